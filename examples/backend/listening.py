"""From the queue's events to the content pieces. The listener itself has stored each event before it gets here."""

import asyncio

import structlog
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from examples.backend.content import conclude, outcome_of
from producer.listener import Listener
from schemas.events import TerminalEvent

_OUTAGE_PAUSE_S = 1.0

log = structlog.get_logger(__name__)


def keep_content(listener: Listener, sessions: sessionmaker[Session]) -> None:
    """Registers the handler that gives content pieces their outcome."""

    @listener.on("generation.succeeded", "generation.failed", "generation.cancelled")
    async def store_outcome(event: TerminalEvent) -> None:
        # The listener logs what a handler raises, and goes on; an event whose handler has not returned comes again.
        while True:
            try:
                await asyncio.to_thread(_store, sessions, event)
            except OperationalError as error:
                log.warning("content.waiting", error=type(error).__name__)
                await asyncio.sleep(_OUTAGE_PAUSE_S)
            else:
                return


def _store(sessions: sessionmaker[Session], event: TerminalEvent) -> None:
    outcome = outcome_of(event)
    with sessions.begin() as session:
        changed = conclude(session, event.data.job_id, event.data.run, outcome)
    if changed:
        log.info("content.concluded", status=outcome.status, error_code=outcome.error_code)
