"""Settings: sources, precedence, and the errors of bad values."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dedup_service.config.durations import format_duration, parse_duration
from dedup_service.config.settings import (
    SETTINGS,
    BadSettings,
    Settings,
    health_address,
    listening_address,
    load_settings,
    settings_from_json,
)

TEN_THOUSAND_DIGITS = "0x" + "f" * 10_000


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
        ("DEDUP_DEFAULT_TTL", "0s", "DEDUP_DEFAULT_TTL (--default-ttl): '0s' is zero: write at least 1ms"),
        ("DEDUP_MAX_TTL", "1s", "DEDUP_DEFAULT_TTL (60s) is longer than DEDUP_MAX_TTL (1s)"),
        ("DEDUP_MAX_TTL", "36501d", "DEDUP_MAX_TTL (--max-ttl): '36501d' is too long: write at most 36500d"),
        ("DEDUP_RETENTION", "8d", "DEDUP_RETENTION (8d) is longer than DEDUP_MAX_TTL (7d): lower the one"),
        ("DEDUP_RETENTION", "60", "DEDUP_RETENTION (--retention): '60' is not a duration"),
        ("DEDUP_RETENTION", "0s", "DEDUP_RETENTION (--retention): '0s' is zero: write at least 1ms"),
        (
            "DEDUP_MAX_RESULT_BYTES",
            "0",
            "DEDUP_MAX_RESULT_BYTES (--max-result-bytes): 0 is too small: write at least 1",
        ),
        ("DEDUP_MAX_RESULT_BYTES", "1048577", "1048577 is too large: write at most 1048576"),
        (
            "DEDUP_MAX_RESULT_BYTES",
            "4k",
            "DEDUP_MAX_RESULT_BYTES (--max-result-bytes): '4k' is not a whole number: write at least 1 and at most",
        ),
        ("DEDUP_MAX_IN_FLIGHT", "0", "DEDUP_MAX_IN_FLIGHT (--max-in-flight): 0 is too small: write at least 1"),
        ("DEDUP_MAX_IN_FLIGHT", "\u0665", "'\u0665' is not a whole number: write at least 1"),
        ("DEDUP_MAX_IN_FLIGHT", "9" * 5_000, "99' is not a whole number: write at least 1"),
        ("DEDUP_MIN_REPLICAS", "-1", "DEDUP_MIN_REPLICAS (--min-replicas): -1 is too small: write at least 0"),
        ("DEDUP_MIN_REPLICAS", "101", "101 is too large: write at most 100"),
        ("DEDUP_LOG_SAMPLE", "1.1", "DEDUP_LOG_SAMPLE (--log-sample): 1.1 is too large: write at most 1"),
        ("DEDUP_LOG_SAMPLE", "-0.1", "-0.1 is too small: write at least 0"),
        ("DEDUP_LOG_SAMPLE", "half", "'half' is not a number: write at least 0 and at most 1"),
        ("DEDUP_LOG_SAMPLE", "nan", "'nan' is not a number"),
        ("DEDUP_LOG_SAMPLE", "inf", "inf is too large: write at most 1"),
        ("DEDUP_STRICT", "maybe", "DEDUP_STRICT (--strict): 'maybe' is neither true nor false: write one of them"),
        (
            "DEDUP_KEY_PREFIX",
            "x" * 65,
            "DEDUP_KEY_PREFIX (--key-prefix): 'xxxxxxxxxxxx...xxxxxxxxxxxxx' has 65 characters",
        ),
        ("DEDUP_KEY_PREFIX", "x" * 65, "has 65 characters: write at most 64"),
        ("DEDUP_KEY_PREFIX", "\udcff", "DEDUP_KEY_PREFIX (--key-prefix): '\\udcff' is not valid UTF-8"),
        ("DEDUP_STORE_URL", "redis://hunter2\udcff", "DEDUP_STORE_URL (--store-url): it is not UTF-8 text: write it"),
        ("DEDUP_LISTEN", "127.0.0.1", "'127.0.0.1' is not an address"),
        ("DEDUP_LISTEN", "127.0.0.1:70000", "is not an address"),
        ("DEDUP_LISTEN", ",", "the list of addresses is empty: write host:port"),
        ("DEDUP_LISTEN", "unix://relative.sock", "is not a Unix socket"),
        ("DEDUP_LISTEN", "unix:///" + "x" * 104, "at most 103 bytes"),
        (
            "DEDUP_LOG_LEVEL",
            "INFO",
            "DEDUP_LOG_LEVEL (--log-level): 'INFO' is unknown: write debug, info, warning or error",
        ),
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
    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)


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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('default_tll = "1s"', "there is no setting 'default_tll': did you mean default_ttl?"),
        ('"\\n" = 1', "there is no setting '\\n': see `dedup-service serve --help` for all settings"),
        ("default_ttl = ", "is not usable: it is not valid TOML"),
        ("default_ttl = 60", "DEDUP_DEFAULT_TTL (--default-ttl): 60 is not a duration: write it in quotes with a unit"),
        ("retention = true", "DEDUP_RETENTION (--retention): True is not a duration"),
        ("max_in_flight = true", "DEDUP_MAX_IN_FLIGHT (--max-in-flight): True is not a whole number"),
        ("max_in_flight = 5.0", "5.0 is not a whole number: write at least 1"),
        (f"max_in_flight = {TEN_THOUSAND_DIGITS}", "the number is not a whole number: write at least 1"),
        ("log_sample = false", "DEDUP_LOG_SAMPLE (--log-sample): False is not a number"),
        (f"log_sample = 1{'0' * 400}", "is not a number: write at least 0 and at most 1"),
        ("strict = 2", "DEDUP_STRICT (--strict): 2 is neither true nor false"),
        ("strict = []", "[] is neither true nor false"),
        ("key_prefix = 5", "DEDUP_KEY_PREFIX (--key-prefix): 5 is not text: write it in quotes"),
        ("engine = ['grpcio']", "DEDUP_ENGINE (--engine): ['grpcio'] is unknown: write grpcio or native"),
        ("listen = []", "DEDUP_LISTEN (--listen): the list of addresses is empty"),
        ("listen = 50051", "50051 is not text: write it in quotes"),
        ("listen = [50051]", "50051 is not text: write it in quotes"),
        ("health_listen = ['nowhere']", "DEDUP_HEALTH_LISTEN (--health-listen): 'nowhere' is not an address"),
        ("metrics_listen = 9090", "DEDUP_METRICS_LISTEN (--metrics-listen): 9090 is not text: write it in quotes"),
        ("workers = true", "DEDUP_WORKERS (--workers): True is not a valid worker count: write 1 to 64, or auto"),
        ("policy_file = ''", "DEDUP_POLICY_FILE (--policy-file): '' is not a path: write the path of a file"),
        ("policy_file = 5", "5 is not a path"),
        ('policy_file = "a\\u0000b"', "'a\\x00b' is not a path"),
        ("store_url_file = 5", "DEDUP_STORE_URL_FILE (--store-url-file): 5 is not a path"),
        ("store_url = ''", "DEDUP_STORE_URL (--store-url): it is set but empty: give it a value, or remove it"),
        ("store_url = ['redis://:hunter2@x']", "DEDUP_STORE_URL (--store-url): it is not UTF-8 text"),
    ],
)
def test_a_bad_file_is_one_clear_sentence(tmp_path: Path, line: str, words: str) -> None:
    """A settings file with an unknown key, a value of a wrong type or invalid TOML is an error."""
    file = tmp_path / "settings.toml"
    file.write_text(line)
    with pytest.raises(BadSettings) as caught:
        load_settings(config_file=file)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)


def test_the_types_of_toml_are_accepted(tmp_path: Path) -> None:
    """Numbers, booleans and lists of addresses may be written as such in the settings file, or as text."""
    file = tmp_path / "settings.toml"
    file.write_text(
        'listen = ["127.0.0.1:1", "unix:///x"]\nmax_waits = 5\nmax_in_flight = "6"\nlog_sample = 1\nstrict = true\n'
        'require_store_url = 0\nallow_unauthenticated = "yes"\nworkers = 1\n'
    )
    assert load_settings(config_file=file) == Settings(
        listen=("127.0.0.1:1", "unix:///x"),
        max_waits=5,
        max_in_flight=6,
        log_sample=1.0,
        strict=True,
        allow_unauthenticated=True,
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, True) for word in ("true", "TRUE", "yes", "on", "t", "y", "1")),
        *((word, False) for word in ("false", "False", "no", "off", "f", "n", "0")),
    ],
)
def test_the_words_for_true_and_false(monkeypatch: pytest.MonkeyPatch, text: str, value: bool) -> None:  # noqa: FBT001 - a case
    """A variable may say true and false in the usual words, in any case."""
    monkeypatch.setenv("DEDUP_STRICT", text)
    assert load_settings().strict is value


@pytest.mark.parametrize(("text", "value"), [("5", 5), (" 5 ", 5), ("+5", 5), ("1_000", 1_000), ("005", 5)])
def test_the_forms_of_whole_numbers(monkeypatch: pytest.MonkeyPatch, text: str, value: int) -> None:
    """A variable may write a whole number with spaces around it, a sign and underscores."""
    monkeypatch.setenv("DEDUP_MAX_WAITS", text)
    assert load_settings().max_waits == value


def test_every_fault_is_reported_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One error reports the faults of all settings from all sources, in the order of the help."""
    file = tmp_path / "settings.toml"
    file.write_text('colour = "red"\nmax_waits = 0\nlog_level = "loud"\n')
    monkeypatch.setenv("DEDUP_STRICT", "maybe")
    with pytest.raises(BadSettings) as caught:
        load_settings({"listen": "nowhere", "log_level": "info"}, file)
    assert str(caught.value) == (
        "DEDUP_LISTEN (--listen): 'nowhere' is not an address: write host:port (such as 127.0.0.1:50051) or "
        "unix:///path; DEDUP_MAX_WAITS (--max-waits): 0 is too small: write at least 1; DEDUP_STRICT (--strict): "
        "'maybe' is neither true nor false: write one of them; there is no setting 'colour': see `dedup-service serve "
        "--help` for all settings"
    )


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
    assert "hunter2" not in f"{settings!r} {settings}"
    assert settings.effective_store_url == "redis://:hunter2@cache"


