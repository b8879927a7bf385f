"""SIGHUP: the policy file and the tokens are read anew, and whatever is in them, the server goes on."""

import asyncio
import signal
from typing import Any

from dedup_service.claims import ClaimService, Policies
from dedup_service.config.policy_file import load_policies
from dedup_service.config.token_file import load_tokens
from dedup_service.api.authorization import CallerGate
from dedup_service.config.settings import BadSettings, Settings


class PolicyReload:
    """Rereads the files at SIGHUP, one reading at a time; from its making on the signal ends nothing.

    `gate`, once there is one, gets the new tokens.
    """

    def __init__(self, settings: Settings, log: Any) -> None:  # noqa: ANN401 - as in logs.logger
        self.gate: CallerGate | None = None
        self._settings = settings
        self._log = log
        self._asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._asked.set)

    def log_loaded(self, claims: ClaimService) -> None:
        """Write what applies now and what shadow mode has let through so far; nothing without a policy file."""
        if self._settings.policy_file is None:
            return
        self._log.info(
            "policy_loaded",
            file=str(self._settings.policy_file),
            namespaces=sorted(claims.policies.namespaces),
            allow_unknown_namespaces=claims.policies.allow_unknown,
            shadow_duplicates=dict(claims.shadow_duplicates),
            **({} if claims.policies.callers is None else {"callers": sorted(claims.policies.callers)}),
        )

    async def follow(self, claims: ClaimService) -> None:
        """Give `claims` the rules of every new version of the file, for ever; cancelled at the shutdown.

        A file that is not usable changes nothing, and the log says why.
        """
        while True:
            await self._asked.wait()
            # Before the reading, since a signal during it is about a file that may be newer than what was read.
            self._asked.clear()
            await self._reload_tokens()
            await self._reload(claims)

    async def _reload_tokens(self) -> None:
        path = self._settings.auth_tokens
        if self.gate is None or path is None:
            return
        try:
            self.gate.tokens = await asyncio.to_thread(load_tokens, path)
        except BadSettings as error:
            self._log.error("tokens_reload_failed", file=str(path), message=str(error))
            return
        self._log.info("tokens_loaded", file=str(path), tokens=len(self.gate.tokens))

    async def _reload(self, claims: ClaimService) -> None:
        if self._settings.policy_file is None:
            if self._settings.auth_tokens is None:
                self._log.info("policy_reload_skipped", message="SIGHUP changes nothing: no policy file is set")
            return
        try:
            # In a thread, since calls must not wait for a slow disk.
            policies: Policies = await asyncio.to_thread(load_policies, self._settings)
        except BadSettings as error:
            self._log.error("policy_reload_failed", file=str(self._settings.policy_file), message=str(error))
            return
        claims.policies = policies
        self.log_loaded(claims)
