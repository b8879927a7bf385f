"""Signals of the server processes: remembered from their first line, until the event loop handles them.

Without a handler, a signal ends the process, and the kernel drops it where the process is number 1 of a container.
Imports little, since nothing of this holds before it is imported.
"""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
_remembered: list[int] = []


def remember_signals() -> None:
    """Remember every signal from now on, also those that were blocked for this process."""
    for number in _HANDLED:
        signal.signal(number, lambda number, _: _remembered.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)


def handle_signals(handlers: Mapping[signal.Signals, Callable[[], object]]) -> None:
    """Let the running loop call these handlers, and call them for what was remembered. Other signals are ignored."""
    import asyncio  # noqa: PLC0415 - takes longer than the rest of the start of a process

    loop = asyncio.get_running_loop()
    for number, handle in handlers.items():
        loop.add_signal_handler(number, handle)
    for number, handle in handlers.items():
        if number in _remembered:
            handle()
    _remembered.clear()


def ignore_signals() -> None:
    """Ignore every signal from now on: the process is about to end, with its own exit code."""
    import asyncio  # noqa: PLC0415 - as above

    loop = asyncio.get_running_loop()
    for number in _HANDLED:
        # Otherwise the loop would restore the default action when it is closed.
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_IGN)


def keep_for_next_program() -> None:
    """Leave the signals, remembered and later ones, to the program this process is about to execute."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    for number in _remembered:
        signal.raise_signal(number)


@contextmanager
def kept_for_child() -> Iterator[None]:
    """Let a process started meanwhile begin with its signals blocked, until it remembers them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
