"""The invariants of the queue, read from a snapshot of Redis and compared with the ledger."""

import functools
import json
from collections import Counter, defaultdict
from typing import Any

from consumer.queue import Place
from schemas.entries import decode_entry
from schemas.keys import Keys
from tests.integration.machine_ledger import ENDED, MAX_ATTEMPTS, Job, Ledger, RunKey
from tests.integration.machine_world import Fields, World, number

CANARY = "X-Amz-Signature"
TENANT = "acme"


class History:
    """Every event that was ever published, and what each listener group has said it needs no more."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.acked: dict[str, set[str]] = defaultdict(set)
        self.seen: dict[str, set[str]] = defaultdict(set)

    def learn(self, world: World) -> None:
        for entry_id in world.completions.keys() - self.events.keys():
            self.events[entry_id] = json.loads(world.completions[entry_id][b"payload"])

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events.values() if event["type"].removeprefix("generation.") in kinds]


def check(world: World, ledger: Ledger, history: History, keys: Keys) -> None:
    """Raises AssertionError where an invariant does not hold."""
    history.learn(world)
    _each_entry_is_unread_or_pending(world)
    for job_id, job in ledger.jobs.items():
        _the_hash_says_what_happened(world, job_id, job)
        _the_run_is_in_one_place(world, job_id, job)
    assert world.jobs.keys() == ledger.jobs.keys()
    assert world.delayed.keys() <= ledger.jobs.keys()
    _what_was_promised_is_there(world, ledger)
    _each_ended_run_has_one_event(ledger, history)
    _letters_are_those_of_dead_runs(world, ledger)
    _no_signature_is_kept(world, keys)
    _nothing_unacknowledged_is_trimmed(world, history)
    _tenants_are_charged_for_unfinished_runs(world, ledger)


@functools.lru_cache(maxsize=4096)
def _run_of(fields: tuple[tuple[bytes, bytes], ...]) -> RunKey | None:
    entry = decode_entry(dict(fields))
    return (entry.job_id, entry.run) if entry.job_id else None


def run_of(fields: Fields) -> RunKey | None:
    """Job and run of a request stream's entry."""
    return _run_of(tuple(fields.items()))


def _each_entry_is_unread_or_pending(world: World) -> None:
    """An entry that was delivered and is not pending would never be delivered again."""
    assert world.pending.keys() <= world.requests.keys(), "pending, and in no stream"
    for place in world.requests:
        stream, entry_id = place
        last = world.delivered.get(stream)
        delivered = last is not None and number(entry_id) <= number(last)
        assert delivered == (place in world.pending), f"{place} is acknowledged, and not deleted"


def _the_hash_says_what_happened(world: World, job_id: str, job: Job) -> None:
    found = world.jobs[job_id]
    said = found["run"], found["state"], found["attempt"], found["priority"]
    assert said == tuple(str(value).encode() for value in (job.run, job.state, job.attempts, job.priority))
    assert 0 <= job.attempts <= MAX_ATTEMPTS, "attempts are not bounded"
    assert found.get("lease", b"").decode() == job.lease
    assert ("event" in found) == (job.state in ENDED)


def _the_run_is_in_one_place(world: World, job_id: str, job: Job) -> None:
    waits: list[Place | str] = ["delayed"] if job_id in world.delayed else []
    waits += [job.place] if job.place in world.requests and job.place is not None else []
    assert len(waits) == (job.state not in ENDED), f"{job_id} is in {waits}"
    assert job.state not in ENDED or job_id not in world.cancels, "the cancel key would be a later run's"


def _what_was_promised_is_there(world: World, ledger: Ledger) -> None:
    waiting = {run_of(fields) for fields in world.requests.values()}
    for job_id, run in ledger.promised:
        job = ledger.jobs.get(job_id)
        if job is None or job.run < run:
            assert (job_id, run) in waiting, f"{job_id}, run {run}, is nowhere"
        elif job.run > run:
            assert (job_id, run) in ledger.ended, f"{job_id}, run {run}, has not ended"


def _each_ended_run_has_one_event(ledger: Ledger, history: History) -> None:
    terminal = history.of(*ENDED)
    found = Counter((event["data"]["job_id"], event["data"]["run"], event["type"]) for event in terminal)
    assert found == Counter((job_id, run, f"generation.{state}") for (job_id, run), state in ledger.ended.items())
    ids = Counter(event["id"] for event in [*terminal, *history.of("retrying", "started")])
    assert not ids or max(ids.values()) == 1, "an event was published twice"


def _letters_are_those_of_dead_runs(world: World, ledger: Ledger) -> None:
    letters = [fields for fields in world.dead.values() if b"raw" not in fields]
    found = Counter((fields[b"job_id"].decode(), int(fields[b"run"])) for fields in letters)
    assert found == +ledger.letters
    assert len(world.dead) - len(letters) == ledger.buried


def _no_signature_is_kept(world: World, keys: Keys) -> None:
    """Before a job's end its signature is in its entry and its hash, and after it nowhere."""
    live = {keys.job(job_id) for job_id, job in world.jobs.items() if job["state"].decode() not in ENDED}
    for key, value in world.values.items():
        if key not in live and key not in keys.request_streams:
            assert CANARY not in value, f"a signature is left in {key}"
    for job_id, job in world.jobs.items():
        assert (job["state"].decode() in ENDED) == (keys.job(job_id) in world.expiring), "kept for ever, or dropped"


def _nothing_unacknowledged_is_trimmed(world: World, history: History) -> None:
    for group in world.listening:
        assert history.events.keys() - world.completions.keys() <= history.acked[group], f"{group} has lost events"


def _tenants_are_charged_for_unfinished_runs(world: World, ledger: Ledger) -> None:
    owed = sum(job.tenant is not None and job.state not in ENDED for job in ledger.jobs.values())
    assert world.tenants == ({TENANT: owed} if owed else {})
