"""`listen` and `dead` on a real Redis."""

import asyncio
import json
import os
import sys

import pytest

from demo.servers import RedisServer
from producer.store import Store
from schemas.keys import Keys, Priority
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import CANARY, FOREIGN_URL, Ender, a_client, a_redis
from tests.integration.queue_kit import add, entries


def a_dead_job(cli: Cli, job_id: str = "job-1", *options: str) -> str:
    """Publishes a job that fails; returns the entry id of its dead letter."""
    cli.run("publish", "a fox", "--job-id", job_id, *options)
    cli.consume(lambda ann: ann.fail_next(error="a black picture"))
    entry_id: str = cli.run_json("dead", "list")[-1]["entry_id"]
    return entry_id


async def runs(ann: Ender) -> list[tuple[str, str]]:
    waiting = await entries(ann.redis, ann.keys.requests(Priority.NORMAL))
    return [(fields[b"job_id"].decode(), fields[b"run"].decode()) for _, fields in waiting]


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
    store = Store(cli.environment["DATABASE_URL"])
    assert [store.job(f"job-{number}") is not None for number in (0, 99, 100)] == [True, True, False]
    store.close()


def test_dead_letters_are_listed_and_shown_to_people_and_to_programs(cli: Cli) -> None:
    assert cli.run("dead", "list") == "no dead letters\n"
    entry_id = a_dead_job(cli, "job-1", "--lora-url", f"{FOREIGN_URL}?{CANARY}")
    head, row = cli.run("dead", "list").splitlines()
    assert head.split() == ["entry", "died", "at", "job", "run", "code", "error"]
    assert row.split()[0] == entry_id
    assert row.rstrip().endswith("job-1  1    GENERATION_FAILED  a black picture")
    shown = cli.run("dead", "show", entry_id)
    assert "a black picture" in shown
    assert FOREIGN_URL in shown
    [document] = cli.run_json("dead", "list", "--error-code", "GENERATION_FAILED", "--limit", "1")
    assert document == cli.run_json("dead", "show", entry_id)
    assert (document["request"]["prompt"], document["run"], document["raw"]) == ("a fox", 1, None)
    assert cli.run_json("dead", "list", "--error-code", "TIMEOUT") == []
    assert "canary" not in shown + json.dumps(document)


def test_a_letter_that_cannot_be_read_is_shown_as_far_as_it_goes(cli: Cli) -> None:
    async def bury(ann: Ender) -> str:
        return await add(ann.redis, ann.keys.dead, {"raw": b"\xff\x1b[31m", "source": "s", "died_at": "1000"})

    entry_id = cli.consume(bury)
    assert "cannot be read" in cli.run("dead", "list")
    assert "\\x1b[31m" in cli.run("dead", "show", entry_id)
    assert cli.run_json("dead", "show", entry_id)["raw"] == "\ufffd\x1b[31m"
    [result] = cli.run_json("dead", "replay", entry_id)
    assert (cli.status, result["verdict"]) == (1, "undecodable")


def test_a_dry_run_says_what_a_replay_then_does(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    [would] = cli.run_json("dead", "replay", entry_id, "--dry-run")
    assert (would["verdict"], would["run"]) == ("would_replay", 2)
    assert cli.consume(runs) == []
    assert "replayed" in cli.run("dead", "replay", entry_id)
    assert (cli.status, cli.consume(runs)) == (0, [("job-1", "2")])
    assert cli.run_json("dead", "list") == []


@pytest.mark.parametrize("chosen", [["--all"], ["--error-code", "GENERATION_FAILED"]])
def test_many_letters_are_replayed_at_once(cli: Cli, chosen: list[str]) -> None:
    for job_id in ("job-1", "job-2"):
        a_dead_job(cli, job_id)
    results = cli.run_json("dead", "replay", *chosen)
    assert [result["verdict"] for result in results] == ["replayed", "replayed"]
    assert sorted(cli.consume(runs)) == [("job-1", "2"), ("job-2", "2")]


def test_a_replay_that_needs_a_fresh_url_is_refused_until_it_gets_one(cli: Cli) -> None:
    entry_id = a_dead_job(cli, "job-1", "--lora-url", f"{FOREIGN_URL}?{CANARY}")
    [refused] = cli.run_json("dead", "replay", entry_id)
    assert (cli.status, refused["verdict"], "lora_url" in refused["reason"]) == (1, "refused", True)
    changes = json.dumps({"lora_url": f"{FOREIGN_URL}?sig=fresh"})
    [replayed] = cli.run_json("dead", "replay", entry_id, "--changes", changes)
    assert (cli.status, replayed["verdict"]) == (0, "replayed")


def test_dropped_letters_are_gone_for_good(cli: Cli) -> None:
    entry_id = a_dead_job(cli)
    assert cli.run("dead", "drop", entry_id) == "dropped 1 of 1\n"
    assert cli.status == 0
    assert cli.run_json("dead", "drop", entry_id) == {"dropped": 0}
    assert cli.status == 2
