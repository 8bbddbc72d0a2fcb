"""A replay of many dead letters that is interrupted, killed, cut off from Redis, or done twice at once."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from demo.servers import redis_server
from producer.dead_letters import Replayer, Verdict, replay_each
from schemas.keys import Keys
from tests.integration.cli_kit import Cli
from tests.integration.client_kit import PATIENCE_S, a_client, a_redis
from tests.integration.letter_kit import every_letter, many_dead_jobs, replay, runs

MANY = 1000
A_FEW = 30


def start(cli: Cli, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """`python -m producer dead …` as a process; it can print only little that nobody reads."""
    return subprocess.Popen(
        [sys.executable, "-m", "producer", "dead", *arguments],
        env={**os.environ, **cli.environment},
        stdout=subprocess.PIPE,
        bufsize=0,
        pipesize=4096,
        **options,
    )


async def each_once(redis: Redis, keys: Keys, count: int) -> bool:
    """Whether the jobs are all that waits, each in its second run, and no letter is left."""
    waiting = await runs(redis, keys)
    assert len(waiting) == len(set(waiting)), "a letter was replayed twice"
    return sorted(waiting) == sorted((f"job-{number}", "2") for number in range(count)) and not await redis.xlen(
        keys.dead
    )


async def interrupted(cli: Cli, number: signal.Signals, redis: Redis) -> tuple[int, list[dict[str, Any]]]:
    """Starts to replay everything, and sends a signal amid it. Returns the exit status and what was printed."""
    process = start(cli, "replay", "--all", "--json")
    assert process.stdout is not None
    with process:
        lines = [await asyncio.to_thread(process.stdout.readline) for _ in range(A_FEW)]
        process.send_signal(number)
        rest, _ = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    assert 0 < await redis.xlen(cli.keys.dead) < MANY
    return process.returncode, [
        json.loads(line) for line in [*lines, *rest.splitlines()] if line.endswith((b"}", b"\n"))
    ]


async def test_a_replay_of_a_thousand_that_is_interrupted_killed_and_done_twice_at_once_replays_each_once(
    cli: Cli, redis: Redis, keys: Keys
) -> None:
    await many_dead_jobs(redis, keys, MANY)
    for number in (signal.SIGINT, signal.SIGTERM):
        before = await redis.xlen(keys.dead)
        status, [*letters, last] = await interrupted(cli, number, redis)
        assert status == 1
        assert [letter["verdict"] for letter in letters] == ["replayed"] * len(letters)
        assert last["summary"]["not_reached"] == before - len(letters) == await redis.xlen(keys.dead)
    status, _ = await interrupted(cli, signal.SIGKILL, redis)
    assert status == -signal.SIGKILL
    assert not await each_once(redis, keys, MANY)

    left = await redis.xlen(keys.dead)
    both = [start(cli, "replay", "--all", "--json") for _ in range(2)]
    outputs = [await asyncio.to_thread(process.communicate, timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    verdicts = [json.loads(out.splitlines()[-1])["summary"]["verdicts"] for out, _ in outputs]
    assert sum(counts.get("replayed", 0) for counts in verdicts) == left
    assert await each_once(redis, keys, MANY)


async def test_two_replays_side_by_side_share_the_letters(cli: Cli, redis: Redis, keys: Keys) -> None:
    await many_dead_jobs(redis, keys, 200)
    async with a_client(cli.environment["REDIS_URL"], keys) as ann, a_client(cli.environment["REDIS_URL"], keys) as bob:
        letters = await every_letter(ann.queue)
        results = await asyncio.gather(replay(ann, letters), replay(bob, letters, changes={"steps": 40}))
    assert await each_once(redis, keys, 200)
    verdicts = [result.verdict for both in results for result in both]
    assert verdicts.count(Verdict.REPLAYED) == 200
    assert set(verdicts) <= {Verdict.REPLAYED, Verdict.ALREADY, Verdict.GONE}


async def test_a_replay_during_which_redis_dies_goes_on_when_it_is_back(tmp_path: Path, keys: Keys) -> None:
    arguments = ("--appendonly", "yes", "--appendfsync", "always")
    with redis_server(tmp_path, *arguments) as server:

        async def replay_until_it_dies(replayer: Replayer, entry_ids: list[str]) -> None:
            results = replay_each(replayer, entry_ids)
            for _ in range(A_FEW):
                assert (await anext(results)).verdict is Verdict.REPLAYED
            server.process.kill()
            await anext(results)

        async with a_redis(server.url) as redis, a_client(server.url, keys) as client:
            await many_dead_jobs(redis, keys, 100)
            letters = await every_letter(client.queue)
            with pytest.raises(RedisError):
                await replay_until_it_dies(Replayer(client.queue), [letter.entry_id for letter in letters])
    with redis_server(tmp_path, *arguments, port=server.port):
        async with a_redis(server.url) as redis, a_client(server.url, keys) as client:
            results = await replay(client, letters)
            assert await each_once(redis, keys, 100)
    assert [result.verdict for result in results[:A_FEW]] == [Verdict.GONE] * A_FEW
    assert {result.verdict for result in results[A_FEW:]} == {Verdict.REPLAYED}


async def test_a_redis_that_is_lost_in_the_middle_of_a_command_is_status_3_after_the_summary(
    cli: Cli, tmp_path: Path
) -> None:
    with redis_server(tmp_path) as server:
        cli.environment["REDIS_URL"] = server.url
        async with a_redis(server.url) as redis:
            await many_dead_jobs(redis, cli.keys, 300)
        process = start(cli, "replay", "--all", "--json")
        assert process.stdout is not None
        with process:
            for _ in range(A_FEW):
                await asyncio.to_thread(process.stdout.readline)
            server.process.kill()
            rest, _ = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    *_, summary, error = map(json.loads, rest.splitlines())
    assert process.returncode == 3
    assert summary["summary"]["not_reached"] > 0
    assert error["error"]["kind"] == "ConnectionError"


def test_a_terminal_is_asked_before_anything_that_was_not_named_is_dropped(cli: Cli) -> None:
    cli.consume(lambda ann: many_dead_jobs(ann.redis, ann.keys, 3))
    outcomes = []
    for answer in (None, b"n\n", b"y\n"):
        ours, theirs = pty.openpty()
        process = start(cli, "drop", "--all", stdin=theirs, stderr=theirs)
        os.close(theirs)
        asked = b""
        while b"[y/N]" not in asked:
            asked += os.read(ours, 1000)
        assert b"Drop 3 dead letters for good?" in asked
        if answer is None:
            process.send_signal(signal.SIGINT)
        else:
            os.write(ours, answer)
        out, _ = process.communicate(timeout=PATIENCE_S)
        os.close(ours)
        outcomes.append((process.returncode != 0, out.strip(), len(cli.run_json("dead", "list"))))
    assert outcomes == [(True, b"", 3), (True, b"", 3), (False, b"dropped 3 of 3", 0)]
