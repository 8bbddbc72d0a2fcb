"""One fault's world: a Redis with an AOF behind a proxy, an S3 that checks signatures, and consumers as processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr
from redis import Redis

from consumer.failpoints import VARIABLE as FAILPOINTS
from demo.servers import RedisServer, redis_server
from producer.client import GenerationClient
from producer.settings import ProducerSettings
from schemas.keys import Keys, Priority
from tests.chaos.consumer import LEDGER, STEP_S
from tests.chaos.proxy import Proxy
from tests.chaos.servers import servers_in_a_thread
from tests.s3_stub import ACCESS_KEY, SECRET_KEY, S3Stub

BUCKET = "pictures"
LORA = f"/{BUCKET}/loras/cat.safetensors"
LEASE_S = 2.0
MAX_ATTEMPTS = 3
PATIENCE_S = 60.0
TERMINAL = ("generation.succeeded", "generation.failed", "generation.cancelled")
_AOF = ("--appendonly", "yes", "--appendfsync", "always")


@dataclass
class Consumer:
    """A consumer's process, and what it has said."""

    process: subprocess.Popen[bytes]
    log: Path

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self, within_s: float = PATIENCE_S) -> int:
        """Its exit status; negative: the signal that killed it."""
        return self.process.wait(within_s)

    def said(self, text: str) -> bool:
        return text.encode() in self.log.read_bytes()

    def open_files(self) -> int:
        return int(psutil.Process(self.process.pid).num_fds())

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


