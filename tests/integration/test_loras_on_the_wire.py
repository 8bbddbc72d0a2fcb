"""LoRAs of every kind through `python -m consumer` with the fast engine: pictures against weights merged by hand."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from demo.servers import RedisServer, S3Server
from schemas.keys import Keys
from tests.integration.wire_kit import BUCKET, SMALL, Wire, consuming, stock_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]
ALPHA, RANK = 3.0, 4
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


@pytest.fixture(scope="module")
def wire(
    redis_at: RedisServer, s3_at: S3Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Wire]:
    s3_at.create_bucket(BUCKET)
    folder = tmp_path_factory.mktemp("consumer")
    with consuming(redis_at, s3_at, tiny_model, folder, Keys("kinds"), SDXL_SPEED="fast") as wire:
        yield wire


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    return stock_pipeline(tiny_model)


def parameters(stock: Any, *ends: str) -> Tensors:
    """The pipeline's weights whose modules' names end like this."""
    return {
        f"{component}.{name}": parameter.data
        for component in KOHYA
        for name, parameter in getattr(stock, component).named_parameters()
        if name.removesuffix(".weight").endswith(ends)
    }


def draw(stock: Any, *changes: tuple[Mapping[str, Tensor], float]) -> npt.NDArray[np.int16]:
    """The stock pipeline's picture with `scale * change` added to its weights in float64."""
    live = parameters(stock, "")
    pristine = {name: base.clone() for name, base in live.items()}
    merged = {name: base.double() for name, base in live.items()}
    for change, scale in changes:
        for name, tensor in change.items():
            merged[name] += scale * tensor
    for name, base in live.items():
        base.copy_(merged[name])
    image = stock(
        SMALL["prompt"],
        width=512,
        height=512,
        num_inference_steps=20,
        guidance_scale=1.0,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]
    for name, base in live.items():
        base.copy_(pristine[name])
    return np.asarray(image, dtype=np.int16)


class Drawn:
    """Random tensors of one file, by the module's name in it and their own."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.tensors: Tensors = {}

    def add(self, module: str, part: str, *shape: int, size: float) -> Tensor:
        """Returns it in float64."""
        self.tensors[f"{module}.{part}"] = size * torch.randn(shape, generator=self._generator)
        return self.tensors[f"{module}.{part}"].double()

    def alpha(self, module: str) -> float:
        """Returns alpha / rank."""
        self.tensors[f"{module}.alpha"] = torch.tensor(ALPHA)
        return ALPHA / RANK

    def save(self, path: Path) -> Path:
        save_file(self.tensors, path)
        return path


def kohya(parameter: str) -> str:
    component, path = parameter.removesuffix(".weight").removesuffix(".bias").split(".", 1)
    return KOHYA[component] + path.replace(".", "_")


def a_loha(stock: Any, path: Path) -> tuple[Path, Tensors]:
    """LoHa in LyCORIS' names."""
    drawn, changes = Drawn(1), {}
    for name, base in parameters(stock, "attn2.to_k", "attn2.to_v", "attn2.to_out.0").items():
        module, (outputs, inputs) = kohya(name).replace("lora_unet_", "lycoris_"), base.shape
        halves = [
            drawn.add(module, f"hada_w{i}_a", outputs, RANK, size=0.4)
            @ drawn.add(module, f"hada_w{i}_b", RANK, inputs, size=0.4)
            for i in (1, 2)
        ]
        changes[name] = drawn.alpha(module) * halves[0] * halves[1]
    return drawn.save(path), changes


