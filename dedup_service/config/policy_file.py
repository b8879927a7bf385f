"""The policy file: rules for namespaces and callers, checked as a whole."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, StrictBool, ValidationError, ValidationInfo

from dedup_service.config.durations import parse_duration
from dedup_service.config.errors import BadSettings
from dedup_service.config.files import read_toml


def read_policy_file(
    path: Path, *, namespace_fault: Callable[[str], str | None], rpcs: Collection[str]
) -> "PolicyFile":
    """Return the content of a policy file.

    `namespace_fault` returns the fault of a namespace's name; `rpcs` are the names a caller may list. Raises
    BadSettings with one sentence that names the file and all its faults.
    """
    text = read_toml(path, lambda sentence: unusable(path, sentence))
    try:
        return PolicyFile.model_validate(text, context={"namespace_fault": namespace_fault, "rpcs": rpcs})
    except ValidationError as error:
        raise unusable(path, "; ".join(_sentence(dict(detail)) for detail in error.errors())) from None


def unusable(path: Path, sentence: str) -> BadSettings:
    """Return the exception for a policy file with a fault."""
    return BadSettings(f"the policy file {str(path)!r} is not usable: {sentence}")


def _written_duration(value: object) -> int:
    # The author of a bare number probably means seconds.
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004 - pydantic turns a ValueError into a sentence
            f'{shortened(value)} is not a duration: write it in quotes with a unit, such as "250ms", "60s" or "7d"'
        )
    milliseconds = parse_duration(value)
    if not milliseconds:
        raise ValueError(f"{value!r} is zero: write at least 1ms")
    return milliseconds


def _namespace(name: str, info: ValidationInfo) -> str:
    if fault := (info.context or {})["namespace_fault"](name):
        raise ValueError(f"the name {fault}")
    return name


def _rpc(name: str, info: ValidationInfo) -> str:
    rpcs = (info.context or {})["rpcs"]
    if name not in rpcs:
        raise ValueError(f"there is no rpc {shortened(name)}: write some of {', '.join(rpcs)}")
    return name


def _list(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{shortened(value)} is not a list of names: write it as ["one", "two"]')
    return value


_DurationMs = Annotated[int, BeforeValidator(_written_duration)]
_Namespace = Annotated[str, AfterValidator(_namespace)]
_Rpc = Annotated[str, AfterValidator(_rpc)]


class NamespaceRules(BaseModel):
    """One table [namespaces.NAME]; durations are milliseconds, None if absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_ttl: _DurationMs | None = None
    max_ttl: _DurationMs | None = None
    retention: _DurationMs | None = None
    mode: Literal["enforce", "shadow"] = "enforce"


class CallerRules(BaseModel):
    """One table [callers.NAME]; None allows all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: Annotated[frozenset[_Namespace], BeforeValidator(_list)] | None = None
    rpcs: Annotated[frozenset[_Rpc], BeforeValidator(_list)] | None = None


class PolicyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    allow_unknown_namespaces: StrictBool = True
    namespaces: Mapping[_Namespace, NamespaceRules] = {}
    callers: Mapping[str, CallerRules] | None = None


def _sentence(detail: dict[str, Any]) -> str:
    """Return an error of pydantic as a sentence that says what to write."""
    kind, value = detail["type"], detail["input"]
    table, *path = detail["loc"]
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not path:
        return _sentence_of_the_file(kind, str(table), value)
    name, *keys = path
    subject, example, words = (
        ("caller", "pay.example", "namespaces or rpcs")
        if table == "callers"
        else ("namespace", "pay.eu", "default_ttl, max_ttl, retention or mode")
    )
    where = f"{subject} {name!r}: "
    if kind == "extra_forbidden":
        # TOML reads dots in a table's name as levels.
        hint = f' (quote a name with a dot, as in [{table}."{example}"])' if isinstance(value, dict) else ""
        return f"{where}there is no key {str(keys[-1])!r}: write {words}{hint}"
    if not keys:
        return f"{where}{shortened(value)} is not a table: write [{table}.NAME] above its keys"
    key = str(keys[0])
    if kind == "literal_error":
        return f'{where}{key} is {shortened(value)}: write "enforce" or "shadow"'
    return f"{where}{message}" if key == "[key]" else f"{where}{key}: {message}"


def _sentence_of_the_file(kind: str, key: str, value: object) -> str:
    if kind == "extra_forbidden":
        return (
            f"there is no key {key!r}: write allow_unknown_namespaces, or a table [namespaces.NAME] or [callers.NAME]"
        )
    if kind == "bool_type":
        return f"{key} is {shortened(value)}: write true or false"
    return f"{key} is {shortened(value)}, which is not a table: write [{key}.NAME] above the keys of each"
