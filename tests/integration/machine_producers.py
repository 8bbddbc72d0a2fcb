"""What backends do in the machine: submit, add entries themselves, cancel, replay, listen, trim."""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from producer.cancelling import cancel, cancellation
from producer.completions import Completions
from producer.queue import JobRecord, ProducerQueue
from producer.submissions import QueueLimits
from schemas.keys import CONSUMER_GROUP, JobState, Priority
from schemas.requests import GenerationRequest
from tests.event_kit import NOW
from tests.integration.machine_base import FAULTS, LISTENERS, NO_FAULT, PICKS, SLOTS, MachineBase, choose
from tests.integration.machine_checks import CANARY, TENANT, run_of
from tests.integration.machine_ledger import ENDED, NEVER, Job
from tests.integration.machine_world import Fault
from tests.integration.queue_kit import a_request

SIGNED = f"https://files.example/fox.safetensors?{CANARY}=c0ffee"
BODIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "signed": {"lora_url": SIGNED},
    "tenant": {"tenant": TENANT},
    "expiring": {"expires_at": NEVER, "upload_url": SIGNED},
}
PRIORITIES = st.sampled_from([Priority.NORMAL, Priority.NORMAL, Priority.HIGH, Priority.LOW])
ENOUGH = 3


class ProducerRules(MachineBase):
    def __init__(self) -> None:
        super().__init__()
        limits = QueueLimits(1000)
        self.producers = [ProducerQueue(self.redis, self.keys, limits=limits, job_ttl_s=60) for _ in range(3)]
        self.listeners = {group: self.listener(group) for group in LISTENERS}
        self.requests: dict[str, GenerationRequest] = {}
        self.records: list[JobRecord] = []

    def listener(self, group: str) -> Completions:
        self.boots += 1
        return Completions(self.redis, self.redis, self.keys, group, f"listener-{self.boots}")

    @precondition(lambda self: len(self.requests) - len(self.ledger.ended) < ENOUGH)
    @rule(body=st.sampled_from(list(BODIES)), bare=st.booleans(), priority=PRIORITIES, slot=SLOTS)
    def a_new_job(self, body: str, bare: bool, priority: Priority, slot: int) -> None:
        job_id = f"job-{len(self.requests)}"
        request = self.requests[job_id] = a_request(job_id, **BODIES[body])
        if bare:
            self.add(job_id, request.encode(), None, priority)
        else:
            self.submit(slot, request, 1, priority)
            self.look(job_id, slot)

    @precondition(lambda self: self.requests)
    @rule(pick=PICKS, slot=SLOTS, after=st.sampled_from([0, 1, 1, 2]), other=st.booleans(), priority=PRIORITIES)
    def submit_again(self, pick: int, slot: int, after: int, other: bool, priority: Priority) -> None:
        """`after`: the run that is asked for, counted from the last one."""
        request = choose(list(self.requests.values()), pick)
        job = self.ledger.jobs.get(request.job_id)
        if other:
            request = request.model_copy(update={"steps": 30})
        self.submit(slot, request, job.run + after if job else 1, priority)

    @precondition(lambda self: self.requests)
    @rule(pick=PICKS, after=st.sampled_from([0, 0, 1, 1, 2]), valid=st.booleans(), priority=PRIORITIES)
    def add_again(self, pick: int, after: int, valid: bool, priority: Priority) -> None:
        request = choose(list(self.requests.values()), pick)
        job = self.ledger.jobs.get(request.job_id)
        payload = request.encode() if valid else f'{{"job_id":"{request.job_id}","lora_url":"{SIGNED}"}}'.encode()
        self.add(request.job_id, payload, job.run + after if job else 1, priority)

    @precondition(lambda self: len(self.world.dead) + len(self.world.unread) < ENOUGH)
    @rule(priority=PRIORITIES)
    def add_what_nobody_can_read(self, priority: Priority) -> None:
        self.do(self.redis.xadd(self.keys.requests(priority), {"payload": b"\xff\xfe"}))

    @precondition(lambda self: self.cancellable())
    @rule(pick=PICKS, slot=SLOTS, fault=FAULTS, again=st.booleans())
    def cancel(self, pick: int, slot: int, fault: Fault, again: bool) -> None:
        self._cancel(choose(self.cancellable(), pick), slot, fault, again=again)

    def _cancel(self, job_id: str, slot: int, fault: Fault, *, again: bool) -> None:
        done = self.do(cancel(self.producers[slot], job_id, lambda: NOW), fault)
        self._cancelled(job_id)
        job = self.ledger.jobs.get(job_id)
        if done is not None and job is not None:
            assert job.state in ENDED or job_id in self.world.cancels
        if again:
            self._cancel(job_id, slot, NO_FAULT, again=False)

    @precondition(lambda self: self.cancellable())
    @rule(pick=PICKS, slot=SLOTS, fault=FAULTS)
    def ask_to_cancel(self, pick: int, slot: int, fault: Fault) -> None:
        job_id = choose(self.cancellable(), pick)
        self.do(self.producers[slot].ask_to_cancel(job_id), fault)
        assert self.unchanged or job_id in self.world.cancels, self.difference

    @precondition(lambda self: any(job.state not in ENDED for job in self.ledger.jobs.values()))
    @rule(pick=PICKS, slot=SLOTS)
    def look_at_a_job(self, pick: int, slot: int) -> None:
        job_ids = [job_id for job_id, job in self.ledger.jobs.items() if job.state not in ENDED]
        self.look(choose(job_ids, pick), slot)

    @precondition(lambda self: self.expiring())
    @rule(pick=PICKS)
    def time_passes(self, pick: int) -> None:
        self.ledger.overdue.add(choose(self.expiring(), pick))

    @precondition(lambda self: self.records)
    @rule(pick=PICKS, slot=SLOTS, again=st.booleans())
    def cancel_as_it_looked_then(self, pick: int, slot: int, again: bool) -> None:
        record = choose(self.records, pick)
        self._cancel_seen(record, slot)
        if again:
            self._cancel_seen(record, slot)

    @precondition(lambda self: any(b"raw" not in letter for letter in self.world.dead.values()))
    @rule(pick=PICKS, slot=SLOTS, fault=FAULTS, again=st.booleans())
    def replay(self, pick: int, slot: int, fault: Fault, again: bool) -> None:
        letter_id = choose([name for name, letter in self.world.dead.items() if b"raw" not in letter], pick)
        self._replay(slot, letter_id, fault)
        if again:
            self._replay(slot, letter_id, NO_FAULT)

    @precondition(lambda self: self.world.dead and self.steps % 4 == 0)
    @rule(pick=PICKS, slot=SLOTS)
    def drop_a_letter(self, pick: int, slot: int) -> None:
        letter_id = choose(list(self.world.dead), pick)
        letter = self.world.dead[letter_id]
        self.do(self.producers[slot].drop_dead_letters([letter_id]))
        if b"raw" in letter:
            self.ledger.buried -= 1
        else:
            self.ledger.letters[letter[b"job_id"].decode(), int(letter[b"run"])] -= 1

    @precondition(lambda self: self.world.completions)
    @rule(
        group=st.sampled_from(LISTENERS),
        fault=FAULTS,
        acks=st.sampled_from(["all", "half", "none"]),
        how=st.sampled_from(["reads", "reads", "restarts", "reclaims"]),
    )
    def listen(self, group: str, fault: Fault, acks: str, how: str) -> None:
        if how == "restarts":
            self.listeners[group] = self.listener(group)
        listener = self.listeners[group]
        found = self.do(listener.reclaim(idle_ms=0) if how == "reclaims" else listener.read(block_ms=1), fault) or []
        entry_ids = [entry.entry_id for entry in found]
        self.history.seen[group] |= set(entry_ids)
        done = {"all": entry_ids, "half": entry_ids[: len(entry_ids) // 2], "none": []}[acks]
        self.history.acked[group] |= set(done)
        if self.do(listener.ack(done), fault) is None:
            listener.reread()

    @precondition(lambda self: self.world.completions)
    @rule(group=st.sampled_from(LISTENERS), fault=FAULTS)
    def trim(self, group: str, fault: Fault) -> None:
        self.do(self.listeners[group].trim(), fault)

    @precondition(lambda self: self.steps % 23 == 22)
    @rule(priority=PRIORITIES)
    def lose_the_group(self, priority: Priority) -> None:
        self.do(self.redis.xgroup_destroy(self.keys.requests(priority), CONSUMER_GROUP))

    def expiring(self) -> list[str]:
        overdue = self.ledger.overdue
        return [name for name, request in self.requests.items() if request.expires_at and name not in overdue]

    def cancellable(self) -> list[str]:
        """A third of the jobs, so that the others live longer."""
        return [job_id for job_id in self.requests if job_id[-1] in "258" and job_id not in self.world.cancels]

    def submit(self, slot: int, request: GenerationRequest, run: int, priority: Priority) -> None:
        expected = self.ledger.submit_verdict(request.job_id, run, request.fingerprint())
        found = self.do(self.producers[slot].submit([request], run=run, priority=priority))
        assert found is not None
        assert found[0].verdict == expected, f"submit answers {found[0].verdict}, not {expected}"
        self._answered(expected, request, run, priority)

    def add(self, job_id: str, payload: bytes, run: int | None, priority: Priority) -> None:
        envelope: dict[Any, Any] = {"payload": payload} | ({} if run is None else {"run": str(run)})
        self.do(self.redis.xadd(self.keys.requests(priority), envelope))
        self.ledger.added(job_id, run or 1)

    def _answered(self, verdict: str, request: GenerationRequest, run: int, priority: Priority) -> None:
        self.tally[f"submit: {verdict}"] += 1
        if verdict != "accepted":
            assert self.unchanged
            return
        new = [place for place in self.world.requests if place not in self.before.requests]
        [place] = [place for place in new if run_of(self.world.requests[place]) == (request.job_id, run)]
        assert place[0] == self.keys.requests(priority)
        job = Job(run, priority, request.fingerprint(), place, request.tenant)
        self.ledger.submitted(request.job_id, job)

    def look(self, job_id: str, slot: int) -> None:
        record = self.do(self.producers[slot].job(job_id))
        if record is not None and record.state in (JobState.QUEUED, JobState.DELAYED):
            self.records = [*self.records, record][-6:]

    def _cancel_seen(self, record: JobRecord, slot: int) -> None:
        job, found = self.ledger.jobs[record.job_id], self.world.jobs[record.job_id]
        now = job.run, job.state, job.attempts, found["entry_id"].decode()
        fits = now == (record.run, record.state, record.attempt, record.entry_id)
        event, payload = cancellation(record, NOW)
        ended = self.do(self.producers[slot].cancel_waiting(record, event, payload))
        assert ended == (fits or found.get("event") == event.encode())
        assert fits != self.unchanged, "cancelled what is not where it was seen"
        self._cancelled(record.job_id)

    def _cancelled(self, job_id: str) -> None:
        """Takes note of what a cancellation did, whether its answer arrived or not."""
        if b"ended" in self.redis.answers and not self.unchanged:
            self.tally["cancelled while waiting"] += 1
            self.ledger.end(job_id, JobState.CANCELLED)

    def _replay(self, slot: int, letter_id: str, fault: Fault) -> None:
        letter = self.before.dead.get(letter_id) or self.world.dead[letter_id]
        job_id, run = letter[b"job_id"].decode(), int(letter[b"run"]) + 1
        request, there = self.requests[job_id], letter_id in self.world.dead
        expected = self.ledger.submit_verdict(job_id, run, request.fingerprint()) if there else "gone"
        priority = Priority(self.keys.priority_of(letter[b"source"].decode()))
        self.do(self.producers[slot].replay(letter_id, request, run=run, priority=priority), fault)
        if not self.redis.answers:
            assert self.unchanged
            return
        verdict = self.redis.answers[-1][0].decode()
        assert verdict == expected, f"replay answers {verdict}, not {expected}"
        self.tally[f"replay: {verdict}"] += 1
        if verdict in ("accepted", "same"):
            self.ledger.letters[job_id, run - 1] -= 1
        if verdict == "accepted":
            self._answered(verdict, request, run, priority)
