"""`dedup-service doctor`, and the same checks at server start-up, against real stores."""

import asyncio
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.polling import wait_until
from tests.support.processes import RedisProcess, ServiceProcess, free_port, run_command
from tests.support.scripted_redis import ScriptedRedis, says

pytestmark = pytest.mark.one_store

StartRedis = Callable[..., RedisProcess]
StartService = Callable[..., ServiceProcess]
SOUND = ("--appendonly", "yes", "--appendfsync", "always")
FORGETFUL = (*SOUND, "--maxmemory-policy", "allkeys-lru")
UNFIT = (*FORGETFUL, "--maxmemory", "50mb")


@pytest.mark.parametrize(
    ("options", "code", "word"), [(SOUND, 0, "INFO"), (FORGETFUL, 7, "WARNING"), (UNFIT, 8, "CRITICAL")]
)
def test_the_worst_finding_is_the_exit_code_and_comes_last(
    start_redis: StartRedis, options: tuple[str, ...], code: int, word: str
) -> None:
    """`doctor` exits with 0, 7 or 8, and its output ends with the worst finding and its remedy."""
    ended = run_command("doctor", "--store-url", start_redis(*options).url)
    assert ended.returncode == code, ended.stderr
    findings = [line.split()[0] for line in ended.stdout.splitlines()[1:] if not line.strip().startswith("Remedy")]
    assert findings[-1] == word
    assert code == 0 or "Remedy: CONFIG SET maxmemory-policy noeviction" in ended.stdout.splitlines()[-1]


def test_json_is_one_object(start_redis: StartRedis) -> None:
    """`--json` prints the store, without its password, and every finding with its four fields."""
    server = start_redis(*UNFIT, "--requirepass", "secret-word")
    url = server.url.replace("redis://", "redis://:secret-word@")
    ended = run_command("doctor", "--json", environment={"DEDUP_STORE_URL": url})
    printed = json.loads(ended.stdout)
    assert ended.returncode == 8
    assert printed["store"] == f"Redis at {server.url}"
    assert "secret-word" not in ended.stdout + ended.stderr
    assert {frozenset(finding) for finding in printed["findings"]} == {
        frozenset(("check", "severity", "message", "remedy"))
    }
    severities = {finding["check"]: finding["severity"] for finding in printed["findings"]}
    assert (severities["eviction"], severities["persistence"], severities["replicas"]) == ("critical", "ok", "info")


def test_settings_come_from_flags_environment_and_file(start_redis: StartRedis, tmp_path: Path) -> None:
    """The doctor examines the store that `serve` would use, also when the settings file names it."""
    server = start_redis(*SOUND)
    file = tmp_path / "settings.toml"
    file.write_text(f'store_url = "{server.url}"\nkey_layout = "raw"\n')
    assert (
        json.loads(run_command("doctor", "--json", "--config", str(file)).stdout)["store"] == f"Redis at {server.url}"
    )
    flag = run_command("doctor", "--config", str(file), "--store-url", f"sqlite://{tmp_path / 'claims.db'}")
    assert (flag.returncode, flag.stdout.split()[0]) == (0, "sqlite")
    assert run_command("doctor", "--store-url", "http://127.0.0.1").returncode == 2
    assert run_command("doctor", "--store-timeout", "soon").returncode == 2


def test_an_unreachable_store_exits_with_1() -> None:
    """An unreachable store is an error, in text and in JSON, not a finding."""
    arguments = ("doctor", "--store-url", f"redis://127.0.0.1:{free_port()}")
    text, printed = run_command(*arguments), run_command(*arguments, "--json")
    assert (text.returncode, printed.returncode) == (1, 1)
    assert text.stderr.startswith("STORE_UNREACHABLE: ")
    assert json.loads(printed.stdout)["error"]["reason"] == "STORE_UNREACHABLE"


