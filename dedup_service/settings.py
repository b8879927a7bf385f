"""The settings: from flags, the environment and a file, in that order, checked once. Only this module reads them."""

import os
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_core import to_json

from dedup_service.addresses import Addresses, MetricsAddress, beyond_this_host
from dedup_service.durations import format_duration
from dedup_service.security_settings import SecuritySettings
from dedup_service.setting_types import DurationMs, EngineName, OptionalDurationMs, WorkerCount

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

# Kubernetes and Docker describe a service called "dedup" to its neighbours in variables like these.
_LINK_VARIABLE = re.compile(r"DEDUP_(\w+_)?(SERVICE_HOST|SERVICE_PORT|PORT)(_\w+)?")

# How long a completed transaction is remembered where neither its holder nor the operator says, and the maximum allows.
_DEFAULT_RETENTION_MS = 24 * 3_600_000


class BadSettings(Exception):
    """A setting is wrong; the message is one sentence for the operator and never contains a secret."""


def default_store_url() -> str:
    """Return the URL of the embedded store that is used when none is set: one file for each user of this host."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return f"sqlite://{Path(state).expanduser() / 'dedup-service' / 'claims.db'}"


class Listening(BaseModel):
    """Where the server listens: all that a probe beside it needs to know."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    listen: Addresses = Field(
        ("127.0.0.1:50051",), description="Where to serve: host:port or unix:///path, several with commas between."
    )
    health_listen: Addresses = Field(
        (),
        description="Where to serve the health service alone, for probes: plaintext, and open to everybody.  "
        "[default: nowhere, --listen serves it too]",
    )


