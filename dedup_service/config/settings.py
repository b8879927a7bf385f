"""Settings from flags, environment variables and a TOML file, in that order of precedence."""

import os
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import to_json

from dedup_service.config.addresses import Address, parse_addresses, reachable_from_other_hosts
from dedup_service.config.durations import format_duration, parse_duration
from dedup_service.config.errors import BadSettings
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


def _duration(value: object) -> object:
    return parse_duration(value) if isinstance(value, str) else value


def _address_list(value: object) -> object:
    return parse_addresses(value) if isinstance(value, str) else value


def _tcp_address(value: object) -> object:
    if isinstance(value, str):
        Address.parse_tcp(value)
    return value


def _worker_count(value: object) -> object:
    if value == "auto":
        return min(_usable_cpus(), _MAX_WORKERS)
    if isinstance(value, bool) or not str(value).isdecimal() or not 1 <= int(str(value)) <= _MAX_WORKERS:
        raise ValueError(f"{value!r} is not a valid worker count: write 1 to {_MAX_WORKERS}, or auto for one per CPU")
    return value


def _usable_cpus() -> int:
    # This process may be limited to some of the host's CPUs.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


DurationMs = Annotated[int, BeforeValidator(_duration), Field(gt=0)]
# The command line recognises durations by the outer validator.
OptionalDurationMs = Annotated[DurationMs | None, BeforeValidator(_duration)]
Addresses = Annotated[tuple[str, ...], BeforeValidator(_address_list)]
MetricsAddress = Annotated[str | None, BeforeValidator(_tcp_address)]
EngineName = Literal["grpcio", "native"]
WorkerCount = Annotated[int, BeforeValidator(_worker_count)]


