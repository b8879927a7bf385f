"""Exposure to other hosts and users: listeners, reflection, Unix sockets, and secrets."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from tests.support.certificates import Authority
from tests.support.errors import refused
from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, run_command
from tests.support.scrapes import scraped_text

Start = Callable[..., ServiceProcess]
Claim = dedup_pb2.ClaimTransactionRequest
ANYWHERE = "0.0.0.0:0"


@pytest.fixture
def store(tmp_path: Path) -> tuple[str, str]:
    """The arguments for an embedded store of this test."""
    return "--store-url", f"sqlite://{tmp_path / 'claims.db'}"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A token file with one caller."""
    path = tmp_path / "tokens.toml"
    path.touch(0o600)
    path.write_text('box = "a-token-of-twenty-21"')
    return path


@pytest.mark.parametrize("listen", [ANYWHERE, "[::]:0", "127.0.0.1:0,192.0.2.1:0", "dedup.example:0"])
def test_a_public_listener_requires_authentication_or_consent(store: tuple[str, str], listen: str) -> None:
    """Without authentication the server does not listen beyond this host; the error names settings that allow it."""
    ended = run_command("serve", "--listen", listen, *store)
    assert ended.returncode == 2
    for name in ("DEDUP_LISTEN", "DEDUP_TLS_CLIENT_CA", "DEDUP_AUTH_TOKENS", "DEDUP_ALLOW_UNAUTHENTICATED=true"):
        assert name in ended.stderr


def test_tls_alone_does_not_authenticate(store: tuple[str, str], tmp_path: Path) -> None:
    """A server certificate does not authenticate callers, so it does not permit a public listener."""
    cert, key = Authority(tmp_path).server_files()
    ended = run_command("serve", "--listen", ANYWHERE, "--tls-cert", str(cert), "--tls-key", str(key), *store)
    assert (ended.returncode, "can be reached from other hosts without authentication" in ended.stderr) == (2, True)


def test_an_allowed_unauthenticated_listener_is_logged(start_service: Start, store: tuple[str, str]) -> None:
    """With `--allow-unauthenticated` the server listens beyond this host and logs a warning at each start."""
    service = start_service("--listen", ANYWHERE, "--allow-unauthenticated", *store)
    assert service.events("unauthenticated_listener_opened")[0]["addresses"] == service.addresses


def test_tokens_without_tls_are_logged(start_service: Start, store: tuple[str, str], tokens: Path) -> None:
    """With tokens the server listens beyond this host, and a warning says that plaintext tokens can be read."""
    service = start_service("--listen", ANYWHERE, "--auth-tokens", str(tokens), *store)
    wait_until(lambda: service.events("tokens_sent_in_plaintext"), what="the warning")
    assert not service.events("unauthenticated_listener_opened")


@pytest.mark.every_engine
def test_the_native_engine_beyond_this_host_is_logged(
    start_service: Start, store: tuple[str, str], engine: EngineName
) -> None:
    """A warning says that the engine `native` unpacks what every peer sends; `grpcio` does not."""
    service = start_service("--listen", ANYWHERE, "--allow-unauthenticated", *store)
    assert service.stop() == 0
    warned = [line["addresses"] for line in service.events("unbounded_decompression_exposed")]
    assert warned == ([service.addresses] if engine == "native" else [])


