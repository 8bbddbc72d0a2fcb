"""Both text encoders, against transformers' modules and the stock pipeline's `encode_prompt`."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from consumer.engine.fast import text
from consumer.engine.fast.checkpoint import Checkpoint, load_checkpoint
from consumer.engine.fast.configs import TextConfig
from consumer.engine.fast.text import conditions, token_ids

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

HALVES = [torch.float16, torch.bfloat16]
_HIGHEST = 999
_END = 998


class Encoders:
    """transformers' modules with random weights, and their weights under the names of the fast engine."""

    def __init__(self, first: Any, second: Any) -> None:
        self.modules = (first.eval(), second.eval())
        read = (
            TextConfig.read(name, {"architectures": None} | json.loads(module.config.to_json_string()))
            for name, module in zip(("text_encoder", "text_encoder_2"), self.modules, strict=True)
        )
        self.configs = next(read), next(read)

    def weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        named = zip(("text_encoder", "text_encoder_2"), self.modules, strict=True)
        return {
            f"{part}.{name}": tensor.detach().to(dtype)
            for part, module in named
            for name, tensor in module.named_parameters()
        }

    @torch.no_grad()
    def theirs(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        first, second = (module.to(dtype) for module in self.modules)
        output = second(ids[1], output_hidden_states=True)
        hidden = first(ids[0], output_hidden_states=True).hidden_states[-2]
        return torch.cat([hidden, output.hidden_states[-2]], dim=-1), output.text_embeds

    @torch.no_grad()
    def ours(self, ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return conditions(self.weights(dtype), self.configs, ids, torch.tensor([True, True]))


def encoders(share: int) -> Encoders:
    """Two layers of CLIP ViT-L and of OpenCLIP bigG, 1 / `share` as wide, with weights of a trained model's size."""
    common: dict[str, Any] = {"vocab_size": 1000, "num_hidden_layers": 2, "eos_token_id": _END}
    first = CLIPTextConfig(
        hidden_size=768 // share, intermediate_size=3072 // share, num_attention_heads=12 // share, **common
    )
    second = CLIPTextConfig(
        hidden_size=1280 // share,
        intermediate_size=5120 // share,
        num_attention_heads=20 // share,
        projection_dim=1280 // share,
        hidden_act="gelu",
        **common,
    )
    with torch.device("meta"):
        both = CLIPTextModel(first), CLIPTextModelWithProjection(second)
    generator = torch.Generator().manual_seed(3)
    for module in both:
        module.to_empty(device="cpu")
        for name, values in module.state_dict().items():
            size = 0.1 if values.dim() == 1 else values.shape[-1] ** -0.5
            values.copy_(size * torch.randn(values.shape, generator=generator))
            if "norm" in name and name.endswith("weight"):
                values.add_(1)
        positions = (module if module is both[0] else both[1].text_model).embeddings.position_ids
        positions.copy_(torch.arange(77))
    return Encoders(*both)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """[2, 2, 77]: a prompt that ends early, one that fills everything, and in both the highest id somewhere else."""
    ids = torch.randint(3, _END, (2, 2, 77), generator=torch.Generator().manual_seed(4))
    ids[:, 0, 20:] = _END
    ids[:, 1, 76] = _END
    ids[:, :, 60] = _HIGHEST
    return ids


def distance(result: Tensor, exact: Tensor) -> float:
    return float((result.float() - exact).norm() / exact.norm())


def test_in_float32_they_are_transformers_own(ids: Tensor) -> None:
    """Guards `_layer`, `_norm`, both activations and both rules of `_at_the_end`."""
    both = encoders(share=1)
    pooled = []
    for eos_token_id in (_END, 2):
        both.modules[1].text_model.eos_token_id = eos_token_id
        both.configs = both.configs[0], replace(both.configs[1], eos_token_id=eos_token_id)
        theirs = both.theirs(ids, torch.float32)
        for one, other in zip(both.ours(ids, torch.float32), theirs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-5
        pooled.append(theirs[1])
    assert not torch.equal(*pooled)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_in_half_precision_they_are_nearer_to_float32_than_transformers(ids: Tensor, dtype: torch.dtype) -> None:
    """Guards the float32 sums of `_layer` and `_hidden`."""
    both = encoders(share=4)
    for module in both.modules:
        module.to(dtype).float()  # the very weights that half precision has
    exact = both.theirs(ids, torch.float32)
    for ours, theirs, true in zip(both.ours(ids, dtype), both.theirs(ids, dtype), exact, strict=True):
        assert ours.dtype == dtype
        assert distance(ours, true) < 0.9 * distance(theirs, true)


@pytest.mark.parametrize("dtype", HALVES, ids=["float16", "bfloat16"])
def test_quick_gelu_in_half_precision_is_rounded_once(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Guards `_activation`."""
    x = (3 * torch.randn(1000, generator=torch.Generator().manual_seed(5))).to(dtype)
    config = checkpoint.text_encoders[0]
    assert torch.equal(text._activation(x, config), text._activation(x.float(), config).to(dtype))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path) -> Checkpoint:
    place = torch.device("cpu")
    return load_checkpoint(str(tiny_model), vae=None, device=place, dtype=torch.float32, token=None)


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return StableDiffusionXLPipeline.from_pretrained(tiny_model, add_watermarker=False)


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("a red flower", ""), ("a red flower!", "blurry"), ("red sea " * 60, " "), ("", "x")],
    ids=["no-negative", "negative", "long", "no-prompt"],
)
@torch.no_grad()
def test_conditions_are_those_of_the_stock_pipeline(
    checkpoint: Checkpoint, pipeline: Any, prompt: str, negative: str
) -> None:
    """Guards `conditions` with its zeros, and `token_ids`."""
    embeddings, negative_embeddings, pooled, negative_pooled = pipeline.encode_prompt(
        prompt=prompt, negative_prompt=negative or None, device=torch.device("cpu")
    )
    ids = token_ids(checkpoint.tokenizers, [negative, prompt])
    assert (ids.dtype, ids.shape) == (torch.int64, (2, 2, 77))
    present = torch.tensor([bool(negative) or not checkpoint.zeros, True])
    ours = conditions(checkpoint.parameters, checkpoint.text_encoders, ids, present)
    assert (ours[0] - torch.cat([negative_embeddings, embeddings])).abs().max() <= 1e-5
    assert (ours[1] - torch.cat([negative_pooled, pooled])).abs().max() <= 1e-5


@torch.no_grad()
def test_what_is_absent_is_zero_even_where_the_encoder_overflows(checkpoint: Checkpoint) -> None:
    """Guards `torch.where` in `conditions`: a product would be NaN."""
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in checkpoint.parameters.items()}
    ids = token_ids(checkpoint.tokenizers, ["a", "b"])
    for result in conditions(broken, checkpoint.text_encoders, ids, torch.tensor([False, True])):
        assert torch.equal(result[0], torch.zeros_like(result[0]))
        assert result[1].isnan().all()


@torch.no_grad()
def test_weights_are_looked_up_when_they_are_used(checkpoint: Checkpoint) -> None:
    """A LoRA is patched in place between two pictures."""
    name = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight"
    weights = checkpoint.parameters | {name: checkpoint.parameters[name].clone()}
    ids, present = token_ids(checkpoint.tokenizers, ["a red flower"]), torch.tensor([True])
    before = conditions(weights, checkpoint.text_encoders, ids, present)
    weights[name] *= 2
    after = conditions(weights, checkpoint.text_encoders, ids, present)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[0][..., :32], after[0][..., :32])
    assert not torch.equal(before[1], after[1])
