"""The faults of the soak. Each is a generator: it injects, says for how many seconds to leave it so, and ends it."""

import hashlib
import random
import signal
import time
from collections.abc import Callable, Iterator

from aiohttp import web

from consumer.queue import scripts as consumer_scripts
from producer import scripts as producer_scripts
from tests.chaos.proxy import Action
from tests.chaos.world import Consumer, World
from tests.s3_stub import Reply, hang_up, reset, status, truncated

Fault = Iterator[float]

_PLACES = ("begin", "start", "progress", "finish", "download", "prepare", "patch", "generate", "encode", "upload")
_LOOK_EVERY_S = 0.1
_PATIENCE_S = 5.0


_SCRIPTS = (
    *(consumer_scripts.BEGIN, consumer_scripts.START, consumer_scripts.PROGRESS, consumer_scripts.EXTEND),
    *(consumer_scripts.FINISH, consumer_scripts.RETRY, consumer_scripts.RELEASE, consumer_scripts.RECLAIM),
    *(consumer_scripts.PROMOTE, consumer_scripts.NOTE_UPLOAD, producer_scripts.SUBMIT),
)


def name_of(script: str) -> bytes:
    """What EVALSHA calls it by."""
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()


_REQUESTS = (b"XREADGROUP", *map(name_of, _SCRIPTS))


class RandomFaults:
    """Faults in one world, as `chance` has them. `consumers` are those at work; whoever dies is to be replaced."""

    def __init__(self, world: World, chance: random.Random, consumers: list[Consumer]) -> None:
        self._world = world
        self._chance = chance
        self._consumers = consumers
        self.kinds: dict[str, Callable[[], Fault]] = {
            "SIGKILL": self._kill,
            "SIGSTOP, then SIGCONT": self._freeze,
            "SIGTERM": self._terminate,
            "killed at a failpoint": self._kill_at_failpoint,
            "redis-server killed": self._kill_redis,
            "connections dropped": self._drop_connections,
            "requests lost": lambda: self._lose("reset"),
            "replies lost": lambda: self._lose("swallow"),
            "replies that never come": lambda: self._lose("hang"),
            "latency": self._delay,
            "one-byte replies": self._slice,
            "Redis out of reach, half-open": self._freeze_proxy,
            "SCRIPT FLUSH": self._flush_scripts,
            "storage: 503": lambda: self._trouble(status(503)),
            "storage: reset": lambda: self._trouble(reset()),
            "storage: truncated body": lambda: self._trouble(self._truncated),
            "storage: PUT done, reply lost": lambda: self._trouble(self._done_and_lost),
        }

    def _victim(self) -> Consumer:
        return self._chance.choice(self._consumers)

    def _kill(self) -> Fault:
        self._victim().process.kill()
        yield 0

    def _freeze(self) -> Fault:
        victim = self._victim()
        victim.signal(signal.SIGSTOP)
        yield self._chance.uniform(0.5, 5)
        victim.signal(signal.SIGCONT)

    def _terminate(self) -> Fault:
        self._victim().signal(signal.SIGTERM)
        yield 0

    def _kill_at_failpoint(self) -> Fault:
        place = f"{self._chance.choice(_PLACES)}.{self._chance.choice(('before', 'after'))}"
        index = self._chance.randrange(len(self._consumers))
        self._consumers[index].signal(signal.SIGTERM)
        armed = self._world.consumer(failpoints=f"{place}=kill@{self._chance.randint(1, 3)}")
        self._consumers[index] = armed
        yield from self._wait(lambda: armed.process.poll() is not None)

    def _kill_redis(self) -> Fault:
        self._world.kill_redis()
        time.sleep(self._chance.uniform(0, 1))  # nobody can look at anything meanwhile
        self._world.start_redis()
        yield 0

    def _drop_connections(self) -> Fault:
        self._world.proxy.disconnect_all()
        yield 0

    def _lose(self, action: Action) -> Fault:
        rule = self._world.proxy.add(self._chance.choice(_REQUESTS), action, times=self._chance.randint(1, 3))
        yield from self._wait(lambda: rule.met == rule.times)
        self._world.proxy.rules.remove(rule)

    def _delay(self) -> Fault:
        self._world.proxy.delay_s = self._chance.uniform(0.2, 2)
        yield self._chance.uniform(1, 4)
        self._world.proxy.delay_s = 0

    def _slice(self) -> Fault:
        self._world.proxy.slice_replies = True
        yield self._chance.uniform(1, 3)
        self._world.proxy.slice_replies = False

    def _freeze_proxy(self) -> Fault:
        self._world.proxy.is_frozen = True
        yield self._chance.uniform(1, 6)
        self._world.proxy.is_frozen = False

    def _flush_scripts(self) -> Fault:
        self._world.redis.script_flush()
        yield 0

    def _trouble(self, reply: Reply) -> Fault:
        self._world.store.trouble = reply
        yield self._chance.uniform(0.2, 1)
        self._world.store.trouble = None

    async def _truncated(self, request: web.Request) -> web.StreamResponse:
        stored = self._world.store.objects.get(request.path)
        if request.method != "GET" or stored is None:
            return await self._world.store.obey(request)
        return await truncated(stored.body, len(stored.body) // 2)(request)

    async def _done_and_lost(self, request: web.Request) -> web.StreamResponse:
        response = await self._world.store.obey(request)
        if request.method == "PUT":
            hang_up(request)
        return response

    def _wait(self, condition: Callable[[], object]) -> Fault:
        end = time.monotonic() + _PATIENCE_S
        while not condition() and time.monotonic() < end:
            yield _LOOK_EVERY_S
