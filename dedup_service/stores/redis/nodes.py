"""Which connection a key's commands go over: always the same one where a single server takes all claims."""

from collections.abc import Sequence
from typing import Protocol

from dedup_service.stores.redis.link import RedisLink


class RedisNodes(Protocol):
    """The servers that take claims now, each with a link that is kept open."""

    async def open(self) -> None:
        """Begin to keep links, and return after the first attempt, whether it succeeded or not; raise StoreRefused."""

    async def close(self) -> None:
        """Stop keeping links; commands under way fail. May be called twice."""

    def link_of(self, key: bytes) -> RedisLink:
        """Return the link of the server that takes this key; raise StoreUnavailable (never applied) without one."""

    def places(self) -> Sequence[tuple[bytes, RedisLink]]:
        """Return each link that takes claims, with a text that puts a key which contains it onto that server.

        Raises StoreUnavailable (never applied), and StoreRefused, when no server is known.
        """

    def redirected(self, key: bytes, link: RedisLink, reply: str) -> RedisLink | None:
        """Return the link of the server to which the reply MOVED or ASK of `link` points, or None to believe none."""


class OneServer:
    """The nodes of a deployment in which one server at a time takes all claims."""

    def __init__(self, link: RedisLink) -> None:
        self._link = link

    async def open(self) -> None:
        """See RedisNodes.open."""
        await self._link.open()

    async def close(self) -> None:
        """See RedisNodes.close."""
        await self._link.close()

    def link_of(self, _key: bytes) -> RedisLink:
        """Return the one link."""
        return self._link

    def places(self) -> Sequence[tuple[bytes, RedisLink]]:
        """Return the one link; any key is at home there."""
        return ((b"", self._link),)

    def redirected(self, _key: bytes, _link: RedisLink, _reply: str) -> RedisLink | None:
        """Believe none: a cluster behind the URL of a single server is a mistake that must show itself."""
        return None
