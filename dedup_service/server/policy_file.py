"""The policy file: what the operator wrote about namespaces and callers, checked whole before any of it applies."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError

from dedup_service.claims import Policies, Policy
from dedup_service.durations import format_duration
from dedup_service.server.policy_callers import CallerRules, callers_of, namespace_name, sentence_of_a_caller
from dedup_service.setting_types import duration_setting
from dedup_service.settings import ENV_PREFIX, BadSettings, Settings


def load_policies(settings: Settings) -> Policies:
    """Return the rules of every namespace: those of the policy file over those of the settings.

    Without a policy file all namespaces are alike. Raises BadSettings with one sentence that names the file and
    everything that is wrong in it; then nothing of it applies.
    """
    max_ttl = settings.max_ttl
    default = Policy(settings.default_ttl, max_ttl, settings.retention_under(max_ttl))
    if settings.policy_file is None:
        return Policies(default)
    file = _read(settings.policy_file)
    policies = {name: rules.over(settings) for name, rules in file.namespaces.items()}
    if sentences := [
        text for name in policies for text in _contradictions(name, file.namespaces[name], policies[name])
    ]:
        raise _bad(settings.policy_file, "; ".join(sentences))
    if file.callers is None:
        return Policies(default, policies, file.allow_unknown_namespaces)
    if not settings.authenticates:
        raise _bad(
            settings.policy_file,
            f"it has callers, and nobody is asked who they are: set {ENV_PREFIX}TLS_CLIENT_CA or "
            f"{ENV_PREFIX}AUTH_TOKENS",
        )
    return Policies(default, policies, file.allow_unknown_namespaces, callers_of(file.callers))


def _written_duration(value: object) -> int:
    # A bare number would be milliseconds here and seconds in the mind of whoever wrote it.
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004 - the kind that pydantic turns into a sentence
            f'{shortened(value)} is not a duration: write it in quotes with a unit, such as "250ms", "60s" or "7d"'
        )
    milliseconds = duration_setting(value)
    if not milliseconds:
        raise ValueError(f"{value!r} is no time at all: write at least 1ms")
    return milliseconds


_DurationMs = Annotated[int, BeforeValidator(_written_duration)]


class _Rules(BaseModel):
    """One table [namespaces.NAME]; durations are milliseconds, and None is what was left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_ttl: _DurationMs | None = None
    max_ttl: _DurationMs | None = None
    retention: _DurationMs | None = None
    mode: Literal["enforce", "shadow"] = "enforce"

    def over(self, settings: Settings) -> Policy:
        """Return the policy in which the settings supply what was left out."""
        max_ttl = self.max_ttl or settings.max_ttl
        return Policy(
            default_ttl_ms=self.default_ttl or settings.default_ttl,
            max_ttl_ms=max_ttl,
            retention_ms=self.retention or settings.retention_under(max_ttl),
            shadow=self.mode == "shadow",
        )


class _File(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow_unknown_namespaces: StrictBool = True
    namespaces: Mapping[Annotated[str, AfterValidator(namespace_name)], _Rules] = {}
    callers: Mapping[str, CallerRules] | None = None


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(tomllib.loads(path.read_bytes().decode()))
    except OSError as error:
        raise _bad(path, f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _bad(path, f"it is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except ValidationError as error:
        raise _bad(path, "; ".join(_sentence(dict(detail)) for detail in error.errors())) from None
    except RecursionError:
        raise _bad(path, "it is not the TOML of a policy file: its values are nested too deep") from None
    except ValueError as error:
        raise _bad(path, f"it is not TOML: {error}") from None


def _bad(path: Path, sentence: str) -> BadSettings:
    return BadSettings(f"the policy file {str(path)!r} is not usable: {sentence}")


def _contradictions(name: str, rules: _Rules, policy: Policy) -> Iterator[str]:
    longest = _said("max_ttl", rules.max_ttl, policy.max_ttl_ms)
    for key, written, ms in (
        ("default_ttl", rules.default_ttl, policy.default_ttl_ms),
        ("retention", rules.retention, policy.retention_ms),
    ):
        if ms > policy.max_ttl_ms:
            yield (
                f"namespace {name!r}: {_said(key, written, ms)} is longer than {longest}: "
                f"write a {key} of at most {format_duration(policy.max_ttl_ms)}, or a longer max_ttl"
            )


def _said(key: str, written: int | None, ms: int) -> str:
    origin = f", from {ENV_PREFIX}{key.upper()}" if written is None else ""
    return f"{key} ({format_duration(ms)}{origin})"


def _sentence(detail: dict[str, Any]) -> str:
    kind, value = detail["type"], detail["input"]
    top, *inner = detail["loc"]
    if not inner:
        return _sentence_of_the_file(kind, str(top), value)
    if top == "callers":
        return sentence_of_a_caller(detail)
    where = f"namespace {inner[0]!r}: "
    key = str(inner[-1]) if len(inner) > 1 else ""
    if kind == "extra_forbidden":
        # TOML reads the dots of a table's name as levels.
        hint = ' (a name with a dot is quoted, as in [namespaces."pay.eu"])' if isinstance(value, dict) else ""
        return f"{where}there is no key {key!r}: write default_ttl, max_ttl, retention or mode{hint}"
    if kind == "literal_error":
        return f'{where}{key} is {shortened(value)}: write "enforce" or "shadow"'
    if not key:
        return f"{where}{shortened(value)} is no table: write [namespaces.NAME] above its keys"
    message = str(detail["msg"]).removeprefix("Value error, ")
    return f"{where}{message}" if key == "[key]" else f"{where}{key}: {message}"


def _sentence_of_the_file(kind: str, key: str, value: object) -> str:
    if kind == "extra_forbidden":
        return (
            f"there is no key {key!r}: write allow_unknown_namespaces, or a table [namespaces.NAME] or [callers.NAME]"
        )
    if kind == "bool_type":
        return f"{key} is {shortened(value)}: write true or false"
    return f"{key} is {shortened(value)}, which is no table: write [{key}.NAME] above the keys of each"
