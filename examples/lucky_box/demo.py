"""Compares the original guard with the dedup service: three clicks of one user within a millisecond.

Starts a Redis, the dedup service, and the lucky box API in Python and (if installed) Go, each with both guards. Sends
the clicks, prints the results, and stops everything.
"""

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CLICKS = 3
START_TIMEOUT_S = 60
CORRELATION_HEADER = "x-correlation-id"


@dataclass
class Logged:
    """A process that logs JSON lines."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def event(self, name: str) -> dict[str, Any]:
        """Return the first line of this event."""
        until = time.monotonic() + START_TIMEOUT_S
        while not (found := [line for line in list(self.lines) if line.get("event") == name]):
            if self.process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{self.process.args!r} did not log {name!r}: {self.lines[-3:]}")
            time.sleep(0.02)
        return found[0]


@dataclass
class Round:
    """The results of a user's clicks."""

    statuses: list[int]
    passed: int
    spread_us: float
    correlation_ids: list[str]


@contextlib.contextmanager
def logged(*command: str, cwd: Path | None = None) -> Iterator[Logged]:
    """Run a process and collect its log."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("DEDUP_")}
    with subprocess.Popen(command, cwd=cwd, env=clean, stderr=subprocess.PIPE, text=True) as process:
        running = Logged(process)

        def read() -> None:
            for line in process.stderr or ():
                running.lines.append(json.loads(line) if line.startswith("{") else {"text": line.rstrip()})

        reader = threading.Thread(target=read)
        reader.start()
        try:
            yield running
        finally:
            process.terminate()
            process.wait()
            reader.join()


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """Run a Redis and yield its port."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise SystemExit("redis-server is not on PATH: sudo apt-get install redis-server, or brew install redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--logfile", "redis.log")
    with subprocess.Popen([binary, *options]) as process:
        try:
            for _ in range(500):
                with socket.socket() as client:
                    if client.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.02)
            yield port
        finally:
            process.terminate()


async def click_together(port: int, device: int) -> Round:
    """Send the clicks in quick succession over open connections."""
    streams = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CLICKS)]
    body = json.dumps({"device": device, "event": "daily", "day": "2025-11-28"})
    ids = [secrets.token_hex(16) for _ in range(CLICKS)]
    requests = [
        f"POST /api/benefit-promotions/405/lucky-box HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n{CORRELATION_HEADER}: {correlation_id}\r\nConnection: close\r\n\r\n"
        f"{body}".encode()
        for correlation_id in ids
    ]
    begun = time.perf_counter()
    for (_, writer), request in zip(streams, requests, strict=True):
        writer.write(request)
    spread_us = (time.perf_counter() - begun) * 1e6
    statuses = [int((await reader.readline()).split()[1]) for reader, _ in streams]
    for reader, writer in streams:
        await reader.read()
        writer.close()
    return Round(statuses, 0, spread_us, ids)


async def play(api: Logged, rounds: int, first_device: int) -> list[Round]:
    """Click for `rounds` users. Count the clicks that passed the guard, by the API's log."""
    port = api.event("serving")["port"]
    played = [await click_together(port, first_device + number) for number in range(rounds)]
    clicks: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + START_TIMEOUT_S
    while len(clicks) < rounds * CLICKS and time.monotonic() < until:
        clicks = {line["correlation_id"]: line for line in list(api.lines) if line.get("event") == "click"}
        await asyncio.sleep(0.02)
    for one in played:
        one.passed = sum(clicks[correlation_id]["passed"] for correlation_id in one.correlation_ids)
    return played


def figures(api: str, guard: str, played: list[Round]) -> dict[str, Any]:
    """Return the table row of an API with a guard."""
    first = played[0]
    return {
        "api": api,
        "guard": guard,
        "rounds": len(played),
        "first_round": first.statuses,
        "clicks_that_passed_the_guard": sum(one.passed for one in played),
        "rounds_in_which_several_passed": sum(one.passed > 1 for one in played),
        "rounds_with_one_200": sum(one.statuses.count(200) == 1 for one in played),
        "longest_spread_us": round(max(one.spread_us for one in played)),
    }


