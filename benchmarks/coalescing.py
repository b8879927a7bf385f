"""Measures coalescing: the plain stub, the client without coalescing, and the client with its defaults.

The Go client and both Python clients call the service on grpcio over a fresh Redis, at several numbers of callers, in
interleaved rounds, each with its own client process. Every fresh id must be CLAIMED, and a second claim of each
caller's last id a DUPLICATE. Linux only. Progress goes to standard error.
"""

import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine, publishing
from benchmarks.claim_load import KINDS
from benchmarks.publishing import ROOT, number, say, table, with_range
from benchmarks.results import Spread, paired_ratios, spread
from benchmarks.servers import CannotMeasure, Server, Subject, running_redis

CALLERS = (1, 4, 16, 64)
_TIMEOUT_S = 60
_FIGURES = ("rate", "p50_ms", "p99_ms", "server_cpu_us", "client_cpu_us")


def loads(folder: Path) -> dict[str, list[str]]:
    """Return each client's load command; without Go, omit its client with a message."""
    found = {
        f"Python {name}": [sys.executable, "-m", "benchmarks.claim_load", "--client", name] for name in ("aio", "sync")
    }
    go = shutil.which("go")
    if go is None:
        say("go is not on PATH: skipping the Go client")
        return found
    binary = folder / "claimload"
    build = [go, "build", "-o", str(binary), "./internal/claimload"]
    if subprocess.run(build, cwd=ROOT / "clients" / "go", check=False).returncode:
        raise CannotMeasure("the load generator of the Go client does not compile: see the output above")
    return {"Go": [str(binary)], **found}


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Return all figures by client, callers and kind. Raises CannotMeasure for a wrong answer."""
    found: dict[str, dict[str, dict[str, list[dict[str, float]]]]] = {}
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, running_redis(Path(name)) as redis:
        commands = loads(Path(name))
        arguments = ("-m", "dedup_service", "serve", "--log-level", "warning", "--store-url", redis.tcp_url)
        server = Server(Subject("service", "grpcio", "redis", (), arguments), Path(name))
        server.start()
        try:
            for done in range(rounds):
                for callers, (client, command) in itertools.product(CALLERS, commands.items()):
                    # Another kind is the first in each round.
                    for kind in (*KINDS[done % 3 :], *KINDS[: done % 3]):
                        cpu_s = server.cpu_s
                        figures = one_round(
                            [*command, "--seconds", str(seconds)],
                            target=server.target,
                            prefix=f"{done}:{client}",
                            kind=kind,
                            callers=callers,
                        )
                        # Slightly too high: includes warm-up and final duplicates.
                        figures["server_cpu_us"] = (server.cpu_s - cpu_s) * 1e6 / figures["claims"]
                        found.setdefault(client, {}).setdefault(str(callers), {}).setdefault(kind, []).append(figures)
                    say(f"round {done + 1} of {rounds}, {client}, {callers} callers")
        finally:
            server.stop()
    return {"machine": machine.describe(), "seconds": seconds, "clients": found}


def one_round(command: list[str], *, target: str, prefix: str, kind: str, callers: int) -> dict[str, float]:
    """Return one client process's figures, with its CPU time."""
    asked = ["--target", target, "--callers", str(callers), "--kind", kind, "--prefix", f"{prefix}:{kind}:{callers}"]
    cpu_s = _children_cpu_s()
    done = subprocess.run([*command, *asked], cwd=ROOT, stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise CannotMeasure(f"a client failed or received a wrong answer: {' '.join(command)}")
    figures: dict[str, float] = json.loads(done.stdout)
    # Includes the start of the process.
    figures["client_cpu_us"] = (_children_cpu_s() - cpu_s) * 1e6 / figures["claims"]
    return figures


def _children_cpu_s() -> float:
    """Return the CPU seconds of the child processes that have ended: of the clients, while the server runs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ratio(of_callers: dict[str, list[dict[str, float]]], figure: str, base: str) -> Spread:
    """Return the ratio of a figure with the defaults to that of another kind, paired by rounds."""
    with_defaults, other = ([_figure(each, figure) for each in of_callers[kind]] for kind in ("adaptive", base))
    return paired_ratios(with_defaults, other)


def _figure(of_round: dict[str, float], figure: str) -> float:
    return of_round["claims"] / of_round["seconds"] if figure == "rate" else of_round[figure]


def markdown(results: dict[str, Any]) -> str:
    """Return the table for the documentation: ratios of the defaults to the client without coalescing."""
    rows = []
    for (name, client), callers in itertools.product(results["clients"].items(), CALLERS):
        found = client[str(callers)]
        rates = [number(spread([_figure(each, "rate") for each in found[kind]]).median) for kind in KINDS]
        ratios = [with_range(ratio(found, figure, "unary")) for figure in _FIGURES]
        rows.append([f"{name}, {callers}", *rates, *ratios, with_range(ratio(found, "rate", "plain"))])
    header = ["client, callers", "claims/s by the plain stub", "alone", "coalesced", "ratio to alone", "p50", "p99"]
    return table([*header, "CPU of the server a claim", "of the client", "claims/s to the plain stub"], rows)


def main() -> None:
    """Publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure(*((1, 0.2) if chosen.quick else (7, 2.0)))
    except CannotMeasure as error:
        sys.exit(f"coalescing: {error}")
    publishing.publish("coalescing", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
