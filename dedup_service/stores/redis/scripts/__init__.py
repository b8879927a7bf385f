"""The Lua scripts, each of which compares a token and changes its transaction in one atomic step."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class Script:
    """One script, as EVAL takes it and as EVALSHA names it."""

    text: bytes
    sha: str


def _load(name: str) -> Script:
    folder = files(__package__)
    text = folder.joinpath("held.lua").read_bytes() + folder.joinpath(f"{name}.lua").read_bytes()
    return Script(text, hashlib.sha1(text, usedforsecurity=False).hexdigest())


COMPLETE = _load("complete")
RELEASE = _load("release")
EXTEND = _load("extend")
CONFIRM = _load("confirm")