@dataclass
class World:
    """Everything here is meant for one test's thread; the servers live in processes and in a thread of their own."""

    folder: Path
    store: S3Stub
    proxy: Proxy
    redis: Redis
    keys: Keys = field(default_factory=Keys)
    consumers: list[Consumer] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    injected_at: float | None = None
    injections: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    _server: RedisServer | None = None
    _server_life: ExitStack = field(default_factory=ExitStack)

    # --- the parts ---

    def start_redis(self, *arguments: str) -> None:
        """The same Redis again, on its port, from its AOF."""
        self._server = self._server_life.enter_context(
            redis_server(self.folder, *_AOF, *arguments, port=self.proxy.server_port)
        )

    def kill_redis(self) -> None:
        """kill -9."""
        assert self._server is not None
        self._server.process.kill()
        self._server.process.wait()
        self.stop_redis()

    def stop_redis(self) -> None:
        self._server_life.pop_all().close()

    def consumer(self, *, direct: bool = False, failpoints: str = "", **environment: str) -> Consumer:
        """Starts a consumer, through the proxy unless `direct`."""
        port = self.proxy.server_port if direct else self.proxy.port
        settings = {
            "REDIS_URL": f"redis://127.0.0.1:{port}/0",
            "SDXL_LEASE_SECONDS": str(LEASE_S),
            "SDXL_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "SDXL_RETRY_BASE_SECONDS": "0.1",
            "SDXL_RETRY_CAP_SECONDS": "0.5",
            "SDXL_DRAIN_SECONDS": "5",
            "LORA_CACHE_DIR": str(self.folder / "cache"),
            "LORA_ALLOW_LOOPBACK": "true",
            "R2_ACCESS_KEY_ID": ACCESS_KEY,
            "R2_SECRET_ACCESS_KEY": SECRET_KEY,
            "R2_BUCKET_NAME": BUCKET,
            "R2_ENDPOINT_URL": self.store.url,
            LEDGER: str(self.folder / "ledger"),
            STEP_S: "0.005",
            FAILPOINTS: failpoints,
            **environment,
        }
        log = self.folder / f"consumer-{len(self.consumers)}.log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "tests.chaos.consumer"]
            process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=output)
        self.consumers.append(Consumer(process, log))
        return self.consumers[-1]

    def client(self) -> GenerationClient:
        """A backend's client, through the proxy; use it as a context manager."""
        url = SecretStr(f"redis://127.0.0.1:{self.proxy.port}/0")
        return GenerationClient.from_settings(ProducerSettings(redis_url=url))

    # --- jobs ---

    def publish(self, *job_ids: str, priority: Priority = Priority.NORMAL, **fields: Any) -> None:
        """A bare XADD of each job, by a way that no fault touches. Jobs have a LoRA, with a real signature."""
        for job_id in job_ids:
            request = {"lora_url": self.store.presign("GET", LORA), **fields}
            self.add({"job_id": job_id, "prompt": "a red fox", "steps": 20, **request}, priority)
            self.accepted.append(job_id)

    def add(self, payload: dict[str, Any], priority: Priority = Priority.NORMAL, **envelope: str) -> None:
        """An entry as it is; it is on nobody's list of accepted jobs."""
        entry: dict[Any, Any] = {"payload": json.dumps(payload), **envelope}
        self.redis.xadd(self.keys.requests(priority), entry)

    def forget(self, *job_ids: str) -> None:
        """Redis has lost these jobs: nobody waits for them, and where they stood does not count."""
        for job_id in job_ids:
            self.accepted.remove(job_id)
            self.forgotten.append(job_id)

    def events(self) -> list[dict[str, Any]]:
        reply: Any = self.redis.xrange(self.keys.completions)
        return [json.loads(fields[b"payload"]) for _, fields in reply]

    def ended(self) -> dict[str, dict[str, Any]]:
        """The terminal events by job id."""
        return {event["data"]["job_id"]: event for event in self.events() if event["type"] in TERMINAL}

    def executions(self) -> Counter[str]:
        """How often each job was drawn, or begun to be."""
        ledger = self.folder / "ledger"
        return Counter(line.split()[0] for line in ledger.read_text().splitlines()) if ledger.exists() else Counter()

    # --- faults and time ---

    def injected(self, times: int = 1) -> None:
        """Marks the moment of the fault, from which recovery is measured."""
        self.injections += times
        self.injected_at = time.monotonic()

    def recovered(self) -> None:
        """Marks the moment when everything went on as if nothing had been."""
        assert self.injected_at is not None
        self.recoveries_s.append(time.monotonic() - self.injected_at)
        self.injected_at = None

    def until(self, condition: Callable[[], object], within_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, self.logs()
            time.sleep(0.01)

    def until_ended(self, *job_ids: str, within_s: float = PATIENCE_S) -> dict[str, dict[str, Any]]:
        """Waits for the terminal events of these jobs, of all accepted ones where none is named."""
        wanted = set(job_ids or self.accepted)
        self.until(lambda: wanted <= self.ended().keys(), within_s)
        return self.ended()

    def logs(self) -> str:
        return "\n".join(f"--- {one.log.name}\n{one.log.read_text()[-3000:]}" for one in self.consumers)

    def stop_consumers(self) -> None:
        for consumer in self.consumers:
            if consumer.process.poll() is None:
                consumer.signal(signal.SIGCONT)
                consumer.signal(signal.SIGTERM)
        for consumer in self.consumers:
            try:
                consumer.wait(15)
            except subprocess.TimeoutExpired:
                consumer.kill()


@contextmanager
def a_world(folder: Path) -> Iterator[World]:
    """Everything that a fault needs; nothing of it is left afterwards."""
    with ExitStack() as stack:
        server_life = stack.enter_context(ExitStack())
        server = server_life.enter_context(redis_server(folder, *_AOF))
        store, proxy = stack.enter_context(servers_in_a_thread(server.port))
        redis = Redis.from_url(server.url)
        stack.callback(redis.close)
        store.put(LORA, b"lora" + bytes(60_000))
        world = World(folder, store, proxy, redis, _server=server, _server_life=server_life.pop_all())
        stack.callback(world.stop_redis)
        try:
            yield world
        finally:
            for consumer in world.consumers:
                consumer.kill()
