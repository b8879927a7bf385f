"""Ways in which a Redis answers and refuses every claim, and how each is ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dedup_service.claims import Reason
from tests.support.processes import free_port

APP = "app:secret"
"""User and password of the service, as in a URL."""

Command = tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """What an administrator does to make Redis refuse claims, and to end that."""

    name: str
    reason: Reason
    begin: Command
    end: Command

    @contextmanager
    def applied_to(self, admin: Any) -> Iterator[None]:
        """Make the server refuse claims for the context."""
        admin.execute_command(*self.begin)
        try:
            yield
        finally:
            admin.execute_command(*self.end)


def allow_app(admin: Any) -> None:
    """Create the user of the service."""
    admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all")


REFUSALS = (
    Refusal(
        *("out of memory", Reason.STORE_OUT_OF_MEMORY),
        begin=("CONFIG", "SET", "maxmemory", "1"),
        end=("CONFIG", "SET", "maxmemory", "0"),
    ),
    Refusal(
        *("too few replicas", Reason.STORE_TOO_FEW_REPLICAS),
        begin=("CONFIG", "SET", "min-replicas-to-write", "1"),
        end=("CONFIG", "SET", "min-replicas-to-write", "0"),
    ),
    Refusal(
        *("SET forbidden", Reason.STORE_NOT_PERMITTED),
        begin=("ACL", "SETUSER", "app", "-set"),
        end=("ACL", "SETUSER", "app", "+set"),
    ),
    Refusal(
        *("keys forbidden", Reason.STORE_NOT_PERMITTED),
        begin=("ACL", "SETUSER", "app", "resetkeys", "~unrelated:*"),
        end=("ACL", "SETUSER", "app", "~*"),
    ),
    Refusal(
        *("reading keys forbidden", Reason.STORE_NOT_PERMITTED),
        begin=("ACL", "SETUSER", "app", "resetkeys", "%W~*"),
        end=("ACL", "SETUSER", "app", "resetkeys", "~*"),
    ),
    Refusal(
        *("demoted", Reason.STORE_READ_ONLY),
        begin=("REPLICAOF", "127.0.0.1", str(free_port())),
        end=("REPLICAOF", "NO", "ONE"),
    ),
)
