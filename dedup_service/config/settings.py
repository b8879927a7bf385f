"""Settings from flags, environment variables and a TOML file, in that order of precedence."""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from dedup_service.config.addresses import reachable_from_other_hosts
from dedup_service.config.durations import format_duration
from dedup_service.config.errors import BadSettings
from dedup_service.config.fields import (
    ADDRESSES,
    DURATION,
    FILE,
    SECRET,
    SWITCH,
    TCP_ADDRESS,
    Kind,
    choice,
    number,
    parse_values,
    setting,
    settings_of,
    shown,
    text_up_to,
    whole_number,
)
from dedup_service.config.files import read_text, read_toml

__all__ = ["BadSettings", "Settings", "load_settings"]

ENV_PREFIX = "DEDUP_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"
TARGET_VARIABLE = f"{ENV_PREFIX}TARGET"
TARGET_TLS_CA_VARIABLE = f"{TARGET_VARIABLE}_TLS_CA"
TARGET_TLS_CERT_VARIABLE = f"{TARGET_VARIABLE}_TLS_CERT"
TARGET_TLS_KEY_VARIABLE = f"{TARGET_VARIABLE}_TLS_KEY"
TARGET_TOKEN_FILE_VARIABLE = f"{TARGET_VARIABLE}_TOKEN_FILE"
STORE_URL_VARIABLE = f"{ENV_PREFIX}STORE_URL"

_OTHER_VARIABLES = {
    *(CONFIG_VARIABLE, TARGET_VARIABLE, TARGET_TOKEN_FILE_VARIABLE),
    *(TARGET_TLS_CA_VARIABLE, TARGET_TLS_CERT_VARIABLE, TARGET_TLS_KEY_VARIABLE),
}

# Kubernetes and Docker set such variables in other pods for a service named "dedup".
_LINK_VARIABLE = re.compile(r"DEDUP_(\w+_)?(SERVICE_HOST|SERVICE_PORT|PORT)(_\w+)?")

_DEFAULT_RETENTION_MS = 24 * 3_600_000
_MAX_WORKERS = 64


def _worker_count(value: object) -> int:
    if value == "auto":
        return min(_usable_cpus(), _MAX_WORKERS)
    try:
        count: int = whole_number(1, _MAX_WORKERS).parse(value)
    except ValueError:
        raise ValueError(
            f"{shown(value)} is not a valid worker count: write 1 to {_MAX_WORKERS}, or auto for one per CPU"
        ) from None
    return count


def _usable_cpus() -> int:
    # This process may be limited to some of the host's CPUs.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


