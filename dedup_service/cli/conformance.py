"""`dedup-service conformance`."""

import asyncio
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from dedup_service.cli.options import positive_milliseconds_option, text_option
from dedup_service.cli.output import ExitCode, print_json
from dedup_service.config.errors import BadSettings

if TYPE_CHECKING:
    from dedup_service.conformance.run import Result
    from dedup_service.conformance.subject import Plan

_FAILED = 1
_NO_RESULT = 2


def _body(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, metavar="JSON", show_default=False)
    return option


def conformance(
    *,
    base_url: Annotated[
        list[str],
        typer.Option(
            help="Address of the service, such as http://127.0.0.1:8080. Give it once for each process of a fleet.",
            metavar="URL",
            show_default=False,
        ),
    ],
    route: Annotated[
        str, typer.Option(help="Guarded path that takes POST, with an optional query.", metavar="PATH")
    ] = "/",
    body: Annotated[str, typer.Option(help="Body of a request that succeeds.", metavar="JSON")] = "{}",
    other_body: Annotated[
        str | None, _body("Another body. [default: --body with one more member, if it is an object]")
    ] = None,
    rejected_body: Annotated[str | None, _body("Body that is answered with 4xx and has no effect.")] = None,
    failing_body: Annotated[str | None, _body("Body that is answered with 5xx.")] = None,
    slow_body: Annotated[
        str | None, _body("Body of a request that succeeds after some seconds; best after more than the ttl.")
    ] = None,
    large_body: Annotated[str | None, _body("Body whose response is too large to be stored.")] = None,
    other_route: Annotated[
        str | None, typer.Option(help="Another guarded path that takes --body.", metavar="PATH", show_default=False)
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(
            help="Header of every request, such as 'Authorization: Bearer …'. Can be repeated.",
            metavar="'NAME: VALUE'",
            show_default=False,
        ),
    ] = None,
    claimant: Annotated[
        str, typer.Option(help="Claimant of the service's client, which refusals must not show.", show_default=False)
    ] = "",
    max_body_bytes: Annotated[int, typer.Option(help="Limit of a guarded body.", min=1, metavar="BYTES")] = 1_048_576,
    timeout: Annotated[str, typer.Option(help="Timeout of each request.", metavar="DURATION")] = "30s",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Check that an HTTP service with a guard follows the client contract.

    WARNING: it sends real requests, and the service does the real work for each that the guard lets through: about
    twenty times, and more often if the guard is broken. Use it against a test environment.

    Several --base-url are the processes of one fleet: a first request and its repeats go to different processes. Every
    run uses fresh keys, whose prefix it prints. A check whose option is not given is skipped.

    Exit code 0: every check passed or was skipped. 1: a check failed. 2: invalid usage, a process is not reachable, or
    a check could not run and none failed.
    """
    try:
        # Imported lazily: other commands do not need httpx.
        from dedup_service.conformance.exchange import NoAnswer  # noqa: PLC0415 - as above
        from dedup_service.conformance.subject import Plan  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise BadSettings(f"conformance cannot start ({error}): install the extra `conformance`") from None
    for url in base_url:
        _check_url(url)
    for name, path in (("--route", route), ("--other-route", other_route)):
        if path is not None and not path.startswith("/"):
            raise typer.BadParameter(f"{path!r} does not begin with /", param_hint=name)
    plan = Plan(
        base_urls=base_url,
        route=route,
        body=text_option("--body", body).encode(),
        other_body=_encoded("--other-body", other_body),
        rejected_body=_encoded("--rejected-body", rejected_body),
        failing_body=_encoded("--failing-body", failing_body),
        slow_body=_encoded("--slow-body", slow_body),
        large_body=_encoded("--large-body", large_body),
        other_route=other_route,
        headers=[_header(text) for text in header or ()],
        claimant=text_option("--claimant", claimant),
        max_body_bytes=max_body_bytes,
        timeout_s=positive_milliseconds_option("timeout", timeout) / 1000,
    )
    try:
        prefix, results = asyncio.run(_run(plan))
    except NoAnswer as error:
        if as_json:
            print_json({"error": {"reason": "UNREACHABLE", "message": str(error)}})
        else:
            typer.echo(f"UNREACHABLE: {error}", err=True)
        raise typer.Exit(_NO_RESULT) from None
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    counts = Counter(result.status.value for result in results)
    if as_json:
        print_json(_as_dict(prefix, results, counts))
    else:
        _print(results, counts)
    raise typer.Exit(_FAILED if counts["failed"] else _NO_RESULT if counts["could not run"] else 0)


async def _run(plan: "Plan") -> tuple[str, "list[Result]"]:
    """Return the prefix of the keys, and the results. Raises NoAnswer if a process is not reachable."""
    # Imported late: rich would take a sixth of the start of every command.
    from rich.console import Console  # noqa: PLC0415 - as above
    from rich.progress import Progress, SpinnerColumn, TextColumn  # noqa: PLC0415 - as above

    from dedup_service.conformance.checks import CHECKS  # noqa: PLC0415 - needs httpx
    from dedup_service.conformance.run import reached, run_checks  # noqa: PLC0415 - as above

    results: list[Result] = []
    columns = (SpinnerColumn(), TextColumn("{task.completed} of {task.total}  {task.description}"))
    quiet = not sys.stderr.isatty()
    async with reached(plan) as subject:
        # On standard error and first: an interrupted run has left keys behind too.
        typer.echo(f"Keys begin with {subject.prefix}", err=True)
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
            task = progress.add_task("first-request", total=len(CHECKS))
            async for result in run_checks(subject):
                results.append(result)
                progress.update(task, completed=len(results), description=f"after {result.check.name}")
    return subject.prefix, results


def _print(results: "list[Result]", counts: Counter[str]) -> None:
    width = max(len(result.check.name) for result in results)
    status_width = len("could not run")
    for result in results:
        why = f"{result.check.rule}. {result.reason}" if result.status == "failed" else result.reason
        typer.echo(f"{result.status.upper():<{status_width}}  {result.check.name:<{width}}  {why or result.check.rule}")
        if result.status == "failed":
            typer.echo(f"{'':<{status_width}}  {'':<{width}}  {result.check.section}")
    typer.echo(", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped", "could not run")))


def _as_dict(prefix: str, results: "list[Result]", counts: Counter[str]) -> dict[str, object]:
    return {
        "key_prefix": prefix,
        **{name: counts[name.replace("_", " ")] for name in ("passed", "failed", "skipped", "could_not_run")},
        "checks": [
            {
                "check": result.check.name,
                "rule": result.check.rule,
                "section": result.check.section,
                "result": result.status.value.replace(" ", "_"),
                "reason": result.reason,
            }
            for result in results
        ],
    }


def _encoded(name: str, text: str | None) -> bytes | None:
    return None if text is None else text_option(name, text).encode()


def _check_url(url: str) -> None:
    from httpx import URL, InvalidURL  # noqa: PLC0415 - optional

    try:
        valid = URL(url).scheme in ("http", "https") and bool(URL(url).host)
    except InvalidURL:
        valid = False
    if not valid:
        raise typer.BadParameter(f"{url!r} is not an address such as http://127.0.0.1:8080", param_hint="--base-url")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip() or not text.isascii():
        raise typer.BadParameter("write 'Name: value' in ASCII", param_hint="--header")
    return name.strip(), value.strip()
