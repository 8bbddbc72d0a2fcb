"""Files that are no LoRA, on their way through a worker: each ends its job for good, and the worker goes on."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from redis.asyncio import Redis

from consumer.engine import LoraFile, PreparedLoras
from consumer.lora.formats import parse
from demo.servers import RedisServer
from schemas.events import AppliedLora
from schemas.keys import Keys
from schemas.lora.sdxl_base import sdxl_base
from schemas.requests import LoraRef
from tests.fakes import FakeEngine, FakeFetcher
from tests.integration.queue_kit import a_request, entries, publish, where_is
from tests.integration.worker_kit import Bench
from tests.unit.bad_inputs.lora_files import BAD_FILES, GOOD, BadFile

FILES = {f"bad-{number}": file for number, file in enumerate(BAD_FILES)} | {"good": BadFile("good", GOOD, "")}


class ReadingEngine(FakeEngine):
    """Reads LoRAs as the stock engine does, for SDXL, and draws as the fake one."""

    def prepare(self, files: Sequence[LoraFile]) -> PreparedLoras:
        for file in files:
            parse(file.path, sdxl_base())
        return PreparedLoras((AppliedLora(name="a", version=None, scale=1.0, modules=1, skipped=0),))


class FilesOnDisk(FakeFetcher):
    """Has the file that a request's key names."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @asynccontextmanager
    async def fetch(self, ref: LoraRef) -> AsyncIterator[Path]:
        folder = self.folder / Path(ref.name).stem  # two jobs are prepared at once
        folder.mkdir(exist_ok=True)
        yield FILES[folder.name].write(folder)


@pytest.fixture
def bench(redis: Redis, keys: Keys, redis_at: RedisServer, tmp_path: Path) -> Bench:
    return Bench(redis, keys, redis_at.url, engine=ReadingEngine(), fetcher=FilesOnDisk(tmp_path))


async def test_every_bad_file_ends_its_job_for_good_without_the_gpu_and_the_worker_lives(bench: Bench) -> None:
    """Guards `LoraInvalid.code`, by which `Outcomes` neither retries nor buries, and that `prepare` comes first."""
    for job_id in FILES:
        await publish(bench.redis, bench.keys, a_request(job_id, lora_key=f"{job_id}.safetensors"))
    async with bench.working(max_attempts=3):
        events = await bench.ended(*FILES, within_s=60)
    ends = {event["data"]["job_id"]: event for event in events if event["type"] != "generation.started"}
    assert len(ends) == len(FILES) == len([event for event in events if event["type"] != "generation.started"])
    assert ends.pop("good")["type"] == "generation.succeeded"
    for job_id, event in ends.items():
        data = event["data"]
        said = (event["type"], data["error_code"], data["retry_after"], data["dead_lettered"], data["attempt"])
        assert said == ("generation.failed", "LORA_LOAD_FAILED", None, False, 1), FILES[job_id].name
        assert FILES[job_id].said in data["error"]
    assert [line for line in bench.engine.log if line.startswith("draw ")] == ["draw good"]
    assert await entries(bench.redis, bench.keys.dead) == []
    assert await where_is(bench.redis, bench.keys, "bad-0") == ["done"]
