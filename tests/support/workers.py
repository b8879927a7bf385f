"""Calls to a chosen worker of a service with several workers."""

import itertools
import uuid

import grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess

# Otherwise channels of one process to one address share one connection, and so one worker.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


def channel_to(service: ServiceProcess) -> grpc.Channel:
    """Return a channel with its own connection; the kernel chooses the worker."""
    return grpc.insecure_channel(service.target, options=OWN_CONNECTION)


def pids(service: ServiceProcess) -> dict[int, int]:
    """Return the process id of each worker, by number, as of its last start."""
    return {line["worker"]: line["pid"] for line in service.events("worker_spawned")}


def worker_of(service: ServiceProcess, channel: grpc.Channel) -> int:
    """Return the number of the worker that answers on a channel."""
    correlation_id = uuid.uuid4().hex
    look = dedup_pb2_grpc.DedupServiceStub(channel).GetTransaction.future(
        dedup_pb2.GetTransactionRequest(transaction_id="nobody"), metadata=(("x-correlation-id", correlation_id),)
    )
    assert look.code() is grpc.StatusCode.NOT_FOUND

    def line() -> list[int]:
        return [line["worker"] for line in service.events("call_finished") if line["correlation_id"] == correlation_id]

    wait_until(line, what="the log line")
    return line()[0]


def channels_to_each(service: ServiceProcess, workers: int = 2) -> dict[int, grpc.Channel]:
    """Return a channel to each worker, by number. The caller must close them."""
    found: dict[int, grpc.Channel] = {}
    for _ in itertools.takewhile(lambda _: len(found) < workers, range(1_000)):
        channel = channel_to(service)
        if found.setdefault(worker_of(service, channel), channel) is not channel:
            channel.close()
    assert len(found) == workers, f"of {workers} workers, only {sorted(found)} answer"
    return found
