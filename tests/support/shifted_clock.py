"""`python -m tests.support.shifted_clock serve …`: the service on a clock that a file shifts while it runs.

The file named by SHIFT_FILE has the milliseconds to add to the real time.
"""

import os
import time
from pathlib import Path

_file = Path(os.environ["SHIFT_FILE"])
_real_ns = time.time_ns


def _shifted_ns() -> int:
    return _real_ns() + int(_file.read_text() or 0) * 1_000_000


if __name__ == "__main__":
    time.time_ns = _shifted_ns
    time.time = lambda: _shifted_ns() / 1_000_000_000

    from dedup_service.cli import main

    main()
