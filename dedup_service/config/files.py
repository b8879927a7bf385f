"""The operator's files: TOML, secrets and bearer tokens, and a sentence for each fault."""

import re
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from dedup_service.config.errors import BadSettings

Refuse = Callable[[str], BadSettings]


def read_toml(path: Path, refuse: Refuse, *, quote: bool = True) -> dict[str, Any]:
    """Return the content of a TOML file; raise `refuse(sentence)` for a fault.

    `quote=False` keeps the file's text, which may hold secrets, out of the sentence.
    """
    # Imported late: many processes read no TOML file.
    import tomllib  # noqa: PLC0415 - as above

    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise refuse(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise refuse(f"it is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except RecursionError:
        raise refuse("it is not valid TOML here: its values are nested too deep") from None
    except ValueError as error:
        if quote:
            raise refuse(f"it is not valid TOML: {error}") from None
        where = re.search(r"at line \d+|at end of document", str(error))
        raise refuse(f"it is not valid TOML{f' ({where[0]})' if where else ''}") from None


def read_text(path: Path, refuse: Refuse) -> str:
    """Return the stripped text of a small file; raise as `read_toml` does."""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise refuse("cannot be read: it is not UTF-8") from None


def read_log_id_key(path: Path | None) -> bytes | None:
    """Return the stripped key for the hashes of transaction ids in the log.

    Raises BadSettings for a file that is unreadable or holds fewer than 16 bytes.
    """
    if path is None:
        return None
    setting = "DEDUP_LOG_ID_KEY_FILE (--log-id-key-file)"
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(f"{setting}: cannot read {str(path)!r}: {error.strerror}") from None
    # Shorter keys can be found by trying them all.
    if len(key) < _MIN_KEY_BYTES:
        raise BadSettings(
            f"{setting}: {str(path)!r} holds {len(key)} bytes, which can be guessed: write at least {_MIN_KEY_BYTES}, "
            "such as the output of `openssl rand -hex 32`"
        )
    return key


_MIN_KEY_BYTES = 16


_MIN_LENGTH = 16
_TOKEN = re.compile(r"[\x21-\x7e]{16,4096}")
_DIGEST_PREFIX = "sha256:"
_DIGEST = re.compile(rf"{_DIGEST_PREFIX}[0-9a-f]{{64}}")


def read_tokens(path: Path) -> dict[bytes, str]:
    """Return the caller of each token, by the SHA-256 of the token.

    The TOML file maps a caller to a token or a list of them, in plain text or as `sha256:` and the hexadecimal SHA-256.
    Raises BadSettings with one sentence that names the caller at fault and contains no token.
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
