"""Settings: sources, precedence, and the errors of bad values."""

import os
from pathlib import Path

import pytest

from dedup_service.config.durations import format_duration, parse_duration
from dedup_service.config.settings import BadSettings, listening_address, load_settings, settings_from_json


@pytest.fixture(autouse=True)
def _no_settings_of_this_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DEDUP_CONFIG", "DEDUP_STORE_URL", "DEDUP_LISTEN"):
        monkeypatch.delenv(name, raising=False)


def test_flags_win_over_the_environment_and_it_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each setting comes from its first source: flag, variable, file."""
    file = tmp_path / "settings.toml"
    file.write_text('default_ttl = "1s"\nmax_ttl = "2h"\nkey_prefix = "file:"\n')
    monkeypatch.setenv("DEDUP_CONFIG", str(file))
    monkeypatch.setenv("DEDUP_DEFAULT_TTL", "2s")
    monkeypatch.setenv("DEDUP_KEY_PREFIX", "environment:")
    settings = load_settings({"default_ttl": "3s"})
    assert (settings.default_ttl, settings.max_ttl, settings.key_prefix) == (3_000, 7_200_000, "environment:")


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DEDUP_KEY_PREFIX=` in a manifest means the default."""
    monkeypatch.setenv("DEDUP_KEY_PREFIX", "")
    assert load_settings().key_prefix == "dedup:"


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("DEDUP_DEFAULT_TTL", "60", "'60' is not a duration: write a whole number and a unit"),
        ("DEDUP_DEFAULT_TTL", "0s", "greater than 0"),
        ("DEDUP_MAX_TTL", "1s", "DEDUP_DEFAULT_TTL (60s) is longer than DEDUP_MAX_TTL (1s)"),
        ("DEDUP_MAX_TTL", "36501d", "DEDUP_MAX_TTL (--max-ttl): '36501d' is too long: write at most 36500d"),
        ("DEDUP_RETENTION", "8d", "DEDUP_RETENTION (8d) is longer than DEDUP_MAX_TTL (7d): lower the one"),
        ("DEDUP_RETENTION", "60", "DEDUP_RETENTION (--retention): '60' is not a duration"),
        ("DEDUP_RETENTION", "0s", "DEDUP_RETENTION (--retention): Input should be greater than 0"),
        ("DEDUP_MAX_RESULT_BYTES", "0", "DEDUP_MAX_RESULT_BYTES (--max-result-bytes): Input should be greater than 0"),
        ("DEDUP_MAX_RESULT_BYTES", "1048577", "less than or equal to 1048576"),
        (
            "DEDUP_MAX_RESULT_BYTES",
            "4k",
            "DEDUP_MAX_RESULT_BYTES (--max-result-bytes): Input should be a valid integer",
        ),
        ("DEDUP_LISTEN", "127.0.0.1", "'127.0.0.1' is not an address"),
        ("DEDUP_LISTEN", "127.0.0.1:70000", "is not an address"),
        ("DEDUP_LISTEN", ",", "the list of addresses is empty: write host:port"),
        ("DEDUP_LISTEN", "unix://relative.sock", "is not a Unix socket"),
        ("DEDUP_LISTEN", "unix:///" + "x" * 104, "at most 103 bytes"),
        ("DEDUP_LOG_LEVEL", "loud", "DEDUP_LOG_LEVEL (--log-level)"),
        ("DEDUP_WORKERS", "0", "DEDUP_WORKERS (--workers): '0' is not a valid worker count: write 1 to 64, or auto"),
        ("DEDUP_WORKERS", "65", "write 1 to 64, or auto"),
        ("DEDUP_WORKERS", "1.5", "write 1 to 64, or auto"),
        ("DEDUP_WORKERS", "many", "write 1 to 64, or auto"),
        (
            "DEDUP_METRICS_LISTEN",
            "9090",
            "DEDUP_METRICS_LISTEN (--metrics-listen): '9090' is not an address: write host:",
        ),
        ("DEDUP_METRICS_LISTEN", "127.0.0.1:70000", "is not an address: write host:port"),
        ("DEDUP_METRICS_LISTEN", "unix:///x", "is not an address: write host:port"),
        ("DEDUP_REQUIRE_STORE_URL", "true", "DEDUP_STORE_URL is not set and DEDUP_REQUIRE_STORE_URL is"),
        ("DEDUP_STORE_URL", "", "DEDUP_STORE_URL is set but empty: give it a value"),
        ("DEDUP_STOR_URL", "redis://x", "there is no setting DEDUP_STOR_URL: did you mean DEDUP_STORE_URL?"),
        ("DEDUP_CONFIG", "/nowhere.toml", "'/nowhere.toml' does not exist"),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    """The error names the setting and the remedy; a misspelt setting is refused, not ignored."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(BadSettings) as caught:
        load_settings()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "retention"),
    [
        ({}, 86_400_000),
        ({"max_ttl": "1h"}, 3_600_000),
        ({"retention": "2h"}, 7_200_000),
        ({"retention": "7d"}, 604_800_000),
    ],
)
def test_the_retention_is_a_day_unless_set_or_cut_to_the_maximum(flags: dict[str, str], retention: int) -> None:
    """The retention is the setting, or else 24 hours, cut to the maximum ttl."""
    settings = load_settings(flags)
    assert settings.retention_under(settings.max_ttl) == retention


@pytest.mark.parametrize(("text", "size"), [("1", 1), ("4096", 4_096), ("1048576", 1_048_576)])
def test_results_may_have_one_byte_to_one_mebibyte(text: str, size: int) -> None:
    """The limit of a result is a number of bytes, 4096 by default."""
    assert load_settings({"max_result_bytes": text}).max_result_bytes == size
    assert load_settings().max_result_bytes == 4_096


def test_the_policy_file_is_a_setting_like_any_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its path comes from a flag, a variable or the settings file; an empty variable counts as unset."""
    file = tmp_path / "settings.toml"
    file.write_text('policy_file = "/etc/dedup/policies.toml"\n')
    assert load_settings(config_file=file).policy_file == Path("/etc/dedup/policies.toml")
    assert load_settings({"policy_file": "here.toml"}, file).policy_file == Path("here.toml")
    monkeypatch.setenv("DEDUP_POLICY_FILE", "")
    assert load_settings().policy_file is None


