"""`wait`, `publish --wait` and what they show on a terminal."""

import asyncio
import json
import os
import pty
import re
import sys
import termios

import pytest

from demo.servers import RedisServer
from schemas.keys import Keys
from tests import event_kit
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import Ender, a_client, a_redis


def test_wait_prints_a_line_for_each_end_and_the_worst_is_the_status(cli: Cli) -> None:
    for job_id in ("job-1", "job-2", "job-3"):
        cli.run("publish", "a fox", "--job-id", job_id)
    event = cli.consume(lambda ann: ann.succeed_next())
    assert cli.run("wait", "job-1") == f"job-1  succeeded  {event.data.image_url}  15.0 s\n"
    assert cli.status == 0
    cli.consume(lambda ann: ann.fail_next(error="a black picture"))
    cli.run("cancel", "job-3")
    lines = cli.run("wait", "job-3", "job-1", "job-2", "job-1").splitlines()
    assert cli.status == 1
    assert sorted(lines) == [
        f"job-1  succeeded  {event.data.image_url}  15.0 s",
        "job-2  failed  GENERATION_FAILED  a black picture  (retry: 30 s)",
        "job-3  cancelled  while queued",
    ]


def test_wait_prints_the_events_themselves_as_json_lines(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    event = cli.consume(lambda ann: ann.succeed_next())
    cli.run("publish", "a fox", "--job-id", "job-2")
    lines = [json.loads(line) for line in cli.run("wait", "job-1", "job-2", "--json", "--timeout", "0.2").splitlines()]
    assert cli.status == 1
    assert lines[0] == json.loads(event.encode())
    assert (lines[1]["job_id"], lines[1]["error"]["kind"]) == ("job-2", "WaitTimeout")


def test_one_unknown_job_does_not_hide_the_others(cli: Cli) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    cli.consume(lambda ann: ann.succeed_next())
    assert "job-1   succeeded" in cli.run("wait", "nobody", "job-1")
    assert (cli.status, "nothing is known of a job nobody" in cli.err) == (2, True)


@pytest.mark.parametrize("arguments", [["wait", "job-1", "job-2"], ["publish", "a fox", "--job-id", "job-1", "--wait"]])
def test_an_end_that_this_version_cannot_read_is_told_and_hides_no_other(cli: Cli, arguments: list[str]) -> None:
    async def spoil(ann: Ender) -> None:
        await ann.redis.hset(ann.keys.job("job-1"), "event", b'{"type":"generation.dreamt"}')

    for job_id in ("job-1", "job-2"):
        cli.run("publish", "a fox", "--job-id", job_id)
        cli.consume(lambda ann: ann.succeed_next())
    cli.consume(spoil)
    shown = cli.run(*arguments)
    assert cli.status == 1
    assert "the job job-1: this version cannot read an event" in cli.err
    assert ("job-2  succeeded" in shown) is ("job-2" in arguments)
    documents = [json.loads(line) for line in cli.run(*arguments, "--json").splitlines()]
    assert cli.status == 1
    assert [document["job_id"] for document in documents if "error" in document] == ["job-1"]


@pytest.mark.parametrize("as_json", [False, True])
def test_publish_can_wait_for_what_it_has_published(cli: Cli, as_json: bool) -> None:
    cli.run("publish", "a fox", "--job-id", "job-1")
    event = cli.consume(lambda ann: ann.succeed_next())
    options = ["--json"] if as_json else []
    job, end = cli.run("publish", "a fox", "--job-id", "job-1", "--wait", *options).splitlines()
    assert cli.status == 0
    if as_json:
        assert json.loads(job) == {"job_id": "job-1", "run": 1, "state": "succeeded", "duplicate": True}
        assert json.loads(end) == json.loads(event.encode())
    else:
        assert (job, end) == ("job-1", f"job-1  succeeded  {event.data.image_url}  15.0 s")


async def on_a_terminal(cli: Cli, *arguments: str) -> tuple[asyncio.subprocess.Process, int]:
    """The command as a process on a terminal of 100 columns, and the end from which its screen is read."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    environment = {**os.environ, **cli.environment, "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "producer", *arguments]
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    return process, ours


async def read_until(screen: int, pattern: str) -> str:
    """Everything that the terminal was sent until the pattern came."""
    shown = ""
    while not re.search(pattern, shown):
        shown += (await asyncio.to_thread(os.read, screen, 65536)).decode()
    return shown


async def test_a_terminal_shows_how_far_a_job_is_and_then_its_end(cli: Cli, redis_at: RedisServer, keys: Keys) -> None:
    async with a_client(redis_at.url, keys) as client, a_redis(redis_at.url) as redis:
        await client.submit(job_id="job-1", prompt="a fox")
        process, screen = await on_a_terminal(cli, "wait", "job-1")
        try:
            async with asyncio.timeout(30):
                await read_until(screen, "job-1.*queued")
                ann = Ender(redis, keys, "ann")
                lease, delivery = await ann.run_next()
                await ann.leases.progress(lease, 7, 28, 10.4)
                await read_until(screen, r"job-1.*running.*7/28.*10 s left")
                await ann.end(lease, delivery, event_kit.failed("job-1", error="no \x1b[2Jfox"))
                shown = await read_until(screen, r"retry: 30 s")
                assert await process.wait() == 1
        finally:
            os.close(screen)
    assert "\x1b[31mfailed" in shown  # in red
    assert r"no \x1b[2Jfox" in shown
    assert "\x1b[2J" not in shown


async def test_ctrl_c_ends_the_waiting_and_not_the_job(cli: Cli, redis_at: RedisServer, keys: Keys) -> None:
    async with a_client(redis_at.url, keys) as client:
        await client.submit(job_id="job-1", prompt="a fox")
        process, screen = await on_a_terminal(cli, "wait", "job-1")
        try:
            async with asyncio.timeout(30):
                await read_until(screen, "job-1.*queued")
                process.send_signal(2)
                assert await process.wait() == 130
                shown = os.read(screen, 65536).decode()
        finally:
            os.close(screen)
        assert "Traceback" not in shown
        assert (await client.status("job-1")).state == "queued"


async def test_the_module_runs_and_lists_its_commands() -> None:
    command = [sys.executable, "-m", "producer", "--help"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    helped, _ = await process.communicate()
    assert process.returncode == 0
    for name in (b"publish", b"wait", b"status", b"cancel", b"stats", b"listen", b"dead"):
        assert name in helped
