"""The tables [callers.NAME] of the policy file: what each caller may ask for."""

from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from dedup_service.claims import Caller
from dedup_service.claims.limits import identity_violations
from dedup_service.servicer.dedup_servicer import METHODS


def namespace_name(name: str) -> str:
    """Return the name of a namespace, or raise ValueError."""
    for violation in identity_violations("any", name):
        raise ValueError(f"the name {violation.description}")
    return name


def _rpc(name: str) -> str:
    if name not in METHODS:
        raise ValueError(f"there is no rpc {shortened(name)}: write some of {', '.join(METHODS)}")
    return name


def _list(value: object) -> object:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f'{shortened(value)} is no list of names: write it as ["one", "two"]')
    return value


class CallerRules(BaseModel):
    """One such table; None is what was left out, and allows all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    namespaces: Annotated[frozenset[Annotated[str, AfterValidator(namespace_name)]], BeforeValidator(_list)] | None = (
        None
    )
    rpcs: Annotated[frozenset[Annotated[str, AfterValidator(_rpc)]], BeforeValidator(_list)] | None = None


def callers_of(tables: Mapping[str, CallerRules]) -> dict[str, Caller]:
    """Return the callers of the tables, by name."""
    return {name: Caller(name, rules.namespaces, rules.rpcs) for name, rules in tables.items()}


def sentence_of_a_caller(detail: dict[str, Any]) -> str:
    """Return what is wrong in one of the tables, for one of pydantic's errors in it."""
    _, name, *inner = detail["loc"]
    where = f"caller {name!r}: "
    if detail["type"] == "extra_forbidden":
        # TOML reads the dots of a table's name as levels.
        hint = (
            ' (a name with a dot is quoted, as in [callers."pay.example"])' if isinstance(detail["input"], dict) else ""
        )
        return f"{where}there is no key {str(inner[-1])!r}: write namespaces or rpcs{hint}"
    if not inner:
        return f"{where}{shortened(detail['input'])} is no table: write [callers.NAME] above its keys"
    return f"{where}{inner[0]}: {str(detail['msg']).removeprefix('Value error, ')}"
