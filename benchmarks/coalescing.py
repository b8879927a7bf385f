"""Measures coalescing: concurrent callers with one claim per call, compared with coalesced claims.

The Go client and both Python clients call the service on grpcio over a fresh Redis, in interleaved rounds, each with
its own client process. Every fresh id must be CLAIMED, and a second claim of each caller's last id a DUPLICATE. Linux
only. Progress goes to standard error.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine, publishing
from benchmarks.publishing import ROOT, number, say, table, with_range
from benchmarks.results import Spread, paired_ratios, spread
from benchmarks.servers import CannotMeasure, Server, Subject, running_redis

CALLERS = 64
KINDS = ("unary", "coalesced")
_TIMEOUT_S = 60


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
    """Return all figures by round. Raises CannotMeasure for a wrong answer."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="dedup-benchmark-") as name, running_redis(Path(name)) as redis:
        commands = loads(Path(name))
        arguments = ("-m", "dedup_service", "serve", "--log-level", "warning", "--store-url", redis.tcp_url)
        server = Server(Subject("service", "grpcio", "redis", (), arguments), Path(name))
        server.start()
        try:
            for done in range(rounds):
                for client, command in commands.items():
                    for kind in KINDS:
                        cpu_s = server.cpu_s
                        figures = one_round(command, server.target, f"{done}:{client}:{kind}", kind, seconds)
                        # Slightly too high: includes warm-up and final duplicates.
                        figures["server_cpu_us"] = (server.cpu_s - cpu_s) * 1e6 / figures["claims"]
                        found.setdefault(client, {}).setdefault(kind, []).append(figures)
                        rate = figures["claims"] / figures["seconds"]
                        say(f"round {done + 1} of {rounds}, {client}, {kind}: {rate:,.0f} claims/s")
        finally:
            server.stop()
    return {"machine": machine.describe(), "callers": CALLERS, "seconds": seconds, "clients": found}


def one_round(command: list[str], target: str, prefix: str, kind: str, seconds: float) -> dict[str, float]:
    """Return one client process's figures."""
    asked = ["--target", target, "--callers", str(CALLERS), "--seconds", str(seconds), "--prefix", prefix]
    if kind == "coalesced":
        asked.append("--coalesce")
    done = subprocess.run([*command, *asked], cwd=ROOT, stdout=subprocess.PIPE, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise CannotMeasure(f"a client failed or received a wrong answer: {' '.join(command)}")
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def gain(client: dict[str, list[dict[str, float]]], figure: str) -> Spread:
    """Return the ratio of a figure with coalescing to that without, paired by rounds."""
    alone, together = ([_figure(each, figure) for each in client[kind]] for kind in KINDS)
    return paired_ratios(together, alone)


def _figure(of_round: dict[str, float], figure: str) -> float:
    return of_round["claims"] / of_round["seconds"] if figure == "rate" else of_round[figure]


def markdown(results: dict[str, Any]) -> str:
    """Return the table for the documentation."""
    rows = []
    for name, client in results["clients"].items():
        rates = [spread([_figure(each, "rate") for each in client[kind]]) for kind in KINDS]
        p99 = [number(spread([each["p99_ms"] for each in client[kind]]).median) for kind in KINDS]
        cpu = [number(spread([each["server_cpu_us"] for each in client[kind]]).median) for kind in KINDS]
        ratios = [with_range(gain(client, figure)) for figure in ("rate", "p99_ms")]
        rows.append([name, *(number(each.median) for each in rates), ratios[0], *p99, ratios[1], *cpu])
    header = ["client", "claims/s alone", "coalesced", "ratio", "p99 ms alone", "coalesced", "ratio"]
    return table([*header, "CPU µs of the server alone", "coalesced"], rows)


def main() -> None:
    """Publish the figures."""
    chosen = publishing.options(__doc__)
    try:
        results = publishing.earlier(chosen) or measure(*((1, 0.5) if chosen.quick else (7, 3.0)))
    except CannotMeasure as error:
        sys.exit(f"coalescing: {error}")
    publishing.publish("coalescing", results, markdown(results), chosen)


if __name__ == "__main__":
    main()
