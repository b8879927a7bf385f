"""Reads the key that ids are hashed with in the log."""

from dedup_service.config.settings import BadSettings, Settings
from dedup_service.observability.logged_ids import LoggedIds

# A shorter one could be found by trying all that there are.
_MIN_KEY_BYTES = 16

_SETTING = "DEDUP_LOG_ID_KEY_FILE (--log-id-key-file)"


def logged_ids(settings: Settings) -> LoggedIds:
    """Return how ids stand in the log by the settings; raise BadSettings when the key file cannot be used.

    White space around the key is no part of it, so that an editor's last line break changes nothing.
    """
    plain = settings.log_transaction_ids == "plain"
    path = settings.log_id_key_file
    if path is None:
        return LoggedIds(plain=plain)
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(f"{_SETTING}: cannot read {str(path)!r}: {error.strerror}") from None
    if len(key) < _MIN_KEY_BYTES:
        raise BadSettings(
            f"{_SETTING}: {str(path)!r} holds {len(key)} bytes, which can be guessed: write at least "
            f"{_MIN_KEY_BYTES}, such as `openssl rand -hex 32` makes"
        )
    return LoggedIds(plain=plain, key=key)
