"""The command `dedup-service`. Must not import the internals of the server."""

import sys

from dedup_service.config.errors import FatalError


def main() -> None:
    """Run the command line; the exit code is 2 for a bad command or setting, 1 for a failed start."""
    # Imported lazily: a server without the libraries of other commands saves a third of its start-up time and memory,
    # and the supervisor needs none of the server's.
    try:
        match sys.argv[1:2]:
            case ["serve"]:
                from dedup_service.cli.serve import run_serve  # noqa: PLC0415 - as above

                run_serve(sys.argv[2:])
            case ["supervisor"]:
                from dedup_service.supervisor.process import run_supervisor  # noqa: PLC0415 - as above

                run_supervisor()
            case ["worker"]:
                from dedup_service.server.process import run_worker  # noqa: PLC0415 - as above

                run_worker()
            case _:
                from dedup_service.cli.commands import app  # noqa: PLC0415 - as above

                app()
    except FatalError as error:
        print(f"dedup-service: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
