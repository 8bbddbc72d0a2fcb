"""What consumers do in the machine: also late, twice, and with leases that they have lost."""

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from consumer.queue import scripts
from tests.integration.machine_base import FAULTS, NO_FAULT, PICKS, SLOTS, choose
from tests.integration.machine_calls import WORK, ConsumerCalls, steps_of
from tests.integration.machine_world import Fault

SEVERAL = st.lists(st.sampled_from(WORK), min_size=1, max_size=5)


class ConsumerRules(ConsumerCalls):
    @precondition(lambda self: self.world.unread)
    @rule(slot=SLOTS, fault=FAULTS)
    def read(self, slot: int, fault: Fault) -> None:
        consumer = self.consumers[slot]
        self.given(consumer, self.do(consumer.intake.read(block_ms=1), fault))

    @precondition(lambda self: self.world.unread)
    @rule(slot=SLOTS, fault=FAULTS, again=st.booleans())
    def read_and_begin(self, slot: int, fault: Fault, again: bool) -> None:
        consumer = self.consumers[slot]
        self.given(consumer, self.do(consumer.intake.read(block_ms=1)))
        self.ask_newest(fault, again)

    @precondition(lambda self: self.world.pending)
    @rule(pick=PICKS, slot=SLOTS, fault=FAULTS, again=st.booleans())
    def take_over(self, pick: int, slot: int, fault: Fault, again: bool) -> None:
        """A lease runs out in its owner's hands, and the run is begun elsewhere."""
        self.let_a_lease_run_out(pick)
        self.reclaim(slot, NO_FAULT, forgetful=False)
        self.ask_newest(fault, again)

    @precondition(lambda self: any(hold.place in self.world.pending for hold in self.working()))
    @rule(pick=PICKS, slot=SLOTS, own=st.booleans(), begins=st.booleans(), steps=SEVERAL)
    def sleep_beyond_the_lease(self, pick: int, slot: int, own: bool, begins: bool, steps: list[str]) -> None:
        """The run is taken over, perhaps by the `own` consumer itself; then the first attempt goes on."""
        hold = choose([hold for hold in self.working() if hold.place in self.world.pending], pick)
        names = [consumer.name for consumer in self.consumers]
        self.do(self.age([hold.place]))
        self.reclaim(names.index(hold.consumer) if own else slot, NO_FAULT, forgetful=True)
        if begins:
            self.ask_newest(NO_FAULT, again=False)
        for step in steps:
            self.fenced(hold, step)

    @precondition(lambda self: any(self.unseen(consumer) for consumer in self.consumers))
    @rule(pick=PICKS, fault=FAULTS)
    def read_what_got_lost_on_its_way(self, pick: int, fault: Fault) -> None:
        consumer = choose([consumer for consumer in self.consumers if self.unseen(consumer)], pick)
        wanted = self.unseen(consumer)
        found = self.do(consumer.intake.unseen(self.held_by(consumer)), fault)
        assert found is None or not self.world.delivered or {delivery.place for delivery in found} == wanted
        self.given(consumer, found)

    @precondition(lambda self: self.world.pending)
    @rule(pick=PICKS)
    def let_a_lease_run_out(self, pick: int) -> None:
        self.do(self.age([choose(list(self.world.pending), pick)]))

    @precondition(lambda self: any(pending.lapsed for pending in self.world.pending.values()))
    @rule(slot=SLOTS, fault=FAULTS, forgetful=st.booleans())
    def reclaim(self, slot: int, fault: Fault, forgetful: bool) -> None:
        """`forgetful`: it has dropped what it had, and may well get it again."""
        consumer = self.consumers[slot]
        held = set() if forgetful else self.held_by(consumer)
        found = self.do(consumer.intake.reclaim(held), fault)
        for place, pending in self.before.pending.items():
            assert self.world.owner(place) == pending.owner or pending.lapsed, "taken from a live consumer"
        self.given(consumer, found)

    @precondition(lambda self: self.world.delayed)
    @rule(slot=SLOTS, pick=PICKS, fault=FAULTS, ripe=st.booleans())
    def promote(self, slot: int, pick: int, fault: Fault, ripe: bool) -> None:
        if ripe:
            self.do(self.ripen([choose(list(self.world.delayed), pick)]))
        self.do(self.consumers[slot].intake.promote(), fault)
        self.promoted()

    @precondition(lambda self: self.ledger.jobs)
    @rule(pick=PICKS)
    def promote_what_was_due_once(self, pick: int) -> None:
        """Between listing what is due and moving it, others may have moved it, and may have delayed it again."""
        job_id = choose(list(self.ledger.jobs), pick)
        stream = self.keys.requests(self.ledger.jobs[job_id].priority)
        names = [self.keys.delayed, self.keys.job(job_id), self.keys.cancel(job_id), stream]
        self.do(self.redis.register_script(scripts.PROMOTE)(keys=names, args=[job_id]))
        assert self.unchanged or job_id in self.before.delayed
        self.promoted()

    @precondition(lambda self: any(self.may_begin(hold) for hold in self.holds))
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans())
    def begin(self, pick: int, fault: Fault, again: bool) -> None:
        self.ask(choose([hold for hold in self.holds if self.may_begin(hold)], pick), fault, again)

    @precondition(lambda self: self.working())
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans())
    def start(self, pick: int, fault: Fault, again: bool) -> None:
        self.fenced(choose(self.working(), pick), "start", fault, again)

    @precondition(lambda self: self.working())
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans())
    def retry(self, pick: int, fault: Fault, again: bool) -> None:
        self.fenced(choose(self.working(), pick), "retry", fault, again)

    @precondition(lambda self: self.working())
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans(), how=st.sampled_from(["die", "die", "fail", "succeed"]))
    def finish(self, pick: int, fault: Fault, again: bool, how: str) -> None:
        self.fenced(choose(self.working(), pick), how, fault, again)

    @precondition(lambda self: self.ending())
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans())
    def end_without_work(self, pick: int, fault: Fault, again: bool) -> None:
        hold = choose(self.ending(), pick)
        self.fenced(hold, steps_of(hold)[0], fault, again)

    @precondition(lambda self: self.holds)
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans(), step=st.sampled_from(["extend", "progress", "note_upload"]))
    def keep(self, pick: int, fault: Fault, again: bool, step: str) -> None:
        hold = choose(self.holds, pick)
        self.fenced(hold, step if hold.verdict == "ok" else "extend", fault, again)

    @precondition(lambda self: self.holds)
    @rule(pick=PICKS, fault=FAULTS, again=st.booleans())
    def hand_back(self, pick: int, fault: Fault, again: bool) -> None:
        self.fenced(choose(self.holds, pick), "release", fault, again)

    @precondition(lambda self: self.stale)
    @rule(pick=PICKS, step=PICKS)
    def work_on_without_a_lease(self, pick: int, step: int) -> None:
        hold = choose(self.stale, pick)
        if self.may_begin(hold):
            self.ask(hold)
        else:
            self.fenced(hold, choose(steps_of(hold), step))

    @precondition(lambda self: any(hold.asked and hold.verdict for hold in [*self.holds, *self.stale]))
    @rule(pick=PICKS)
    def begin_arrives_late(self, pick: int) -> None:
        """A begin that its client has sent twice is carried out the second time when much else has happened."""
        self.ask(choose([hold for hold in [*self.holds, *self.stale] if hold.asked and hold.verdict], pick))

    @rule(slot=SLOTS, leaves=st.booleans(), frozen=st.booleans())
    def die(self, slot: int, leaves: bool, frozen: bool) -> None:
        """A consumer dies, or freezes and comes back when another has long replaced it."""
        consumer, self.consumers[slot] = self.consumers[slot], self.boot()
        if leaves:
            self.do(consumer.presence.leave())
        mine = [hold for hold in self.holds if hold.consumer == consumer.name]
        self.holds = [hold for hold in self.holds if hold.consumer != consumer.name]
        self.stale = (self.stale + mine if frozen else self.stale)[-8:]
