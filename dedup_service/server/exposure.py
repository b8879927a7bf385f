"""Start-up warnings about exposed listeners and readable secrets."""

import stat
from collections.abc import Sequence
from pathlib import Path

from dedup_service.config.addresses import reachable_from_other_hosts
from dedup_service.config.settings import Settings
from dedup_service.observability.logs import Logger


def warn_of_exposure(settings: Settings, addresses: Sequence[str], log: Logger) -> None:
    """Log a warning for each."""
    exposed = reachable_from_other_hosts(addresses)
    if exposed and not settings.authenticates:
        log.warning(
            "unauthenticated_listener_opened",
            addresses=exposed,
            message="every host that reaches these addresses may claim and release",
        )
    if exposed and settings.auth_tokens is not None and settings.tls_cert is None:
        log.warning(
            "tokens_sent_in_plaintext",
            addresses=exposed,
            message="without TLS here or in a proxy, the network can read the tokens: set DEDUP_TLS_CERT and "
            "DEDUP_TLS_KEY",
        )
    for path in (settings.tls_key, settings.auth_tokens, settings.store_url_file):
        if path is not None and _readable_by_everybody(path):
            log.warning(
                "secret_file_exposed",
                file=str(path),
                message="every user of this host can read this file: chmod o-r it",
            )


def _readable_by_everybody(path: Path) -> bool:
    try:
        return bool(path.stat().st_mode & stat.S_IROTH)
    except OSError:
        return False