class Listening(BaseModel):
    """The addresses of the server; a probe needs no other settings."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    listen: Addresses = Field(
        ("127.0.0.1:50051",), description="Addresses to serve, comma-separated: host:port or unix:///path."
    )
    health_listen: Addresses = Field(
        (),
        description="Addresses that serve the health service alone, for probes: plaintext, no authentication.  "
        "[default: none; --listen serves health too]",
    )


class Settings(Listening):
    """Everything an operator can set. Durations are milliseconds."""

    model_config = ConfigDict(extra="forbid")

    tls_cert: Path | None = Field(
        None,
        description="PEM file with the server certificate and its chain: enables TLS on every address of --listen. "
        "Reloaded when it changes.  [default: none, plaintext]",
    )
    tls_key: Path | None = Field(
        None, description="PEM file with the key of that certificate, reloaded with it.  [default: none]"
    )
    tls_client_ca: Path | None = Field(
        None,
        description="PEM file of certificate authorities: callers must present a client certificate issued by one of "
        "them (mTLS). Reloaded when it changes.  [default: none]",
    )
    auth_tokens: Path | None = Field(
        None,
        description="TOML file of callers and their bearer tokens: every call must carry one, unless a client "
        "certificate identifies the caller. Reloaded on SIGHUP.  [default: none]",
    )
    allow_unauthenticated: bool = Field(
        False, description="Allow addresses that other hosts can reach without authentication."
    )
    reflection: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Server reflection, for tools such as grpcurl; auto: only when every address of --listen is local "
        "to this host.",
    )
    max_connections: int | None = Field(
        None,
        gt=0,
        description="Maximum open connections per TCP address or socket; further ones are closed at once.  "
        "[default: 1000 with grpcio; the engine native has no limit, and rejects this setting]",
    )
    store_url: SecretStr | None = Field(
        None,
        description="Store of the claims: redis://, rediss:// (TLS), unix://, redis+sentinel:// or redis+cluster:// "
        "with [user:password@], or sqlite:///path for the embedded store of this host.  "
        "[default: sqlite, in the user's state folder]",
    )
    store_url_file: Path | None = Field(
        None,
        description="File that contains the store URL, which keeps its password out of process lists and variables.  "
        "[default: none]",
    )
    require_store_url: bool = Field(
        False, description="Refuse to start without a store URL instead of using the embedded store."
    )
    key_prefix: str = Field("dedup:", max_length=64, description="Prefix of every Redis key.")
    key_layout: Literal["prefixed", "raw"] = Field(
        "prefixed",
        description="prefixed: {prefix}{namespace}:{id}. raw: the id alone, to share claims with services that use "
        "SETNX themselves.",
    )
    min_replicas: int = Field(
        0,
        ge=0,
        le=100,
        description="Redis replicas that must acknowledge a claim before the caller receives CLAIMED.",
    )
    default_ttl: DurationMs = Field(60_000, description="Lease of a claim whose caller sets no ttl.")
    max_ttl: DurationMs = Field(7 * 86_400_000, description="Longest ttl a caller may request.")
    retention: OptionalDurationMs = Field(
        None,
        description="Retention of a completed transaction whose holder sets no ttl.  "
        "[default: 24h, or the maximum ttl if that is shorter]",
    )
    max_result_bytes: int = Field(
        4_096, gt=0, le=1_048_576, description="Largest result of a completed transaction, in bytes."
    )
    policy_file: Path | None = Field(
        None,
        description="TOML file with rules for each namespace. Reloaded on SIGHUP.  "
        "[default: none, the same rules for every namespace]",
    )
    max_in_flight: int = Field(
        2_000,
        gt=0,
        description="Maximum claims and look-ups in flight; further ones are rejected. Calls of holders have a limit "
        "of the same size for themselves; waiting claims and health checks do not count.",
    )
    max_waits: int = Field(
        2_000, gt=0, description="Maximum claims that wait for work in progress; further ones are rejected."
    )
    store_timeout: DurationMs = Field(1_000, description="Timeout of one store operation.")
    readiness: Literal["store", "process"] = Field(
        "store",
        description="Meaning of readiness. store: the store takes claims. process: this process accepts calls, "
        "whatever the store does.",
    )
    strict: bool = Field(False, description="Refuse to start when the doctor reports a critical finding.")
    shutdown_grace: DurationMs = Field(10_000, description="Grace period for in-flight calls after SIGTERM or SIGINT.")
    engine: EngineName = Field(
        "grpcio",
        description="gRPC implementation: grpcio, or native, which is faster but younger, and closes connections of "
        "callers that cancel many calls; see docs/engines.md.",
    )
    workers: WorkerCount = Field(
        1, description="Worker processes that share the TCP port: 1 to 64, or auto for one per CPU."
    )
    metrics_listen: MetricsAddress = Field(
        None,
        description="host:port of the Prometheus metrics, served over HTTP without authentication.  [default: none]",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log level to write; successful calls are info."
    )
    log_sample: float = Field(
        0.0, ge=0, le=1, description="Share of successful calls to log, 0 to 1. Failed calls are always logged."
    )
    log_slow: DurationMs = Field(250, description="Successful calls that take at least this long are always logged.")
    log_transaction_ids: Literal["hashed", "plain"] = Field(
        "hashed", description="Transaction ids in the log: the start of their SHA-256, or plain."
    )
    log_id_key_file: Path | None = Field(
        None,
        description="File with a secret of at least 16 bytes: hashed ids in the log become the start of their "
        "HMAC-SHA-256 with it, which cannot be guessed.  [default: none, plain SHA-256]",
    )
    traces: Literal["off", "otlp"] = Field(
        "off",
        description="otlp: send OpenTelemetry traces by OTLP over gRPC, configured by the standard OTEL_* variables; "
        "needs the extra `otel`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        for name, value in (("DEFAULT_TTL", self.default_ttl), ("RETENTION", self.retention)):
            if value is not None and value > self.max_ttl:
                raise ValueError(
                    f"{ENV_PREFIX}{name} ({format_duration(value)}) is longer than "
                    f"{ENV_PREFIX}MAX_TTL ({format_duration(self.max_ttl)}): lower the one or raise the other"
                )
        if self.require_store_url and self.store_url is None:
            raise ValueError(
                f"{ENV_PREFIX}STORE_URL is not set and {ENV_PREFIX}REQUIRE_STORE_URL is: a container that deduplicates "
                f"against itself alone pays twice. Set {ENV_PREFIX}STORE_URL=redis://host:6379/0"
            )
        self._check_shared_sockets()
        self._check_security()
        return self

    def _check_shared_sockets(self) -> None:
        for name, addresses in (("LISTEN", self.listen), ("HEALTH_LISTEN", self.health_listen)):
            if self.workers > 1 and (sockets := [address for address in addresses if address.startswith("unix:")]):
                raise ValueError(
                    f"{ENV_PREFIX}WORKERS is {self.workers} and {ENV_PREFIX}{name} has {sockets[0]}: several processes "
                    f"cannot share a Unix socket. Set {ENV_PREFIX}WORKERS=1, or listen on a loopback address such as "
                    "127.0.0.1:50051"
                )

    def _check_security(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing, other = ("TLS_KEY", "TLS_CERT") if self.tls_key is None else ("TLS_CERT", "TLS_KEY")
            raise ValueError(f"DEDUP_{other} is set and DEDUP_{missing} is not: a server certificate needs both")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError(
                "DEDUP_TLS_CLIENT_CA is set and DEDUP_TLS_CERT is not: client certificates need TLS, so set "
                "DEDUP_TLS_CERT and DEDUP_TLS_KEY"
            )
        exposed = reachable_from_other_hosts(self.listen)
        if exposed and not self.authenticates and not self.allow_unauthenticated:
            raise ValueError(
                f"DEDUP_LISTEN ({exposed[0]}) can be reached from other hosts without authentication: listen on "
                "127.0.0.1 or a Unix socket, set DEDUP_TLS_CLIENT_CA (mTLS) or DEDUP_AUTH_TOKENS, or set "
                "DEDUP_ALLOW_UNAUTHENTICATED=true where the network admits only the right callers"
            )

    def to_json(self) -> str:
        """Return all settings for another process, including the password of the store URL."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        plain = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in values.items()
        }
        return to_json(plain).decode()

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
        return self.store_url.get_secret_value() if self.store_url else _default_store_url()

    def retention_under(self, max_ttl: int) -> int:
        """Return the retention: the setting, or the default cut to `max_ttl`."""
        return min(_DEFAULT_RETENTION_MS, max_ttl) if self.retention is None else self.retention


