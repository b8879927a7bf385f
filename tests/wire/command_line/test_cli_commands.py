"""The command line against a real server: output and exit codes."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dedup_service import __version__
from dedup_service.cli.commands import app
from dedup_service.config.settings import SETTINGS
from tests.support.processes import ServiceProcess, free_port, run_command

pytestmark = pytest.mark.one_store


def run_here(*arguments: str) -> Result:
    """Run `dedup-service` in this process, which is faster than a separate process."""
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_claim_prints_claimed_then_duplicate(service: ServiceProcess, unique: str) -> None:
    """The first `claim` exits with 0 and shows its token. The second exits with 3 and shows the holder."""
    arguments = ("claim", unique, "--target", service.target, "--ttl", "90s", "--claimant", "anna")
    first, second = run_command(*arguments), run_command(*arguments)
    assert (first.returncode, first.stdout.splitlines()[0]) == (0, "CLAIMED")
    assert "token" in first.stdout
    assert (second.returncode, second.stdout.splitlines()[0]) == (3, "DUPLICATE")
    assert "anna" in second.stdout
    assert "token" not in second.stdout


def test_claim_with_the_same_token_is_a_replay(service: ServiceProcess, unique: str) -> None:
    """`claim --token` with the token of an earlier attempt prints CLAIMED (replayed)."""
    first = run_here("claim", unique, "--target", service.target, "--json")
    token = json.loads(first.stdout)["claim_token"]
    again = run_here("claim", unique, "--target", service.target, f"--token={token}")
    assert (again.exit_code, again.stdout.splitlines()[0]) == (0, "CLAIMED (replayed)")


def test_json_output_is_one_object(service: ServiceProcess, unique: str) -> None:
    """`--json` prints one JSON object for outcomes and errors, with the field names of the contract."""
    claimed = run_here("claim", unique, "--target", service.target, "--json", "--namespace", "pay")
    assert json.loads(claimed.stdout)["transaction"]["namespace"] == "pay"
    found = run_here("get", unique, "--target", service.target, "--json", "--namespace", "pay")
    assert json.loads(found.stdout)["transaction"] == json.loads(claimed.stdout)["transaction"]
    refused = run_here("claim", unique, "--target", service.target, "--json", "--ttl", "8d")
    assert refused.exit_code == 1
    error = json.loads(refused.stdout)["error"]
    assert (error["code"], error["reason"], error["applied"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "no")


def test_another_fingerprint_exits_with_4(service: ServiceProcess, unique: str) -> None:
    """A claim of the same id with another `--fingerprint` is a mismatch."""
    run_here("claim", unique, "--target", service.target, "--fingerprint", "one")
    other = run_here("claim", unique, "--target", service.target, "--fingerprint", "two")
    assert (other.exit_code, other.stdout.splitlines()[0]) == (4, "PAYLOAD_MISMATCH")


def test_claim_waits_longer_than_its_timeout(service: ServiceProcess, unique: str) -> None:
    """`claim --wait` adds to the timeout, and receives CLAIMED once the holder's lease has ended."""
    claim = ("claim", unique, "--target", service.target)
    assert run_here(*claim, "--ttl", "1500ms").exit_code == 0
    waited = run_here(*claim, "--timeout", "500ms", "--wait", "20s")
    assert (waited.exit_code, waited.stdout.splitlines()[0]) == (0, "CLAIMED")
    again = run_here(*claim, "--wait", "100ms", "--json")
    assert (again.exit_code, json.loads(again.stdout)["outcome"]) == (3, "CLAIM_OUTCOME_DUPLICATE")


def test_claim_marks_a_shadow_duplicate(
    start_service: Callable[..., ServiceProcess], unique: str, tmp_path: Path
) -> None:
    """In shadow mode a duplicate `claim` exits with 0 and prints that enforce mode would have refused it."""
    (tmp_path / "policies.toml").write_text('[namespaces.trial]\nmode = "shadow"\n')
    store = f"sqlite://{tmp_path / 'claims.db'}"
    service = start_service("--store-url", store, "--policy-file", str(tmp_path / "policies.toml"))
    claim = ["claim", unique, "--target", service.target, "--namespace", "trial", "--claimant", "anna"]
    first, second = (run_here(*claim) for _ in range(2))
    assert first.stdout.splitlines()[0] == "CLAIMED"
    assert (second.exit_code, second.stdout.splitlines()[0]) == (0, "CLAIMED (shadow duplicate)")
    assert "enforce mode would have refused this claim" in second.stdout
    counted = CliRunner().invoke(
        app,
        ["batch", "-", "--target", service.target, "--namespace", "trial", "--results", str(tmp_path / "results")],
        input=unique,
    )
    assert (counted.exit_code, "claimed      1 (1 shadow duplicates)" in counted.stdout) == (0, True)
    assert json.loads((tmp_path / "results").read_text())["shadow_duplicate"] is True


def test_long_values_are_printed_in_full(service: ServiceProcess, unique: str) -> None:
    """An id wider than the terminal is neither truncated nor wrapped."""
    transaction_id = unique * 16
    shown = run_here("claim", transaction_id, "--target", service.target)
    assert f"  transaction  {transaction_id}\n" in shown.stdout