class Settings(SecuritySettings, Listening):
    """Everything that an operator can set. Durations are milliseconds inside."""

    model_config = ConfigDict(extra="forbid")

    store_url: SecretStr | None = Field(
        None,
        description="Where claims are kept: redis://, rediss:// (TLS), unix://, redis+sentinel:// or "
        "redis+cluster:// with [user:password@], or sqlite:///path for the embedded store of this host alone.  "
        "[default: sqlite, in the state folder of the user]",
    )
    store_url_file: Path | None = Field(
        None,
        description="A file with that URL instead, which no list of processes or variables shows.  [default: none]",
    )
    require_store_url: bool = Field(
        False, description="Refuse to start without a store URL instead of using the embedded store."
    )
    key_prefix: str = Field("dedup:", max_length=64, description="What every Redis key begins with.")
    key_layout: Literal["prefixed", "raw"] = Field(
        "prefixed",
        description="prefixed: {prefix}{namespace}:{id}. raw: the id alone, to share claims with services that write "
        "them by SETNX themselves.",
    )
    min_replicas: int = Field(
        0,
        ge=0,
        le=100,
        description="How many Redis replicas have to acknowledge a claim before its caller is told CLAIMED.",
    )
    default_ttl: DurationMs = Field(60_000, description="How long a claim lives when its caller does not say.")
    max_ttl: DurationMs = Field(7 * 86_400_000, description="How long a claim may live at most.")
    retention: OptionalDurationMs = Field(
        None,
        description="How long a completed transaction is remembered when its holder does not say.  "
        "[default: 24h, or the maximum ttl where that is shorter]",
    )
    max_result_bytes: int = Field(
        4_096, gt=0, le=1_048_576, description="How many bytes the result of a completed transaction may have."
    )
    policy_file: Path | None = Field(
        None,
        description="A TOML file of namespaces and what applies to each; SIGHUP rereads it.  "
        "[default: none, all namespaces are alike]",
    )
    max_in_flight: int = Field(
        2_000, gt=0, description="How many calls may be under way at a time; more are refused. Health is exempt."
    )
    store_timeout: DurationMs = Field(1_000, description="How long to wait for one answer of the store.")
    readiness: Literal["store", "process"] = Field(
        "store",
        description="What the health service calls ready. store: while the store answers. process: while this process "
        "takes calls, whatever the store does.",
    )
    strict: bool = Field(False, description="Refuse to start when the doctor finds something critical about the store.")
    shutdown_grace: DurationMs = Field(
        10_000, description="How long calls under way may take to end after SIGTERM or SIGINT."
    )
    engine: EngineName = Field(
        "grpcio",
        description="What speaks gRPC: grpcio, or native, which is faster and younger; see docs/engines.md.",
    )
    workers: WorkerCount = Field(
        1, description="How many processes share the TCP port: 1 to 64, or auto for one a CPU. For more than one core."
    )
    metrics_listen: MetricsAddress = Field(
        None,
        description="Where to show Prometheus metrics over HTTP, to everybody who can reach it: host:port.  "
        "[default: nowhere]",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The least severe log lines to write; successful calls are info."
    )
    log_sample: float = Field(
        0.0, ge=0, le=1, description="The share of successful calls to log, 0 to 1; failed ones are logged always."
    )
    log_slow: DurationMs = Field(250, description="Successful calls that take as long as this are logged always.")
    log_transaction_ids: Literal["hashed", "plain"] = Field(
        "hashed", description="How transaction ids stand in the log: as the start of their SHA-256, or as they are."
    )
    log_id_key_file: Path | None = Field(
        None,
        description="A file with a secret of 16 bytes or more: ids stand in the log as the start of their HMAC-SHA-256 "
        "with it, which nobody can guess without it.  [default: none, plain SHA-256]",
    )
    traces: Literal["off", "otlp"] = Field(
        "off",
        description="otlp: send OpenTelemetry traces by OTLP over gRPC, as the standard OTEL_* variables say; needs "
        "the extra `otel`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.default_ttl > self.max_ttl:
            raise ValueError(
                f"{ENV_PREFIX}DEFAULT_TTL ({format_duration(self.default_ttl)}) is longer than "
                f"{ENV_PREFIX}MAX_TTL ({format_duration(self.max_ttl)}): lower the one or raise the other"
            )
        if self.retention is not None and self.retention > self.max_ttl:
            raise ValueError(
                f"{ENV_PREFIX}RETENTION ({format_duration(self.retention)}) is longer than "
                f"{ENV_PREFIX}MAX_TTL ({format_duration(self.max_ttl)}): lower the one or raise the other"
            )
        if self.require_store_url and self.store_url is None:
            raise ValueError(
                f"{ENV_PREFIX}STORE_URL is not set and {ENV_PREFIX}REQUIRE_STORE_URL is: a container that dedups "
                f"against itself alone pays twice. Set {ENV_PREFIX}STORE_URL=redis://host:6379/0"
            )
        self._check_shared_sockets()
        self.check_security(self.listen)
        return self

    def _check_shared_sockets(self) -> None:
        for name, addresses in (("LISTEN", self.listen), ("HEALTH_LISTEN", self.health_listen)):
            if self.workers > 1 and (sockets := [address for address in addresses if address.startswith("unix:")]):
                raise ValueError(
                    f"{ENV_PREFIX}WORKERS is {self.workers} and {ENV_PREFIX}{name} names {sockets[0]}: several "
                    f"processes cannot share a Unix socket. Set {ENV_PREFIX}WORKERS=1, or listen on a loopback address "
                    "such as 127.0.0.1:50051"
                )

    def to_json(self) -> str:
        """Return all settings for another process of this service: with the password of the store URL."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        plain = {
            name: value.get_secret_value() if isinstance(value, SecretStr) else value for name, value in values.items()
        }
        return to_json(plain).decode()

    @property
    def reflects(self) -> bool:
        """Whether tools are told which services there are."""
        if self.reflection == "auto":
            return not beyond_this_host(self.listen)
        return self.reflection == "on"

    @property
    def effective_store_url(self) -> str:
        """The store URL to use, which may contain a password."""
        return self.store_url.get_secret_value() if self.store_url else default_store_url()

    def retention_under(self, max_ttl: int) -> int:
        """Return the retention where claims live at most `max_ttl`: as set, else the default cut to that maximum."""
        return min(_DEFAULT_RETENTION_MS, max_ttl) if self.retention is None else self.retention


def load_settings(flags: dict[str, Any] | None = None, config_file: Path | None = None) -> Settings:
    """Return the settings of this process; `flags` holds what the command line said, by field name.

    Raises BadSettings, with one sentence that names each setting at fault.
    """
    _refuse_unknown_variables()
    _refuse_empty_store_url()
    settings = _load(Settings, flags or {}, config_file)
    if settings.traces == "otlp":
        _refuse_other_protocols()
    return settings


def settings_from_json(text: str) -> Settings:
    """Return the settings that `Settings.to_json` wrote; this process's own environment does not count."""
    return Settings.model_validate_json(text)


def listening_address() -> str:
    """Return the first address that a server with the settings of this process listens on; raise BadSettings."""
    return _load(Listening, {}, None).listen[0]


def health_address() -> str:
    """Return where a server with the settings of this process is asked for its health; raise BadSettings."""
    listening = _load(Listening, {}, None)
    return (listening.health_listen or listening.listen)[0]


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
    try:
        return tomllib.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise BadSettings(f"the settings file {str(config_file)!r} cannot be read: {error}") from None


def _store_url_of_file(values: dict[str, Any]) -> str:
    path = Path(values["store_url_file"])
    if "store_url" in values:
        raise BadSettings(
            f"{STORE_URL_VARIABLE} and {STORE_URL_VARIABLE}_FILE are both set: unset one of them, by whichever of "
            "flag, variable and settings file it came"
        )
    try:
        url = path.read_text().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise BadSettings(f"{STORE_URL_VARIABLE}_FILE ({path}) cannot be read: {reason}") from None
    if not url:
        raise BadSettings(f"{STORE_URL_VARIABLE}_FILE ({path}) is empty: write the URL of the store into it")
    return url


def _environment() -> dict[str, str]:
    # Case does not matter, and an empty variable is as none: manifests often have both.
    found = {name.upper(): value for name, value in os.environ.items() if value}
    variables = {name: f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    return {name: found[variable] for name, variable in variables.items() if variable in found}


def target_from_environment() -> str | None:
    """Return the server that the client commands should call, if the environment names one."""
    return os.environ.get(TARGET_VARIABLE) or None


def file_from_environment(variable: str) -> Path | None:
    """Return the path that one of the variables of the client commands holds, if it holds one."""
    return Path(path) if (path := os.environ.get(variable)) else None


def _refuse_empty_store_url() -> None:
    # An unfilled secret in a manifest must not mean the embedded store, which dedups against this host alone.
    if os.environ.get(STORE_URL_VARIABLE) == "":
        raise BadSettings(f"{STORE_URL_VARIABLE} is set but empty: give it a value, or unset it for the embedded store")


def _refuse_other_protocols() -> None:
    # Spans that are sent in another protocol than the collector's are lost, and only the log says so.
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if protocol := os.environ.get(name):
            if protocol != "grpc":
                raise BadSettings(
                    f"{ENV_PREFIX}TRACES is otlp and {name} is {protocol}: this service sends traces by gRPC alone. "
                    f"Set {name}=grpc and an endpoint that takes it, which is port 4317 by custom"
                )
            return


def _refuse_unknown_variables() -> None:
    # A misspelt DEDUP_STORE_URL would start on the embedded store and dedup against this host alone.
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
