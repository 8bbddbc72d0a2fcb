"""`lora check` reads a header as consumers read the file: the same verdict, the same reason."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from consumer.errors import LoraInvalid
from consumer.lora.deltas import LowRankDelta
from consumer.lora.formats import parse
from demo import loras
from producer.lora_check import LoraReport, check_lora
from schemas.lora.adapter_config import METADATA_KEY
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import read_header
from schemas.lora.plan import plan
from schemas.lora.sdxl_base import sdxl_base
from tests.lora_bytes import ACCEPTED_BY_THE_FORMAT, REFUSED_BY_THE_FORMAT, framed

SDXL = sdxl_base()
FEW = {
    name: SDXL.weights[name]
    for name in (
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.down_blocks.0.resnets.0.conv1",
        "unet.up_blocks.0.resnets.0.conv_shortcut",
        "text_encoder_2.text_projection",
    )
}
TO_Q = next(iter(FEW))
SETTINGS: dict[str, Any] = {"rank": 4, "alpha": 2.0, "seed": 1, "strength": 0.1}


def agreed(path: Path) -> LoraReport:
    """The report, once the consumer's own parser has said the same."""
    report = check_lora(path)
    assert (report.planned is None) == (report.refusal is not None)
    if report.planned is None:
        with pytest.raises(LoraInvalid) as refusal:
            parse(path, SDXL)
        assert (str(report.refusal), report.refusal and report.refusal.details) == (
            str(refusal.value),
            refusal.value.details,
        )
        return report
    parsed = parse(path, SDXL)
    planned = [(delta.module, delta.part) for delta in report.planned.deltas]
    assert planned == [(delta.module, delta.part) for delta in parsed.deltas]
    for plan_of_it, delta in zip(report.planned.deltas, parsed.deltas, strict=True):
        if isinstance(delta, LowRankDelta):
            assert (plan_of_it.rank, plan_of_it.alpha) == (delta.rank, delta.alpha)
    assert report.planned.skipped == parsed.skipped
    return report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lora.safetensors"


def test_a_file_with_peft_names_fits_and_is_described(path: Path) -> None:
    report = agreed(loras.write_peft(path, FEW, **SETTINGS))
    assert report.naming == ["diffusers"]
    assert (report.ranks, report.alphas, report.dtypes) == ([4], [2.0], ["F32"])
    assert report.modules == {"unet": 4, "text_encoder_2": 1}
    assert report.size_bytes == path.stat().st_size


@pytest.mark.parametrize(("naming", "told"), [("sgm", "original"), ("diffusers", "diffusers")])
def test_a_file_with_kohyas_names_fits_in_either_naming_of_blocks(path: Path, naming: Any, told: str) -> None:
    report = agreed(loras.write_kohya(path, FEW, SDXL, naming=naming, **SETTINGS))
    assert report.naming == [f"kohya, {told} block names", "kohya, text encoders"]
    assert report.modules == {"unet": 4, "text_encoder_2": 1}


def test_every_module_of_sdxl_fits_under_every_name_that_files_use(path: Path) -> None:
    loras.write_peft(path, SDXL.weights, rank=1, alpha=1.0, seed=1, strength=0.1)
    other = loras.write_kohya(path.with_suffix(".kohya"), SDXL.weights, SDXL, rank=1, alpha=1.0, seed=1, strength=0.1)
    for file in (path, other):
        report = check_lora(file)
        assert report.planned is not None
        assert {delta.module for delta in report.planned.deltas} == SDXL.weights.keys()
        assert report.planned.skipped == ()


