"""The life of jobs as a state machine: any order of steps, by any of three producers and three consumers."""

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from consumer.queue import Intake
from schemas.keys import Priority
from tests.integration.machine_base import NO_FAULT, PICKS, SLOTS, choose
from tests.integration.machine_calls import ENDS_BY_VERDICT
from tests.integration.machine_checks import CANARY
from tests.integration.machine_consumers import ConsumerRules
from tests.integration.machine_ledger import ENDED
from tests.integration.machine_producers import BODIES, ProducerRules

STAGES: dict[str, tuple[str, ...]] = {
    "queued": (),
    "begun": (),
    "running": ("start",),
    "delayed": ("start", "retry"),
    "dead": ("start", "die"),
}
_ROUNDS = 100


class QueueMachine(ConsumerRules, ProducerRules):
    """In the end everybody does what is left to do: then each run that was accepted has its one terminal event."""

    @initialize(
        bodies=st.lists(st.sampled_from(list(BODIES)), min_size=3, max_size=3),
        stages=st.lists(st.sampled_from(list(STAGES)), min_size=3, max_size=3),
        bare=st.booleans(),
    )
    def three_jobs(self, bodies: list[str], stages: list[str], bare: bool) -> None:
        """Each of them has come so far already: what goes wrong early is seen sooner this way, and deep states, too."""
        for slot, (body, stage) in enumerate(zip(bodies, stages, strict=True)):
            self.a_new_job(body, bare, Priority.NORMAL, slot)
            if stage != "queued":
                self.read_and_begin(slot, NO_FAULT, again=False)
                for step in STAGES[stage]:
                    self.fenced(self.holds[-1], step)

    @precondition(lambda self: self.world.delayed)
    @rule(pick=PICKS, slot=SLOTS)
    def promote_what_is_to_be_cancelled(self, pick: int, slot: int) -> None:
        """It is still called delayed when it is back in its stream: somebody may have looked before."""
        job_id = choose(list(self.world.delayed), pick)
        self.look(job_id, slot)
        self.do(self.producers[slot].ask_to_cancel(job_id))
        self.promote(slot, pick, NO_FAULT, ripe=True)

    def teardown(self) -> None:
        try:
            if self.sound:
                self.finish_everything()
        finally:
            super().teardown()

    def finish_everything(self) -> None:
        self.holds = []
        last = self.boot()
        self.do(last.intake.ensure_groups())
        self.do(self.age(list(self.world.pending)))
        for _ in range(_ROUNDS):
            if not self.world.requests and not self.world.delayed:
                break
            self._work_once(last.name, last.intake)
        self.nothing_is_lost_and_nothing_is_published_twice()
        assert not self.world.requests
        assert not self.world.delayed
        assert all(job.state in ENDED for job in self.ledger.jobs.values())
        assert self.ledger.promised <= self.ledger.ended.keys(), "a run that was accepted has not ended"
        assert not any(CANARY in value for value in self.world.values.values())
        assert self.world.counters.get("duplicates", 0) == self.ledger.duplicates
        self._hear_everything()

    def _work_once(self, name: str, intake: Intake) -> None:
        """Takes one entry, however it can be had, and ends its run."""
        if self.world.delayed:
            self.do(self.ripen(list(self.world.delayed)))
            self.do(intake.promote())
            self.promoted()
        consumer = self.known[name]
        self.given(consumer, self.do(intake.reclaim(()) if self.world.pending else intake.read(block_ms=1)))
        for hold in list(self.holds):
            if hold.job_id:
                self.ask(hold)
            if hold in self.holds:
                self.fenced(hold, ENDS_BY_VERDICT.get(hold.verdict, "succeed") if hold.job_id else "bury")

    def _hear_everything(self) -> None:
        for group, listener in self.listeners.items():
            listener.reread()
            while found := self.do(listener.reclaim(idle_ms=0)) or self.do(listener.read(block_ms=1)):
                entry_ids = [entry.entry_id for entry in found]
                self.history.seen[group] |= set(entry_ids)
                self.history.acked[group] |= set(entry_ids)
                self.do(listener.ack(entry_ids))
            assert self.history.seen[group] >= self.history.events.keys(), f"{group} has not heard everything"
        self.do(listener.trim())
        self.nothing_is_lost_and_nothing_is_published_twice()
        assert len(self.world.completions) <= 1, "what everybody has heard is kept"


def a_machine(url: str) -> type[QueueMachine]:
    """A machine on this Redis, with a tally of its own."""
    return type("Machine", (QueueMachine,), {"url": url, "tally": Counter()})
