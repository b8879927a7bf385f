"""The file of bearer tokens: what the operator wrote, of which only digests stay in memory."""

import re
import tomllib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from dedup_service.servicer.caller_gate import BearerTokens
from dedup_service.settings import BadSettings

_MIN_LENGTH = 16
_TOKEN = re.compile(r"[\x21-\x7e]{16,4096}")
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(rf"{_DIGEST_PREFIX}[0-9a-f]{{64}}")


def load_tokens(path: Path) -> BearerTokens:
    """Return the tokens of a file: TOML, with the name of a caller before each token or list of them.

    A token is written as it is, or as `sha256:` and the hexadecimal digits of its SHA-256. Raises BadSettings with one
    sentence that names the caller at fault and shows no token.
    """
    digests: dict[bytes, str] = {}
    for caller, written in _read(path).items():
        for digest in _digests(path, caller, written):
            if digests.setdefault(digest, caller) != caller:
                raise _bad(path, f"{caller!r} has a token of {digests[digest]!r}: give each caller tokens of its own")
    if not digests:
        raise _bad(path, 'it has no token: write lines such as lucky-box-api = "TOKEN"')
    return BearerTokens(digests.items())


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise _bad(path, f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise _bad(path, f"it is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except RecursionError:
        raise _bad(path, "its values are nested too deep") from None
    except ValueError as error:
        # What is wrong may be quoted from the line with the token.
        where = re.search(r"at line \d+|at end of document", str(error))
        raise _bad(path, f"it is not TOML{f' ({where[0]})' if where else ''}") from None


def _digests(path: Path, caller: str, written: object) -> Iterator[bytes]:
    tokens = written if isinstance(written, list) else [written]
    if not caller or not tokens:
        raise _bad(path, f'{caller!r} is no name with a token: write lines such as lucky-box-api = "TOKEN"')
    for token in tokens:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise _bad(
                path,
                f"{caller!r} has something that is no token: write at least {_MIN_LENGTH} visible ASCII characters in "
                "quotes, such as the output of `openssl rand -hex 32`; a name with a dot is quoted too",
            )
        if not token.startswith(_DIGEST_PREFIX):
            yield sha256(token.encode()).digest()
        elif _DIGEST.fullmatch(token):
            yield bytes.fromhex(token.removeprefix(_DIGEST_PREFIX))
        else:
            raise _bad(path, f"{caller!r} has a {_DIGEST_PREFIX} without 64 hexadecimal digits in lower case")


def _bad(path: Path, sentence: str) -> BadSettings:
    return BadSettings(f"the token file {str(path)!r} is not usable: {sentence}")
