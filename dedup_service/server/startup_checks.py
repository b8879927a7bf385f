"""Examines the store once when the server starts, as `dedup-service doctor` does, and logs what is wrong with it."""

import asyncio
import signal
from typing import Any

from dedup_service.claims.findings import Severity
from dedup_service.server.listeners import StartRefused
from dedup_service.server.readiness import Readiness
from dedup_service.config.settings import Settings
from dedup_service.stores.registry import StorePlace, examine_store

# What the examination may add to the start.
_TIMEOUT_S = 2.0


def store_place(settings: Settings) -> StorePlace:
    """Return where and how claims are kept by the settings."""
    return StorePlace(
        settings.effective_store_url,
        settings.key_layout,
        settings.key_prefix,
        settings.store_timeout,
        settings.min_replicas,
    )


class StartupChecks:
    """Examines the store once it answers: at the start where it does by then, and later where it is away."""

    def __init__(self, settings: Settings, readiness: Readiness, log: Any) -> None:  # noqa: ANN401 - as logger()
        self._settings = settings
        self._readiness = readiness
        self._log = log
        self._done = False
        self._refusal: StartRefused | None = None

    async def run(self) -> None:
        """Examine the store if it answers by now. Raises StartRefused when the settings are strict about a finding."""
        if self._readiness.answered.is_set():
            await self._examine()
            self.raise_refusal()

    async def follow(self, stop: asyncio.Queue[signal.Signals]) -> None:
        """Examine the store as soon as it answers, unless that is done; a refusal ends the server by way of `stop`."""
        await self._readiness.answered.wait()
        if not self._done:
            await self._examine()
            if self._refusal is not None:
                stop.put_nowait(signal.SIGTERM)

    def raise_refusal(self) -> None:
        """Raise StartRefused when the store was found unfit."""
        if self._refusal is not None:
            raise self._refusal

    async def _examine(self) -> None:
        self._done = True
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                findings = await examine_store(store_place(self._settings))
        except TimeoutError:
            self._log.warning(
                "store_examination_failed", message=f"the store did not answer everything within {_TIMEOUT_S:g} s"
            )
            return
        except Exception as error:  # noqa: BLE001 - whatever it trips over, claims can be served
            self._log.warning("store_examination_failed", message=f"{type(error).__name__}: {error}")
            return
        for finding in sorted(findings, key=lambda finding: -finding.severity):
            if finding.severity < Severity.WARNING:
                continue
            # Not as an error, which is for what this service did wrong itself.
            self._log.warning("store_finding_reported", **finding.as_dict())
            if finding.severity is Severity.CRITICAL and self._settings.strict and self._refusal is None:
                self._refusal = StartRefused(
                    f"DEDUP_STRICT is set and the store is unfit ({finding.check}): {finding.message} "
                    f"Remedy: {finding.remedy}"
                )