def load_settings(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> Settings:
    """Return the settings of this process; `flags` come from the command line, by field name.

    Raises BadSettings with one sentence that names each faulty setting.
    """
    _reject_unknown_variables()
    _reject_empty_store_url()
    settings = _load(Settings, flags or {}, config_file)
    if settings.traces == "otlp":
        _reject_other_protocols()
    return settings


def settings_from_json(text: str) -> Settings:
    """Return the settings `Settings.to_json` wrote, without the environment of this process."""
    return Settings.model_validate_json(text)


def listening_address() -> str:
    """Return the first address of a server with these settings. Raises BadSettings."""
    return _load(Listening, {}, None).listen[0]


def health_address() -> str:
    """Return the health check address of such a server. Raises BadSettings."""
    listening = _load(Listening, {}, None)
    return (listening.health_listen or listening.listen)[0]


def target_from_environment() -> str | None:
    """Return the DEDUP_TARGET of the client commands."""
    return os.environ.get(TARGET_VARIABLE) or None


def file_from_environment(variable: str) -> Path | None:
    """Return the path in a variable of the client commands."""
    return Path(path) if (path := os.environ.get(variable)) else None


SettingsT = TypeVar("SettingsT", bound=Listening)


def _load(model: type[SettingsT], flags: dict[str, Any], config_file: Path | None) -> SettingsT:
    if config_file is None and (path := os.environ.get(CONFIG_VARIABLE)):
        config_file = Path(path)
    written = {} if config_file is None else _read(config_file)
    values = written | _environment() | flags
    if "store_url_file" in values and model is Settings:
        values["store_url"] = _store_url_of_file(values)
    try:
        return model(**values)
    except ValidationError as error:
        raise BadSettings("; ".join(_sentence(dict(detail)) for detail in error.errors())) from None


def _read(config_file: Path) -> dict[str, Any]:
    if not config_file.is_file():
        raise BadSettings(f"the settings file {str(config_file)!r} does not exist")
    return read_toml(
        config_file, lambda sentence: BadSettings(f"the settings file {str(config_file)!r} is not usable: {sentence}")
    )


def _store_url_of_file(values: dict[str, Any]) -> str:
    path = Path(values["store_url_file"])
    if "store_url" in values:
        raise BadSettings(
            f"{STORE_URL_VARIABLE} and {STORE_URL_VARIABLE}_FILE are both set, by a flag, a variable or the settings "
            "file: unset one of them"
        )
    url = read_text(path, lambda sentence: BadSettings(f"{STORE_URL_VARIABLE}_FILE ({path}) {sentence}"))
    if not url:
        raise BadSettings(f"{STORE_URL_VARIABLE}_FILE ({path}) is empty: write the URL of the store into it")
    return url


def _default_store_url() -> str:
    # One file per user.
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return f"sqlite://{Path(state).expanduser() / 'dedup-service' / 'claims.db'}"


def _environment() -> dict[str, str]:
    # Case is ignored, and empty variables count as unset: manifests often contain both.
    found = {name.upper(): value for name, value in os.environ.items() if value}
    variables = {name: f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    return {name: found[variable] for name, variable in variables.items() if variable in found}


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
    known = {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields} | _OTHER_VARIABLES
    for name in sorted(os.environ):
        if name.upper().startswith(ENV_PREFIX) and name.upper() not in known and not _LINK_VARIABLE.fullmatch(name):
            close = get_close_matches(name.upper(), known, n=1)
            hint = f": did you mean {close[0]}?" if close else ": see `dedup-service serve --help` for all settings"
            raise BadSettings(f"there is no setting {name}{hint}")


def _sentence(detail: dict[str, Any]) -> str:
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    name = str(detail["loc"][0])
    if detail["type"] == "extra_forbidden":
        return f"there is no setting {name!r}: see `dedup-service serve --help` for all settings"
    return f"{ENV_PREFIX}{name.upper()} (--{name.replace('_', '-')}): {message}"
