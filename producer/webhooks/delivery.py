"""One attempt to deliver a webhook: guarded, signed, sent, and its outcome written down."""

import asyncio
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import structlog
from aiohttp.abc import AbstractResolver
from rq import Retry
from sqlalchemy.exc import SQLAlchemyError
from standardwebhooks import Webhook

from producer.database import open_engine
from producer.settings import ProducerSettings
from producer.tables import DELIVERED, DISABLED, GAVE_UP, PENDING
from producer.webhooks.rows import Deliveries, Delivery
from producer.webhooks.signing import read_secrets, signed_headers
from schemas.net.http import Deadlines, ExchangeBroken, exchange, open_session, retry_after_s, utc_now
from schemas.net.urls import ForbiddenUrl, HostRules
from schemas.redact import redact_value

log = structlog.get_logger(__name__)

# The schedule that Standard Webhooks gives: the first attempt at once, each next one so long after the one before.
DELAYS_S = (5, 5 * 60, 30 * 60, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
MAX_ATTEMPTS = len(DELAYS_S) + 1
JITTER = 0.1  # a delay is longer by up to this share of it
DEADLINES = Deadlines(connect_s=5.0, read_s=15.0, whole_s=15.0)

_GONE = 410
_BUSY = frozenset({429, 502, 503, 504})
_CRASH_DELAY_S = 60.0  # until the last attempt is given up, should its outcome never be written
_DATABASE_RETRY_S = 30.0
_EARLY_S = 2.0  # RQ schedules in whole seconds, and clocks differ a little
_UNBOUNDED = 2**31  # the rows count the attempts, not RQ
_EVENT_ID = re.compile(r"[A-Za-z0-9_:-]{1,200}")  # of this contract; without a full stop, as the signature needs it


class DeliveryFailed(Exception):
    """There will be no further attempt. RQ keeps the job in its failed registry, as our row says `failed`."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """What came of a request. `problem` None: success; `is_final`: another attempt would come to the same."""

    status: int | None = None
    problem: str | None = None
    retry_after_s: float = 0.0
    is_final: bool = False


class Sender:
    """Makes the attempts. `secrets` sign them all; `rules` say where they may go."""

    def __init__(
        self,
        rows: Deliveries,
        secrets: Sequence[Webhook],
        rules: HostRules,
        *,
        deadlines: Deadlines = DEADLINES,
        now: Callable[[], datetime] = utc_now,
        uniform: Callable[[float, float], float] = random.uniform,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._rows = rows
        self._secrets = secrets
        self._rules = rules
        self._deadlines = deadlines
        self._now = now
        self._uniform = uniform
        self._resolver = resolver

    def attempt(self, event_id: str) -> float | None:
        """Makes the next attempt of a delivery that is pending.

        Returns in how many seconds another one is due, None where the delivery has ended or does not exist. Raises
        DeliveryFailed where it has failed for good, now or before; sqlalchemy.exc.SQLAlchemyError.
        """
        outgoing = self._rows.load(event_id)
        if outgoing is None:
            log.warning("webhook.unknown")
            return None
        delivery = outgoing.delivery
        if delivery.state == GAVE_UP:
            raise DeliveryFailed(delivery.error)
        if delivery.state != PENDING:
            return None
        if outgoing.is_disabled:
            self._rows.end(event_id, DISABLED, None, "the endpoint is disabled")
            log.warning("webhook.disabled")
            return None
        if delivery.attempts >= MAX_ATTEMPTS:
            self._fail(delivery, _Answer(delivery.status, "nothing was heard of the last attempt"), delivery.attempts)
        if outgoing.body is None:
            self._fail(delivery, _Answer(problem="its event is no longer kept"), delivery.attempts)
        early_s = (delivery.due_at - self._now()).total_seconds()
        if early_s > _EARLY_S:
            return early_s
        delay_s = self._delay_s(delivery.attempts + 1)
        if not self._rows.begin(delivery, delay_s):
            return None
        return self._settle(delivery, asyncio.run(self._post(delivery, outgoing.body)), delay_s)

    def _delay_s(self, attempt: int) -> float:
        """Seconds from this attempt, counted from 1, to the next."""
        if attempt >= MAX_ATTEMPTS:
            return _CRASH_DELAY_S
        return DELAYS_S[attempt - 1] * self._uniform(1.0, 1.0 + JITTER)

    async def _post(self, delivery: Delivery, body: bytes) -> _Answer:
        if not _EVENT_ID.fullmatch(delivery.event_id):
            return _Answer(problem="its event's id is not of this contract", is_final=True)
        headers = {"Content-Type": "application/json"}
        headers |= signed_headers(self._secrets, delivery.event_id, body, self._now())
        try:
            async with (
                open_session(allow_loopback=self._rules.allow_loopback, resolver=self._resolver) as session,
                exchange(
                    session, self._rules, "POST", delivery.url, headers=headers, deadlines=self._deadlines, body=body
                ) as response,
            ):
                # What it has to say besides is not read.
                return self._read(response.status, response.headers.get("Retry-After"))
        except ForbiddenUrl as error:
            return _Answer(problem=f"its URL may not be opened: {error}", is_final=True)
        except ExchangeBroken as error:
            return _Answer(problem=str(error))

    def _read(self, status: int, retry_after: str | None) -> _Answer:
        if 200 <= status < 300:
            return _Answer(status)
        wanted_s = (retry_after_s(retry_after, self._now()) or 0.0) if status in _BUSY else 0.0
        return _Answer(status, f"answered {status}", wanted_s)

    def _settle(self, delivery: Delivery, answer: _Answer, delay_s: float) -> float | None:
        event_id, attempt = delivery.event_id, delivery.attempts + 1
        if answer.problem is None:
            self._rows.end(event_id, DELIVERED, answer.status, None)
            log.info("webhook.delivered", attempt=attempt, status=answer.status)
            return None
        if answer.status == _GONE:
            self._rows.end_with_endpoint(delivery, answer.status, "answered 410 Gone")
            log.warning("webhook.endpoint_disabled", attempt=attempt)
            return None
        if answer.is_final or attempt >= MAX_ATTEMPTS:
            self._fail(delivery, answer, attempt)
        delay_s = max(delay_s, answer.retry_after_s)
        self._rows.postpone(event_id, attempt, delay_s, answer.status, answer.problem)
        log.warning("webhook.postponed", attempt=attempt, error=answer.problem, delay_s=round(delay_s))
        return delay_s

    def _fail(self, delivery: Delivery, answer: _Answer, attempts: int) -> NoReturn:
        self._rows.give_up(delivery.event_id, attempts, answer.status, answer.problem)
        log.error("webhook.failed", error=answer.problem)
        raise DeliveryFailed(answer.problem)


def read_rules(settings: ProducerSettings) -> HostRules:
    """Where webhooks may go. Raises ValueError where WEBHOOK_ALLOWED_HOSTS is no list of hosts."""
    if settings.webhook_allowed_hosts is None:
        return HostRules(any_public=True)
    return HostRules.parse(settings.webhook_allowed_hosts, default=HostRules(allow_loopback=settings.allow_loopback))


def deliver(event_id: str) -> Retry | None:
    """RQ's job: one attempt, in a process that was forked for it. It reads its settings and opens its own connections.

    Raises DeliveryFailed.
    """
    settings = ProducerSettings()
    if settings.webhook_secret is None:
        raise ValueError("WEBHOOK_SECRET is not set")
    secrets = read_secrets(settings.webhook_secret.get_secret_value())
    engine = open_engine(settings.database_url.get_secret_value())
    with structlog.contextvars.bound_contextvars(event_id=event_id):
        try:
            delay_s = Sender(Deliveries(engine), secrets, read_rules(settings)).attempt(event_id)
        except SQLAlchemyError as error:
            log.warning("webhook.no_database", error=redact_value(error))
            delay_s = _DATABASE_RETRY_S
        finally:
            engine.dispose()
    return None if delay_s is None else Retry(max=_UNBOUNDED, interval=math.ceil(delay_s))
