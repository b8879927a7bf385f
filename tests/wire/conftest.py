"""Channels and stubs to the service under test, and services of a test's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dedup.v1 import dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from tests.support.processes import ServiceProcess


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[dedup_pb2_grpc.DedupServiceStub]:
    """A stub of the service, over each store."""
    with service.channel() as channel:
        yield dedup_pb2_grpc.DedupServiceStub(channel)


@pytest.fixture
def start_service(engine: EngineName) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services of a test's own, on each engine, and ends them with it."""
    with _starting("--engine", engine) as start:
        yield start


@pytest.fixture
def start_grpcio() -> Iterator[Callable[..., ServiceProcess]]:
    """The same with the default engine alone, for what no other can do or no engine does."""
    with _starting() as start:
        yield start


@contextmanager
def _starting(*before: str) -> Iterator[Callable[..., ServiceProcess]]:
    started: list[ServiceProcess] = []

    def start(*arguments: str, **options: Any) -> ServiceProcess:
        process = ServiceProcess(*before, *arguments, **options)
        started.append(process)
        return process.start()

    try:
        yield start
    finally:
        for process in started:
            process.kill()
