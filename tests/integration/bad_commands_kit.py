"""What shows that a command or a call has changed nothing: every key of a test's Redis, byte for byte."""

import json
from typing import Any

from redis.asyncio import Redis

from consumer.queue import Lease
from schemas.keys import Keys
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import Ender
from tests.integration.queue_kit import add, entries

Letter = dict[Any, Any]


async def everything(redis: Redis, keys: Keys) -> dict[bytes, bytes | None]:
    """What DUMP says of each key."""
    names = [name async for name in redis.scan_iter(match=f"{{{keys.prefix}}}:*", count=1000)]
    return {name: await redis.dump(name) for name in sorted(names)}


def dumped(cli: Cli) -> dict[bytes, bytes | None]:
    """The same, between two commands."""
    return cli.consume(lambda ann: everything(ann.redis, ann.keys))


def publish(cli: Cli, job_id: str, *options: str, prompt: str = "a fox") -> None:
    cli.run("publish", prompt, "--job-id", job_id, *options)
    assert cli.status == 0, cli.err


def a_dead_job(cli: Cli, job_id: str = "job-1", *options: str, error: str = "black", prompt: str = "a fox") -> str:
    """Publishes a job that fails; returns the entry id of its dead letter."""
    publish(cli, job_id, *options, prompt=prompt)
    cli.consume(lambda ann: ann.fail_next(error=error))
    entry_id: str = cli.run_json("dead", "list")[-1]["entry_id"]
    return entry_id


def succeed(cli: Cli, run: int) -> None:
    cli.consume(lambda ann: ann.succeed_next(run))


def fail(cli: Cli, run: int) -> None:
    cli.consume(lambda ann: ann.fail_next(run))


def start(cli: Cli) -> Lease:
    """The next job gets the GPU, and stays there."""

    async def begin(ann: Ender) -> Lease:
        lease, _ = await ann.run_next()
        return lease

    return cli.consume(begin)


def letters(cli: Cli) -> dict[str, Letter]:
    """The dead letters as they are, by entry id."""

    async def all_of_them(ann: Ender) -> dict[str, Letter]:
        return {entry_id.decode(): fields for entry_id, fields in await entries(ann.redis, ann.keys.dead)}

    return cli.consume(all_of_them)


def bury(cli: Cli, letter: Letter) -> str:
    """Adds a dead letter that no consumer has written."""

    return cli.consume(lambda ann: add(ann.redis, ann.keys.dead, letter))


def replayed(cli: Cli, *arguments: str) -> list[dict[str, Any]]:
    """The lines of `dead replay`, without the summary."""
    lines = cli.run("dead", "replay", *arguments, "--json").splitlines()
    return [json.loads(line) for line in lines][:-1]
