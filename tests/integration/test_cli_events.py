"""`listen` on a real Redis."""

import asyncio
import json
import os
import sys

import pytest

from demo.servers import RedisServer
from producer.database import open_engine
from producer.store import Store
from schemas.keys import Keys
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import a_client, a_redis
from tests.integration.store_kit import execute


def test_listen_stores_what_there_is_and_prints_a_line_for_each_event(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    event = cli.consume(lambda ann: ann.succeed_next())
    lines = [line.split() for line in cli.run("listen", "--once").splitlines()]
    assert [line[2:4] for line in lines] == [["job-1", "started"], ["job-1", "succeeded"]]
    assert lines[1][4] == event.data.image_url
    assert cli.run("listen", "--once") == ""
    assert cli.status == 0


def test_every_group_gets_every_event_as_json_lines(cli: Cli) -> None:
    for group in ("listeners", "billing"):  # events are kept for the groups that there are
        cli.run("listen", "--once", "--group", group)
    cli.run("publish", "a fox", "--job-id", "job-1")
    event = cli.consume(lambda ann: ann.fail_next())
    for group in ("listeners", "billing"):
        lines = [json.loads(line) for line in cli.run("listen", "--once", "--json", "--group", group).splitlines()]
        assert [line["type"] for line in lines] == ["generation.started", "generation.failed"]
        assert lines[1] == json.loads(event.encode())


def test_a_group_that_nobody_reads_is_dropped(cli: Cli) -> None:
    cli.run("listen", "--once", "--group", "billing")
    assert cli.run("listen", "--drop-group", "billing") == "dropped the group billing\n"
    assert cli.run("listen", "--drop-group", "billing") == ""
    assert (cli.status, "no group billing" in cli.err) == (2, True)
    cli.run("listen", "--once", "--group", "billing")
    assert cli.run_json("listen", "--drop-group", "billing") == {"dropped": "billing"}


async def test_listen_goes_on_until_a_signal_comes(cli: Cli, redis_at: RedisServer, keys: Keys) -> None:
    command = [sys.executable, "-m", "producer", "listen", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **cli.environment}, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with a_client(redis_at.url, keys) as client, asyncio.timeout(30):
            await client.submit(job_id="job-1", prompt="a fox")
            await client.cancel("job-1")
            assert process.stdout is not None
            assert json.loads(await process.stdout.readline())["id"] == "job-1:1:cancelled"
            process.terminate()
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, out, err) == (0, b"", b"")


@pytest.mark.parametrize("options", [[], ["--json"], ["--once"], ["--once", "--json"]])
async def test_listen_stops_when_nobody_reads_what_it_prints_and_loses_nothing(
    cli: Cli, redis_at: RedisServer, keys: Keys, options: list[str]
) -> None:
    async with a_client(redis_at.url, keys) as client, a_redis(redis_at.url) as redis:
        for number in range(150):  # more than one batch
            await client.submit(job_id=f"job-{number}", prompt="a fox")
            await client.cancel(f"job-{number}")
        ours, theirs = os.pipe()
        os.close(ours)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "producer", "listen", *options),
            env={**os.environ, **cli.environment},
            stdout=theirs,
            stderr=asyncio.subprocess.PIPE,
        )
        os.close(theirs)
        try:
            async with asyncio.timeout(30):
                _, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert (process.returncode, err) == (0, b"")
        [group] = await redis.xinfo_groups(keys.completions)
        assert group["pending"] == 0
    engine = open_engine(cli.environment["DATABASE_URL"])
    store = Store(engine)
    assert [store.job(f"job-{number}") is not None for number in (0, 99, 100)] == [True, True, False]
    engine.dispose()


@pytest.mark.parametrize("options", [[], ["--once"], ["--once", "--json"]])
def test_listen_refuses_a_database_that_a_newer_version_has_migrated(cli: Cli, options: list[str]) -> None:
    cli.run("listen", "--once")
    engine = open_engine(cli.environment["DATABASE_URL"])
    execute(engine, "UPDATE sdxl_alembic_version SET version_num = '9999'")
    engine.dispose()
    cli.run("listen", *options)
    said = cli.out if "--json" in options else cli.err
    assert (cli.status, "DATABASE_URL: a newer version of this program has changed its tables" in said) == (2, True)