def reflects(service: ServiceProcess) -> bool:
    """Return whether a service serves reflection."""
    with grpc.insecure_channel(service.target.replace("0.0.0.0", "127.0.0.1")) as channel:  # noqa: S104
        try:
            return bool(ProtoReflectionDescriptorDatabase(channel).get_services())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return False
            raise


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((), True),
        (("--reflection", "off"), False),
        (("--listen", ANYWHERE, "--allow-unauthenticated"), False),
        (("--listen", ANYWHERE, "--allow-unauthenticated", "--reflection", "on"), True),
    ],
)
def test_reflection_is_off_for_public_listeners_by_default(
    start_service: Start, store: tuple[str, str], arguments: tuple[str, ...], *, shown: bool
) -> None:
    """Reflection is served to this host by default, and to other hosts only with `--reflection on`."""
    assert reflects(start_service(*arguments, *store)) is shown


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_use_the_socket(start_service: Start, store: tuple[str, str], tmp_path: Path) -> None:
    """A process of another user and group cannot connect.

    Protection: the umask around the bind.
    """
    path = tmp_path / "dedup.sock"
    # Open the parent folders, so that only the mode of the socket denies access.
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    start_service("--listen", f"unix://{path}", *store)
    code = "import os, socket, sys; user, group, path = sys.argv[1:]; os.setgroups([]); os.setgid(int(group)); "
    code += "os.setuid(int(user)); socket.socket(socket.AF_UNIX).connect(path)"
    for user, group, connected in ((65_534, 65_534, False), (65_534, 0, True)):
        command = [sys.executable, "-c", code, str(user), str(group), str(path)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (ended.returncode == 0, "PermissionError" in ended.stderr) == (connected, not connected), ended.stderr


@pytest.mark.parametrize("flag", ["--tls-key", "--auth-tokens", "--store-url-file"])
def test_a_world_readable_secret_is_logged(
    start_grpcio: Start, store: tuple[str, str], tmp_path: Path, tokens: Path, flag: str
) -> None:
    """A warning names each key, token or store URL file that other users of the host can read."""
    cert, key = Authority(tmp_path).server_files()
    url_file = tmp_path / "url"
    url_file.touch(0o600)
    url_file.write_text(store[1] + "\n")
    files = {"--tls-key": key, "--auth-tokens": tokens, "--store-url-file": url_file}
    files[flag].chmod(0o644)
    service = start_grpcio("--tls-cert", str(cert), *(text for pair in files.items() for text in map(str, pair)))
    wait_until(lambda: service.events("secret_file_exposed"), what="the warning")
    assert [line["file"] for line in service.events("secret_file_exposed")] == [str(files[flag])]


def test_a_password_on_the_command_line_is_logged(start_service: Start, redis_server: RedisProcess) -> None:
    """The process list shows command lines, so the service logs a warning; a URL without a password causes none."""
    url = redis_server.url
    for shown in (url.replace("//", "//:pass-in-list@"), "redis+sentinel://127.0.0.1:1/m?sentinel_password=x"):
        assert start_service("--store-url", shown).events("password_exposed")
    assert not start_service("--store-url", url).events("password_exposed")


def test_the_store_url_is_read_from_a_file(start_service: Start, redis_server: RedisProcess, tmp_path: Path) -> None:
    """`serve` and `doctor` read the URL from DEDUP_STORE_URL_FILE, without its trailing newline."""
    path = tmp_path / "url"
    path.write_text(redis_server.url + "\n")
    service = start_service(environment={"DEDUP_STORE_URL_FILE": str(path), "DEDUP_REQUIRE_STORE_URL": "true"})
    assert str(redis_server.port) in service.events("server_started")[0]["store"]
    doctor = run_command("doctor", "--store-url-file", str(path))
    assert str(redis_server.port) in doctor.stdout


@pytest.mark.parametrize(
    ("content", "environment", "words"),
    [
        (None, {}, "cannot be read: No such file or directory"),
        ("", {}, "is empty: write the URL of the store into it"),
        (
            "redis://x",
            {"DEDUP_STORE_URL": "redis://y"},
            "are both set, by a flag, a variable or the settings file: unset one",
        ),
    ],
)
def test_an_invalid_store_url_file_prevents_start_up(
    tmp_path: Path, content: str | None, environment: dict[str, str], words: str
) -> None:
    """A missing or empty file does not fall back to the embedded store, and two URLs are an error."""
    path = tmp_path / "url"
    if content is not None:
        path.write_text(content)
    ended = run_command("serve", environment={"DEDUP_STORE_URL_FILE": str(path), **environment})
    assert (ended.returncode, words in ended.stderr) == (2, True), ended.stderr


def test_secrets_never_leak(
    start_grpcio: Start, start_redis: Callable[..., RedisProcess], tmp_path: Path, unique: str
) -> None:
    """The Redis password, the tokens and the TLS key appear in no log line, error, metric, help or process list.

    Meanwhile calls succeed, fail and are rejected, Redis stops, and reloads of invalid files fail.
    """
    password, token, claim_token = "redis-secret-4711", "bearer-secret-0815-xy", "claim-secret-12345"
    redis_server = start_redis("--requirepass", password)
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    tokens, url = tmp_path / "tokens.toml", tmp_path / "url"
    tokens.write_text(f'box = "{token}"')
    url.write_text(redis_server.url.replace("//", f"//:{password}@"))
    secrets = [password, token, claim_token, key.read_text().splitlines()[1]]
    service = start_grpcio(
        *("--tls-cert", str(cert), "--tls-key", str(key), "--auth-tokens", str(tokens), "--log-level", "debug"),
        *("--store-timeout", "200ms", "--log-transaction-ids", "plain"),
        *("--metrics-listen", "127.0.0.1:0"),
        environment={"DEDUP_STORE_URL_FILE": str(url)},
    )
    seen: list[str] = []
    with grpc.secure_channel(service.target, authority.credentials()) as channel:
        stub = dedup_pb2_grpc.DedupServiceStub(channel)

        def call(bearer: str, request: Claim) -> None:
            try:
                stub.ClaimTransaction(request, metadata=(("authorization", f"Bearer {bearer}"),), timeout=10)
            except grpc.RpcError as error:
                seen.extend((str(error), str(error.trailing_metadata())))

        def call_all(name: str) -> None:
            call(token, Claim(transaction_id=name, claim_token=claim_token))
            call(token, Claim(transaction_id=name))
            call(token, Claim(transaction_id="", claim_token=claim_token))
            call(f"{token}-wrong", Claim(transaction_id=name, claim_token=claim_token))

        call_all(unique)
        assert len(seen) == 4
        tokens.write_text(f'box = "{token}" "{token}"')
        key.write_text("broken")
        service.signal(signal.SIGHUP)
        wait_until(lambda: service.events("tokens_reload_failed"), what="the tokens_reload_failed event")
        refused(lambda: _call_without_token(service, authority))
        redis_server.stop()
        wait_until(lambda: service.events("store_became_unavailable"), what="the store_became_unavailable event")
        call_all(f"{unique}-2")
    seen.append(scraped_text(service))
    if sys.platform == "linux":
        seen.append(Path(f"/proc/{service.pid}/cmdline").read_text())
    environment = {"DEDUP_STORE_URL": url.read_text()}
    for arguments in (("serve", "--help"), ("doctor", "--help"), ("doctor",), ("serve", "--default-ttl", "x")):
        ended = run_command(*arguments, environment=environment)
        seen.extend((ended.stdout, ended.stderr))
    assert service.stop() == 0
    seen.extend((*service.stderr_lines, service.stdout))
    assert {
        name for name in ("call_finished", "store_became_unavailable", "tls_reload_failed") if not service.events(name)
    } == set()
    for secret in secrets:
        assert [text for text in seen if secret in text] == []


def _call_without_token(service: ServiceProcess, authority: Authority) -> None:
    with grpc.secure_channel(service.target, authority.credentials()) as channel:
        dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id="x"), timeout=10)


def test_a_unix_socket_uses_tls_too(start_grpcio: Start, store: tuple[str, str], tmp_path: Path) -> None:
    """TLS settings apply to every address, including a Unix socket."""
    authority = Authority(tmp_path)
    cert, key = authority.server_files()
    path = tmp_path / "dedup.sock"
    service = start_grpcio("--listen", f"unix://{path}", "--tls-cert", str(cert), "--tls-key", str(key), *store)
    # A certificate cannot contain the path of a socket.
    options = [("grpc.ssl_target_name_override", "localhost")]
    with grpc.secure_channel(service.target, authority.credentials(), options) as channel:
        assert dedup_pb2_grpc.DedupServiceStub(channel).ClaimTransaction(Claim(transaction_id="x"), timeout=10).outcome
    with socket.socket(socket.AF_UNIX) as plain:
        plain.settimeout(10)
        plain.connect(str(path))
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert not plain.recv(64).startswith(b"\x00\x00")
