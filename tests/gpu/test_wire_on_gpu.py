"""`python -m consumer` with its default device and dtype, driven over the wire."""

from pathlib import Path

import numpy as np
import pytest
import torch

from demo import loras
from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests.integration.wire_kit import BUCKET, consuming

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_jobs_with_and_without_a_lora_are_drawn_in_float16(
    redis_at: RedisServer, s3_at: S3Server, tiny_model: Path, tmp_path: Path, keys: Keys
) -> None:
    s3_at.create_bucket(BUCKET)
    modules = loras.attention_modules(loras.shapes_of(tiny_model), text_encoders=True)
    path = loras.write_peft(tmp_path / "lora.safetensors", modules, seed=3, strength=0.8)
    on_gpu = {"SDXL_DEVICE": "cuda", "SDXL_DTYPE": "float16"}
    with consuming(redis_at, s3_at, tiny_model, tmp_path, keys, **on_gpu) as wire:
        url = wire.upload(path, "loras/lora.safetensors")
        for job_id, fields in {"plain": {}, "with": {"lora_url": url}, "again": {}}.items():
            wire.add(job_id, **fields)
        events = wire.wait("plain", "with", "again", within_s=120)
        assert {event["type"] for event in events.values()} == {"generation.succeeded"}
        assert "NVIDIA" in events["plain"]["data"]["gpu"]
        assert np.array_equal(wire.pixels("plain"), wire.pixels("again"))
        assert np.abs(wire.pixels("with") - wire.pixels("plain")).mean() > 2
        assert wire.stop() == 0