def followed(api: Logged, sidecar: Logged, correlation_id: str) -> dict[str, Any]:
    """Return the log lines of API and dedup service for a correlation id."""
    until = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < until:
        found = {
            name: [line for line in list(log.lines) if line.get("correlation_id") == correlation_id]
            for name, log in (("api", api), ("sidecar", sidecar))
        }
        if all(found.values()):
            return {"correlation_id": correlation_id, **found}
        time.sleep(0.02)
    raise SystemExit(f"no log line of the dedup service has the correlation id {correlation_id}")


def main() -> None:
    """Run the demo. Exits with 1 if the dedup service let a second click pass."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="number of users (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lucky-box-")))
        programs: dict[str, tuple[str, ...]] = {"python": (sys.executable, str(HERE / "python" / "lucky_box.py"))}
        if shutil.which("go"):
            say("Building the API in Go…")
            subprocess.run(["go", "build", "-o", str(folder / "lucky_box"), "."], cwd=HERE / "go", check=True)
            programs["go"] = (str(folder / "lucky_box"),)
        else:
            say("Go is not installed: running the API in Python only.")
        say("Starting Redis, the dedup service and the APIs…")
        port = stack.enter_context(redis_server(folder))
        target = f"unix://{folder}/dedup.sock"
        command = (sys.executable, "-m", "dedup_service", "serve", "--listen", target, "--log-sample", "1")
        sidecar = stack.enter_context(logged(*command, "--store-url", f"redis://127.0.0.1:{port}"))
        sidecar.event("server_started")
        results, trace = [], {}
        for number, (api, program) in enumerate(programs.items()):
            for offset, guard in enumerate(("legacy", "sidecar")):
                say(f"Clicking: {api}, {guard}…")
                arguments = ("--guard", guard, "--redis", str(port), "--sidecar", target)
                with logged(*program, *arguments) as running:
                    played = asyncio.run(play(running, options.rounds, 1_000_000 * (2 * number + offset + 1)))
                    results.append(figures(api, guard, played))
                    if guard == "sidecar":
                        trace = followed(running, sidecar, played[0].correlation_ids[0])
    if options.json:
        sys.stdout.write(json.dumps({"results": results, "followed": trace}) + "\n")
    else:
        show(results, trace)
    if any(
        r["rounds_in_which_several_passed"] or r["rounds_with_one_200"] < r["rounds"]
        for r in results
        if r["guard"] == "sidecar"
    ):
        raise SystemExit(1)


def show(results: list[dict[str, Any]], trace: dict[str, Any]) -> None:
    """Print the table and the log lines of one click."""
    console = Console()
    table = Table(title=f"{CLICKS} clicks of one user within a millisecond, by {results[0]['rounds']} users")
    for column in ("API", "guard", "first user was told", "clicks let through", "users let through twice or more"):
        table.add_column(column)
    for one in results:
        table.add_row(
            one["api"],
            one["guard"],
            " ".join(map(str, one["first_round"])),
            f"{one['clicks_that_passed_the_guard']} of {CLICKS * one['rounds']}",
            str(one["rounds_in_which_several_passed"]),
        )
    console.print(table)
    console.print(
        "legacy reads a flag and then writes it; sidecar asks the dedup service, which decides by one command."
    )
    console.print(f"\nOne click, followed by its correlation id {trace['correlation_id']}:")
    for name in ("api", "sidecar"):
        for line in trace[name]:
            shown = {key: line[key] for key in line if key != "correlation_id"}
            console.print(f"  {name:<8} {json.dumps(shown)}", soft_wrap=True, highlight=False)


def say(text: str) -> None:
    """Print progress on standard error."""
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main()
