"""`dedup-service complete`, `release` and `extend` against a real server: output and exit codes."""

import base64
import json
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dedup_service.cli.commands import app
from tests.support.processes import ServiceProcess

pytestmark = pytest.mark.one_store

TOKEN = "token-of-sixteen"


class Commands:
    """Runs the command line in this process against one server."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __call__(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
        """Return the exit code, standard output and standard error of one command."""
        result = CliRunner().invoke(app, [*arguments, "--target", self.target], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    def json(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, dict[str, Any]]:
        """Return the exit code and the one JSON object of a command."""
        code, stdout, _ = self(*arguments, "--json", stdin=stdin)
        (line,) = stdout.splitlines()
        return code, json.loads(line)


@pytest.fixture
def command(service: ServiceProcess) -> Commands:
    """The command line against the service, over each store."""
    return Commands(service.target)


def test_complete_keeps_the_result_for_duplicates(command: Commands, unique: str) -> None:
    """`complete` exits with 0, also when repeated, and a later duplicate receives the result."""
    holder = (unique, "--token", TOKEN, "--namespace", "pay")
    command("claim", *holder)
    for _ in range(2):
        code, stdout, _ = command("complete", *holder, "--result", "paid: 7", "--ttl", "5m")
        assert (code, stdout.splitlines()[0]) == (0, "COMPLETED")
        assert "state        completed\n" in stdout
        assert "result       'paid: 7'\n" in stdout
    code, stdout, _ = command("claim", unique, "--namespace", "pay")
    assert (code, stdout.splitlines()[0]) == (3, "DUPLICATE")
    assert "'paid: 7'" in stdout


def test_complete_sends_a_file_unchanged(command: Commands, unique: str, tmp_path: Path) -> None:
    """`complete --result-file` sends arbitrary bytes, from a file and from standard input."""
    content = bytes(range(256))
    (tmp_path / "result").write_bytes(content)
    for number, source in enumerate((str(tmp_path / "result"), "-")):
        holder = (f"{unique}-{number}", "--token", TOKEN)
        command("claim", *holder)
        code, reply = command.json("complete", *holder, "--result-file", source, stdin=content)
        assert (code, reply["outcome"]) == (0, "COMPLETE_OUTCOME_COMPLETED")
        assert base64.b64decode(reply["transaction"]["result"]) == content


def test_release_lets_the_next_caller_claim(command: Commands, unique: str) -> None:
    """`release` exits with 0, and the next claim of the transaction receives CLAIMED."""
    command("claim", unique, "--token", TOKEN)
    code, stdout, _ = command("release", unique, "--token", TOKEN)
    assert (code, stdout.splitlines()) == (0, [f"RELEASED: {unique} may be claimed again"])
    assert command("claim", unique, "--token", f"other-{TOKEN}")[0] == 0
    assert command.json("release", unique, "--token", f"other-{TOKEN}") == (0, {"outcome": "RELEASE_OUTCOME_RELEASED"})


def test_extend_lengthens_and_shortens_only_on_request(command: Commands, unique: str) -> None:
    """`extend` shows the new expiry. An earlier expiry takes effect only with `--allow-shortening`."""
    holder = (unique, "--token", TOKEN)
    command("claim", *holder, "--ttl", "60s")
    code, stdout, _ = command("extend", *holder, "--ttl", "10m")
    assert (code, stdout.splitlines()[0]) == (0, "EXTENDED")

    def end(*arguments: str) -> datetime:
        code, reply = command.json("extend", *holder, *arguments)
        assert (code, reply["outcome"]) == (0, "EXTEND_OUTCOME_EXTENDED")
        return datetime.fromisoformat(reply["transaction"]["expire_time"])

    far = end("--ttl", "30s")
    assert 200 < (far - end("--ttl", "60s", "--allow-shortening")).total_seconds() < 600


@pytest.mark.parametrize("name", ["complete", "release", "extend"])
def test_a_token_that_does_not_hold_exits_with_6(command: Commands, unique: str, name: str) -> None:
    """Each command prints NOT HELD, its possible causes and that nothing changed, and exits with 6."""
    command("claim", unique, "--token", TOKEN)
    stranger = (name, unique, "--token", "token-of-another-caller")
    code, stdout, _ = command(*stranger)
    assert (code, len(stdout.splitlines())) == (6, 1)
    assert stdout.startswith(f"NOT HELD: the token does not hold {unique}: its claim expired")
    assert "Nothing was changed" in stdout
    assert command.json(*stranger) == (6, {"outcome": f"{name.upper()}_OUTCOME_NOT_HELD"})
    assert command.json("get", unique)[1]["transaction"]["state"] == "TRANSACTION_STATE_IN_PROGRESS"


@pytest.mark.parametrize("name", ["complete", "release", "extend"])
def test_an_unknown_outcome_prints_advice_to_repeat(unique: str, tmp_path: Path, name: str) -> None:
    """If the change may have been made, each command says that repeating it is safe."""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent.sock"))
        silent.listen()
        command = Commands(f"unix://{tmp_path / 'silent.sock'}")
        code, stdout, stderr = command(name, unique, "--token", TOKEN, "--timeout", "200ms")
        assert (code, stdout) == (1, "")
        assert stderr.startswith("DEADLINE_EXCEEDED: ")
        assert "Repeat the same command: it is safe" in stderr
        code, reply = command.json(name, unique, "--token", TOKEN, "--timeout", "200ms")
        assert (code, reply["error"]["code"], reply["error"]["applied"]) == (1, "DEADLINE_EXCEEDED", "unknown")


def test_a_definite_error_prints_no_advice(command: Commands, unique: str) -> None:
    """An error that changed nothing is printed without advice to repeat the command."""
    code, _, stderr = command("release", unique, "--token", "short")
    assert (code, "INVALID_ARGUMENT" in stderr, "Repeat" in stderr) == (1, True, False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("complete", "x"), "Missing option '--token'"),
        (("complete", "x", "--token", TOKEN, "--ttl", "soon"), "--ttl: 'soon' is not a duration"),
        (("complete", "x", "--token", TOKEN, "--result-file", "/nowhere/x"), "--result-file': "),
        (
            ("complete", "x", "--token", TOKEN, "--result", "a", "--result-file", "-"),
            "--result-file: cannot be combined with --result",
        ),
        (("extend", "x", "--token", TOKEN, "--ttl", "999999999999999d"), "--ttl: '999999999999999d' is too long"),
        (("release", "x", "--token", TOKEN, "--timeout", "5"), "--timeout: '5' is not a duration"),
        (("release", "x", "--token", "a\udcff"), "--token: is not valid UTF-8"),
    ],
)
def test_bad_usage_names_the_flag(arguments: tuple[str, ...], words: str) -> None:
    """An invalid flag exits with 2 and a sentence that names it, before any server is called."""
    code, stdout, stderr = Commands("127.0.0.1:1")(*arguments)
    assert (code, stdout) == (2, "")
    assert words in " ".join(stderr.split())
