"""From the outbox to the queue: a database row and an XADD cannot be one transaction, so this stands between them."""

import asyncio

import structlog
from redis.exceptions import RedisError
from sqlalchemy import delete, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.content import Outcome, conclude, refusal
from examples.backend.publishing import Answer, Publish
from examples.backend.tables import OutboxEntry
from producer.errors import ProducerError, QueueFull

_BATCH = 100
_OUTAGE_CAP_S = 30.0
_MAX_DOUBLINGS = 10

log = structlog.get_logger(__name__)


class Relay:
    """Publishes what is in the outbox, the oldest first, many at once, and deletes what was taken.

    A relay that dies in between publishes again what it had not deleted yet, and so do several relays that see the
    same entry: publishing is idempotent by `job_id`, so nobody needs to lock anything.
    """

    def __init__(
        self, sessions: sessionmaker[Session], publish: Publish, *, poll_s: float, committed: asyncio.Event
    ) -> None:
        self._sessions = sessions
        self._publish = publish
        self._poll_s = poll_s
        self._committed = committed

    async def run(self) -> None:
        """Works until it is cancelled, whenever `committed` is set, and at least every `poll_s` seconds.

        Outages of Redis, endpoint and database are waited out.
        """
        outages = 0
        while True:
            self._committed.clear()
            try:
                pause_s = await self.publish_all()
                outages = 0
            except (RedisError, SQLAlchemyError, OSError) as error:
                outages = min(outages + 1, _MAX_DOUBLINGS)
                pause_s = min(_OUTAGE_CAP_S, self._poll_s * 2**outages)
                log.warning("relay.waiting", error=type(error).__name__, pause_s=pause_s)
            if pause_s:
                await asyncio.sleep(pause_s)
            else:
                await self._next_commit()

    async def publish_all(self) -> float:
        """Publishes until the outbox is empty, or entries are not taken for now: returns for how many seconds.

        Raises redis.RedisError, sqlalchemy.exc.SQLAlchemyError, OSError.
        """
        while entries := await asyncio.to_thread(self._oldest):
            answers = await self._publish(entries)
            await asyncio.to_thread(self._settle, dict(zip((entry.job_id for entry in entries), answers, strict=True)))
            pauses = [answer.retry_after or self._poll_s for answer in answers if isinstance(answer, QueueFull)]
            if pauses:
                log.warning("relay.refused_for_now", entries=len(pauses), pause_s=max(pauses))
                return max(pauses)
        return 0.0

    def _oldest(self) -> list[OutboxEntry]:
        with self._sessions() as session:
            return list(session.scalars(select(OutboxEntry).order_by(OutboxEntry.id).limit(_BATCH)))

    def _settle(self, answers: dict[str, Answer]) -> None:
        with self._sessions.begin() as session:
            for job_id, answer in answers.items():
                match answer:
                    case QueueFull():
                        continue
                    case ProducerError():
                        log.warning("relay.refused", job_id=job_id, error_code=answer.error_code)
                        conclude(session, job_id, 1, refusal(answer))
                    case Outcome():
                        conclude(session, job_id, 1, answer)
                session.execute(delete(OutboxEntry).where(OutboxEntry.job_id == job_id))

    async def _next_commit(self) -> None:
        try:
            await asyncio.wait_for(self._committed.wait(), self._poll_s)
        except TimeoutError:
            return
