"""The client commands against a server with TLS and authentication."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.processes import ServiceProcess, run_command

pytestmark = pytest.mark.one_store

TOKEN = "a-token-of-twenty-21"
Start = Callable[..., ServiceProcess]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files of the server and of the caller."""
    (tmp_path / "tokens.toml").write_text(f'me = "{TOKEN}"')
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "batch").write_text("batched\n")
    return tmp_path


def commands(folder: Path) -> tuple[tuple[str, ...], ...]:
    """Return the arguments of each command that calls a server."""
    held = ("order", "--token", "token-of-sixteen")
    return (
        ("claim", "order"),
        ("get", "order"),
        ("complete", *held),
        ("release", *held),
        ("extend", *held),
        ("watch", "unclaimed"),
        ("batch", str(folder / "batch")),
        ("healthcheck",),
    )


def codes(
    folder: Path, names: Iterable[str], *options: str, environment: dict[str, str] | None = None
) -> dict[str, int]:
    """Return the exit code of each of these commands with these options."""
    chosen = [command for command in commands(folder) if command[0] in names]
    return {command[0]: run_command(*command, *options, environment=environment).returncode for command in chosen}


# Claimed, found, not held (three times), not claimed, claimed, serving.
ANSWERED = dict(zip(("claim", "get", "complete", "release", "extend", "watch", "batch", "healthcheck"),
                    (0, 0, 6, 6, 6, 5, 0, 0), strict=True))  # fmt: skip


def test_every_command_sends_a_certificate_and_a_token(start_grpcio: Start, folder: Path) -> None:
    """With the four files, each command succeeds as without authentication, over TCP and a Unix socket."""
    authority = Authority(folder)
    cert, key = authority.server_files()
    path = folder / "dedup.sock"
    service = start_grpcio(
        *("--listen", f"127.0.0.1:0,unix://{path}", "--store-url", f"sqlite://{folder / 'claims.db'}"),
        *("--tls-cert", str(cert), "--tls-key", str(key), "--tls-client-ca", str(authority.file)),
        *("--auth-tokens", str(folder / "tokens.toml")),
    )
    mine, my_key = authority.caller_files("me", "me.example")
    tls = ("--tls-ca", str(authority.file), "--tls-cert", str(mine), "--tls-key", str(my_key))
    assert codes(folder, ANSWERED, *tls, "--token-file", str(folder / "token"), "--target", service.target) == ANSWERED
    looked = run_command("get", "order", *tls, "--target", f"unix://{path}")
    assert (looked.returncode, "FOUND" in looked.stdout) == (0, True)
    assert run_command("get", "order", *tls[:2], "--target", service.target).returncode == 1


def test_the_environment_can_name_the_token_file(start_service: Start, folder: Path) -> None:
    """A variable can name the token file. Without a token, every command but `healthcheck` is refused."""
    store = ("--store-url", f"sqlite://{folder / 'claims.db'}")
    service = start_service("--auth-tokens", str(folder / "tokens.toml"), *store)
    target = {"DEDUP_TARGET": service.target}
    # One command of each way to call.
    names = {"claim", "get", "watch", "batch"}
    environment = target | {"DEDUP_TARGET_TOKEN_FILE": str(folder / "token")}
    assert codes(folder, names, environment=environment) == {name: ANSWERED[name] for name in names}
    refused = run_command("get", "order", environment=target)
    assert (refused.returncode, "send the metadata 'authorization" in refused.stderr) == (1, True)
    assert run_command("healthcheck", environment=target).returncode == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tls-ca", "/nowhere"), "/nowhere cannot be read: No such file"),
        (("--token-file", "/nowhere"), "/nowhere cannot be read: No such file"),
        (("--token-file", "/dev/null"), "/dev/null does not contain a token"),
        (("--tls-cert", "/dev/null"), "a client certificate needs both"),
        (("--tls-cert", "/dev/null", "--tls-key", "/dev/null"), "--tls-ca: is missing"),
    ],
)
def test_an_invalid_credentials_file_is_a_usage_error(options: tuple[str, ...], words: str) -> None:
    """The error names the flag and the problem, and no server is called."""
    ended = run_command("get", "order", *options)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.replace("│", " ").split())
