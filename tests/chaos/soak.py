"""Random faults under load, in one world: `python -m tests.chaos.soak --minutes 5 --consumers 3 --seed 1`.

Every few seconds something is killed, frozen, cut off or lied to. When the time is up all of it is mended, and every
job that was accepted has to have ended exactly once. The exit status is 1 where an invariant is broken.
"""

import argparse
import hashlib
import heapq
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.invariants import verify
from tests.chaos.load import Load, upload_path
from tests.chaos.random_faults import Fault, RandomFaults
from tests.chaos.report import Result, note
from tests.chaos.world import LEASE_S, TERMINAL, Consumer, World, a_world

_JOBS_PER_S = 6.0
_TICK_S = 0.02
_LAST_S = 180.0
_SHOWN = 50
_LEAST_SHARE = 0.8
_NEVER_DRAWN = ("forbidden", "missing")
_CODES = {"LORA_DOWNLOAD_FAILED", "UPLOAD_FAILED", "WORKER_LOST", "TIMEOUT"}


@dataclass
class Recovery:
    """How long it takes after a fault until the jobs that were accepted by then have ended."""

    kind: str
    since: float
    waiting: set[str]


@dataclass
class Soak:
    """One thread does everything here but publishing."""

    world: World
    consumers_wanted: int
    seed: int
    consumers: list[Consumer] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    recoveries_s: dict[str, list[float]] = field(default_factory=dict)
    injected: Counter[str] = field(default_factory=Counter)
    _open: list[Recovery] = field(default_factory=list)
    _lasting: list[tuple[float, int, str, Fault]] = field(default_factory=list)
    _waiting: set[str] = field(default_factory=set)
    _seen: int = 0
    _last_id: str = "-"
    _order: "itertools.count[int]" = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._faults = RandomFaults(self.world, self._chance, self.consumers)
        self.load = Load(self.world, self.seed, _JOBS_PER_S)

    def run(self, seconds: float) -> None:
        """Raises AssertionError where an invariant is broken."""
        self._replace_the_dead()
        self.load.start()
        try:
            self._disturb(seconds)
        finally:
            self.load.stop()
        self._mend()
        self._settle_what_is_unknown()

    def _disturb(self, seconds: float) -> None:
        began = time.monotonic()
        next_at = began + 1
        bag: deque[str] = deque()
        while time.monotonic() < began + seconds:
            if time.monotonic() >= next_at:
                bag = bag or deque(self._chance.sample(sorted(self._faults.kinds), len(self._faults.kinds)))
                kind = bag.popleft()
                self.history.append(f"{time.monotonic() - began:7.2f} s  {kind}")
                self.injected[kind] += 1
                self._go_on(kind, self._faults.kinds[kind]())
                next_at = time.monotonic() + self._chance.uniform(1, 3)
            self._tick()
            time.sleep(_TICK_S)

    def _tick(self) -> None:
        self.load.check()
        while self._lasting and self._lasting[0][0] <= time.monotonic():
            _, _, kind, fault = heapq.heappop(self._lasting)
            self._go_on(kind, fault)
        self._replace_the_dead()
        self._observe()

    def _go_on(self, kind: str, fault: Fault) -> None:
        seconds = next(fault, None)
        if seconds is not None:
            heapq.heappush(self._lasting, (time.monotonic() + seconds, next(self._order), kind, fault))
            return
        self._observe()
        self._measure(kind)

    def _measure(self, kind: str) -> None:
        """From now until the jobs that are waiting have ended; where none is, there is nothing to measure."""
        if self._waiting:
            self._open.append(Recovery(kind, time.monotonic(), set(self._waiting)))

    def _replace_the_dead(self) -> None:
        self.consumers[:] = [one for one in self.consumers if one.process.poll() is None]
        while len(self.consumers) < self.consumers_wanted:
            self.consumers.append(self.world.consumer())

    def _observe(self) -> None:
        """Reads what has been published since the last look."""
        accepted = self.load.accepted[self._seen :]
        self._seen += len(accepted)
        self._waiting |= set(accepted) - self.ends.keys()
        entries: Any = self.world.redis.xrange(self.world.keys.completions, min=self._last_id)
        for entry_id, fields in entries:
            self._last_id = f"({entry_id.decode()}"
            if fields[b"type"].decode() in TERMINAL:
                job_id = fields[b"job_id"].decode()
                self.ends[job_id] = fields[b"type"].decode()
                self._waiting.discard(job_id)
        for recovery in list(self._open):
            recovery.waiting &= self._waiting
            if not recovery.waiting:
                self.recoveries_s.setdefault(recovery.kind, []).append(time.monotonic() - recovery.since)
                self._open.remove(recovery)

    def _mend(self) -> None:
        """Ends what still lasts, and waits until nothing is left to do."""
        for _, _, kind, fault in sorted(self._lasting):
            for _ in fault:
                pass
            self._measure(kind)
        self._lasting.clear()
        self.world.store.trouble = None
        self.world.proxy.heal()
        end = time.monotonic() + _LAST_S
        while self._waiting or self._open or not self._nothing_waits():
            assert time.monotonic() < end, f"these have not ended: {sorted(self._waiting)}"
            self._tick()
            time.sleep(_TICK_S)

    def _nothing_waits(self) -> bool:
        redis, keys = self.world.redis, self.world.keys
        return not redis.zcard(keys.delayed) and not any(redis.xlen(stream) for stream in keys.request_streams)

    def _settle_what_is_unknown(self) -> None:
        """A job whose publication got no answer may exist or not."""
        self.world.accepted += [*self.load.accepted, *(one for one in self.load.unknown if one in self.ends)]
        self.world.injections = self.injected.total()

    def verify(self) -> dict[str, int]:
        """The world's invariants, and those of this mix of jobs. Raises AssertionError."""
        counts = verify(self.world)
        for event in (event for event in self.world.events() if event["type"] in TERMINAL):
            self._verify_end(event["type"], event["data"])
        drawable = Counter(end for job_id, end in self.ends.items() if not job_id.startswith(_NEVER_DRAWN))
        drawable.pop("generation.cancelled", None)
        # A fault may cost a job its attempts; most jobs outlive most faults.
        assert drawable["generation.succeeded"] >= _LEAST_SHARE * drawable.total(), drawable
        return counts

    def _verify_end(self, kind: str, data: dict[str, Any]) -> None:
        job_id: str = data["job_id"]
        if kind == "generation.failed":
            codes = _CODES - {"UPLOAD_FAILED"} if job_id.startswith(_NEVER_DRAWN) else _CODES
            assert data["error_code"] in codes, (job_id, data)
        if kind == "generation.cancelled":
            assert job_id.startswith("cancelled"), job_id
        if kind == "generation.succeeded":
            assert not job_id.startswith(_NEVER_DRAWN), job_id
            if job_id.startswith("upload"):
                stored = self.world.store.objects[upload_path(job_id)]
                assert hashlib.sha256(stored.body).hexdigest() == data["image_sha256"], job_id

    def results(self, seconds: float, counts: dict[str, int]) -> list[Result]:
        """A row for each kind of fault, and one for all."""
        of_kinds = [
            Result(0, f"soak: {kind}", times, self.recoveries_s.get(kind, []))
            for kind, times in sorted(self.injected.items())
        ]
        ends = Counter(self.ends.values())
        drawn = self.world.executions().total()
        figures: dict[str, float] = {
            "seed": self.seed,
            "minutes": round(seconds / 60, 2),
            "jobs": len(self.world.accepted),
            "jobs_per_minute": round(60 * len(self.ends) / seconds, 1),
            "consumers_started": len(self.world.consumers),
            "executions": drawn,
            "wasted_generations": drawn - ends["generation.succeeded"],
            **{name.removeprefix("generation."): ends[name] for name in TERMINAL},
        }
        every = [one for recoveries in self.recoveries_s.values() for one in recoveries]
        return [*of_kinds, Result(0, "soak, in all", self.injected.total(), every, counts, figures)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--consumers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"soak: seed {seed}, {arguments.minutes:g} minutes, lease {LEASE_S:g} s", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with a_world(folder) as world:
        soak = Soak(world, arguments.consumers, seed)
        try:
            soak.run(arguments.minutes * 60)
            counts = soak.verify()
        except AssertionError as error:
            faults = "\n".join(soak.history[-_SHOWN:])
            print(
                f"{str(error)[:4000]}\n{faults}\nbroken with --seed {seed}; its logs are in {folder}", file=sys.stderr
            )
            return 1
    for result in soak.results(arguments.minutes * 60, counts):
        note(result)
    print(json.dumps(soak.results(arguments.minutes * 60, counts)[-1].figures))
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
