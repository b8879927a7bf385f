"""Structured logs: one JSON object a line on standard error, from this service and from the libraries under it."""

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

# structlog imports rich where it is installed, for consoles that no service writes to: 60 ms of every start.
_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]
try:
    import structlog
finally:
    del sys.modules["rich"]
    if _rich is not None:
        sys.modules["rich"] = _rich

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_SHARED: tuple[structlog.typing.Processor, ...] = (
    structlog.processors.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    structlog.processors.format_exc_info,
)


def configure_logs(level: str, *, worker: int | None = None) -> None:
    """Send every log record of this process, its libraries included, to standard error as JSON lines.

    Each line of one of several workers has its number.
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


def _with_worker(number: int) -> structlog.typing.Processor:
    def add(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:  # noqa: ANN401 - as below
        event["worker"] = number
        return event

    return add


def logger() -> Any:  # noqa: ANN401 - structlog's loggers are typed by their configuration
    """Return the log of the service."""
    return structlog.get_logger()