EngineName = Literal["grpcio", "native"]
KeyLayoutName = Literal["prefixed", "raw"]
LogLevel = Literal["debug", "info", "warning", "error"]
LoggedIdForm = Literal["hashed", "plain"]
Readiness = Literal["store", "process"]
Reflection = Literal["auto", "on", "off"]
Traces = Literal["off", "otlp"]


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything an operator can set. Durations are milliseconds."""

    listen: tuple[str, ...] = setting(
        ("127.0.0.1:50051",), ADDRESSES, "Addresses to serve, comma-separated: host:port or unix:///path."
    )
    health_listen: tuple[str, ...] = setting(
        (),
        ADDRESSES,
        "Addresses that serve the health service alone, for probes: plaintext, no authentication.  "
        "[default: none; --listen serves health too]",
    )
    tls_cert: Path | None = setting(
        None,
        FILE,
        "PEM file with the server certificate and its chain: enables TLS on every address of --listen. "
        "Reloaded when it changes.  [default: none, plaintext]",
    )
    tls_key: Path | None = setting(
        None, FILE, "PEM file with the key of that certificate, reloaded with it.  [default: none]"
    )
    tls_client_ca: Path | None = setting(
        None,
        FILE,
        "PEM file of certificate authorities: callers must present a client certificate issued by one of "
        "them (mTLS). Reloaded when it changes.  [default: none]",
    )
    auth_tokens: Path | None = setting(
        None,
        FILE,
        "TOML file of callers and their bearer tokens: every call must carry one, unless a client "
        "certificate identifies the caller. Reloaded on SIGHUP.  [default: none]",
    )
    allow_unauthenticated: bool = setting(
        False, SWITCH, "Allow addresses that other hosts can reach without authentication."
    )
    reflection: Reflection = setting(
        "auto",
        choice(Reflection),
        "Server reflection, for tools such as grpcurl; auto: only when every address of --listen is local "
        "to this host.",
    )
    max_connections: int | None = setting(
        None,
        whole_number(1),
        "Maximum open connections per TCP address or socket; further ones are closed at once.  "
        "[default: 1000 with grpcio; the engine native has no limit, and rejects this setting]",
    )
    store_url: str | None = setting(
        None,
        SECRET,
        "Store of the claims: redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster:// "
        "with [user:password@], or sqlite:///path for the embedded store of this host.  "
        "[default: sqlite, in the user's state folder]",
        secret=True,
    )
    store_url_file: Path | None = setting(
        None,
        FILE,
        "File that contains the store URL, which keeps its password out of process lists and variables.  "
        "[default: none]",
    )
    require_store_url: bool = setting(
        False, SWITCH, "Refuse to start without a store URL instead of using the embedded store."
    )
    key_prefix: str = setting("dedup:", text_up_to(64), "Prefix of every Redis key.")
    key_layout: KeyLayoutName = setting(
        "prefixed",
        choice(KeyLayoutName),
        "prefixed: {prefix}{namespace}:{id}. raw: the id alone, to share claims with services that use "
        "SETNX themselves.",
    )
    min_replicas: int = setting(
        0,
        whole_number(0, 100),
        "Redis replicas that must acknowledge a claim before the caller receives CLAIMED.",
    )
    default_ttl: int = setting(60_000, DURATION, "Lease of a claim whose caller sets no ttl.")
    max_ttl: int = setting(7 * 86_400_000, DURATION, "Longest ttl a caller may request.")
    retention: int | None = setting(
        None,
        DURATION,
        "Retention of a completed transaction whose holder sets no ttl.  "
        "[default: 24h, or the maximum ttl if that is shorter]",
    )
    max_result_bytes: int = setting(
        4_096, whole_number(1, 1_048_576), "Largest result of a completed transaction, in bytes."
    )
    policy_file: Path | None = setting(
        None,
        FILE,
        "TOML file with rules for each namespace. Reloaded on SIGHUP.  "
        "[default: none, the same rules for every namespace]",
    )
    max_in_flight: int = setting(
        2_000,
        whole_number(1),
        "Maximum claims and look-ups in flight; further ones are rejected. Calls of holders have a limit "
        "of the same size for themselves; waiting claims and health checks do not count.",
    )
    max_waits: int = setting(
        2_000, whole_number(1), "Maximum claims that wait for work in progress; further ones are rejected."
    )
    store_timeout: int = setting(1_000, DURATION, "Timeout of one store operation.")
    readiness: Readiness = setting(
        "store",
        choice(Readiness),
        "Meaning of readiness. store: the store takes claims. process: this process accepts calls, "
        "whatever the store does.",
    )
    strict: bool = setting(False, SWITCH, "Refuse to start when the doctor reports a critical finding.")
    shutdown_grace: int = setting(10_000, DURATION, "Grace period for in-flight calls after SIGTERM or SIGINT.")
    engine: EngineName = setting(
        "grpcio",
        choice(EngineName),
        "gRPC implementation: grpcio, or native, which is faster but younger, and closes connections of "
        "callers that cancel many calls; see docs/engines.md.",
    )
    workers: int = setting(
        1, Kind("INTEGER", _worker_count), "Worker processes that share the TCP port: 1 to 64, or auto for one per CPU."
    )
    metrics_listen: str | None = setting(
        None,
        TCP_ADDRESS,
        "host:port of the Prometheus metrics, served over HTTP without authentication.  [default: none]",
    )
    log_level: LogLevel = setting(
        "info", choice(LogLevel), "Least severe log level to write; successful calls are info."
    )
    log_sample: float = setting(
        0.0, number(0, 1), "Share of successful calls to log, 0 to 1. Failed calls are always logged."
    )
    log_slow: int = setting(250, DURATION, "Successful calls that take at least this long are always logged.")
    log_transaction_ids: LoggedIdForm = setting(
        "hashed", choice(LoggedIdForm), "Transaction ids in the log: the start of their SHA-256, or plain."
    )
    log_id_key_file: Path | None = setting(
        None,
        FILE,
        "File with a secret of at least 16 bytes: hashed ids in the log become the start of their "
        "HMAC-SHA-256 with it, which cannot be guessed.  [default: none, plain SHA-256]",
    )
    traces: Traces = setting(
        "off",
        choice(Traces),
        "otlp: send OpenTelemetry traces by OTLP over gRPC, configured by the standard OTEL_* variables; "
        "needs the extra `otel`.",
    )

    def to_json(self) -> str:
        """Return all settings for another process, including the password of the store URL."""
        return json.dumps({name: getattr(self, name) for name in SETTINGS}, default=str)

    @property
    def authenticates(self) -> bool:
        """Whether callers must identify themselves."""
        return self.tls_client_ca is not None or self.auth_tokens is not None

    @property
    def reflects(self) -> bool:
        """Whether server reflection is on."""
        if self.reflection == "auto":
            return not reachable_from_other_hosts(self.listen)
        return self.reflection == "on"

    @property
    def effective_store_url(self) -> str:
        """The store URL; it may contain a password."""
        return _default_store_url() if self.store_url is None else self.store_url

    def retention_under(self, max_ttl: int) -> int:
        """Return the retention: the setting, or the default cut to `max_ttl`."""
        return min(_DEFAULT_RETENTION_MS, max_ttl) if self.retention is None else self.retention


SETTINGS = settings_of(Settings)


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{ENV_PREFIX}{name.upper()}"


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def help_of(name: str) -> str:
    """Return the help of a setting: its description, variable and default."""
    setting = SETTINGS[name]
    default = f" [default: {setting.shown_default}]" if setting.shown_default else ""
    return f"{setting.description}  [env: {variable_of(name)}]{default}"


def load_settings(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> Settings:
    """Return the settings of this process; `flags` come from the command line, by field name.

    Raises BadSettings with one sentence that names each faulty setting.
    """
    _reject_unknown_variables()
    _reject_empty_store_url()
    written = _written(flags or {}, config_file)
    settings = Settings(**_parsed(written))
    if settings.store_url_file is not None:
        settings = replace(settings, store_url=_store_url_of_file(settings.store_url_file, written))
    _reject_contradictions(settings)
    if settings.traces == "otlp":
        _reject_other_protocols()
    return settings


def settings_from_json(text: str) -> Settings:
    """Return the settings `Settings.to_json` wrote, without the environment of this process."""
    values = json.loads(text)
    for name, known in SETTINGS.items():
        if known.kind is ADDRESSES:
            values[name] = tuple(values[name])
        elif known.kind is FILE and values[name] is not None:
            values[name] = Path(values[name])
    return Settings(**values)


def listening_address() -> str:
    """Return the first address of a server with these settings. Raises BadSettings."""
    return _listening().listen[0]


def health_address() -> str:
    """Return the health check address of such a server. Raises BadSettings."""
    listening = _listening()
    return (listening.health_listen or listening.listen)[0]


def target_from_environment() -> str | None:
    """Return the DEDUP_TARGET of the client commands."""
    return os.environ.get(TARGET_VARIABLE) or None


def file_from_environment(variable: str) -> Path | None:
    """Return the path in a variable of the client commands."""
    return Path(path) if (path := os.environ.get(variable)) else None


def _listening() -> Settings:
    # A probe needs no other settings.
    written = _written({}, None)
    return Settings(**_parsed({name: written[name] for name in ("listen", "health_listen") if name in written}))


def _written(flags: Mapping[str, object], config_file: Path | None) -> dict[str, object]:
    if config_file is None and (path := os.environ.get(CONFIG_VARIABLE)):
        config_file = Path(path)
    file = {} if config_file is None else _read(config_file)
    return {**file, **_environment(), **flags}


def _parsed(written: Mapping[str, object]) -> dict[str, Any]:
    values, faults = parse_values({name: known.kind.parse for name, known in SETTINGS.items()}, written)
    sentences = [f"{variable_of(name)} ({flag_of(name)}): {fault}" for name, fault in faults.items()]
    sentences += [_no_setting(repr(name), name, SETTINGS) for name in written if name not in SETTINGS]
    if sentences:
        raise BadSettings("; ".join(sentences))
    return values


def _read(config_file: Path) -> dict[str, Any]:
    if not config_file.is_file():
        raise BadSettings(f"the settings file {str(config_file)!r} does not exist")
    return read_toml(
        config_file, lambda sentence: BadSettings(f"the settings file {str(config_file)!r} is not usable: {sentence}")
    )


def _store_url_of_file(path: Path, written: Mapping[str, object]) -> str:
    if "store_url" in written:
        raise BadSettings(
            f"{STORE_URL_VARIABLE} and {STORE_URL_VARIABLE}_FILE are both set, by a flag, a variable or the settings "
            "file: unset one of them"
        )
    url = read_text(path, lambda sentence: BadSettings(f"{STORE_URL_VARIABLE}_FILE ({_readable(path)}) {sentence}"))
    if not url:
        raise BadSettings(f"{STORE_URL_VARIABLE}_FILE ({_readable(path)}) is empty: write the URL of the store into it")
    return url


def _readable(path: Path) -> str:
    return text if (text := str(path)).isprintable() else repr(text)


def _default_store_url() -> str:
    # One file per user.
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return f"sqlite://{Path(state).expanduser() / 'dedup-service' / 'claims.db'}"


def _environment() -> dict[str, str]:
    # Case is ignored, and empty variables count as unset: manifests often contain both.
    found = {name.upper(): value for name, value in os.environ.items() if value}
    return {name: found[variable_of(name)] for name in SETTINGS if variable_of(name) in found}


def _reject_empty_store_url() -> None:
    # An unfilled secret in a manifest must not select the embedded store.
    if os.environ.get(STORE_URL_VARIABLE) == "":
        raise BadSettings(f"{STORE_URL_VARIABLE} is set but empty: give it a value, or unset it for the embedded store")


def _reject_other_protocols() -> None:
    # Otherwise the collector drops the spans, and only the log says so.
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(name):
            if protocol != "grpc":
                raise BadSettings(
                    f"{ENV_PREFIX}TRACES is otlp and {name} is {protocol}: this service sends traces only over gRPC. "
                    f"Set {name}=grpc and an endpoint that accepts it, usually port 4317"
                )
            return


def _reject_unknown_variables() -> None:
    # A misspelt DEDUP_STORE_URL would select the embedded store, which serves this host alone.
    known = {variable_of(name) for name in SETTINGS} | _OTHER_VARIABLES
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and not _LINK_VARIABLE.fullmatch(name):
            raise BadSettings(_no_setting(name, name.upper(), known))


def _no_setting(shown_name: str, name: str, known: Collection[str]) -> str:
    # Imported late: only a fault needs it.
    from difflib import get_close_matches  # noqa: PLC0415 - as above

    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see `dedup-service serve --help` for all settings"
    return f"there is no setting {shown_name}: {hint}"


def _reject_contradictions(settings: Settings) -> None:
    for name, value in (("DEFAULT_TTL", settings.default_ttl), ("RETENTION", settings.retention)):
        if value is not None and value > settings.max_ttl:
            raise BadSettings(
                f"{ENV_PREFIX}{name} ({format_duration(value)}) is longer than "
                f"{ENV_PREFIX}MAX_TTL ({format_duration(settings.max_ttl)}): lower the one or raise the other"
            )
    if settings.require_store_url and settings.store_url is None:
        raise BadSettings(
            f"{ENV_PREFIX}STORE_URL is not set and {ENV_PREFIX}REQUIRE_STORE_URL is: a container that deduplicates "
            f"against itself alone pays twice. Set {ENV_PREFIX}STORE_URL=redis://host:6379/0"
        )
    _reject_shared_sockets(settings)
    _reject_exposure(settings)


def _reject_shared_sockets(settings: Settings) -> None:
    for name, addresses in (("LISTEN", settings.listen), ("HEALTH_LISTEN", settings.health_listen)):
        if settings.workers > 1 and (sockets := [address for address in addresses if address.startswith("unix:")]):
            raise BadSettings(
                f"{ENV_PREFIX}WORKERS is {settings.workers} and {ENV_PREFIX}{name} has {sockets[0]}: several processes "
                f"cannot share a Unix socket. Set {ENV_PREFIX}WORKERS=1, or listen on a loopback address such as "
                "127.0.0.1:50051"
            )


def _reject_exposure(settings: Settings) -> None:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing, other = ("TLS_KEY", "TLS_CERT") if settings.tls_key is None else ("TLS_CERT", "TLS_KEY")
        raise BadSettings(f"DEDUP_{other} is set and DEDUP_{missing} is not: a server certificate needs both")
    if settings.tls_client_ca is not None and settings.tls_cert is None:
        raise BadSettings(
            "DEDUP_TLS_CLIENT_CA is set and DEDUP_TLS_CERT is not: client certificates need TLS, so set "
            "DEDUP_TLS_CERT and DEDUP_TLS_KEY"
        )
    exposed = reachable_from_other_hosts(settings.listen)
    if exposed and not settings.authenticates and not settings.allow_unauthenticated:
        raise BadSettings(
            f"DEDUP_LISTEN ({exposed[0]}) can be reached from other hosts without authentication: listen on "
            "127.0.0.1 or a Unix socket, set DEDUP_TLS_CLIENT_CA (mTLS) or DEDUP_AUTH_TOKENS, or set "
            "DEDUP_ALLOW_UNAUTHENTICATED=true where the network admits only the right callers"
        )
