"""`dedup-service serve`, with one flag for each setting."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dedup_service.config.fields import SWITCH
from dedup_service.config.settings import CONFIG_VARIABLE, SETTINGS, flag_of, help_of, load_settings
from dedup_service.observability.logs import configure_logs, logger
from dedup_service.supervisor.messages import SupervisorStart, become_supervisor

_DESCRIPTION = """\
Serve claims over gRPC until SIGTERM or SIGINT.

Each setting is a flag, an environment variable and a key of the TOML settings file. Flags override variables, and
variables override the file. Durations are written 250ms, 60s, 2h or 7d. SIGHUP reloads the policy file and the
tokens; with several workers, SIGUSR2 replaces them one by one.
"""


def run_serve(arguments: Sequence[str]) -> None:
    """Serve with these flags until a signal. Raises FatalError; exits with 2 for an unknown flag."""
    flags = vars(_parser().parse_args(arguments))
    config, show_banner = flags.pop("config"), flags.pop("banner")
    settings = load_settings(flags, config)
    configure_logs(settings.log_level)
    _warn_of_password(flags)
    if settings.workers > 1:
        become_supervisor(SupervisorStart(settings.to_json(), show_banner))
    # Imported late: the supervisor and `serve --help` do not need it.
    from dedup_service.server.process import run_server  # noqa: PLC0415 - as above

    run_server(settings, show_banner=show_banner)


def _warn_of_password(flags: dict[str, Any]) -> None:
    # Other users of the host can read a command line.
    url = flags.get("store_url", "")
    if not url.startswith("sqlite:") and ("@" in url or "password=" in url):
        logger().warning(
            "password_exposed",
            message="every user of this host can read the store URL of --store-url: put a URL with a password into "
            "DEDUP_STORE_URL, or into a file that DEDUP_STORE_URL_FILE names",
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "dedup-service serve",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # The environment and the file decide about absent flags.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=None,
        metavar="FILE",
        help=f"A TOML file of settings.  [env: {CONFIG_VARIABLE}]",
    )
    parser.add_argument(
        "--banner",
        action="store_true",
        default=False,
        help="Print example calls on standard output once the server accepts calls.",
    )
    for name, setting in SETTINGS.items():
        help_text = help_of(name).replace("%", "%%")
        if setting.kind is SWITCH:
            parser.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(flag_of(name), metavar=setting.kind.metavar, help=help_text)
    return parser
