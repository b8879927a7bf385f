"""Fixtures: a stub of the shared service, and factories for services that one test owns."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from dedup.v1 import dedup_pb2_grpc
from dedup_service.config.settings import EngineName
from tests.support.processes import ServiceProcess


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[dedup_pb2_grpc.DedupServiceStub]:
    """A stub of the shared service."""
    with service.channel() as channel:
        yield dedup_pb2_grpc.DedupServiceStub(channel)


@pytest.fixture
def start_service(engine: EngineName) -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services on the engine under test and kills them after the test."""
    with _service_factory("--engine", engine) as start:
        yield start


@pytest.fixture
def start_grpcio() -> Iterator[Callable[..., ServiceProcess]]:
    """Starts services on the default engine, for behaviour that is engine-independent or grpcio-only."""
    with _service_factory() as start:
        yield start


@contextmanager
def _service_factory(*common_arguments: str) -> Iterator[Callable[..., ServiceProcess]]:
    started: list[ServiceProcess] = []

    def start(*arguments: str, **options: Any) -> ServiceProcess:
        process = ServiceProcess(*common_arguments, *arguments, **options)
        started.append(process)
        return process.start()

    try:
        yield start
    finally:
        for process in started:
            process.kill()
