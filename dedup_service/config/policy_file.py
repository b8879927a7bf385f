"""The policy file: rules for namespaces and callers, checked as a whole."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dedup_service.config.errors import BadSettings
from dedup_service.config.fields import Parse, parse_values, positive_duration, shown
from dedup_service.config.files import read_toml

Fault = Callable[[str], str | None]
"""Returns what is wrong with a name."""


@dataclass(frozen=True, slots=True)
class NamespaceRules:
    """One table [namespaces.NAME]; durations are milliseconds, None if absent."""

    default_ttl: int | None = None
    max_ttl: int | None = None
    retention: int | None = None
    mode: Literal["enforce", "shadow"] = "enforce"


@dataclass(frozen=True, slots=True)
class CallerRules:
    """One table [callers.NAME]; None allows all."""

    namespaces: frozenset[str] | None = None
    rpcs: frozenset[str] | None = None


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """The whole file."""

    allow_unknown_namespaces: bool = True
    namespaces: Mapping[str, NamespaceRules] = field(default_factory=dict)
    callers: Mapping[str, CallerRules] | None = None


def read_policy_file(path: Path, *, namespace_fault: Fault, rpcs: Collection[str]) -> PolicyFile:
    """Return the content of a policy file.

    `namespace_fault` returns the fault of a namespace's name; `rpcs` are the names a caller may list. Raises
    BadSettings with one sentence that names the file and all its faults.
    """
    written = read_toml(path, lambda sentence: unusable(path, sentence))

    def name_fault(name: str) -> str | None:
        return f"the name {fault}" if (fault := namespace_fault(name)) else None

    def rpc_fault(name: str) -> str | None:
        return None if name in rpcs else f"there is no rpc {shown(name)}: write one or more of {', '.join(rpcs)}"

    of_namespace: dict[str, Parse] = {
        "default_ttl": positive_duration,
        "max_ttl": positive_duration,
        "retention": positive_duration,
        "mode": _mode,
    }
    of_caller = {
        "namespaces": _names(lambda name: f"{fault}, unlike {shown(name)}" if (fault := name_fault(name)) else None),
        "rpcs": _names(rpc_fault),
    }
    namespaces = _Tables("namespace", "pay.eu", NamespaceRules, of_namespace, name_fault)
    callers = _Tables("caller", "pay.example", CallerRules, of_caller)
    parsers: dict[str, Parse] = {
        "allow_unknown_namespaces": _boolean,
        "namespaces": namespaces.parse,
        "callers": callers.parse,
    }
    values, faults = parse_values(parsers, written)
    sentences = [
        *_named(faults),
        *namespaces.faults,
        *callers.faults,
        *(
            f"there is no key {key!r}: write allow_unknown_namespaces, or a table [namespaces.NAME] or [callers.NAME]"
            for key in written
            if key not in parsers
        ),
    ]
    if sentences:
        raise unusable(path, "; ".join(sentences))
    return PolicyFile(**values)


def unusable(path: Path, sentence: str) -> BadSettings:
    """Return the exception for a policy file with a fault."""
    return BadSettings(f"the policy file {str(path)!r} is not usable: {sentence}")


class _Tables:
    """The tables [namespaces.NAME] or [callers.NAME], and the faults in them."""

    def __init__(
        self,
        subject: str,
        dotted_name: str,
        rules: Callable[..., Any],
        parsers: Mapping[str, Parse],
        name_fault: Fault = lambda _: None,
    ) -> None:
        self._subject, self._dotted_name, self._rules = subject, dotted_name, rules
        self._parsers, self._name_fault = parsers, name_fault
        self.faults: list[str] = []

    def parse(self, written: object) -> dict[str, Any]:
        """Return the rules by name. Raises ValueError where `written` is not a table."""
        if not isinstance(written, dict):
            raise ValueError(  # noqa: TRY004 - as all parsers
                f"is {shown(written)}, which is not a table: write [{self._subject}s.NAME] above the keys of each"
            )
        return {name: self._parse_table(name, table) for name, table in written.items()}

    def _parse_table(self, name: str, table: object) -> Any:  # noqa: ANN401 - one of two classes
        found = [fault] if (fault := self._name_fault(name)) else []
        values: dict[str, Any] = {}
        if isinstance(table, dict):
            values, faults = parse_values(self._parsers, table)
            found += _named(faults)
            found += [self._no_key(key, value) for key, value in table.items() if key not in self._parsers]
        else:
            found.append(f"{shown(table)} is not a table: write [{self._subject}s.NAME] above its keys")
        self.faults += [f"{self._subject} {name!r}: {fault}" for fault in found]
        return self._rules(**values)

    def _no_key(self, key: str, value: object) -> str:
        *words, last = self._parsers
        # TOML reads dots in a table's name as levels.
        hint = f' (quote a name with a dot, as in [{self._subject}s."{self._dotted_name}"])'
        return f"there is no key {key!r}: write {', '.join(words)} or {last}{hint if isinstance(value, dict) else ''}"


def _named(faults: Mapping[str, str]) -> list[str]:
    return [f"{key} {fault}" if fault.startswith("is ") else f"{key}: {fault}" for key, fault in faults.items()]


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {shown(value)}: write true or false")  # noqa: TRY004 - as all parsers
    return value


def _mode(value: object) -> object:
    if value not in ("enforce", "shadow"):
        raise ValueError(f'is {shown(value)}: write "enforce" or "shadow"')
    return value


def _names(fault_of: Fault) -> Parse:
    def parse(value: object) -> frozenset[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(f'{shown(value)} is not a list of names: write it as ["one", "two"]')
        if faults := [fault for name in value if (fault := fault_of(name))]:
            raise ValueError("; ".join(faults))
        return frozenset(value)

    return parse