def a_lokr(stock: Any, path: Path) -> tuple[Path, Tensors]:
    """LoKr in PEFT's names, of convolutions too."""
    drawn, changes = Drawn(2), {}
    for name, base in parameters(stock, "attn2.to_out.0", "conv2", "upsamplers.0.conv").items():
        module, (outputs, *inputs) = name.removesuffix(".weight"), base.shape
        left = drawn.add(module, "lokr_w1", 4, 4, size=0.3)
        right = drawn.add(module, "lokr_w2_a", outputs // 4, RANK, size=0.3) @ drawn.add(
            module, "lokr_w2_b", RANK, base[0].numel() // 4, size=0.3
        )
        kernel = right.view(outputs // 4, inputs[0] // 4, *inputs[1:])
        left = left.view(4, 4, *[1] * len(inputs[1:]))
        changes[name] = drawn.alpha(module) * torch.kron(left, kernel)
    return drawn.save(path), changes


def a_dora(stock: Any, path: Path) -> tuple[Path, Tensors]:
    """DoRA in the names of diffusers' conversion to kohya's, which leaves a dot."""
    drawn, changes = Drawn(3), {}
    for name, base in parameters(stock, "attn1.to_v", "attn2.to_q", "attn2.to_v", "conv1").items():
        module, (outputs, *inputs) = kohya(name), base.shape
        up = drawn.add(module, "lora_up.weight", outputs, RANK, *[1] * len(inputs[1:]), size=0.2)
        down = drawn.add(module, "lora_down.weight", RANK, *inputs, size=0.2)
        changed = base.double() + drawn.alpha(module) * (up.flatten(1) @ down.flatten(1)).view(base.shape)
        shape = [1, outputs, 1, 1] if inputs[1:] else [outputs]
        head, tail = name.removesuffix(".weight").removeprefix("unet.").rsplit(".", 1)
        dotted = f"lora_unet_{head.replace('.', '_')}.{tail}"
        lengths = 1 + drawn.add(dotted, "lora_magnitude_vector", *shape, size=0.1).flatten()
        drawn.tensors[f"{dotted}.lora_magnitude_vector"] += 1
        rows = changed.flatten(1)
        rows = rows * (lengths / rows.norm(dim=1)).unsqueeze(1)
        changes[name] = rows.view(base.shape) - base.double()
    return drawn.save(path), changes


_BIASED = ("proj_in", "to_out.0", "ff.net.2", "proj_out", "conv_in")


def a_difference(stock: Any, path: Path) -> tuple[Path, Tensors]:
    """Whole differences of weights, biases, and norms, of the text encoders too."""
    drawn, changes = Drawn(4), {}
    ends = ("self_attn.v_proj", "layer_norm1", "norm2", "proj_out", "conv_in", *(f"{name}.bias" for name in _BIASED))
    for name, base in parameters(stock, *ends).items():
        part = ("w_norm" if "norm" in name else "diff") if name.endswith(".weight") else "diff_b"
        changes[name] = drawn.add(kohya(name), part, *base.shape, size=0.08)
    return drawn.save(path), changes


def test_four_kinds_at_once_are_the_merged_weights_and_leave_nothing_behind(
    wire: Wire, stock: Any, tmp_path: Path
) -> None:
    """Guards every delta's way into the fast engine: sums, scales, convolutions, and what is derived from weights."""
    scales = {a_loha: 0.8, a_lokr: 0.6, a_dora: 0.7, a_difference: 1.0}
    made = {make: make(stock, tmp_path / f"{make.__name__}.safetensors") for make in scales}
    refs = [{"url": wire.upload(path, path.name), "scale": scales[make]} for make, (path, _) in made.items()]
    wire.add("base", cfg=1)
    wire.add("patched", cfg=1, loras=refs)
    wire.add("base-again", cfg=1)
    events = wire.wait("base", "patched", "base-again")
    assert [event["data"].get("error") for event in events.values()] == [None, None, None]
    assert np.array_equal(wire.pixels("base"), wire.pixels("base-again"))
    picture = wire.pixels("patched")
    assert np.abs(picture - draw(stock, *((made[make][1], scale) for make, scale in scales.items()))).max() <= 1
    assert np.abs(picture - wire.pixels("base")).mean() > 20
    assert [lora["skipped"] for lora in events["patched"]["data"]["model_info"]["loras"]] == [0, 0, 0, 0]
