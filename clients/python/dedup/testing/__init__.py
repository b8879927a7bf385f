"""Stand-ins for tests of code that uses this client: no server, no network, and a clock that the test moves."""

from dedup.testing.fake_clients import AsyncFakeClient, FakeClient
from dedup.testing.fake_service import FakeService

__all__ = ["AsyncFakeClient", "FakeClient", "FakeService"]
