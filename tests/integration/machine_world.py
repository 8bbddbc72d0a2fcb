"""All that a Redis holds at one moment, read in one script, and a client whose commands or replies get lost."""

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import TimeoutError as ReplyLost

from consumer.queue import Place
from schemas.keys import CONSUMER_GROUP, Keys

Fields = Mapping[bytes, bytes]
Lost = Literal["request", "reply"]
Fault = tuple[Lost | None, int]

LAPSED_MS = 1_000_000

_SNAPSHOT = """
local function value_of(pairs, name)
  for i = 1, #pairs, 2 do
    if pairs[i] == name then return pairs[i + 1] end
  end
end

local function groups_of(key)
  local groups = {}
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local name, pending = value_of(group, 'name'), {}
    for _, held in ipairs(redis.call('XPENDING', key, name, '-', '+', 1000)) do
      table.insert(pending, {held[1], held[2], held[3] >= tonumber(ARGV[1]) and 1 or 0})
    end
    table.insert(groups, {name, value_of(group, 'last-delivered-id'), pending})
  end
  return groups
end

local read = {
  string = function(key) return redis.call('GET', key) end,
  hash = function(key)  -- sorted: Redis gives the fields in an order that changes by itself
    local names, pairs = redis.call('HKEYS', key), {}
    table.sort(names)
    for _, name in ipairs(names) do
      table.insert(pairs, name)
      table.insert(pairs, redis.call('HGET', key, name))
    end
    return pairs
  end,
  list = function(key) return redis.call('LRANGE', key, 0, -1) end,
  zset = function(key) return redis.call('ZRANGE', key, 0, -1, 'WITHSCORES') end,
  stream = function(key) return {redis.call('XRANGE', key, '-', '+'), groups_of(key)} end
}
local keys, found = redis.call('KEYS', '*'), {}
table.sort(keys)
for _, key in ipairs(keys) do
  local kind = redis.call('TYPE', key)['ok']
  table.insert(found, {key, kind, redis.call('PTTL', key) > 0 and 1 or 0, read[kind](key)})
end
return cjson.encode(found)  -- one string: a thousand small replies take longer to read than to make
"""


class FaultyRedis(Redis):
    """Loses one command, or its reply after it was carried out: the `nth` from now on. Keeps what scripts answered."""

    lost: Lost | None = None
    nth: int = 0
    answers: list[Any]

    def begin_step(self, fault: Fault) -> None:
        self.lost, self.nth = fault
        self.answers = []

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        lost = self.lost if self.nth == 0 and args[0] != "SCRIPT LOAD" else None
        if lost == "request":
            self.lost = None
            raise ReplyLost("the command got lost")
        send: Any = super().execute_command
        reply = await send(*args, **options)
        if args[0] == "EVALSHA":
            self.answers.append(reply)
        if args[0] != "SCRIPT LOAD":
            self.nth -= 1
        if lost == "reply":
            self.lost = None
            raise ReplyLost("the reply got lost")
        return reply


class Pending(NamedTuple):
    """`lapsed`: the lease has run out."""

    owner: str
    lapsed: bool


class Group(NamedTuple):
    """A group of the completions: the last entry that it was given, and what it has not acknowledged."""

    delivered: str
    pending: set[str]


class World:
    """One snapshot. `raw` is all of it, with nothing in it that only time changes."""

    def __init__(self, raw: list[Any], keys: Keys) -> None:
        self.raw = raw
        self.requests: dict[Place, Fields] = {}
        self.pending: dict[Place, Pending] = {}
        self.delivered: dict[str, str] = {}
        self.completions: dict[str, Fields] = {}
        self.listening: dict[str, Group] = {}
        self.dead: dict[str, Fields] = {}
        self.delayed: dict[str, float] = {}
        self.jobs: dict[str, dict[str, bytes]] = {}
        self.counters: dict[str, int] = {}
        self.tenants: dict[str, int] = {}
        self.cancels: set[str] = set()
        self.expiring: set[str] = set()
        self.values: dict[str, str] = {}
        for key, _, expires, content in raw:
            self._take(key, key.removeprefix(f"{{{keys.prefix}}}:").split(":"), content)
            self.values[key] = repr(content)
            if expires:
                self.expiring.add(key)

    def owner(self, place: Place) -> str | None:
        held = self.pending.get(place)
        return held.owner if held else None

    @property
    def unread(self) -> list[Place]:
        return [place for place in self.requests if place not in self.pending]

    def _take(self, key: str, name: list[str], content: Any) -> None:
        match name:
            case ["requests", _]:
                self._take_requests(key, *content)
            case ["completions"]:
                self.completions = _entries(content[0])
                self.listening = {
                    group: Group(last, {held[0] for held in pending}) for group, last, pending in content[1]
                }
            case ["dead"]:
                self.dead = _entries(content[0])
            case ["delayed"]:
                self.delayed = {member.decode(): float(score) for member, score in _pairs(content)}
            case ["job", job_id]:
                self.jobs[job_id] = {field.decode(): value for field, value in _pairs(content)}
            case ["counters"]:
                self.counters = {field.decode(): int(value) for field, value in _pairs(content)}
            case ["tenants"]:
                self.tenants = {field.decode(): int(value) for field, value in _pairs(content)}
            case ["cancel", job_id]:
                self.cancels.add(job_id)

    def _take_requests(self, stream: str, entries: list[Any], groups: list[Any]) -> None:
        self.requests |= {(stream, entry_id): fields for entry_id, fields in _entries(entries).items()}
        for group, last, pending in groups:
            assert group == CONSUMER_GROUP
            self.delivered[stream] = last
            for entry_id, owner, lapsed in pending:
                self.pending[(stream, entry_id)] = Pending(owner, lapsed == 1)


def number(entry_id: str) -> tuple[int, int]:
    """A stream id as a pair that can be compared."""
    milliseconds, _, sequence = entry_id.partition("-")
    return int(milliseconds), int(sequence)


def _pairs(flat: list[str]) -> list[tuple[bytes, bytes]]:
    parts = [part.encode("latin-1") for part in flat]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _entries(found: list[Any]) -> dict[str, Fields]:
    return {entry_id: dict(_pairs(fields)) for entry_id, fields in found}


async def look(redis: Redis, keys: Keys) -> World:
    """What is there now. The time that entries are idle is only told as whether their lease has run out."""
    reply: Any = await redis.eval(_SNAPSHOT, 0, str(LAPSED_MS))
    return World(json.loads(reply.decode("latin-1")), keys)
