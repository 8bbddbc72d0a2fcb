"""A consumer's calls in the machine, each compared with what the ledger expects of it."""

import time
from typing import Any

from consumer.queue import Delivery, Held, Lease, Place
from schemas.entries import decode_entry
from schemas.events import TerminalEvent
from schemas.keys import JobState, Priority
from schemas.redact import redact_bytes
from tests import event_kit
from tests.integration.machine_base import AN_HOUR_MS, NO_FAULT, Consumer, MachineBase
from tests.integration.machine_checks import run_of
from tests.integration.machine_ledger import MAX_ATTEMPTS, Hold
from tests.integration.machine_world import Fault, number

WORK = ("start", "progress", "extend", "note_upload", "retry", "release", "succeed", "fail", "die", "cancel")
ENDS = {"succeed": JobState.SUCCEEDED, "fail": JobState.FAILED, "die": JobState.FAILED, "cancel": JobState.CANCELLED}
ENDS_BY_VERDICT = {"cancelled": "cancel", "refused": "fail", "expired": "die", "exhausted": "die"}


def steps_of(hold: Hold) -> tuple[str, ...]:
    """What a consumer may do with this hold."""
    if hold.verdict == "ok":
        return WORK
    if hold.verdict:
        return ENDS_BY_VERDICT[hold.verdict], "extend", "release"
    return ("bury", "extend", "release") if hold.entry.job_id is None else ("extend", "release")


