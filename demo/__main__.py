"""`python -m demo`: the whole system on this machine, a dozen jobs through it, and a page of what came out."""

import os
import signal
import sys
from pathlib import Path
from threading import Event

from demo.run import run

_DEMO = Path(__file__).resolve().parent


def main(folder: Path = _DEMO) -> int:
    """Writes `folder/out` and `folder/gallery.html`. Returns the exit status: 0 only if everything went as planned."""
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Looked at where nothing is half done: an exception could hit a process that nobody holds yet.
        signal.signal(number, lambda *_: stop.set())
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"  # everything is on this machine
    return run(folder / "out", folder / "gallery.html", stop=stop)


if __name__ == "__main__":
    sys.exit(main())