def test_what_diffusers_saves_fits_with_the_scaling_in_its_metadata(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig

    layers = {
        f"{name.removeprefix('unet.')}.lora_{half}.weight": tensor
        for name, pair in loras.deltas(FEW, **SETTINGS).items()
        if name.startswith("unet.")
        for half, tensor in zip("AB", pair, strict=True)
    }
    config = LoraConfig(r=4, lora_alpha=6, alpha_pattern={"attn1.to_q": 3}, target_modules=["to_q"])
    StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    report = agreed(tmp_path / "pytorch_lora_weights.safetensors")
    assert report.naming == ["diffusers"]
    assert report.alphas == [3.0, 6.0]
    assert report.modules == {"unet": 4}


@pytest.mark.parametrize(
    ("names", "naming"),
    [
        ("base_model.model.{bare}.lora_{AB}.weight", "PEFT"),
        ("{bare}.lora_{AB}.weight", "diffusers, the UNet alone"),
        ("unet.{bare}.lora.{downup}.weight", "diffusers before PEFT"),
    ],
)
def test_the_manner_of_naming_is_told(path: Path, names: str, naming: str) -> None:
    (down, up) = loras.deltas({TO_Q: FEW[TO_Q]}, **SETTINGS)[TO_Q]
    bare = TO_Q.removeprefix("unet.")
    tensors = {
        names.format(bare=bare, AB="A", downup="down"): down,
        names.format(bare=bare, AB="B", downup="up"): up,
    }
    save_file(tensors, path)
    assert agreed(path).naming == [naming]


def test_the_kinds_and_the_namings_of_lycoris_and_comfyui_are_told(path: Path) -> None:
    block = "down_blocks_1_attentions_0_transformer_blocks_0"
    factors = {"hada_w1_a": (640, 2), "hada_w1_b": (2, 640), "hada_w2_a": (640, 2), "hada_w2_b": (2, 640)}
    tensors = {f"lycoris_{block}_attn1_to_q.{part}": torch.ones(shape) for part, shape in factors.items()}
    tensors[f"lycoris_{block}_attn1_to_q.dora_scale"] = torch.ones(640, 1)
    tensors["diffusion_model.out.0.diff"] = torch.ones(320)
    tensors["diffusion_model.out.0.diff_b"] = torch.ones(320)
    save_file(tensors, path)
    report = agreed(path)
    assert report.kinds == ["DoRA on LoHa", "full difference"]
    assert report.naming == ["LyCORIS, diffusers block names", "ComfyUI"]
    assert (report.ranks, report.alphas, report.modules) == ([2], [2.0], {"unet": 2})


def test_a_file_for_another_model_is_named_and_still_described(path: Path) -> None:
    report = agreed(loras.write_sd15(path))
    assert "SD 1.x" in str(report.refusal)
    assert report.ranks == [4]
    assert report.naming == ["kohya, original block names"]
    assert (report.modules, report.alphas) == ({}, [])


def tensors_of(name: str = TO_Q, rank: int = 2) -> dict[str, Tensor]:
    outputs, inputs = FEW[TO_Q]
    return {f"{name}.lora_A.weight": torch.ones(rank, inputs), f"{name}.lora_B.weight": torch.ones(outputs, rank)}


def broken() -> dict[str, dict[str, Tensor]]:
    good, conv = tensors_of(), f"{list(FEW)[2]}.lora_"
    return {
        "half of it": {name: tensor for name, tensor in good.items() if "lora_A" in name},
        "an alpha alone": good | {"unet.conv_in.alpha": torch.tensor(1.0)},
        "halves of different ranks": good | {f"{TO_Q}.lora_B.weight": torch.ones(640, 3)},
        "another size": {name: tensor[:, :1].repeat(1, 7) for name, tensor in good.items()},
        "a rank that is too high": tensors_of(rank=2048),
        "float64": {name: tensor.double() for name, tensor in good.items()},
        "an alpha of 0": good | {f"{TO_Q}.alpha": torch.tensor(0.0)},
        "an alpha of NaN": good | {f"{TO_Q}.alpha": torch.tensor(float("nan"), dtype=torch.bfloat16)},
        "an infinite alpha": good | {f"{TO_Q}.alpha": torch.tensor(float("inf"), dtype=torch.float16)},
        "an alpha of two numbers": good | {f"{TO_Q}.alpha": torch.ones(2)},
        "one module under two names": good | tensors_of(TO_Q.removeprefix("unet.")),
        "one half under two names": good | {f"{TO_Q}.lora.down.weight": torch.ones(2, 640)},
        "nothing that matches": tensors_of("unet.extra"),
        "a kernel of another size": {
            conv + "A.weight": torch.ones(2, 320, 1, 1),
            conv + "B.weight": torch.ones(320, 2),
        },
        "SD 2": tensors_of("lora_unet_x_attn2_to_k")
        | {"unet.x.attn2.to_k.lora_A.weight": torch.ones(2, 1024), "unet.x.attn2.to_k.lora_B.weight": torch.ones(9, 2)},
        "SD 3": tensors_of("transformer.joint_transformer_blocks.0.attn.to_q"),
        "Flux": tensors_of("lora_unet_double_blocks_0_img_attn_proj"),
        "LoHa beside it": good | {f"{TO_Q}.hada_w1_a": torch.ones(2)},
        "half a LoHa": {f"{TO_Q}.hada_w1_a": torch.ones(640, 2)},
        "half a LoKr": {f"{TO_Q}.lokr_w1": torch.ones(2, 2)},
        "a DoRA of another length": good | {f"{TO_Q}.dora_scale": torch.ones(2)},
        "a difference of another size": {f"{TO_Q}.diff": torch.ones(2, 2)},
        "OFT": good | {f"{TO_Q}.oft_blocks": torch.ones(2)},
        "a checkpoint": {"model.diffusion_model.out.2.weight": torch.ones(2)},
        "embeddings": {"emb_params": torch.ones(2, 4)},
    }


@pytest.mark.parametrize(("kind", "tensors"), broken().items(), ids=broken().keys())
def test_a_file_that_consumers_refuse_is_refused_with_their_reason(
    path: Path, kind: str, tensors: dict[str, Tensor]
) -> None:
    save_file(tensors, path)
    assert agreed(path).refusal is not None


@pytest.mark.parametrize(
    "config",
    ["no JSON", '{"unet.use_dora": true}', '{"unet.lora_alpha": 0}', '{"unet.alpha_pattern": {"(a+)+$": 1}}'],
)
def test_a_broken_configuration_is_refused_with_the_same_reason(path: Path, config: str) -> None:
    save_file(tensors_of(), path, metadata={METADATA_KEY: config})
    assert agreed(path).refusal is not None


@pytest.mark.parametrize("raw", (REFUSED_BY_THE_FORMAT | ACCEPTED_BY_THE_FORMAT).values())
def test_bytes_that_are_no_lora_are_refused_with_the_same_reason(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    assert agreed(path).refusal is not None


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_an_alpha_is_read_in_every_dtype_that_trainers_write(path: Path, dtype: torch.dtype) -> None:
    """Guards `ALPHA_FORMATS`, which is also what `_refuse_dtypes` allows."""
    save_file(tensors_of() | {f"{TO_Q}.alpha": torch.tensor(24).to(dtype)}, path)
    assert agreed(path).alphas == [24.0]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_file_that_was_cast_to_8_bits_as_a_whole_fits(path: Path, dtype: torch.dtype) -> None:
    tensors = tensors_of() | {f"{TO_Q}.alpha": torch.tensor(1.0), f"{TO_Q}.dora_scale": torch.ones(640, 1)}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    report = agreed(path)
    assert (report.alphas, report.kinds) == ([1.0], ["DoRA on LoRA"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool], ids=str)
def test_an_alpha_of_another_dtype_is_refused_by_it(path: Path, dtype: torch.dtype) -> None:
    save_file(tensors_of() | {f"{TO_Q}.alpha": torch.tensor(1).to(dtype)}, path)
    assert re.search(r"must be .*I64.*; '.*alpha' is", str(agreed(path).refusal))


def test_what_matches_nothing_is_listed(path: Path) -> None:
    save_file(tensors_of() | tensors_of("unet.extra"), path)
    report = agreed(path)
    assert report.planned is not None
    assert sorted(report.planned.skipped) == ["unet.extra.lora_A.weight", "unet.extra.lora_B.weight"]


def test_bundled_embeddings_are_skipped_and_listed(path: Path) -> None:
    """Guards `BUNDLED_EMBEDDING`: OneTrainer packs what it trained of the vocabulary beside the LoRA."""
    bundled = {f"bundle_emb.ann.{part}": torch.ones(4, size) for part, size in (("clip_l", 768), ("clip_g", 1280))}
    save_file(tensors_of() | bundled, path)
    report = agreed(path)
    assert report.planned is not None
    assert sorted(report.planned.skipped) == sorted(bundled)
    save_file(bundled, path)
    assert "Nothing in the LoRA matches" in str(agreed(path).refusal)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_of_weights_are_not_looked_at(path: Path, value: float) -> None:
    save_file({name: torch.full_like(tensor, value) for name, tensor in tensors_of().items()}, path)
    assert check_lora(path).refusal is None
    with pytest.raises(LoraInvalid):
        parse(path, SDXL)


def test_metadata_are_told_without_signatures_and_shortened(path: Path) -> None:
    metadata = {
        "modelspec.title": "Ann " * 100,
        "ss_sd_model_name": "https://models.example/base.safetensors?X-Amz-Signature=canary",
        "ss_dataset_dirs": "not told",
    }
    save_file(tensors_of(), path, metadata=metadata)
    told = agreed(path).metadata
    assert told == {"modelspec.title": ("Ann " * 50), "ss_sd_model_name": "https://models.example/base.safetensors"}


def test_a_file_that_is_cut_while_it_is_read_is_refused(path: Path) -> None:
    save_file(tensors_of() | {f"{TO_Q}.alpha": torch.tensor(24, dtype=torch.int64)}, path)
    header = read_header(path)
    path.write_bytes(path.read_bytes()[: header.data_start])
    with pytest.raises(LoraUnusable, match="cut short"):
        plan(path, header, SDXL)


SUFFIXES = ("lora_A.weight lora_B.weight alpha", "lora_down.weight lora_up.weight alpha")
ALIASES = [*sorted(alias for alias, name in SDXL.names.items() if name in FEW), "unet.extra", "lora_unet_x_attn2_to_k"]


def seldom(wrong: Any, usual: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * 30 + [wrong])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A file of some modules under some names, often with one thing wrong, and zeros for weights."""
    entries: dict[str, Any] = {}
    data = b""
    for alias in draw(st.lists(st.sampled_from(ALIASES), min_size=1, max_size=3, unique=True)):
        rank = draw(seldom(1025, 2))
        outputs, *inputs = FEW.get(SDXL.names.get(alias, ""), (8, draw(st.sampled_from([8, 768, 2048]))))
        shapes: tuple[list[int], ...] = ([rank, *inputs], [outputs, draw(seldom(rank + 1, rank))], [])
        for suffix, shape in zip(draw(st.sampled_from(SUFFIXES)).split(), shapes, strict=True):
            if draw(seldom(True, False)):
                continue
            dtype, size = draw(seldom(("I16", 2), ("F32", 4)))
            alpha = struct.pack("<f", draw(st.sampled_from([1.0, 4.0, 0.5, 4.0, 0.0, float("inf")])))
            raw = bytes(size * math.prod(shape)) if shape else alpha[-size:]
            offsets = [len(data), len(data) + len(raw)]
            entries[f"{alias}.{suffix}"] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
            data += raw
    return framed(json.dumps(entries).encode(), data)


@given(raw=files())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_check_and_consumer_agree_on_whatever_is_put_together(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.safetensors"
    path.write_bytes(raw)
    agreed(path)


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_check_and_consumer_agree_on_a_flipped_byte_of_the_header(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    save_file(tensors_of(rank=1) | {f"{TO_Q}.alpha": torch.tensor(1.0)}, path)
    raw = bytearray(path.read_bytes())
    raw[position % read_header(path).data_start] = byte
    path.write_bytes(raw)
    agreed(path)