def test_get_shows_a_transaction_or_exits_with_5(service: ServiceProcess, unique: str) -> None:
    """`get` exits with 0 and shows the transaction, or exits with 5 if it is not claimed."""
    missing = run_here("get", unique, "--target", service.target)
    assert (missing.exit_code, missing.stdout) == (5, f"NOT FOUND: {unique} is not claimed\n")
    run_here("claim", unique, "--target", service.target)
    found = run_here("get", unique, "--target", service.target)
    assert (found.exit_code, "in progress" in found.stdout) == (0, True)


def test_a_silent_server_prints_advice_to_retry(unique: str, tmp_path: Path) -> None:
    """Without a reply, `claim` exits with 1 and prints how to repeat the attempt."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        target = f"unix://{tmp_path / 'silent.sock'}"
        ended = run_here("claim", unique, "--target", target, "--token", "token-of-sixteen", "--timeout", "200ms")
    assert ended.exit_code == 1
    assert "DEADLINE_EXCEEDED" in ended.stderr
    assert "--token=token-of-sixteen" in ended.stderr


def test_an_unreachable_server_prints_no_advice(unique: str) -> None:
    """Nothing was sent, so there is nothing to repeat with the same token."""
    ended = run_here("claim", unique, "--target", f"127.0.0.1:{free_port()}", "--token", "token-of-sixteen")
    assert ended.exit_code == 1
    assert "UNAVAILABLE" in ended.stderr
    assert "token-of-sixteen" not in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("claim", "x", "--ttl", "soon"), "--ttl: 'soon' is not a duration"),
        (("claim", "x", "--timeout", "5"), "--timeout: '5' is not a duration"),
        (("claim", "x", "--wait", "5"), "--wait: '5' is not a duration"),
        (("claim", "a\udcff"), "ID: is not valid UTF-8"),
    ],
)
def test_an_invalid_flag_value_names_the_flag(arguments: tuple[str, ...], words: str) -> None:
    """An invalid flag value exits with 2, and the error names the flag."""
    ended = run_here(*arguments)
    assert ended.exit_code == 2
    assert words in " ".join(ended.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("claim", "a\udcff"), "not valid UTF-8"),
        (("serve", "--listen", "nowhere"), "DEDUP_LISTEN (--listen): 'nowhere' is not an address"),
        (("serve", "--store-url", "postgres://x:secret@y"), "DEDUP_STORE_URL (--store-url): the store URL must begin"),
        (
            ("serve", "--key-layout", "flat"),
            "DEDUP_KEY_LAYOUT (--key-layout): 'flat' is unknown: write prefixed or raw",
        ),
    ],
)
def test_an_invalid_setting_is_named_without_a_traceback(arguments: tuple[str, ...], words: str) -> None:
    """An invalid setting exits with 2. The error names it and shows neither a traceback nor a password."""
    ended = run_command(*arguments)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert "E0000" not in ended.stderr
    assert "secret" not in ended.stderr


def test_healthcheck_exits_with_0_while_serving(service: ServiceProcess) -> None:
    """`healthcheck` exits with 0 while the server serves, otherwise with 1. It finds the server by its settings."""
    assert run_command("healthcheck", "--target", service.target).stdout == "SERVING\n"
    by_setting = run_command(
        "healthcheck",
        "--service",
        "dedup.v1.DedupService",
        "--json",
        environment={"DEDUP_LISTEN": service.target.replace("127.0.0.1", "0.0.0.0"), "DEDUP_REQUIRE_STORE_URL": "true"},  # noqa: S104
    )
    assert (by_setting.returncode, json.loads(by_setting.stdout)) == (
        *(0, {"status": "SERVING", "store_forgotten": 0, "store_restarts": 0}),
    )
    assert run_command("healthcheck", "--target", f"127.0.0.1:{free_port()}", "--timeout", "500ms").returncode == 1
    assert run_command("healthcheck", "--target", service.target, "--service", "unknown").stdout == "SERVICE_UNKNOWN\n"


def test_help_names_every_setting_with_its_default() -> None:
    """`serve --help` lists each setting with its flag, its variable and its default."""
    text = " ".join(run_here("serve", "--help").stdout.split())
    for name in SETTINGS:
        assert f"--{name.replace('_', '-')}" in text
        assert f"[env: DEDUP_{name.upper()}]" in text
    assert text.count("[default: ") == len(SETTINGS)


def test_help_names_every_command_and_its_exit_codes() -> None:
    """`--help` lists the commands, and the help of each lists its exit codes and the defaults of its options."""
    text = run_here("--help").stdout
    for name in ("claim", "get", "complete", "release", "extend", "watch", "batch"):
        assert f"\n  {name} " in text
        own = " ".join(run_here(name, "--help").stdout.split())
        assert "Exit code 0: " in own
        assert "[env: DEDUP_TARGET] [default: the address `serve` listens on with these settings]" in own
        assert "--json" in own


def test_version() -> None:
    """`--version` prints the version."""
    assert run_command("--version").stdout == f"dedup-service {__version__}\n"


def test_the_banner_prints_commands_with_the_address(tmp_path: Path) -> None:
    """`serve --banner` prints commands with the address of this server."""
    process = ServiceProcess("--banner", "--store-url", f"sqlite://{tmp_path / 'claims.db'}").start()
    assert process.stop() == 0
    assert f"dedup-service claim order-1234 --target {process.target}" in process.stdout
