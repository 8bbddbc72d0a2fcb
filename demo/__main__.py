"""`python -m demo`: the whole system on this machine, a dozen jobs through it, and a page of what came out."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType

from demo.run import run

_DEMO = Path(__file__).resolve().parent
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Returns the exit status: 0 only if everything went as planned."""
    for number in _SIGNALS:
        signal.signal(number, _stop_once)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # everything is on this machine
    return run(_DEMO / "out", _DEMO / "gallery.html")


def _stop_once(number: int, _frame: FrameType | None) -> None:
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)  # what is already being ended is not interrupted again
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
