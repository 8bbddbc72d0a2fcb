"""`work`: delivers the webhooks that the listener has stored."""

from typing import Annotated

import typer

from producer.cli.command import AsJson, BadUsage, Status, checked_settings
from producer.database import migrate, open_engine
from producer.settings import ProducerSettings
from producer.webhooks.delivery import read_rules
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.signing import BadSecret, read_secrets
from producer.webhooks.worker import work as work_until_stopped

Burst = Annotated[bool, typer.Option("--burst", help="Deliver what is due, and end.")]


def work(burst: Burst = False, as_json: AsJson = False) -> Status:
    """Deliver webhooks until a signal comes; several may run beside each other. Only errors are printed."""
    with checked_settings() as settings:
        _check(settings)
        queue = WebhookQueue(settings.redis_url.get_secret_value(), settings.prefix)
    engine = open_engine(settings.database_url.get_secret_value())
    try:
        migrate(engine)
        engine.dispose()  # RQ forks
        work_until_stopped(queue, engine, burst=burst)
    finally:
        engine.dispose()
        queue.close()
    return Status.OK


def _check(settings: ProducerSettings) -> None:
    """Tells at the start what each attempt would else fail by."""
    if settings.webhook_secret is None:
        raise BadUsage("WEBHOOK_SECRET is not set, and nothing is sent unsigned")
    try:
        read_secrets(settings.webhook_secret.get_secret_value())
    except BadSecret as error:
        raise BadUsage(f"in WEBHOOK_SECRET, {error}") from None
    try:
        read_rules(settings)
    except ValueError as error:
        raise BadUsage(f"WEBHOOK_ALLOWED_HOSTS: {error}") from None
