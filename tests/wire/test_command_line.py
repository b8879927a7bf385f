"""The command line against a real server: what it prints, and its exit codes."""

import json
from pathlib import Path

import pytest

from dedup_service import __version__
from dedup_service.settings import Settings
from harness.processes import ServiceProcess, free_port, run_command


def test_claim_says_claimed_then_duplicate(service: ServiceProcess, unique: str) -> None:
    """`claim` exits with 0 and shows its token, then with 3 and shows the holder."""
    arguments = ("claim", unique, "--target", service.target, "--ttl", "90s", "--claimant", "anna")
    first, second = run_command(*arguments), run_command(*arguments)
    assert (first.returncode, first.stdout.splitlines()[0]) == (0, "CLAIMED")
    assert "token" in first.stdout
    assert (second.returncode, second.stdout.splitlines()[0]) == (3, "DUPLICATE")
    assert "anna" in second.stdout
    assert "token" not in second.stdout


def test_claim_repeats_with_its_token(service: ServiceProcess, unique: str) -> None:
    """`claim --token` recognises its own earlier attempt."""
    first = run_command("claim", unique, "--target", service.target, "--json")
    token = json.loads(first.stdout)["claim_token"]
    again = run_command("claim", unique, "--target", service.target, f"--token={token}")
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "CLAIMED (replayed)")


def test_json_output_is_one_object(service: ServiceProcess, unique: str) -> None:
    """`--json` prints one JSON object for outcomes and errors alike, with the names of the contract."""
    claimed = run_command("claim", unique, "--target", service.target, "--json", "--namespace", "pay")
    assert json.loads(claimed.stdout)["transaction"]["namespace"] == "pay"
    found = run_command("get", unique, "--target", service.target, "--json", "--namespace", "pay")
    assert json.loads(found.stdout)["transaction"] == json.loads(claimed.stdout)["transaction"]
    refused = run_command("claim", unique, "--target", service.target, "--json", "--ttl", "8d")
    assert refused.returncode == 1
    error = json.loads(refused.stdout)["error"]
    assert (error["code"], error["reason"], error["applied"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "no")


def test_another_fingerprint_exits_with_4(service: ServiceProcess, unique: str) -> None:
    """`claim --fingerprint` tells other work under the same id apart."""
    run_command("claim", unique, "--target", service.target, "--fingerprint", "one")
    other = run_command("claim", unique, "--target", service.target, "--fingerprint", "two")
    assert (other.returncode, other.stdout.splitlines()[0]) == (4, "PAYLOAD_MISMATCH")


def test_get_shows_or_says_that_nobody_holds_it(service: ServiceProcess, unique: str) -> None:
    """`get` exits with 0 and the transaction, or with 5."""
    missing = run_command("get", unique, "--target", service.target)
    assert (missing.returncode, "nobody holds" in missing.stdout) == (5, True)
    run_command("claim", unique, "--target", service.target)
    found = run_command("get", unique, "--target", service.target)
    assert (found.returncode, "in progress" in found.stdout) == (0, True)


def test_an_unreachable_server_is_doubt_with_advice(unique: str) -> None:
    """When no server answers, `claim` exits with 1 and says how to repeat the attempt."""
    ended = run_command("claim", unique, "--target", f"127.0.0.1:{free_port()}", "--token", "token-of-sixteen")
    assert ended.returncode == 1
    assert "UNAVAILABLE" in ended.stderr
    assert "--token=token-of-sixteen" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("claim", "x", "--ttl", "soon"), "'soon' is not a duration"),
        (("claim", "x", "--timeout", "5"), "'5' is not a duration"),
        (("claim", "a\udcff"), "not valid UTF-8"),
        (("serve", "--listen", "nowhere"), "DEDUP_LISTEN (--listen): 'nowhere' is no address"),
        (("serve", "--store-url", "postgres://x:secret@y"), "DEDUP_STORE_URL (--store-url): the store URL must begin"),
        (("serve", "--key-layout", "flat"), "DEDUP_KEY_LAYOUT (--key-layout): Input should be 'prefixed' or 'raw'"),
    ],
)
def test_bad_usage_is_one_clear_sentence(arguments: tuple[str, ...], words: str) -> None:
    """A bad flag ends the command with 1 or 2, names itself, and shows neither a traceback nor a password."""
    ended = run_command(*arguments)
    assert ended.returncode == 2
    assert words in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert "E0000" not in ended.stderr
    assert "secret" not in ended.stderr


def test_healthcheck_is_a_probe(service: ServiceProcess) -> None:
    """`healthcheck` exits with 0 while the server serves, finds it by the server's own setting, and else with 1."""
    assert run_command("healthcheck", "--target", service.target).stdout == "SERVING\n"
    by_setting = run_command(
        "healthcheck",
        "--service",
        "dedup.v1.DedupService",
        "--json",
        environment={"DEDUP_LISTEN": service.target.replace("127.0.0.1", "0.0.0.0"), "DEDUP_REQUIRE_STORE_URL": "true"},  # noqa: S104
    )
    assert (by_setting.returncode, json.loads(by_setting.stdout)) == (0, {"status": "SERVING"})
    assert run_command("healthcheck", "--target", f"127.0.0.1:{free_port()}", "--timeout", "500ms").returncode == 1
    assert run_command("healthcheck", "--target", service.target, "--service", "nobody").stdout == "SERVICE_UNKNOWN\n"


def test_help_names_every_setting_with_its_default() -> None:
    """`serve --help` lists each setting as a flag, with its variable and its default."""
    text = " ".join(run_command("serve", "--help").stdout.split())
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
        assert f"[env: DEDUP_{name.upper()}]" in text
    assert text.count("[default: ") == len(Settings.model_fields)


def test_version() -> None:
    """`--version` prints the version."""
    assert run_command("--version").stdout == f"dedup-service {__version__}\n"


def test_the_banner_says_what_to_call(tmp_path: Path) -> None:
    """`serve --banner` prints commands that work against this very server."""
    process = ServiceProcess("--banner", "--store-url", f"sqlite://{tmp_path / 'claims.db'}").start()
    assert process.stop() == 0
    assert f"dedup-service claim order-1234 --target {process.target}" in process.stdout