def test_a_probe_needs_only_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe finds the listening address although the other settings, given as flags, are missing."""
    monkeypatch.setenv("DEDUP_REQUIRE_STORE_URL", "true")
    monkeypatch.setenv("DEDUP_LISTEN", "127.0.0.1:1,127.0.0.1:2")
    monkeypatch.setenv("DEDUP_MAX_WAITS", "many")
    assert listening_address() == health_address() == "127.0.0.1:1"
    monkeypatch.setenv("DEDUP_HEALTH_LISTEN", "127.0.0.1:3")
    assert health_address() == "127.0.0.1:3"
    monkeypatch.setenv("DEDUP_LISTEN", "nowhere")
    with pytest.raises(BadSettings, match="'nowhere' is not an address"):
        listening_address()


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
    assert received == settings
    assert received.effective_store_url == "redis://user:s3cret@redis"


TEXTS = st.one_of(
    st.sampled_from(
        [
            "5",
            " 5 ",
            "-1",
            "0",
            "65",
            "0.5",
            "nan",
            "true",
            "off",
            "auto",
            "60s",
            "0s",
            "8d",
            "127.0.0.1:1",
            "0.0.0.0:1",
        ]
    ),
    st.sampled_from(
        ["unix:///x", "info", "raw", "native", "otlp", "plain", "process", "/a", "", "\udcff", "\n", "x" * 65]
    ),
    st.text(max_size=6),
)
VALUES = st.one_of(
    TEXTS, st.integers(), st.floats(), st.booleans(), st.dates(), st.lists(TEXTS, max_size=2), st.just({"a": 1})
)
NAMES = st.sampled_from([*SETTINGS, *SETTINGS, "nonsense", "\n"])
TYPES = {"INTEGER": int, "NUMBER": float, "DURATION": int, "FILE": type(Path()), "": bool}


@given(st.dictionaries(NAMES, VALUES, max_size=3))
@examples(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_values_give_settings_or_one_sentence(written: dict[str, Any]) -> None:
    """Any values give settings of the right types, equal in another process, or one printable line of all faults.

    The line names each faulty setting once, and an empty or invalid store URL does not select the embedded store.
    """
    if "store_url" in written:
        written["store_url"] = [written["store_url"], "hunter2"]
    try:
        settings = load_settings(written)
    except BadSettings as error:
        assert str(error).isprintable()  # noqa: PT017 - either end is a pass
        assert "hunter2" not in str(error)  # noqa: PT017 - as above
        named = re.findall(r"(?:^|; )DEDUP_\w+ \((--[a-z-]+)\): ", str(error))
        assert len(named) == len(set(named))
        return
    assert "store_url" not in written
    assert settings_from_json(settings.to_json()) == settings
    for name, known in SETTINGS.items():
        value = getattr(settings, name)
        assert value is None or type(value) is TYPES.get(known.kind.metavar, type(value))
        assert name not in written or value is not None
