"""What must be true of every run, kept beside Redis: the rules of the contract, without a script."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from consumer.queue import Lease, Place
from schemas.entries import RequestEntry
from schemas.keys import JobState, Priority
from tests.integration.machine_world import World

MAX_ATTEMPTS = 2
ENDED = (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)

LONG_AGO, NEVER = datetime(2020, 1, 1, tzinfo=UTC), datetime(2999, 1, 1, tzinfo=UTC)

RunKey = tuple[str, int]
Expected = Literal["changes", "repeats", "lost"]


@dataclass
class Job:
    """A job's last run. `place` is its entry, None while it is delayed; `counted` the lease whose attempt counts."""

    run: int
    priority: Priority
    fingerprint: str
    place: Place | None
    tenant: str | None = None
    state: JobState = JobState.QUEUED
    attempts: int = 0
    lease: str = ""
    counted: str = ""

    def may_be_followed(self, run: int) -> bool:
        return run == self.run + 1 and self.state in (JobState.FAILED, JobState.CANCELLED)


@dataclass(eq=False)
class Hold:
    """What one consumer believes to have. `asked`: the lease of a begin whose answer it may not have seen."""

    consumer: str
    lease: Lease
    entry: RequestEntry
    asked: Lease | None = None
    verdict: str = ""
    attempt: int = 0

    @property
    def job_id(self) -> str:
        return self.entry.job_id or ""

    @property
    def token(self) -> str:
        """The lease that it asked for last."""
        return self.asked.token if self.asked else ""

    @property
    def place(self) -> Place:
        return self.lease.delivery.place


@dataclass
class Ledger:
    """`promised`: runs that were accepted. `ended`: how each run did. `letters`: dead runs that were not replayed.

    `overdue`: jobs whose `expires_at`, if they have one, has passed.
    """

    jobs: dict[str, Job] = field(default_factory=dict)
    promised: set[RunKey] = field(default_factory=set)
    ended: dict[RunKey, JobState] = field(default_factory=dict)
    letters: Counter[RunKey] = field(default_factory=Counter)
    overdue: set[str] = field(default_factory=set)
    buried: int = 0
    duplicates: int = 0

    def submit_verdict(self, job_id: str, run: int, fingerprint: str) -> str:
        """What a producer that submits this run is answered."""
        job = self.jobs.get(job_id)
        if job is None or job.may_be_followed(run):
            return "accepted"
        if run in (1, job.run):
            return "same" if job.fingerprint == fingerprint else "conflict"
        return "refused"

    def submitted(self, job_id: str, job: Job) -> None:
        """A producer's run was accepted."""
        self.jobs[job_id] = job
        self.promised.add((job_id, job.run))

    def added(self, job_id: str, run: int) -> None:
        """A bare entry was added: a promise, if the run is the job's first, or follows the last one."""
        job = self.jobs.get(job_id)
        if (job is None and run == 1) or (job is not None and job.may_be_followed(run)):
            self.promised.add((job_id, run))

    def begin_verdict(self, hold: Hold, world: World) -> str:
        """What a consumer that begins this run is answered."""
        if world.owner(hold.place) != hold.consumer:
            return "lost"
        job, entry = self.jobs.get(hold.job_id), hold.entry
        fresh = job is None or job.may_be_followed(entry.run)
        owned = job is not None and job.run == entry.run and job.place == hold.place and job.state not in ENDED
        if not fresh and not owned:
            return "duplicate"
        attempts = 0 if fresh or job is None else job.attempts
        if job is not None and not fresh and job.counted == hold.token:
            return "ok"
        if hold.job_id in world.cancels:
            return "cancelled"
        if entry.request is None:
            return "refused"
        if attempts == 0 and self.expires_at(entry) < datetime.now(UTC):
            return "expired"
        return "exhausted" if attempts >= MAX_ATTEMPTS else "ok"

    def expires_at(self, entry: RequestEntry) -> datetime:
        """Redis' clock cannot be moved: instead what would have expired by now expired long ago."""
        expires_at = entry.request.expires_at if entry.request else None
        return LONG_AGO if entry.job_id in self.overdue and expires_at else expires_at or NEVER

    def begun(self, hold: Hold, verdict: str, priority: Priority) -> None:
        """A begin was answered so, whether the answer arrived or not."""
        if verdict == "duplicate":
            self.duplicates += 1
        if verdict in ("lost", "duplicate"):
            return
        job, entry = self.jobs.get(hold.job_id), hold.entry
        if job is None or job.may_be_followed(entry.run):
            fingerprint = entry.request.fingerprint() if entry.request else ""
            job = self.jobs[hold.job_id] = Job(entry.run, priority, fingerprint, hold.place)
        if verdict == "ok" and job.counted == hold.token:
            return  # the answer to a call that was sent twice, though another lease may have followed
        job.lease = hold.token
        if verdict == "ok":
            job.counted, job.state = job.lease, JobState.PREPARING
            job.attempts += 1

    def expected(self, step: str, hold: Hold, world: World) -> Expected:
        """Whether a fenced step changes something, only repeats what this lease has done, or is refused."""
        job, token = self.jobs.get(hold.job_id), hold.lease.token
        owns = world.owner(hold.place) == hold.consumer
        if step == "bury":
            return "changes" if owns else "lost"
        if token == "" and step in ("extend", "release"):
            return "changes" if owns else "lost"
        if job is None or token == "" or job.lease != token:
            return "lost"
        if step in ("progress", "note_upload"):
            return "changes"
        running = owns and job.state is JobState.RUNNING
        done = {"start": running, "finish": job.state in ENDED, "retry": job.state is JobState.DELAYED}
        if done.get(step):
            return "repeats"
        return "changes" if owns else "lost"

    def changed(self, step: str, hold: Hold, state: JobState | None, *, dead: bool) -> None:
        """A fenced step was carried out. `state` is how `finish` ends the run."""
        if step == "bury":
            self.buried += 1
        job = self.jobs.get(hold.job_id)
        if job is None or hold.lease.token == "":
            return
        match step:
            case "start":
                job.state = JobState.RUNNING
            case "retry":
                job.state, job.place = JobState.DELAYED, None
            case "release" if job.counted == hold.lease.token:
                job.attempts, job.state, job.lease, job.counted = job.attempts - 1, JobState.QUEUED, "", ""
            case "release":
                job.lease = ""
            case "finish" if state is not None:
                self.end(hold.job_id, state)
                self.letters[hold.job_id, job.run] += dead

    def end(self, job_id: str, state: JobState) -> None:
        """The job's last run ended."""
        job = self.jobs[job_id]
        assert (job_id, job.run) not in self.ended, "a run ended twice"
        job.state = self.ended[job_id, job.run] = state
