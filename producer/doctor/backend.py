"""What the backend's own processes need: the database, the webhooks, the gateway's token."""

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from rq import Worker
from sqlalchemy import Connection, Engine, func, make_url, select
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from producer.database import VERSION_TABLE, DatabaseRefused, is_sqlite, open_engine
from producer.doctor.findings import Finding, Verdict, told
from producer.settings import ProducerSettings
from producer.tables import DELIVERIES, GAVE_UP, PENDING
from producer.webhooks.queue import WebhookQueue
from producer.webhooks.signing import BadSecret, read_secrets
from schemas.net.http import utc_now

_CONNECT_S = 5
_OVERDUE = timedelta(minutes=10)
_SHORT_TOKEN = 16

_database = partial(Finding, "database")
_webhooks = partial(Finding, "webhooks")


async def check_database(settings: ProducerSettings) -> list[Finding]:
    """Whether it can be reached, has this version's tables, and which webhooks were not delivered."""
    return await asyncio.to_thread(_look_into, settings.database_url.get_secret_value())


async def check_webhook_secret(settings: ProducerSettings) -> list[Finding]:
    """Whether WEBHOOK_SECRET is one, or several."""
    if settings.webhook_secret is None:
        return [_webhooks("secret", Verdict.SKIPPED, "WEBHOOK_SECRET is not set: no webhook is sent")]
    try:
        secrets = read_secrets(settings.webhook_secret.get_secret_value())
    except BadSecret as error:
        hint = "WEBHOOK_SECRET takes whsec_ and the base64 of 24 to 64 bytes; several are separated by commas."
        return [_webhooks("secret", Verdict.FAIL, f"{error}", hint)]
    return [_webhooks("secret", Verdict.OK, "well formed" if len(secrets) == 1 else f"{len(secrets)}, well formed")]


async def check_webhook_workers(settings: ProducerSettings) -> list[Finding]:
    """Whether anybody works on the queue of webhooks."""
    return await asyncio.to_thread(_look_for_workers, settings)


async def check_token(settings: ProducerSettings) -> list[Finding]:
    """Whether the gateway has a token, and how long it is."""
    if settings.api_token is None:
        return [Finding("gateway", "bearer", Verdict.SKIPPED, "MODAL_API_TOKEN is not set")]
    length = len(settings.api_token.get_secret_value())
    if length < _SHORT_TOKEN:
        hint = "Make one: `python -c 'import secrets; print(secrets.token_urlsafe(32))'`."
        return [Finding("gateway", "bearer", Verdict.WARN, f"MODAL_API_TOKEN has {length} characters", hint)]
    return [Finding("gateway", "bearer", Verdict.OK, f"MODAL_API_TOKEN has {length} characters")]


def _look_into(url: str) -> list[Finding]:
    try:
        engine = open_engine(_impatient(url))
    except DatabaseRefused as error:
        return [_database("reach", Verdict.FAIL, f"{error}", "Look at DATABASE_URL.")]
    try:
        if _is_missing_file(engine):
            hint = "`python -m producer listen` makes it."
            return [_database("reach", Verdict.WARN, "SQLite: there is no such file yet", hint)]
        with engine.connect() as connection:
            version = _version(connection)
            reach = _database("reach", Verdict.OK, f"{engine.dialect.name} answers")
            return [reach, version, *(_deliveries(connection) if version.verdict is Verdict.OK else ())]
    except SQLAlchemyError as error:
        hint = "Look at DATABASE_URL, the server, and its log."
        return [_database("reach", Verdict.FAIL, f"cannot be used ({told(error)})", hint)]
    finally:
        engine.dispose()


def _impatient(url: str) -> str:
    """The URL with a deadline for connecting, where psycopg is the driver."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return url
    if parsed.drivername not in ("postgres", "postgresql", "postgresql+psycopg") or "connect_timeout" in parsed.query:
        return url
    impatient = parsed.update_query_dict({"connect_timeout": f"{_CONNECT_S}"})
    return impatient.render_as_string(hide_password=False)


def _is_missing_file(engine: Engine) -> bool:
    name = engine.url.database
    return is_sqlite(engine) and name not in (None, "", ":memory:") and not Path(f"{name}").exists()


def _version(connection: Connection) -> Finding:
    config = Config()
    config.set_main_option("script_location", "producer:migrations")
    scripts = ScriptDirectory.from_config(config)
    there = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_heads()
    if set(there) == set(scripts.get_heads()):
        return _database("tables", Verdict.OK, f"at the newest migration, {', '.join(there)}")
    if set(there) - {script.revision for script in scripts.walk_revisions()}:
        return _database("tables", Verdict.FAIL, "made by a newer version of this program", "Update this one.")
    found = f"at migration {', '.join(there)}" if there else "none yet"
    return _database("tables", Verdict.WARN, found, "`python -m producer listen` brings them up to date.")


def _deliveries(connection: Connection) -> list[Finding]:
    counts = select(DELIVERIES.c.state, func.count()).group_by(DELIVERIES.c.state)
    of_state: Mapping[str, int] = {row[0]: row[1] for row in connection.execute(counts)}
    late = select(func.count()).where(DELIVERIES.c.state == PENDING, DELIVERIES.c.due_at < utc_now() - _OVERDUE)
    overdue = connection.scalar(late) or 0
    found = ", ".join(f"{count} {state}" for state, count in sorted(of_state.items())) or "none yet"
    if overdue:
        hint = "Start `python -m producer work`."
        return [_webhooks("deliveries", Verdict.WARN, f"{found}; {overdue} should have gone out long ago", hint)]
    if of_state.get(GAVE_UP):
        hint = "Look: `python -m producer webhooks list --state failed`; send again: `webhooks retry`."
        return [_webhooks("deliveries", Verdict.WARN, found, hint)]
    return [_webhooks("deliveries", Verdict.OK, found)]


def _look_for_workers(settings: ProducerSettings) -> list[Finding]:
    queue = WebhookQueue(settings.redis_url.get_secret_value(), settings.prefix)
    try:
        workers = len(Worker.all(queue=queue.rq))
        waiting = len(queue.rq)
    finally:
        queue.close()
    if workers:
        return [_webhooks("workers", Verdict.OK, f"{workers} live, {waiting} deliveries waiting")]
    if settings.webhook_secret is None and not waiting:
        return [_webhooks("workers", Verdict.SKIPPED, "none, and nothing to deliver")]
    hint = "Start `python -m producer work`."
    return [_webhooks("workers", Verdict.WARN, f"none lives, {waiting} deliveries waiting", hint)]