def test_start_up_logs_findings(start_redis: StartRedis, start_service: StartService) -> None:
    """Each warning and critical finding, and no other, is logged before the server starts to serve."""
    service = start_service("--store-url", start_redis(*UNFIT).url)
    (line,) = service.events("store_finding_reported")
    assert (line["level"], line["check"], line["severity"]) == ("warning", "eviction", "critical")
    assert "CONFIG SET maxmemory-policy noeviction" in line["remedy"]
    assert not start_service("--store-url", start_redis(*SOUND).url).events("store_finding_reported")


def test_strict_prevents_start_up_on_a_critical_finding(start_redis: StartRedis) -> None:
    """With `--strict`, a critical finding ends `serve` with exit code 1, the finding and its remedy."""
    ended = run_command("serve", "--listen", "127.0.0.1:0", "--strict", "--store-url", start_redis(*UNFIT).url)
    assert ended.returncode == 1
    (sentence,) = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert sentence.startswith("dedup-service: DEDUP_STRICT is set")
    assert "CONFIG SET maxmemory-policy noeviction" in sentence


def test_strict_prevents_start_up_while_redis_refuses_claims(start_redis: StartRedis) -> None:
    """A Redis that answers and refuses claims is examined at start-up, although the service is not ready.

    Protection: the examination does not wait for readiness.
    """
    full = start_redis(*SOUND, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    ended = run_command("serve", "--listen", "127.0.0.1:0", "--strict", "--store-url", full.url)
    assert ended.returncode == 1
    assert "Redis refuses SET now" in ended.stderr


def test_strict_allows_warnings(start_redis: StartRedis, start_service: StartService, tmp_path: Path) -> None:
    """With `DEDUP_STRICT`, a store with only warnings is served, and so is the embedded store."""
    strict = {"DEDUP_STRICT": "true"}
    service = start_service("--store-url", start_redis(*FORGETFUL).url, environment=strict)
    assert [line["severity"] for line in service.events("store_finding_reported")] == ["warning"]
    start_service("--store-url", f"sqlite://{tmp_path / 'claims.db'}", environment=strict)


def test_an_unreachable_store_is_examined_once_it_answers(start_redis: StartRedis, start_service: StartService) -> None:
    """A server that started without its store logs the findings once the store answers, and keeps serving."""
    port = free_port()
    service = start_service("--store-url", f"redis://127.0.0.1:{port}")
    assert not service.events("store_finding_reported")
    start_redis(*UNFIT, port=port)
    wait_until(lambda: service.events("store_finding_reported"), what="the findings")
    assert service.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_strict_stops_the_server_on_a_late_critical_finding(
    start_redis: StartRedis, start_service: StartService, workers: str
) -> None:
    """With `--strict`, a critical finding about a store unreachable at start-up makes the server drain and exit.

    Protection: a fault that a ready worker reports stops every worker instead of restarting that one.
    """
    port = free_port()
    service = start_service("--strict", "--workers", workers, "--store-url", f"redis://127.0.0.1:{port}")
    start_redis(*UNFIT, port=port)
    assert service.wait() == 1
    assert service.events("shutdown_started")
    assert any("DEDUP_STRICT is set" in line for line in service.stderr_lines)


async def test_a_failed_examination_does_not_prevent_start_up(start_service: StartService) -> None:
    """A store that stops answering during the checks delays start-up by at most 2 s."""
    never = asyncio.Event()

    async def silence(_: asyncio.StreamWriter) -> None:
        await never.wait()

    async with ScriptedRedis(says(b"$-1\r\n"), config=silence) as server:
        arguments = ("--strict", "--store-timeout", "10s", "--store-url", server.url)
        service = await asyncio.to_thread(start_service, *arguments)
        (line,) = service.events("store_examination_failed")
        times = [
            datetime.fromisoformat(service.events(name)[0]["time"]) for name in ("store_became_ready", "server_started")
        ]
        assert line["level"] == "warning"
        assert 1.5 < (times[1] - times[0]).total_seconds() < 6
        assert await asyncio.to_thread(service.stop) == 0
