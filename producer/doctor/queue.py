"""What is in Redis: the groups, the backlog and who works on it, the model, dead letters."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from producer.doctor.findings import Finding, Verdict
from producer.queue import ProducerQueue
from producer.settings import ProducerSettings
from producer.stream_ids import stream_time
from schemas.keys import CONSUMER_GROUP, Keys

_QUEUE_WARN = 0.8
_OLD_EVENT_S = 300.0

_consumers = partial(Finding, "consumers")


async def check_request_groups(redis: Redis, keys: Keys) -> list[Finding]:
    """Whether consumers have made their group on every request stream that holds something."""
    waiting = 0
    for stream in keys.request_streams:
        if CONSUMER_GROUP.encode() not in {group["name"] for group in await _groups(redis, stream)}:
            waiting += await redis.xlen(stream)
    if not waiting:
        return [Finding("queue", "request groups", Verdict.OK, "nothing waits where no consumer reads")]
    hint = "Consumers make their group when they start: start one. After a flush, running ones make it again."
    found = f"{waiting} waiting in streams that no consumer has ever read"
    return [Finding("queue", "request groups", Verdict.WARN, found, hint)]


async def check_completions(redis: Redis, keys: Keys) -> list[Finding]:
    """How far each group of listeners is behind: what one has not acknowledged is kept for it."""
    groups = await _groups(redis, keys.completions)
    if groups:
        return [await _listeners(redis, keys, group) for group in groups]
    kept = await redis.xlen(keys.completions)
    if not kept:
        return [Finding("queue", "listeners", Verdict.OK, "no event yet, and no listener")]
    found, hint = f"nobody listens; events kept until somebody does: {kept}", "Start `python -m producer listen`."
    return [Finding("queue", "listeners", Verdict.WARN, found, hint)]


async def _listeners(redis: Redis, keys: Keys, group: Mapping[str, Any]) -> Finding:
    name, last = group["name"].decode(), group["last-delivered-id"].decode()
    unread: Any = await redis.xrange(keys.completions, min=f"({last}", count=1)
    oldest = [entry_id for entry_id, _ in unread]
    if group["pending"]:
        oldest.append((await redis.xpending(keys.completions, name))["min"])
    if not oldest:
        return Finding("queue", f"listeners {name}", Verdict.OK, "has every event")
    seconds, _ = await redis.time()
    age_s = max(0.0, seconds - min(stream_time(entry_id.decode()) for entry_id in oldest).timestamp())
    lag = group.get("lag")  # unknown to Redis 6.2, and after some deletions
    behind = "some waiting" if lag is None else f"{lag + group['pending']} waiting"
    verdict = Verdict.WARN if age_s > _OLD_EVENT_S else Verdict.OK
    found = f"{behind}, the oldest for {_duration(age_s)}"
    hint = "Start its listener, or forget it: `python -m producer listen --drop-group NAME`."
    return Finding("queue", f"listeners {name}", verdict, found, hint if verdict is Verdict.WARN else None)


async def check_work(queue: ProducerQueue, settings: ProducerSettings) -> list[Finding]:
    """The backlog, the consumers, what they say of the model, and the dead letters."""
    stats = await queue.stats()
    waiting, consumers = sum(stats["waiting"].values()), stats["consumers"]
    live = [record for record in consumers if record["live"] and record.get("state") != "failed"]
    failed = [record for record in consumers if record.get("state") == "failed"]
    return [
        _backlog(waiting, len(live), settings.max_queue),
        *_failures(failed, bool(live)),
        judge_model(live, settings.model),
        _dead(stats["dead"]),
    ]


def _backlog(waiting: int, live: int, max_queue: int) -> Finding:
    found = f"{waiting} waiting or running, {live} consumers live"
    if waiting >= max_queue:
        return _consumers("backlog", Verdict.FAIL, found, "The queue is full (SDXL_MAX_QUEUE): start more consumers.")
    if waiting and not live:
        hint = "Start one: `python -m consumer`. On Modal they come within a minute, or `scale` does not run."
        return _consumers("backlog", Verdict.WARN, found, hint)
    if waiting >= _QUEUE_WARN * max_queue:
        return _consumers("backlog", Verdict.WARN, found, f"At {max_queue} jobs are refused: start more consumers.")
    return _consumers("backlog", Verdict.OK, found)


def _failures(failed: Sequence[Mapping[str, Any]], any_live: bool) -> Iterable[Finding]:
    problems = Counter((record.get("model", ""), record.get("error", "it does not say why")) for record in failed)
    for (model, error), count in problems.items():
        verdict = Verdict.WARN if any_live else Verdict.FAIL
        found = f"{count} failed in the last hour with {model or 'its model'}: {error}"
        yield _consumers("start", verdict, found, "Look at their SDXL_MODEL, SDXL_VAE, HUGGINGFACE_HUB_TOKEN.")


def judge_model(live: Sequence[Mapping[str, Any]], configured: str | None) -> Finding:
    """What live consumers have loaded; where none lives, what SDXL_MODEL names on this host."""
    loaded = Counter(record.get("model", "one that they do not name") for record in live)
    if len(loaded) > 1:
        found = "; ".join(f"{model} ({count})" for model, count in sorted(loaded.items()))
        return _consumers("model", Verdict.WARN, found, "Consumers draw with different models: give all the same.")
    if loaded:
        return _consumers("model", Verdict.OK, f"loaded: {next(iter(loaded))}")
    if configured is None:
        return _consumers("model", Verdict.SKIPPED, "no consumer lives, and SDXL_MODEL is not set here")
    return _folder_or_hub_id(configured)


def _folder_or_hub_id(model: str) -> Finding:
    folder = Path(model)
    if not folder.is_dir():
        if folder.is_absolute() or model.startswith((".", "~")):
            hint = "Consumers need it at this path."
            return _consumers("model", Verdict.WARN, f"{model}: there is no such folder on this host", hint)
        return _consumers("model", Verdict.OK, f"{model}, from the hub; no consumer has loaded it yet")
    if not (folder / "model_index.json").is_file():
        hint = "SDXL_MODEL must be a diffusers folder, as `save_pretrained` writes it, not a single checkpoint."
        return _consumers("model", Verdict.FAIL, f"{model} lacks model_index.json", hint)
    return _consumers("model", Verdict.OK, f"{model}; no consumer has loaded it yet")


def _dead(letters: int) -> Finding:
    if not letters:
        return Finding("queue", "dead letters", Verdict.OK, "none")
    hint = "Look at them: `python -m producer dead list`; run them again: `dead replay`."
    return Finding("queue", "dead letters", Verdict.WARN, f"{letters}", hint)


def _duration(seconds: float) -> str:
    for unit_s, unit in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit_s:
            return f"{seconds // unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


async def _groups(redis: Redis, stream: str) -> list[dict[str, Any]]:
    try:
        groups: list[dict[str, Any]] = await redis.xinfo_groups(stream)
    except ResponseError as error:
        if "no such key" in str(error):
            return []
        raise
    return groups
