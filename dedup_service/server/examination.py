"""The examination of the store at the start, as `dedup-service doctor` does it."""

import asyncio

from dedup_service.claims import Severity
from dedup_service.config.errors import FatalError
from dedup_service.observability.logs import Logger
from dedup_service.stores.registry import StoreConfig, examine_store

# The longest delay of the start.
_TIMEOUT_S = 2.0


async def examine(store: StoreConfig, log: Logger, *, strict: bool) -> None:
    """Log every finding that is a warning or worse. Raises FatalError for a critical one if `strict`."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            findings = await examine_store(store)
    except TimeoutError:
        log.warning("store_examination_failed", message=f"the store did not answer everything within {_TIMEOUT_S:g} s")
        return
    except Exception as error:  # noqa: BLE001 - claims can be served all the same
        log.warning("store_examination_failed", message=f"{type(error).__name__}: {error}")
        return
    critical = None
    for finding in sorted(findings, key=lambda finding: -finding.severity):
        if finding.severity < Severity.WARNING:
            continue
        # Not as an error, which stands for a fault of this service.
        log.warning("store_finding_reported", **finding.as_dict())
        if finding.severity is Severity.CRITICAL:
            critical = critical or finding
    if strict and critical is not None:
        raise FatalError(
            f"DEDUP_STRICT is set and the store is unfit ({critical.check}): {critical.message} "
            f"Remedy: {critical.remedy}"
        )
