"""The pieces of the supervisor: the ports that it holds, its patience with a worker that dies, and its messages."""

import socket
from itertools import pairwise

import pytest

from dedup_service.supervisor.messages import (
    Refusal,
    SupervisorOrders,
    WorkerOrders,
    read_line,
    refusal_line,
    serving_line,
)
from dedup_service.supervisor.process import PortTaken, Reservation
from dedup_service.supervisor.supervisor import RestartPauses


def test_a_held_port_is_nobody_elses() -> None:
    """While no worker listens, neither another reservation nor a plain server gets the port, and workers do.

    Protection: SO_REUSEADDR is off again on the socket that holds the port.
    """
    held = Reservation(["127.0.0.1:0"])
    [address] = held.addresses
    port = int(address.rpartition(":")[2])
    with pytest.raises(PortTaken, match=f"cannot listen on {address}: Address already in use: does another server"):
        Reservation([address])
    with socket.socket() as plain:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            plain.bind(("127.0.0.1", port))
    with socket.socket() as first, socket.socket() as second:
        for worker in (first, second):
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            worker.bind(("127.0.0.1", port))
            worker.listen()
    held.close()
    Reservation([address]).close()


def test_nothing_is_held_where_one_address_is_taken() -> None:
    """A reservation of several addresses is all or nothing."""
    taken = Reservation(["127.0.0.1:0"])
    free = Reservation(["127.0.0.1:0"])
    free.close()
    with pytest.raises(PortTaken):
        Reservation([*free.addresses, *taken.addresses])
    Reservation(free.addresses).close()
    taken.close()


def test_a_worker_that_keeps_dying_is_started_ever_later() -> None:
    """At once after its first death, then after pauses that double up to half a minute; a long life forgives all."""
    pauses = RestartPauses()
    waited = [pauses.after(1.0) for _ in range(12)]
    assert waited[:4] == [0.0, 0.25, 0.5, 1.0]
    assert all(later >= earlier for earlier, later in pairwise(waited))
    assert waited[-1] == 30.0
    assert [pauses.after(3_600.0), pauses.after(1.0)] == [0.0, 0.25]


def test_messages_come_out_as_they_went_in() -> None:
    """Orders and words cross the pipes as one line each, whatever is in them."""
    for orders in (SupervisorOrders('{"a": "ü\\n"}', banner=True), WorkerOrders(3, '{"a": "ü\\n"}', "/run/figures")):
        line = orders.to_line()
        assert line.count(b"\n") == 1
        assert type(orders).from_line(line) == orders
    refusal = Refusal("no:\nnever", 2)
    assert read_line(refusal_line(refusal)) == refusal
    assert read_line(serving_line(["127.0.0.1:1"])) == ["127.0.0.1:1"]
