"""The PNG is the pixels, and its parameters can be read back by what reads such chunks."""

import io
import json
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from consumer.images import encode_png, parameters_text
from schemas.events import AppliedLora, ModelInfo
from schemas.requests import GenerationRequest

BASE = ModelInfo(base_model="stabilityai/stable-diffusion-xl-base-1.0", lora_applied=False)
PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
FIELD = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def parse_generation_parameters(text: str) -> tuple[str, str, dict[str, str]]:
    """What the AUTOMATIC1111 web UI makes of the text: prompt, negative prompt, fields."""
    *lines, last = text.strip().split("\n")
    if len(FIELD.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            target = negative
            target.append(line.removeprefix("Negative prompt:").strip())
        else:
            target.append(line)
    fields = {key: json.loads(value) if value.startswith('"') else value for key, value in FIELD.findall(last)}
    return "\n".join(prompt), "\n".join(negative), fields


def a_request(prompt: str = "a red flower", **fields: object) -> GenerationRequest:
    return GenerationRequest.model_validate({"job_id": "job-1", "prompt": prompt, "seed": 7} | fields)


def chunk(png: bytes) -> str:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        return str(image.info["parameters"])


def test_the_pixels_come_back_as_they_were() -> None:
    with Image.open(io.BytesIO(encode_png(PIXELS, a_request(), BASE))) as image:
        assert image.format == "PNG"
        assert image.mode == "RGB"
        assert image.size == (64, 48)
        assert np.array_equal(np.asarray(image), PIXELS)


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """A PNG's chunks, each checksum looked at, as the standard says it (PNG, 5)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(png):
        [length] = struct.unpack_from(">I", png, at)
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(kind + data),)
        yield kind, data
        at += 12 + length


def decode_by_the_book(png: bytes) -> npt.NDArray[np.uint8]:
    """A second decoder, of RGB pictures with the filters None and Up: the standard library alone."""
    found = dict(chunks(png))
    width, height, *rest = struct.unpack(">IIBBBBB", found[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    inflate = zlib.decompressobj()
    raw = np.frombuffer(inflate.decompress(found[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert inflate.eof
    assert not inflate.unused_data
    above = np.zeros(3 * width, np.uint8)
    rows = []
    for kind, row in zip(raw[:, 0], raw[:, 1:], strict=True):
        above = row + above if kind == 2 else row
        rows.append(above)
    return np.stack(rows).reshape(height, width, 3)


@pytest.mark.parametrize("picture", ["noise", "smooth", "black", "white", "one pixel", "one row", "a view"])
def test_every_decoder_reads_the_same_pixels(picture: str) -> None:
    """Guards `_filtered` and `_chunk`: what wraps around 0 and 255, the first row, the checksums, the end."""
    noise = np.random.default_rng(1).integers(0, 256, (96, 65, 3), dtype=np.uint8)
    y, x = np.mgrid[0:96, 0:65]
    pixels = {
        "noise": noise,
        "smooth": np.stack([y * 2, x * 3, y + x], -1).astype(np.uint8),
        "black": np.zeros_like(noise),
        "white": np.full_like(noise, 255),
        "one pixel": noise[:1, :1].copy(),
        "one row": noise[:1].copy(),
        "a view": noise.transpose(1, 0, 2)[::-1],
    }[picture]
    before = pixels.copy()
    png = encode_png(pixels, a_request(), BASE)
    assert np.array_equal(decode_by_the_book(png), pixels)
    with Image.open(io.BytesIO(png)) as image:
        assert np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(pixels, before)


def test_the_parameters_stand_before_the_pixels_as_pillow_wrote_them() -> None:
    """Guards `_text_chunk` against Pillow's own: readers that stop at the pixels find it, and nothing follows them."""
    for prompt in ("café", "夜"):
        expected = PngInfo()
        expected.add_text("parameters", parameters_text(a_request(prompt), BASE, "Euler"))
        [(kind, data, *_)] = expected.chunks
        found = list(chunks(encode_png(PIXELS, a_request(prompt), BASE)))
        assert [name for name, _ in found] == [b"IHDR", kind, b"IDAT", b"IEND"]
        assert found[1] == (kind, data)


def test_a_smooth_picture_is_small() -> None:
    """Guards that rows are filtered: without, the same picture is five times as large."""
    y, x = np.mgrid[0:256, 0:256] / 256
    waves = [127 + 100 * np.sin(7 * x + 3 * y), 127 + 100 * np.cos(5 * y * x), 127 + 90 * np.sin(9 * (x - y))]
    pixels = np.stack(waves, -1).astype(np.uint8)
    pillow = io.BytesIO()
    Image.fromarray(pixels).save(pillow, "PNG", compress_level=1)
    assert len(encode_png(pixels, a_request(), BASE)) < 1.1 * len(pillow.getvalue())


def test_the_same_picture_is_the_same_bytes() -> None:
    assert encode_png(PIXELS, a_request(), BASE) == encode_png(PIXELS.copy(), a_request(), BASE)


def test_the_parameters_are_those_of_the_request() -> None:
    request = a_request(negative_prompt="blurry", steps=30, cfg=7.25, width=1344, height=768)
    prompt, negative, fields = parse_generation_parameters(chunk(encode_png(PIXELS, request, BASE, sampler="Euler a")))
    assert (prompt, negative) == ("a red flower", "blurry")
    assert fields == {
        "Steps": "30",
        "Sampler": "Euler a",
        "CFG scale": "7.25",
        "Seed": "7",
        "Size": "1344x768",
        "Model": "stabilityai/stable-diffusion-xl-base-1.0",
        "Version": "modal-sdxl-lora",
    }


def test_the_seed_that_was_used_is_told_where_none_was_asked_for() -> None:
    request = a_request(seed=None)
    assert parse_generation_parameters(chunk(encode_png(PIXELS, request, BASE)))[2]["Seed"] == str(
        request.effective_seed
    )


def test_loras_are_named_with_their_scales_beside_an_untouched_prompt() -> None:
    info = BASE.model_copy(
        update={
            "lora_applied": True,
            "loras": (
                AppliedLora(name='ink, "wet".safetensors', scale=0.8, modules=3),
                AppliedLora(name="gold.safetensors", scale=1.0, modules=2),
            ),
        }
    )
    prompt, _, fields = parse_generation_parameters(chunk(encode_png(PIXELS, a_request(), info)))
    assert prompt == "a red flower"
    assert fields["Loras"] == '<lora:ink, "wet".safetensors:0.8>, <lora:gold.safetensors:1.0>'
    assert fields["Version"] == "modal-sdxl-lora"


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [
        ("first line\nsecond line, with: commas", "ugly\nSteps: 1, Sampler: none, Seed: 2"),
        ("Steps: 20, Sampler: fake, CFG scale: 1, Seed: 3", ""),
        ("夜の山、雪、\nгоры ночью", "размытый"),
        ("café ünïcode", "çà"),
        ("emoji 🌸 and עברית", ""),
        ('quotes " and \\ backslashes', '"'),
        ("<lora:somebody:1>", ""),
    ],
)
def test_prompts_of_any_script_and_shape_come_back(prompt: str, negative: str) -> None:
    png = encode_png(PIXELS, a_request(prompt, negative_prompt=negative), BASE)
    assert parse_generation_parameters(chunk(png))[:2] == (prompt, negative)


def test_latin_text_is_a_text_chunk_and_any_other_an_international_one() -> None:
    assert b"tEXtparameters" in encode_png(PIXELS, a_request("café"), BASE)
    assert b"iTXtparameters" in encode_png(PIXELS, a_request("夜"), BASE)


def test_a_prompt_that_looks_like_a_secret_is_kept_as_it_was_written() -> None:
    prompt = "a token: gold, a password=chest"
    png = encode_png(PIXELS, a_request(prompt), BASE)
    assert parse_generation_parameters(chunk(png))[0] == prompt


@given(
    prompt=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60),
    name=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=40),
)
def test_whatever_is_in_prompts_and_names_every_field_comes_back(prompt: str, name: str) -> None:
    request = GenerationRequest.model_construct(job_id="job-1", prompt=prompt, seed=7)
    loras = (AppliedLora(name=name, scale=0.5, modules=1),)
    text = parameters_text(request, BASE.model_copy(update={"loras": loras}), "Euler")
    fields = parse_generation_parameters(text)[2]
    assert fields.keys() == {"Steps", "Sampler", "CFG scale", "Seed", "Size", "Model", "Loras", "Version"}
    assert fields["Size"] == "1024x1024"
