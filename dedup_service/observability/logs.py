"""Structured logs of this service and its libraries: one JSON object per line on standard error."""

import hashlib
import hmac
import logging
import sys
from collections.abc import MutableMapping
from typing import Any, cast

# structlog imports an installed rich for consoles that are unused here: 60 ms of every start.
_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    del sys.modules["rich"]
    if _rich is not None:
        sys.modules["rich"] = _rich

Logger = structlog.typing.FilteringBoundLogger
"""The service's logger: `log.info("noun_verb_past", field=value)`."""

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_SHARED: tuple[structlog.typing.Processor, ...] = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    structlog.processors.format_exc_info,
)


def configure_logs(level: str, *, worker: int | None = None) -> None:
    """Send all log records of this process and its libraries to standard error as JSON lines.

    `worker` is added to each line.
    """
    shared = _SHARED if worker is None else (*_SHARED, _with_worker(worker))
    renderer = structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
            foreign_pre_chain=shared,
        )
    )
    logging.basicConfig(level=max(LEVELS[level], logging.INFO), handlers=[handler], force=True)


def logger() -> Logger:
    """Return the log of the service."""
    return cast("Logger", structlog.get_logger())


def _with_worker(number: int) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ANN401 - structlog's
        event["worker"] = number
        return event

    return add


class LoggedIds:
    """Transaction ids as the log shows them: searchable by the known id, not readable.

    Plain, or the first 16 hexadecimal digits of their HMAC-SHA-256 with `key`, or of their SHA-256 without a key, which
    reveals ids to anyone who can list the possible ones.
    """

    def __init__(self, *, plain: bool, key: bytes | None = None) -> None:
        self._plain = plain
        self._key = key

    def shown(self, transaction_id: str) -> str:
        """Return the form in the log."""
        if self._plain:
            return transaction_id
        spelled = transaction_id.encode("utf-8", "surrogatepass")
        if self._key is None:
            return hashlib.sha256(spelled).hexdigest()[:16]
        return hmac.digest(self._key, spelled, "sha256").hex()[:16]
