"""What an operator should know at the start: doors that are open wider than they may mean, and secrets that show."""

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dedup_service.config.addresses import beyond_this_host
from dedup_service.config.settings import Settings


def warn_of_exposure(settings: Settings, addresses: Sequence[str], log: Any) -> None:  # noqa: ANN401 - as logger()
    """Log a warning for each such thing."""
    wide = beyond_this_host(addresses)
    if wide and not settings.authenticates:
        log.warning(
            "unauthenticated_listener_opened",
            addresses=wide,
            message="whoever reaches these addresses may claim and release",
        )
    if wide and settings.auth_tokens is not None and settings.tls_cert is None:
        log.warning(
            "tokens_sent_in_plaintext",
            addresses=wide,
            message="without TLS here or in front of it, whoever listens on the network learns the tokens: "
            "set DEDUP_TLS_CERT and DEDUP_TLS_KEY",
        )
    for path in (settings.tls_key, settings.auth_tokens, settings.store_url_file):
        if path is not None and _everybody_may_read(path):
            log.warning(
                "secret_file_exposed",
                file=str(path),
                message="every user of this host may read this file: chmod o-r it",
            )


def _everybody_may_read(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
