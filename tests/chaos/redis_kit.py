"""What the tests of Redis' faults share."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from schemas.keys import CONSUMER_GROUP, Priority
from tests.chaos.world import Consumer, World

SLOW_S = "0.05"  # a step; a second for each picture
NEVER = "3600"  # of a lease: nothing is reclaimed while a test runs
FIRST_NORMAL_READ = b"requests:normal\r\n$1\r\n>"  # the non-blocking read of that stream alone


def sha1(script: str) -> str:
    """What Redis calls it by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def call_of(script: str) -> bytes:
    """The beginning of its EVALSHA on the wire; SCRIPT EXISTS and SCRIPT LOAD have another one."""
    return f"EVALSHA\r\n$40\r\n{sha1(script)}".encode()


def out_of_reach_at(consumer: Consumer, step: str) -> bool:
    """Whether the consumer has failed to reach Redis at this step, and goes on trying."""
    return consumer.said(f'"step": "{step}"')


def until_running(world: World, job_id: str) -> None:
    world.until(lambda: world.redis.hget(world.keys.job(job_id), "state") == b"running")


def pending(world: World) -> int:
    """How many entries are delivered and not acknowledged."""
    replies: list[Any] = [world.redis.xpending(stream, CONSUMER_GROUP) for stream in world.keys.request_streams]
    return sum(reply["pending"] for reply in replies)


def normal(world: World) -> str:
    return world.keys.requests(Priority.NORMAL)


def copy_aof(source: Path, target: Path) -> None:
    """Redis 6.2 keeps one file, Redis 7 a folder."""
    target.mkdir(exist_ok=True)
    for path in source.glob("appendonly*"):
        if path.is_dir():
            shutil.copytree(path, target / path.name, dirs_exist_ok=True)
        else:
            shutil.copy(path, target / path.name)
