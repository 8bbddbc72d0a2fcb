"""Named places where a test makes this process die, freeze or fail. None is armed unless a test arms it.

`SDXL_FAILPOINTS` holds `place=action[@n]`, separated by commas: at the n-th arrival (the first, if none is given) at
that place, and only then, the action happens. Places are the boundaries of each step: `download.before`,
`finish.after`, and so on.
Actions: `kill` (SIGKILL), `stop` (SIGSTOP), `fail` (RuntimeError), `memory` (MemoryError), `hang` (for an hour).
"""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

VARIABLE = "SDXL_FAILPOINTS"

_ONE = re.compile(
    r"(?P<place>[a-z_]+\.(?:before|after))=(?P<action>kill|stop|fail|memory|hang)(?:@(?P<nth>[1-9][0-9]*))?"
)
_HANG_S = 3600

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Failpoint:
    action: str
    arrivals_left: int


_armed: dict[str, _Failpoint] = {}
_lock = threading.Lock()


def arm(text: str) -> None:
    """Arms what `text` lists, and nothing else. Raises ValueError."""
    _armed.clear()
    listed = [(item, _ONE.fullmatch(item)) for item in text.split(",") if item]
    for item, match in listed:
        if match is None:
            raise ValueError(f"not place=action[@n]: {item!r}")
    _armed.update({match["place"]: _Failpoint(match["action"], int(match["nth"] or 1)) for _, match in listed if match})
    if _armed:
        log.warning("failpoints.armed", places=sorted(_armed))


@contextmanager
def around(step: str) -> Iterator[None]:
    """The boundaries of a step: `<step>.before` on the way in, `<step>.after` where it has succeeded."""
    _reach(f"{step}.before")
    yield
    _reach(f"{step}.after")


def _reach(place: str) -> None:
    if not _armed:
        return
    with _lock:
        failpoint = _armed.get(place)
        if failpoint is None:
            return
        failpoint.arrivals_left -= 1
        if failpoint.arrivals_left:
            return
    _act(failpoint.action, place)


def _act(action: str, place: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "fail":
            raise RuntimeError(f"failpoint {place}")
        case "memory":
            raise MemoryError(f"failpoint {place}")
        case _:
            time.sleep(_HANG_S)
