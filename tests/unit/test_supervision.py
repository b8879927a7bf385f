"""The parts of the supervisor: held ports, the backoff of dying workers, and messages."""

import socket
import subprocess
import sys
from itertools import pairwise

import pytest

from dedup_service.config.errors import AddressUnavailable
from dedup_service.config.settings import load_settings
from dedup_service.supervisor.messages import (
    Refusal,
    SupervisorStart,
    WorkerStart,
    read_report,
    ready_line,
    refusal_line,
)
from dedup_service.supervisor.process import HeldPorts
from dedup_service.supervisor.supervisor import RestartBackoff


def test_only_workers_can_bind_a_held_port() -> None:
    """While no worker listens, other supervisors and plain servers cannot bind the port, and workers can.

    Protection: SO_REUSEADDR is unset on the socket that holds the port.
    """
    held = HeldPorts(["127.0.0.1:0"])
    [address] = held.addresses
    port = int(address.rpartition(":")[2])
    with pytest.raises(
        AddressUnavailable, match=f"cannot listen on {address}: Address already in use: does another server"
    ):
        HeldPorts([address])
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
    HeldPorts([address]).close()


def test_no_port_stays_held_if_one_is_taken() -> None:
    """Holding several addresses is all or nothing."""
    taken = HeldPorts(["127.0.0.1:0"])
    free = HeldPorts(["127.0.0.1:0"])
    free.close()
    with pytest.raises(AddressUnavailable):
        HeldPorts([*free.addresses, *taken.addresses])
    HeldPorts(free.addresses).close()
    taken.close()


def test_a_worker_that_keeps_dying_restarts_with_backoff() -> None:
    """It restarts at once, then after pauses that double up to 30 seconds; a long life resets the backoff."""
    backoff = RestartBackoff()
    waited = [backoff.after(1.0) for _ in range(12)]
    assert waited[:4] == [0.0, 0.25, 0.5, 1.0]
    assert all(later >= earlier for earlier, later in pairwise(waited))
    assert waited[-1] == 30.0
    assert [backoff.after(3_600.0), backoff.after(1.0)] == [0.0, 0.25]


def test_messages_survive_the_pipe_unchanged() -> None:
    """Each message is one line and decodes to itself, whatever it contains."""
    for start in (SupervisorStart('{"a": "ü\\n"}', banner=True), WorkerStart(3, '{"a": "ü\\n"}', "/run/metrics")):
        line = start.to_line()
        assert line.count(b"\n") == 1
        assert type(start).from_line(line) == start
    refusal = Refusal("cannot:\nserve", 2)
    assert read_report(refusal_line(refusal)) == refusal
    assert read_report(ready_line(["127.0.0.1:1"])) == ["127.0.0.1:1"]


@pytest.mark.parametrize(("error", "reports"), [("BackgroundTaskFailed", False), ("FatalError", True)])
def test_only_a_refusal_is_reported_to_the_supervisor(error: str, reports: bool) -> None:  # noqa: FBT001
    """A dead background task ends a worker without a refusal, so it is restarted; a refusal stops every worker."""
    program = (
        "from dedup_service.config import errors\n"
        "from dedup_service.server import process\n"
        "async def serve(*_):\n"
        f"    raise errors.{error}('the reason')\n"
        "process.serve = serve\n"
        "process.run_worker()\n"
    )
    start = WorkerStart(1, load_settings().to_json()).to_line()
    worker = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert worker.stdin is not None
    assert worker.stdout is not None
    with worker:
        worker.stdin.write(start)
        worker.stdin.flush()
        report = worker.stdout.read()
    assert worker.returncode == 1
    assert (b"the reason" in report) is reports