@pytest.mark.parametrize("text", ['default_tll = "1s"', "default_ttl = "])
def test_a_bad_file_is_refused(tmp_path: Path, text: str) -> None:
    """A settings file with an unknown key or invalid TOML is an error."""
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(BadSettings):
        load_settings(config_file=file)


@pytest.mark.parametrize(
    "name", ["DEDUP_SERVICE_HOST", "DEDUP_PORT", "DEDUP_PORT_50051_TCP_ADDR", "DEDUP_SERVICE_PORT_GRPC"]
)
def test_the_link_variables_of_kubernetes_are_not_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Kubernetes describes a service named "dedup" in variables that the settings ignore."""
    monkeypatch.setenv(name, "tcp://10.0.0.1:50051")
    load_settings()


def test_the_representation_contains_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store URL, which may contain a password, is not in the representation of the settings."""
    monkeypatch.setenv("DEDUP_STORE_URL", "redis://:hunter2@cache")
    settings = load_settings()
    assert "hunter2" not in repr(settings)
    assert settings.effective_store_url == "redis://:hunter2@cache"


def test_a_probe_needs_only_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe finds the listening address although the other settings, given as flags, are missing."""
    monkeypatch.setenv("DEDUP_REQUIRE_STORE_URL", "true")
    monkeypatch.setenv("DEDUP_LISTEN", "127.0.0.1:1,127.0.0.1:2")
    assert listening_address() == "127.0.0.1:1"


@pytest.mark.parametrize(
    ("text", "ms"), [("1ms", 1), ("250ms", 250), ("60s", 60_000), ("2h", 7_200_000), ("7d", 604_800_000)]
)
def test_durations(text: str, ms: int) -> None:
    """Durations have a unit, and `format_duration` writes what `parse_duration` reads."""
    assert parse_duration(text) == ms
    assert parse_duration(format_duration(ms)) == ms


@pytest.mark.parametrize("text", ["", "60", "1.5s", "-1s", "1 s", "s", "1w", "\u0661s", "1s2"])
def test_invalid_durations_are_refused(text: str) -> None:
    """A duration is a whole number and a unit."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_auto_is_one_worker_per_cpu() -> None:
    """`auto` counts the CPUs this process may run on."""
    assert load_settings({"workers": "auto"}).workers == len(os.sched_getaffinity(0))


def test_workers_cannot_share_a_unix_socket() -> None:
    """Several workers on a Unix socket are refused with a remedy; one worker may have one."""
    flags = {"listen": "127.0.0.1:50051,unix:///run/dedup.sock", "workers": "2"}
    with pytest.raises(BadSettings) as caught:
        load_settings(flags)
    assert str(caught.value) == (
        "DEDUP_WORKERS is 2 and DEDUP_LISTEN has unix:///run/dedup.sock: several processes cannot share a Unix "
        "socket. Set DEDUP_WORKERS=1, or listen on a loopback address such as 127.0.0.1:50051"
    )
    assert load_settings(flags | {"workers": "1"}).workers == 1


def test_settings_reach_another_process_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process receives every setting, passwords included, whatever its own environment holds."""
    settings = load_settings(
        {"store_url": "redis://user:s3cret@redis", "policy_file": "/p.toml", "retention": "2h", "workers": "3"}
    )
    monkeypatch.setenv("DEDUP_STORE_URL", "redis://elsewhere")
    monkeypatch.setenv("DEDUP_METRICS_LISTEN", "127.0.0.1:1")
    received = settings_from_json(settings.to_json())
    assert received.model_dump() == settings.model_dump()
    assert received.effective_store_url == "redis://user:s3cret@redis"
