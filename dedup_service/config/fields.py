"""Kinds of settings: how the values of each kind are written, checked, limited and shown."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, get_args

from dedup_service.config.addresses import Address, parse_addresses
from dedup_service.config.durations import format_duration, parse_duration

Parse = Callable[[Any], Any]
"""Returns the value of text or of a TOML value. Raises ValueError: the value, what is wrong, what to write."""


def parse_values(parsers: Mapping[str, Parse], written: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the parsed values and the faults, each by name and in the order of `parsers`; ignores other names."""
    values, faults = {}, {}
    for name, parse in parsers.items():
        if name in written:
            try:
                values[name] = parse(written[name])
            except ValueError as error:
                faults[name] = str(error)
    return values, faults


@dataclass(frozen=True, slots=True)
class Kind:
    """The parser of a setting, the placeholder of its value in the help, and its limits in words."""

    metavar: str
    parse: Parse
    limits: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting, apart from its name."""

    default: Any
    kind: Kind
    description: str

    @property
    def shown_default(self) -> str:
        """The default as an operator writes it, or ""."""
        if self.default is None:
            return ""
        if self.kind is DURATION:
            return format_duration(self.default)
        if self.kind is ADDRESSES:
            return ",".join(self.default)
        return str(self.default).lower() if self.kind is SWITCH else str(self.default)


def setting(default: Any, kind: Kind, description: str, *, secret: bool = False) -> Any:  # noqa: ANN401 - as dataclasses.field
    """Return a dataclass field; a `secret` is not in the representation of its object."""
    return field(default=default, repr=not secret, metadata={_SETTING: Setting(default, kind, description)})


def settings_of(model: type[Any]) -> dict[str, Setting]:
    """Return the settings of a dataclass by name."""
    return {each.name: each.metadata[_SETTING] for each in fields(model)}


_SETTING = "setting"


def shown(value: object) -> str:
    """Return the representation of a value, shortened to fit into a sentence."""
    try:
        return shortened(value)
    except ValueError:
        # Python does not write numbers of more than 4300 digits.
        return "the number"


def positive_duration(value: object) -> int:
    """Return the milliseconds of a duration above 0."""
    # The author of a bare number probably means seconds.
    if not isinstance(value, str):
        raise ValueError(  # noqa: TRY004 - as all parsers
            f'{shown(value)} is not a duration: write it in quotes with a unit, such as "250ms", "60s" or "7d"'
        )
    milliseconds = parse_duration(value)
    if not milliseconds:
        raise ValueError(f"{value!r} is zero: write at least 1ms")
    return milliseconds


def whole_number(least: int, most: int | None = None) -> Kind:
    """Return the kind of integers within these limits."""
    return _number(int, least, most)


def number(least: float, most: float) -> Kind:
    """Return the kind of numbers within these limits."""
    return _number(float, least, most)


def _number(read: type[int] | type[float], least: float, most: float | None) -> Kind:
    metavar, noun = ("INTEGER", "a whole number") if read is int else ("NUMBER", "a number")
    limits = (f"at least {least}",) if most is None else (f"at least {least}", f"at most {most}")

    def parse(value: Any) -> float:  # noqa: ANN401 - as read from the operator
        # Compares exact types, since a boolean is an int. Digits of other scripts are refused, as in durations.
        try:
            found = read(value) if type(value) in {str, int, read} and str(value).isascii() else math.nan
        except (ValueError, OverflowError):
            found = math.nan
        if math.isnan(found):
            raise ValueError(f"{shown(value)} is not {noun}: write {' and '.join(limits)}")
        if found < least:
            raise ValueError(f"{shown(found)} is too small: write at least {least}")
        if most is not None and found > most:
            raise ValueError(f"{shown(found)} is too large: write at most {most}")
        return found

    return Kind(metavar, parse, limits)


def choice(literal: object) -> Kind:
    """Return the kind of the words of a Literal."""
    words = get_args(literal)

    def parse(value: object) -> object:
        if value not in words:
            raise ValueError(f"{shown(value)} is unknown: write {', '.join(words[:-1])} or {words[-1]}")
        return value

    return Kind("|".join(words), parse)


def text_up_to(most: int) -> Kind:
    """Return the kind of UTF-8 text of at most this many characters."""

    def parse(value: object) -> str:
        found = _text(value)
        if len(found) > most:
            raise ValueError(f"{shown(found)} has {len(found)} characters: write at most {most}")
        return found

    return Kind("TEXT", parse, (f"at most {most} characters",))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not text: write it in quotes")  # noqa: TRY004 - as all parsers
    # Python decodes invalid UTF-8 in flags and variables to surrogates.
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)} is not valid UTF-8: write it as UTF-8") from None
    return value


def _secret(value: object) -> str:
    try:
        found = _text(value)
    except ValueError:
        raise ValueError("it is not UTF-8 text: write it in quotes, as UTF-8") from None
    if not found:
        raise ValueError("it is set but empty: give it a value, or remove it")
    return found


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"{shown(value)} is not a path: write the path of a file")
    return Path(value)


_SWITCHES: dict[object, bool] = {
    **dict.fromkeys((True, "true", "yes", "on", "t", "y", "1"), True),
    **dict.fromkeys((False, "false", "no", "off", "f", "n", "0"), False),
}


def _switch(value: object) -> bool:
    word = value.lower() if isinstance(value, str) else value
    if not isinstance(word, str | int) or word not in _SWITCHES:
        raise ValueError(f"{shown(value)} is neither true nor false: write one of them")
    return _SWITCHES[word]


def _addresses(value: object) -> tuple[str, ...]:
    return parse_addresses(",".join(map(_text, value)) if isinstance(value, list) else _text(value))


def _tcp_address(value: object) -> str:
    found = _text(value)
    Address.parse_tcp(found)
    return found


ADDRESSES = Kind("TEXT", _addresses)
DURATION = Kind("DURATION", positive_duration, ("at least 1ms",))
FILE = Kind("FILE", _path)
SECRET = Kind("TEXT", _secret)
SWITCH = Kind("", _switch)
TCP_ADDRESS = Kind("TEXT", _tcp_address)
