"""A steady stream of jobs of all kinds, published side by side by the client and by bare XADDs."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from schemas.keys import Priority
from tests.chaos.world import BUCKET, LORA, World

KINDS = {"picture": 10, "plain": 3, "upload": 3, "forbidden": 1, "missing": 1, "cancelled": 2}
_PRIORITIES = {Priority.HIGH: 1, Priority.NORMAL: 3, Priority.LOW: 1}
_EXPIRES_S = 7200

Publish = Callable[[str, Priority, dict[str, Any]], None]


class Load:
    """`accepted`: jobs in the order of their answers; `unknown`: those whose publication got none, only an error."""

    def __init__(self, world: World, seed: int, jobs_per_s: float) -> None:
        self.accepted: list[str] = []
        self.unknown: list[str] = []
        self._world = world
        self._seed = seed
        self._pause_s = 2 / jobs_per_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads = [threading.Thread(target=self._guarded, args=[way]) for way in (self._by_client, self._by_xadd)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Returns when nobody publishes any more. Raises what a publisher has failed by."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self.check()

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _guarded(self, way: Callable[[], None]) -> None:
        try:
            way()
        except BaseException as error:
            self._failure = error

    def _by_client(self) -> None:
        with self._world.client() as client:

            def publish(job_id: str, priority: Priority, fields: dict[str, Any]) -> None:
                client.submit(job_id=job_id, priority=priority, **fields)

            self._publish_steadily("client", publish, client.cancel)

    def _by_xadd(self) -> None:
        with closing(Redis(port=self._world.proxy.server_port)) as redis:

            def cancel(job_id: str) -> None:
                redis.set(self._world.keys.cancel(job_id), 1, ex=604_800)

            def publish(job_id: str, priority: Priority, fields: dict[str, Any]) -> None:
                self._world.add({"job_id": job_id, **fields}, priority)

            self._publish_steadily("xadd", publish, cancel)

    def _publish_steadily(self, way: str, publish: Publish, cancel: Callable[[str], object]) -> None:
        chance = random.Random(f"{self._seed} {way}")
        number = 0
        while not self._stop.wait(self._pause_s):
            number += 1
            [kind] = chance.choices(list(KINDS), list(KINDS.values()))
            [priority] = chance.choices(list(_PRIORITIES), list(_PRIORITIES.values()))
            job_id = f"{kind}-{way}-{number}"
            try:
                publish(job_id, priority, self._fields(kind, job_id))
            except RedisError:
                self.unknown.append(job_id)
                continue
            self.accepted.append(job_id)
            if kind == "cancelled":
                time.sleep(chance.uniform(0, 0.2))
                self._try(cancel, job_id)

    def _try(self, cancel: Callable[[str], object], job_id: str) -> None:
        try:
            cancel(job_id)
        except RedisError:
            return  # then it is drawn

    def _fields(self, kind: str, job_id: str) -> dict[str, Any]:
        sign, fields = self._world.store.presign, {"prompt": "a red fox", "steps": 20}
        match kind:
            case "picture" | "cancelled":
                return {**fields, "lora_url": sign("GET", LORA, expires_s=_EXPIRES_S)}
            case "upload":
                return {**fields, "upload_url": sign("PUT", upload_path(job_id), expires_s=_EXPIRES_S)}
            case "forbidden":
                an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
                return {**fields, "lora_url": sign("GET", LORA, expires_s=1, at=an_hour_ago)}
            case "missing":
                return {**fields, "lora_url": sign("GET", f"/{BUCKET}/loras/none.safetensors", expires_s=_EXPIRES_S)}
            case _:
                return dict(fields)


def upload_path(job_id: str) -> str:
    """Where the store keeps the picture of a job that had an `upload_url`."""
    return f"/{BUCKET}/uploads/{job_id}.png"
