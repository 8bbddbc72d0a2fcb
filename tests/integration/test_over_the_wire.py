"""What a stranger sees who drives `python -m consumer` by bare XADD: pictures against the stock pipeline, bad requests
among good ones, presigned uploads, cancellation, and no secret anywhere."""

import hashlib
import io
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from demo import loras
from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests.integration.wire_kit import BUCKET, SMALL, Wire, consuming, stock_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

CANARY = "c4n4ryS1gnature"


@pytest.fixture(scope="module")
def wire(
    redis_at: RedisServer, s3_at: S3Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Wire]:
    s3_at.create_bucket(BUCKET)
    with consuming(redis_at, s3_at, tiny_model, tmp_path_factory.mktemp("consumer"), Keys("wire")) as wire:
        yield wire


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    return stock_pipeline(tiny_model)


def draw(stock: Any, deltas: dict[str, torch.Tensor]) -> np.ndarray[Any, np.dtype[np.int16]]:
    """The stock pipeline's picture with `deltas` added to its weights by hand."""
    saved = {}
    for name, delta in deltas.items():
        component, module = name.split(".", 1)
        weight = getattr(stock, component).get_submodule(module).weight.data
        saved[name] = (weight, weight.clone())
        weight += delta.reshape(weight.shape)
    image = stock(
        SMALL["prompt"],
        width=512,
        height=512,
        num_inference_steps=20,
        guidance_scale=5.5,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    for weight, original in saved.values():
        weight.copy_(original)
    return np.asarray(image, dtype=np.int16)


def test_pictures_are_the_stock_pipelines_with_the_loras_merged_by_hand(
    wire: Wire, tiny_model: Path, stock: Any, tmp_path: Path
) -> None:
    shapes = loras.shapes_of(tiny_model)
    how: dict[str, Any] = {"rank": 4, "alpha": 2.0, "seed": 3, "strength": 0.8}
    unet = loras.attention_modules(shapes)
    everything = loras.attention_modules(shapes, text_encoders=True)
    files = {
        "peft": loras.write_peft(tmp_path / "peft.safetensors", unet, **how),
        "text": loras.write_kohya(tmp_path / "text.safetensors", everything, shapes, **how),
    }
    wire.add("plain")
    for name, path in files.items():
        wire.add(name, lora_url=wire.upload(path, f"loras/{path.name}"), lora_scale=0.7)
    wire.add("plain-again")
    events = wire.wait("plain", *files, "plain-again")
    assert {event["type"] for event in events.values()} == {"generation.succeeded"}
    assert np.array_equal(wire.pixels("plain"), wire.pixels("plain-again"))

    def merged(modules: Any) -> dict[str, torch.Tensor]:
        drawn = loras.deltas(modules, **how)
        return {name: 0.7 * (2.0 / 4) * up.flatten(1) @ down.flatten(1) for name, (down, up) in drawn.items()}

    for name, deltas in {"plain": {}, "peft": merged(unet), "text": merged(everything)}.items():
        difference = np.abs(wire.pixels(name) - draw(stock, deltas))
        assert difference.mean() < 0.1, name
        assert difference.max() <= 2, name
    assert np.abs(wire.pixels("peft") - wire.pixels("plain")).mean() > 2
    assert np.abs(wire.pixels("text") - wire.pixels("peft")).mean() > 2
    applied = events["text"]["data"]["model_info"]
    assert applied["loras"] == [
        {"name": "text.safetensors", "version": None, "scale": 0.7, "modules": len(everything), "skipped": 0}
    ]


@pytest.fixture(scope="module")
def whole(wire: Wire) -> dict[str, Any]:
    """The terminal event of a job that has everything."""
    wire.add("whole", seed=None, metadata={"avatar": "a1"}, output_key="people/whole one.png", cfg=7)
    return wire.wait("whole")["whole"]


def test_a_finished_picture_is_where_its_event_says(wire: Wire, whole: dict[str, Any]) -> None:
    data = whole["data"]
    png = wire.png("people/whole one.png")
    assert data["image_sha256"] == hashlib.sha256(png).hexdigest()
    assert data["image_bytes"] == len(png)
    assert data["image_url"] == "https://pictures.example.com/people/whole%20one.png"
    assert data["image_size"] == [512, 512]
    assert data["metadata"]["seed_used"] == int.from_bytes(hashlib.sha256(b"whole").digest()[:4], "big")
    assert data["request_metadata"] == {"avatar": "a1"}
    head = wire.s3.client().head_object(Bucket=BUCKET, Key="people/whole one.png")
    assert head["ContentType"] == "image/png"
    assert head["Metadata"] == {
        "job-id": "whole",
        "run": "1",
        "sha256": data["image_sha256"],
        "seed": str(data["metadata"]["seed_used"]),
    }
    image = Image.open(io.BytesIO(png))
    assert isinstance(image, PngImageFile)
    assert str(image.text["parameters"]).startswith(str(SMALL["prompt"]))
    assert [event["type"] for event in wire.of("whole")] == ["generation.started", "generation.succeeded"]


BAD: dict[str, tuple[dict[str, Any], str, int | None]] = {
    "steps": ({"steps": 3}, "INVALID_REQUEST", None),
    "float-steps": ({"steps": 28.0}, "INVALID_REQUEST", None),
    "unknown-field": ({"stepz": 20}, "INVALID_REQUEST", None),
    "version": ({"v": 2}, "INVALID_REQUEST", None),
    "blank": ({"prompt": " \u200b"}, "INVALID_PROMPT", None),
    "control": ({"prompt": "a\u001b[31mfox"}, "INVALID_PROMPT", None),
    "userinfo": ({"lora_url": "https://a:b@127.0.0.1/x"}, "INVALID_REQUEST", None),
    "metadata-host": ({"lora_url": "http://169.254.169.254/latest"}, "LORA_DOWNLOAD_FAILED", None),
    "other-host": ({"lora_url": "https://evil.example.com/x?sig=" + CANARY}, "LORA_DOWNLOAD_FAILED", None),
    "no-such-lora": ({"lora_key": "loras/none.safetensors"}, "LORA_DOWNLOAD_FAILED", None),
    "not-safetensors": ({"lora_key": "loras/text.html"}, "LORA_LOAD_FAILED", None),
    "sd15": ({"lora_key": "loras/sd15.safetensors"}, "LORA_LOAD_FAILED", None),
    "too-late": ({"expires_at": "2020-01-01T00:00:00Z"}, "EXPIRED", 0),
    "bad-upload-url": ({"upload_url": "https://evil.example.com/x"}, "UPLOAD_FAILED", None),
}


def test_bad_requests_among_good_ones_end_at_once_with_their_own_code(wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "text.html").write_text("<html>no such key</html>")
    wire.upload(tmp_path / "text.html", "loras/text.html")
    wire.upload(loras.write_sd15(tmp_path / "sd15.safetensors"), "loras/sd15.safetensors")
    wire.add("good")
    for name, (fields, _, _) in BAD.items():
        wire.add(name, **fields)
    wire.add_raw({"payload": b"\xff\xfe\xfd"})
    wire.add_raw({"payload": "not json at all", "job_id": "named-only"})
    events = wire.wait("good", *BAD, "named-only")
    for name, (_, code, retry_after) in BAD.items():
        data = events[name]["data"]
        assert (name, data["error_code"], data["retry_after"]) == (name, code, retry_after)
        assert data["dead_lettered"] is (retry_after is not None)
        assert "generation.started" not in [event["type"] for event in wire.of(name)]
    assert events["named-only"]["data"]["error_code"] == "INVALID_REQUEST"
    assert events["good"]["type"] == "generation.succeeded"
    shapes = events["sd15"]["data"]["details"]
    assert shapes["file_shape"][-1] == 768
    assert shapes["model_shape"][-1] != 768
    letters = [fields for _, fields in wire.entries(wire.keys.dead)]
    assert b"\xff\xfe\xfd" in [letter.get(b"raw") for letter in letters]
    assert b"too-late" in [letter.get(b"job_id") for letter in letters]
    wire.until(lambda: wire.redis.xlen("{wire}:requests:normal") == 0)


def test_a_picture_goes_to_an_upload_url_without_storage_credentials(wire: Wire) -> None:
    client = wire.s3.client()
    put = {"Bucket": BUCKET, "Key": "theirs/one.png"}
    wire.add("put", upload_url=client.generate_presigned_url("put_object", Params=put, ExpiresIn=600))
    data = wire.wait("put")["put"]["data"]
    assert hashlib.sha256(wire.png("theirs/one.png")).hexdigest() == data["image_sha256"]
    assert data["image_key"] is None
    assert data["image_url"] == f"{wire.s3.url}/{BUCKET}/theirs/one.png"


def test_an_expired_upload_url_costs_no_gpu_time(wire: Wire) -> None:
    signed = datetime.now(UTC) - timedelta(hours=2)
    url = (
        f"{wire.s3.url}/{BUCKET}/theirs/late.png?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date={signed:%Y%m%dT%H%M%SZ}"
        f"&X-Amz-Expires=60&X-Amz-SignedHeaders=host&X-Amz-Credential=x&X-Amz-Signature={CANARY}"
    )
    wire.add("late", upload_url=url)
    data = wire.wait("late")["late"]["data"]
    assert (data["error_code"], data["retry_after"]) == ("UPLOAD_FAILED", 0)
    assert [event["type"] for event in wire.of("late")] == ["generation.failed"]


def test_a_running_job_is_cancelled_by_a_key_from_any_client(wire: Wire) -> None:
    wire.add("stop-me", steps=50, width=1024, height=1024, timeout=300)
    wire.until(lambda: wire.of("stop-me"))
    wire.redis.set("{wire}:cancel:stop-me", 1, ex=604800)
    event = wire.wait("stop-me")["stop-me"]
    assert (event["type"], event["data"]["stage"]) == ("generation.cancelled", "running")
    assert event["id"] == "stop-me:1:cancelled"


def test_a_job_past_its_timeout_ends_and_the_next_one_is_drawn(wire: Wire) -> None:
    wire.add("slow", steps=50, width=1024, height=1024, timeout=1)
    wire.add("next")
    events = wire.wait("slow", "next")
    assert (events["slow"]["data"]["error_code"], events["slow"]["data"]["retry_after"]) == ("TIMEOUT", 0)
    assert events["next"]["type"] == "generation.succeeded"


def test_progress_ends_with_a_copy_of_the_terminal_event(wire: Wire, whole: dict[str, Any]) -> None:
    *steps, (_, last) = wire.entries("{wire}:progress:whole")
    assert steps
    numbers = [int(fields[b"step"]) for _, fields in steps]
    assert numbers == sorted(numbers)
    assert {fields[b"total"] for _, fields in steps} == {b"20"}
    assert json.loads(last[b"payload"]) == whole


def test_a_second_run_after_a_failure_draws_with_a_fresh_url(wire: Wire) -> None:
    wire.add("again", lora_key="loras/none.safetensors")
    assert wire.wait("again")["again"]["type"] == "generation.failed"
    wire.add("again", lora_key="loras/peft.safetensors", envelope={"run": "2"})
    wire.until(lambda: len(wire.ended("again")) == 2)
    second = wire.ended("again")[1]
    assert (second["id"], second["data"]["run"], second["data"]["attempt"]) == ("again:2:succeeded", 2, 1)


def test_no_signature_is_left_anywhere(wire: Wire, tmp_path: Path) -> None:
    """Runs last: looks through everything that the tests above have left behind."""
    wire.add("canary", lora_url=f"{wire.s3.url}/{BUCKET}/loras/none.safetensors?X-Amz-Signature={CANARY}")
    wire.wait("canary")
    everything = wire.log.read_bytes()
    for key in wire.redis.scan_iter("{wire}*"):
        everything += key + wire.redis.dump(key)
        kind = wire.redis.type(key)
        if kind == b"hash":
            everything += str(wire.redis.hgetall(key)).encode()
        elif kind == b"stream":
            everything += str(wire.entries(key)).encode()
    assert CANARY.encode() not in everything
    assert b"X-Amz-Signature=" not in everything.replace(b"X-Amz-Signature=[redacted]", b"")
    assert b"canary" in everything
