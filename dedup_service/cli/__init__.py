"""The command `dedup-service`: the server, and what people ask of one by hand."""

import gc
import sys

from dedup_service.config.settings import BadSettings


def main() -> None:
    """Run the command line; the exit code is 2 for a bad command or setting, as everywhere."""
    # Each way imports its own half: a service starts without the libraries of the commands, which cost it a third of
    # its start and of its memory.
    try:
        if sys.argv[1:2] == ["serve"]:
            # What is imported stays, so that looking through it for garbage only makes the start longer. The server
            # lets the collector go on when it serves.
            gc.disable()
            from dedup_service.cli.serve import run_serve  # noqa: PLC0415 - as said above

            run_serve(sys.argv[2:])
        else:
            from dedup_service.cli.commands import app  # noqa: PLC0415 - as said above

            app()
    except BadSettings as error:
        print(f"dedup-service: {error}", file=sys.stderr)
        sys.exit(2)
