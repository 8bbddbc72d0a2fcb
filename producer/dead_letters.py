"""Dead letters: runs that failed and could succeed, and entries from which no job could be read. See, replay, drop."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import islice
from typing import Any

from producer.async_client import AsyncGenerationClient
from producer.errors import JobUnknown
from producer.letters import DeadLetter, LetterFilter, decode_dead_letter
from producer.queue import ProducerQueue
from producer.replaying import Pace, Replayer, ReplayResult, Verdict, replay_each
from producer.settings import ProducerSettings
from producer.stream_ids import is_stream_id

__all__ = [
    "DeadLetter",
    "LetterFilter",
    "Pace",
    "ReplayResult",
    "Replayer",
    "Verdict",
    "drop",
    "find",
    "replay",
    "replay_each",
    "show",
]

_PAGE = 200


async def find(
    queue: ProducerQueue, where: LetterFilter, *, limit: int | None = None
) -> AsyncGenerator[DeadLetter, None]:
    """Dead letters in order of death, the oldest first, up to `limit`; a page of them is in memory.

    Raises redis.RedisError.
    """
    after, found = "-", 0
    while found != limit and (page := await queue.dead_letters(after, _PAGE)):
        fitting = filter(where.fits, map(decode_dead_letter, page))
        for letter in islice(fitting, None if limit is None else limit - found):
            found += 1
            yield letter
        after = page[-1].entry_id


async def show(queue: ProducerQueue, entry_id: str) -> DeadLetter:
    """One dead letter.

    Raises JobUnknown where there is none with this entry id, redis.RedisError.
    """
    entry = await queue.dead_letter(entry_id) if is_stream_id(entry_id) else None
    if entry is None:
        raise JobUnknown("there is no dead letter with this entry id")
    return decode_dead_letter(entry)


async def drop(queue: ProducerQueue, entry_ids: Sequence[str]) -> int:
    """Removes dead letters for good; returns how many there were.

    Raises redis.RedisError: the same call goes on from there.
    """
    named = list(filter(is_stream_id, entry_ids))
    return sum([await queue.drop_dead_letters(named[at : at + _PAGE]) for at in range(0, len(named), _PAGE)])


def replay(
    settings: ProducerSettings | None = None,
    *,
    where: LetterFilter,
    changes: Mapping[str, Any] | None = None,
    limit: int | None = None,
    rate_per_s: float | None = None,
    dry_run: bool = False,
) -> list[ReplayResult]:
    """Replays the letters that fit `where`, the oldest first, at most `rate_per_s` jobs per second.

    For scripts: it blocks, and reads the environment where no settings are given. (In an event loop, use `Replayer` and
    `replay_each`.) Where the queue is full, the last result says so, and the letters after it stay. Raises
    RequestRefused for changes that no request can take, and ValueError for a rate that is not above 0, before anything
    is replayed; redis.RedisError: what was done stays done, and the same call goes on from there.
    """

    async def run() -> list[ReplayResult]:
        async with AsyncGenerationClient.from_settings(settings or ProducerSettings()) as client:
            replayer = Replayer(client.queue, storage=client.storage, changes=changes, dry_run=dry_run)
            entry_ids = [letter.entry_id async for letter in find(client.queue, where, limit=limit)]
            return [result async for result in replay_each(replayer, entry_ids, Pace(rate_per_s))]

    return asyncio.run(run())
