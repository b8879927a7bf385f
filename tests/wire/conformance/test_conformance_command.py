"""`dedup-service conformance` as a command: output, exit codes and invalid usage."""

import asyncio
import builtins
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dedup_service.cli.commands import app
from dedup_service.config.errors import BadSettings
from dedup_service.conformance.checks import CHECKS
from tests.support.guarded_service import ASGIApp, guarded, served
from tests.support.processes import free_port

# With the failing body some request is refused with 409, however late concurrent requests arrive.
BODIES = (
    *("--route", "/rewards", "--body", '{"amount": 5}', "--rejected-body", '{"amount": 0}'),
    *("--failing-body", '{"amount": 5, "simulate": "error"}'),
)


def run(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, ["conformance", *arguments])


async def run_against(service: ASGIApp, *arguments: str) -> Result:
    """Run the command against a service of this process."""
    async with served(service) as url:
        return await asyncio.to_thread(run, "--base-url", url, *BODIES, *arguments)


async def test_a_correct_service_exits_with_0() -> None:
    """The table has a line for each check and the counts; the prefix of the keys goes to standard error."""
    result = await run_against(guarded())
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("Keys begin with conformance-")
    *lines, counts = result.stdout.splitlines()
    assert [line.split(maxsplit=2)[1] for line in lines] == [check.name for check in CHECKS]
    assert counts == f"{len(CHECKS) - 5} passed, 0 failed, 5 skipped, 0 could not run"
    assert "SKIPPED        slow                          give --slow-body" in lines


async def test_a_broken_service_exits_with_1() -> None:
    """The line of a failed check has the rule, the reason and the section of the contract."""
    result = await run_against(guarded(outcome=lambda status: "keep" if status >= 400 else "complete"))
    assert result.exit_code == 1, result.output
    lines = result.stdout.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("FAILED"))
    assert lines[at].split(maxsplit=2)[1] == "rejected"
    assert lines[at].endswith("answered 409 in-progress to a repeat of --rejected-body; it must run again")
    assert lines[at + 1].endswith("docs/client-contract.md#status-of-the-response")


async def test_a_check_without_a_result_exits_with_2() -> None:
    """A body with another answer than its option says is invalid usage."""
    result = await run_against(guarded(), "--failing-body", '{"amount": 5}')
    assert result.exit_code == 2, result.output
    assert "COULD NOT RUN  failing" in result.stdout


async def test_json_has_every_check() -> None:
    """The JSON form has the prefix of the keys, the counts, and each check with rule, section, result and reason."""
    result = await run_against(guarded(), "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["key_prefix"] in result.stderr
    assert [check["check"] for check in document["checks"]] == [check.name for check in CHECKS]
    counted = {name: document[name] for name in ("passed", "failed", "skipped", "could_not_run")}
    assert counted == {"passed": len(CHECKS) - 5, "failed": 0, "skipped": 5, "could_not_run": 0}
    assert document["checks"][0] == {
        "check": "first-request",
        "rule": "the first request runs",
        "section": CHECKS[0].section,
        "result": "passed",
        "reason": "",
    }


async def test_headers_are_sent() -> None:
    """A header of the command line is part of every request."""
    seen: list[Any] = []
    service = guarded()

    async def recorded(scope: Any, receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))
        await service(scope, receive, send)

    assert (await run_against(recorded, "--header", "Authorization: Bearer x")).exit_code == 0
    assert len(seen) > len(CHECKS)
    assert {headers[b"authorization"] for headers in seen} == {b"Bearer x"}


def test_an_unreachable_process_exits_with_2() -> None:
    """A process that does not answer ends the command before any check, and its address is named."""
    url = f"http://127.0.0.1:{free_port()}"
    result = run("--base-url", url, *BODIES)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"UNREACHABLE: {url} did not answer: ")
    result = run("--base-url", url, "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["reason"] == "UNREACHABLE"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--base-url", "127.0.0.1:80"), "is not an address such as"),
        (("--base-url", "http://h", "--route", "rewards"), "does not begin with /"),
        (("--base-url", "http://h", "--header", "Authorization"), "write 'Name: value'"),
        (("--base-url", "http://h", "--header", "X-Name: é"), "in ASCII"),
        (("--base-url", "http://h", "--slow-body", "\udce9"), "is not valid UTF-8"),
        (("--base-url", "http://h", "--timeout", "soon"), "is not a duration"),
        ((), "Missing option '--base-url'"),
    ],
)
def test_invalid_options_are_refused(arguments: tuple[str, ...], said: str) -> None:
    """Invalid usage exits with 2 and says what is wrong."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_without_httpx_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command says which extra has the library that it needs."""
    real = builtins.__import__

    def refusing(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("dedup_service.conformance"):
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refusing)
    result = run("--base-url", "http://h")
    assert isinstance(result.exception, BadSettings)
    assert str(result.exception) == (
        "conformance cannot start (No module named 'httpx'): install the extra `conformance`"
    )
