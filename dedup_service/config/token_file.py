"""The file of bearer tokens. Only digests of the tokens stay in memory."""

import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from dedup_service.config.errors import BadSettings
from dedup_service.config.files import read_toml

_MIN_LENGTH = 16
_TOKEN = re.compile(r"[\x21-\x7e]{16,4096}")
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(rf"{_DIGEST_PREFIX}[0-9a-f]{{64}}")


def read_tokens(path: Path) -> dict[bytes, str]:
    """Return the caller of each token, by the SHA-256 of the token.

    The file is TOML: the name of a caller, then its token or a list of them. A token is written as it is, or as
    `sha256:` and the hexadecimal digits of its SHA-256. Raises BadSettings with one sentence that names the caller at
    fault and contains no token.
    """
    digests: dict[bytes, str] = {}
    for caller, written in read_toml(path, lambda sentence: _bad(path, sentence), quote=False).items():
        for digest in _digests(path, caller, written):
            if digests.setdefault(digest, caller) != caller:
                raise _bad(path, f"{caller!r} has a token of {digests[digest]!r}: give each caller tokens of its own")
    if not digests:
        raise _bad(path, 'it has no token: write lines such as lucky-box-api = "TOKEN"')
    return digests


def _digests(path: Path, caller: str, written: object) -> Iterator[bytes]:
    tokens = written if isinstance(written, list) else [written]
    if not caller or not tokens:
        raise _bad(path, f'{caller!r} is not a name with a token: write lines such as lucky-box-api = "TOKEN"')
    for token in tokens:
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise _bad(
                path,
                f"{caller!r} has an invalid token: write at least {_MIN_LENGTH} visible ASCII characters in quotes, "
                "such as the output of `openssl rand -hex 32`; quote a name that contains a dot, too",
            )
        if not token.startswith(_DIGEST_PREFIX):
            yield sha256(token.encode()).digest()
        elif _DIGEST.fullmatch(token):
            yield bytes.fromhex(token.removeprefix(_DIGEST_PREFIX))
        else:
            raise _bad(path, f"{caller!r} has a {_DIGEST_PREFIX} without 64 hexadecimal digits in lower case")


def _bad(path: Path, sentence: str) -> BadSettings:
    return BadSettings(f"the token file {str(path)!r} is not usable: {sentence}")
