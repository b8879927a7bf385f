"""A service of several workers: which of them answers, and calls that reach each."""

import itertools
import uuid

import grpc

from dedup.v1 import dedup_pb2, dedup_pb2_grpc
from tests.support.polling import wait_until
from tests.support.processes import ServiceProcess

# Connections of one process to one address would otherwise be one, which one worker answers.
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


def channel_to(service: ServiceProcess) -> grpc.Channel:
    """Return a channel whose connection is its own, so that chance decides which worker answers."""
    return grpc.insecure_channel(service.target, options=OWN_CONNECTION)


def pids(service: ServiceProcess) -> dict[int, int]:
    """Return the process id of each worker by its number, as of its last start."""
    return {line["worker"]: line["pid"] for line in service.events("worker_spawned")}


def worker_of(service: ServiceProcess, channel: grpc.Channel) -> int:
    """Return the number of the worker that answers on this channel."""
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
    """Return a channel to each worker, by its number; the caller closes them."""
    found: dict[int, grpc.Channel] = {}
    for _ in itertools.takewhile(lambda _: len(found) < workers, range(1_000)):
        channel = channel_to(service)
        if found.setdefault(worker_of(service, channel), channel) is not channel:
            channel.close()
    assert len(found) == workers, f"of {workers} workers {sorted(found)} answer"
    return found
