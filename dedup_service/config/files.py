"""The files an operator writes: TOML, secrets, and the sentence for each way one cannot be read."""

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dedup_service.config.errors import BadSettings

Refuse = Callable[[str], BadSettings]


def read_toml(path: Path, refuse: Refuse, *, quote: bool = True) -> dict[str, Any]:
    """Return the content of a TOML file; raise what `refuse` makes of a sentence about the file.

    With `quote` off the sentence quotes nothing from the file, which may hold secrets.
    """
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
    """Return the text of a small file without surrounding white space; raise as `read_toml` does."""
    try:
        return path.read_text().strip()
    except OSError as error:
        raise refuse(f"cannot be read: {error.strerror}") from None
    except ValueError:
        raise refuse("cannot be read: it is not UTF-8") from None


def read_log_id_key(path: Path | None) -> bytes | None:
    """Return the key that transaction ids are hashed with in the log, without surrounding white space.

    Raises BadSettings for a file that cannot be read or holds fewer than 16 bytes.
    """
    if path is None:
        return None
    setting = "DEDUP_LOG_ID_KEY_FILE (--log-id-key-file)"
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(f"{setting}: cannot read {str(path)!r}: {error.strerror}") from None
    # A shorter key could be found by trying every one.
    if len(key) < _MIN_KEY_BYTES:
        raise BadSettings(
            f"{setting}: {str(path)!r} holds {len(key)} bytes, which can be guessed: write at least {_MIN_KEY_BYTES}, "
            "such as the output of `openssl rand -hex 32`"
        )
    return key


_MIN_KEY_BYTES = 16
