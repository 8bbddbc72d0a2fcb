"""The loop of one consumer: takes entries, sees each of them through, and drains when told to."""

import asyncio
from collections import deque
from contextlib import ExitStack
from typing import Any

import structlog
from redis.exceptions import RedisError

from consumer.attempt import Attempt
from consumer.errors import HandedBack, ModelBroken
from consumer.handing_back import HandBack
from consumer.keeper import Keeper
from consumer.outage import until_answered
from consumer.outcomes import Outcomes
from consumer.queue import Begun, Delivery, Intake, Lease, Leases
from consumer.settings import ConsumerSettings
from consumer.slots import Slots
from consumer.stages import Stages
from consumer.stopping import Stop
from schemas.entries import MAX_SALVAGED_BYTES, RequestEntry, decode_entry
from schemas.events import SucceededData
from schemas.redact import redact_bytes

log = structlog.get_logger(__name__)

BLOCK_S = 0.5
_SWEEP_EVERY_S = 0.5
_ABANDON_AFTER_S = 5.0
_PARALLEL_DELIVERIES = 4


class Worker:
    """One consumer: one job is drawn, `prefetch` more are prepared, and one behind them is on its way.

    A LoRA may take longer to fetch than a picture to draw, so the next two are fetched side by side. With a prefetch
    of 0 nothing is taken before the GPU is free. Finished pictures are stored behind.
    """

    def __init__(
        self,
        intake: Intake,
        leases: Leases,
        keeper: Keeper,
        stages: Stages,
        outcomes: Outcomes,
        settings: ConsumerSettings,
    ) -> None:
        self._intake = intake
        self._leases = leases
        self._keeper = keeper
        self._stages = stages
        self._outcomes = outcomes
        self._settings = settings
        self._deliveries = asyncio.Semaphore(_PARALLEL_DELIVERIES)
        self._hand_back = HandBack(intake, leases)
        self._backlog: deque[Delivery] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stop = Stop()
        self._slots = Slots(2 + settings.prefetch if settings.prefetch else 1, self._stop)
        self._swept_at = 0.0
        self._busy_at = 0.0
        self._reread = True

    def request_stop(self) -> None:
        """Begins to drain; the second time, hands everything back at once. A signal handler of the loop."""
        self._stop.request()

    @property
    def broken(self) -> ModelBroken | None:
        """Why the model can draw no more; the jobs that it has not drawn are tried elsewhere."""
        return self._stages.health.broken

    @property
    def stopping(self) -> bool:
        return self._stop.asked.is_set()

    async def run(self) -> None:
        """Works until told to stop, until idle for as long as the settings say, or until `broken`; then drains.

        Raises what has broken the keeping of leases.
        """
        keeping = asyncio.create_task(self._keeper.run())
        keeping.add_done_callback(self._stop_without_leases)
        try:
            await self._stop.unless_asked(until_answered(self._intake.ensure_groups, what="ensure_groups"))
            await self._take()
        except asyncio.CancelledError:
            self._stop.urgent.set()  # whoever cancels takes the machine away: hand everything back now
            raise
        finally:
            await self._drain()
            self._keeper.leave()
            await asyncio.wait({keeping}, timeout=_ABANDON_AFTER_S)
            log.info("consumer.stopped")
        if keeping.done():
            keeping.result()  # a defect in keeping leases is this process's end, and no success

    def _stop_without_leases(self, keeping: asyncio.Task[None]) -> None:
        if not keeping.cancelled() and keeping.exception() is not None:
            log.error("keeper.defect", exc_info=keeping.exception())
            self.request_stop()

    async def _take(self) -> None:
        loop = asyncio.get_running_loop()
        self._busy_at = loop.time()
        while not self.stopping and (slot := await self._slots.take()):
            delivery = await self._stop.unless_asked(self._next(), grace_s=2 * BLOCK_S)
            if delivery is not None:
                await self._slots.clear_for(delivery.place, slot)
                task = asyncio.create_task(self._handle(delivery, slot))
                self._tasks.add(task)
                task.add_done_callback(self._forget)
                continue
            slot.close()
            if not self._tasks and 0 < self._settings.idle_exit_s <= loop.time() - self._busy_at:
                log.info("consumer.idle", seconds=self._settings.idle_exit_s)
                return

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._busy_at = asyncio.get_running_loop().time()

    async def _next(self) -> Delivery | None:
        """One entry to handle, or None after a short wait."""
        try:
            if not self._backlog:
                found = await self._more()  # a group that was lost and made anew delivers again what is in our hands
                self._backlog.extend(one for one in found if one.place not in self._keeper.leases_held)
        except RedisError as error:
            log.warning("redis.out_of_reach", step="read", error=type(error).__name__)
            self._reread = True  # the reply that was lost may have carried an entry
            await asyncio.sleep(BLOCK_S)
        if self.stopping:
            return None  # what has come is handed back with everything that nobody holds
        for delivery in self._backlog:
            self._keeper.leases_held.setdefault(delivery.place, Lease(delivery))
        return self._backlog.popleft() if self._backlog else None

    async def _more(self) -> list[Delivery]:
        held = self._keeper.leases_held
        if self._reread:
            unseen = await self._intake.unseen(held)
            self._reread = False
            if unseen:
                return unseen
        now = asyncio.get_running_loop().time()
        if now - self._swept_at >= _SWEEP_EVERY_S:
            await self._intake.promote()
            reclaimed = await self._intake.reclaim(held)
            if reclaimed:  # where one was left there may be more: look again next time
                self._slots.suspects.add(reclaimed[0].place)
                log.info("queue.reclaimed", entry_id=reclaimed[0].entry_id)
                return reclaimed
            self._swept_at = now
        return await self._intake.read(block_ms=int(BLOCK_S * 1000))

    async def _handle(self, delivery: Delivery, slot: ExitStack) -> None:
        with slot:
            try:
                await self._see_through(delivery, slot)
            except Exception:
                # Nothing is acknowledged: the lease runs out and the entry is reclaimed, as often as attempts allow.
                log.exception("delivery.abandoned", entry_id=delivery.entry_id)
            finally:
                self._keeper.drop(delivery.place)

    async def _see_through(self, delivery: Delivery, slot: ExitStack) -> None:
        entry = decode_entry(delivery.fields)
        structlog.contextvars.bind_contextvars(entry_id=delivery.entry_id, job_id=entry.job_id)
        if self.stopping:
            await until_answered(lambda: self._leases.release(Lease(delivery)), what="release")
        elif entry.job_id is None:
            raw = redact_bytes((entry.raw or repr(dict(delivery.fields)).encode())[:MAX_SALVAGED_BYTES])
            await until_answered(lambda: self._leases.bury(delivery, raw), what="bury")
            log.warning("entry.buried", error=str(entry.error))
        else:
            await self._attempt(self._leases.lease(delivery, entry.job_id), entry, slot)

    async def _attempt(self, lease: Lease, entry: RequestEntry, slot: ExitStack) -> None:
        begun = await until_answered(lambda: self._begin(lease, entry), what="begin")
        log.info("job.begun", verdict=begun.verdict, run=entry.run, attempt=begun.attempt)
        if begun.verdict in ("lost", "duplicate"):
            return
        self._keeper.leases_held[lease.delivery.place] = lease
        try:
            data = await self._work(lease, entry, begun, slot)
        except Exception as error:
            if self.broken is not None:
                self._stop.asked.set()
            await self._outcomes.end(lease, entry, begun, error)
        else:
            await self._outcomes.succeed(lease, entry, data)

    async def _begin(self, lease: Lease, entry: RequestEntry) -> Begun:
        request = entry.request
        expires_at = request.expires_at if request else None
        return await self._leases.begin(
            lease,
            run=entry.run,
            payload=entry.raw if request is not None else b"",
            fingerprint=request.fingerprint() if request else "",
            max_attempts=self._settings.max_attempts,
            expires_at_ms=None if expires_at is None else int(expires_at.timestamp() * 1000),
            valid=request is not None,
            traceparent=entry.traceparent,
        )

    async def _work(self, lease: Lease, entry: RequestEntry, begun: Begun, slot: ExitStack) -> SucceededData:
        if begun.verdict != "ok" or entry.request is None:
            raise self._outcomes.of_verdict(entry, begun)
        attempt = Attempt(lease, entry.request, entry.run, begun)
        self._keeper.attempts[lease.delivery.place] = attempt
        if self.stopping:
            attempt.stop(HandedBack())
        generated = await self._stages.generate(attempt)
        async with self._deliveries:  # when uploads fall behind, no further job is taken
            slot.close()
            return await self._stages.deliver(attempt, generated)

    async def _drain(self) -> None:
        """Hands back at once what the GPU has not begun; gives what it has begun the time that the settings allow."""
        self._stop.asked.set()
        self._keeper.state = "draining"
        log.info("consumer.draining", jobs=len(self._tasks))
        for attempt in self._keeper.attempts.values():
            if attempt.stage == "preparing":
                attempt.stop(HandedBack())
        while self._backlog:
            self._keeper.drop(self._backlog.popleft().place)
        await self._hand_back.unheld(self._keeper.leases_held)
        tasks = asyncio.gather(*self._tasks, return_exceptions=True)
        urgent = asyncio.ensure_future(self._stop.urgent.wait())
        waiting: set[asyncio.Future[Any]] = {tasks, urgent}
        await asyncio.wait(waiting, timeout=self._settings.drain_s, return_when=asyncio.FIRST_COMPLETED)
        urgent.cancel()
        for attempt in self._keeper.attempts.values():
            attempt.stop(HandedBack())
        await asyncio.wait(waiting - {urgent}, timeout=_ABANDON_AFTER_S)
        abandoned = list(self._keeper.leases_held.values())
        tasks.cancel()
        await self._hand_back.all(abandoned)
        await self._hand_back.unheld(self._keeper.leases_held)
