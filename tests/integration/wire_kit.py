"""A stranger's view of the product: a consumer as a process, bare XADD in, completions and objects out."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from redis import Redis

from demo.servers import RedisServer, S3Server
from schemas.keys import Keys

BUCKET = "pictures"
SMALL = {"width": 512, "height": 512, "steps": 20, "prompt": "a red fox in the snow", "seed": 7}
TERMINAL = ("generation.succeeded", "generation.failed", "generation.cancelled")


@dataclass
class Wire:
    """One consumer process and everything around it."""

    redis: Redis
    keys: Keys
    s3: S3Server
    process: subprocess.Popen[bytes]
    log: Path
    events: list[dict[str, Any]] = field(default_factory=list)
    _last: bytes = b"0"

    def add(
        self, job_id: str | None = None, /, *, priority: str = "normal", envelope: Any = None, **fields: Any
    ) -> None:
        """A bare XADD of a small job."""
        payload = {**SMALL, **({"job_id": job_id} if job_id else {}), **fields}
        self.add_raw({"payload": json.dumps(payload), **(envelope or {})}, priority)

    def add_raw(self, entry: dict[Any, Any], priority: str = "normal") -> None:
        self.redis.xadd(f"{{{self.keys.prefix}}}:requests:{priority}", entry)

    def wait(self, *job_ids: str, within_s: float = 60) -> dict[str, dict[str, Any]]:
        """The terminal events of these jobs."""
        self.until(lambda: all(self.ended(job_id) for job_id in job_ids), within_s=within_s)
        return {job_id: self.ended(job_id)[0] for job_id in job_ids}

    def until(self, condition: Callable[[], object], *, within_s: float = 60) -> None:
        end = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            self.poll(block_ms=50)

    def poll(self, block_ms: int | None = None) -> None:
        reply: Any = self.redis.xread({self.keys.completions: self._last}, block=block_ms) or {}
        for _, entries in reply.items() if isinstance(reply, dict) else reply:
            for self._last, fields in entries:
                self.events.append(json.loads(fields[b"payload"]))

    def entries(self, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        reply: Any = self.redis.xrange(stream)
        return list(reply)

    def ended(self, job_id: str) -> list[dict[str, Any]]:
        return [event for event in self.of(job_id) if event["type"] in TERMINAL]

    def of(self, job_id: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["data"]["job_id"] == job_id]

    def png(self, key: str) -> bytes:
        return self.s3.client().get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def pixels(self, job_id: str) -> npt.NDArray[np.int16]:
        return np.asarray(Image.open(io.BytesIO(self.png(f"images/{job_id}.png"))), dtype=np.int16)

    def upload(self, path: Path, key: str) -> str:
        """Stores a file; returns a presigned URL for it."""
        client = self.s3.client()
        client.upload_file(str(path), BUCKET, key)
        return str(client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key}, ExpiresIn=600))

    def stop(self, number: int = signal.SIGTERM, within_s: float = 40) -> int:
        self.process.send_signal(number)
        return self.process.wait(within_s)


@contextmanager
def consuming(
    redis_at: RedisServer, s3: S3Server, model: Path, folder: Path, keys: Keys, **environment: str
) -> Iterator[Wire]:
    """Runs `python -m consumer` until the block ends."""
    log = folder / "consumer.log"
    settings = {
        "REDIS_URL": redis_at.url,
        "SDXL_PREFIX": keys.prefix,
        "SDXL_MODEL": str(model),
        "SDXL_DEVICE": "cpu",
        "SDXL_DTYPE": "float32",
        "OMP_NUM_THREADS": "1",  # two wait for each other when a core is taken
        "SDXL_LEASE_SECONDS": "5",
        "SDXL_RETRY_BASE_SECONDS": "0.1",
        "LORA_CACHE_DIR": str(folder / "cache"),
        "LORA_ALLOW_LOOPBACK": "true",
        "R2_ACCESS_KEY_ID": s3.access_key,
        "R2_SECRET_ACCESS_KEY": s3.secret_key,
        "R2_BUCKET_NAME": BUCKET,
        "R2_ENDPOINT_URL": s3.url,
        "R2_PUBLIC_URL": "https://pictures.example.com",
        **environment,
    }
    with log.open("ab") as output:
        command = [sys.executable, "-m", "consumer"]
        process = subprocess.Popen(command, env={**os.environ, **settings}, stdout=output, stderr=output)
    redis = Redis.from_url(redis_at.url)
    try:
        yield Wire(redis, keys, s3, process, log)
    finally:
        process.kill()
        process.wait()
        redis.close()


def stock_pipeline(model: Path) -> Any:
    """What pictures are compared with: diffusers' own pipeline."""
    from diffusers import StableDiffusionXLPipeline  # takes seconds, which other tests of the wire do without

    pipeline = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