class ConsumerCalls(MachineBase):
    def working(self) -> list[Hold]:
        return [hold for hold in self.holds if hold.verdict == "ok"]

    def ending(self) -> list[Hold]:
        """What only has to be ended: a run that may not be made, or what nobody can read."""
        return [hold for hold in self.holds if hold.verdict not in ("", "ok") or not hold.job_id]

    def ask_newest(self, fault: Fault, again: bool) -> None:
        if self.holds and self.may_begin(self.holds[-1]):
            self.ask(self.holds[-1], fault, again)

    def held_by(self, consumer: Consumer) -> set[Place]:
        return {hold.place for hold in self.holds if hold.consumer == consumer.name}

    def unseen(self, consumer: Consumer) -> set[Place]:
        mine = {place for place, pending in self.world.pending.items() if pending.owner == consumer.name}
        return mine - self.held_by(consumer)

    def may_begin(self, hold: Hold) -> bool:
        return hold.job_id != "" and not hold.verdict

    def given(self, consumer: Consumer, found: list[Delivery] | None) -> None:
        for delivery in found or []:
            for hold in [held for held in self.holds if held.place == delivery.place]:
                if hold.consumer == consumer.name:
                    self.drop(hold)
            self.holds.append(Hold(consumer.name, Lease(delivery), decode_entry(delivery.fields)))

    def drop(self, hold: Hold) -> None:
        if hold in self.holds:
            self.holds.remove(hold)
            self.stale = [*self.stale, hold][-8:]

    def promoted(self) -> None:
        for job_id in self.before.delayed.keys() - self.world.delayed.keys():
            assert self.before.delayed[job_id] <= time.time() * 1000 + 1000, "promoted before its time"
            job = self.ledger.jobs[job_id]
            new = [place for place, fields in self.world.requests.items() if run_of(fields) == (job_id, job.run)]
            new = [place for place in new if place not in self.before.requests]
            job.place = max(new, key=lambda place: number(place[1]), default=None)
            job.state = job.state if job_id in self.world.cancels else JobState.QUEUED
            assert job.place is None or job.place[0] == self.keys.requests(job.priority)

    def ask(self, hold: Hold, fault: Fault = NO_FAULT, again: bool = False) -> None:
        """Begins a run; the same call again has the same lease."""
        leases, entry = self.known[hold.consumer].leases, hold.entry
        hold.asked = hold.asked or leases.lease(hold.lease.delivery, hold.job_id)
        expected = self.ledger.begin_verdict(hold, self.world)
        request = entry.request
        work = leases.begin(
            hold.asked,
            run=entry.run,
            payload=entry.raw if request else b"",
            fingerprint=request.fingerprint() if request else "",
            max_attempts=MAX_ATTEMPTS,
            expires_at_ms=int(self.ledger.expires_at(entry).timestamp() * 1000),
            valid=request is not None,
        )
        begun = self.do(work, fault)
        if not self.redis.answers:
            assert self.unchanged
        else:
            verdict = self.redis.answers[-1][0].decode()
            assert verdict == expected, f"begin answers {verdict}, not {expected}"
            self.tally[f"begin: {verdict}"] += 1
            if not self.unchanged and verdict not in ("lost", "duplicate"):
                assert not self.world.pending[hold.place].lapsed, "the lease was not renewed"
            self.ledger.begun(hold, verdict, Priority(self.keys.priority_of(hold.place[0])))
        if begun is not None:
            self._heard(hold, begun.verdict, begun.attempt)
        if again and not hold.verdict:
            self.ask(hold)

    def _heard(self, hold: Hold, verdict: str, attempt: int) -> None:
        if verdict in ("lost", "duplicate"):
            return self.drop(hold)
        assert hold.asked is not None
        hold.lease, hold.verdict, hold.attempt = hold.asked, hold.verdict or verdict, attempt
        return None

    def fenced(self, hold: Hold, step: str, fault: Fault = NO_FAULT, again: bool = False) -> None:
        """A step that only the lease's owner may take."""
        script = "finish" if step in ENDS else step
        expected = self.ledger.expected(script, hold, self.world)
        held = self.do(self._step_of(hold, step), fault)
        if not self.redis.answers:
            assert self.unchanged
        else:
            answer = self.redis.answers[-1]
            self.tally[f"{script}: {expected}"] += 1
            assert (answer == b"lost") == (expected == "lost"), f"{step} answers {answer!r}, not {expected}"
            heeds = script in ("start", "progress", "extend") and hold.lease.job_id in self.before.cancels
            assert (answer == b"cancel") == (heeds and expected != "lost")
            assert expected == "changes" or self.unchanged, f"{step} was refused, and changed something"
            assert step != "extend" or expected == "lost" or not self.world.pending[hold.place].lapsed
            if script == "retry" and expected == "changes":
                due_ms = self.world.delayed.get(hold.job_id, 0)
                assert due_ms > time.time() * 1000 + AN_HOUR_MS / 2, "due before its time"
            if expected == "changes" and (answer != b"cancel" or script != "start"):
                self.ledger.changed(script, hold, ENDS.get(step), dead=step == "die")
        if again:
            self.fenced(hold, step)
        if held is Held.LOST or (held is Held.OK and script in ("finish", "retry", "release", "bury")):
            self.drop(hold)

    async def _step_of(self, hold: Hold, step: str) -> Any:
        leases, lease = self.known[hold.consumer].leases, hold.lease
        about = (hold.job_id, hold.entry.run, hold.attempt)
        match step:
            case "start":
                return await leases.start(lease, event_kit.started(*about))
            case "progress":
                return await leases.progress(lease, 3, 20, 1.0)
            case "extend":
                return await leases.extend(lease)
            case "note_upload":
                return await leases.note_upload(lease, b"{}")
            case "retry":
                return await leases.retry(lease, event_kit.retrying(*about), AN_HOUR_MS / 1000)
            case "release":
                return await leases.release(lease)
            case "bury":
                return await leases.bury(lease.delivery, hold.entry.raw)
            case _:
                return await self._finish(hold, step)

    async def _finish(self, hold: Hold, step: str) -> Held:
        about = (hold.job_id, hold.entry.run, hold.attempt)
        events: dict[str, TerminalEvent] = {
            "succeed": event_kit.succeeded(*about),
            "fail": event_kit.failed(*about, dead=False),
            "die": event_kit.failed(*about),
            "cancel": event_kit.cancelled(*about),
        }
        entry = hold.entry
        payload = entry.request.redacted().encode() if entry.request else redact_bytes(entry.raw)
        leases = self.known[hold.consumer].leases
        return await leases.finish(hold.lease, ENDS[step], events[step], payload, dead=step == "die")
