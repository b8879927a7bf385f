"""The file descriptors of a server process: as many as its listeners may need."""

import contextlib
import resource

from dedup_service.config.settings import Settings
from dedup_service.observability.logs import Logger
from dedup_service.server.engines import MAX_CONNECTIONS
from dedup_service.server.health import MAX_PROBE_CONNECTIONS

# The metrics endpoint, the store, and whatever libraries open.
_OTHERS = 150


def allow_descriptors(settings: Settings, log: Logger) -> None:
    """Raise the soft limit of open files to what the connection limits add up to; warn if the hard limit is lower.

    Otherwise peers of one listener could leave the other listeners and the store without descriptors.
    """
    needed = (
        len(settings.listen) * (settings.max_connections or MAX_CONNECTIONS)
        + len(settings.health_listen) * MAX_PROBE_CONNECTIONS
        + _OTHERS
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        # macOS refuses more than its kernel allows, whatever the hard limit says.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < needed:
            log.warning(
                "descriptors_limited",
                limit=soft,
                needed=needed,
                message="peers can use up the file descriptors of this process: raise its limit of open files "
                "(ulimit -Hn), or lower DEDUP_MAX_CONNECTIONS",
            )
