"""LoRAs of every kind for one layer, made by PEFT, and what PEFT makes of them: nothing here is our own code."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

RANK, ALPHA = 4, 6.0
_PEFT_PREFIX = "base_model.model.layer."


@dataclass(frozen=True, slots=True)
class Sample:
    """A layer, its tensors in a LoRA file by what follows the module's name, and what a scale of 1 adds, in float64."""

    base: Tensor
    tensors: dict[str, Tensor]
    change: Tensor
    base_bias: Tensor | None = None
    bias_change: Tensor | None = None


def layer_for(shape: tuple[int, ...], *, bias: bool = False) -> nn.Linear | nn.Conv2d:
    """A random layer whose weight is [out, in] or [out, in, kernel height, kernel width]."""
    if len(shape) == 2:
        return nn.Linear(shape[1], shape[0], bias=bias)
    return nn.Conv2d(shape[1], shape[0], (shape[2], shape[3]), padding=shape[2] // 2, bias=bias)


def by_peft(shape: tuple[int, ...], config: PeftConfig, *, seed: int = 0) -> Sample:
    """Wraps a random layer with PEFT, draws the adapter's weights, and merges them in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = layer_for(shape, bias=getattr(config, "lora_bias", False))
        base, base_bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
        wrapped: Any = get_peft_model(nn.Sequential(OrderedDict(layer=layer)), config)
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                away = 0.1 if "magnitude" not in name else 0.02
                parameter.data = parameter.data + away * torch.randn_like(parameter)
    # given the state, PEFT does not take the one dimension of a bias for a fault
    state = get_peft_model_state_dict(wrapped, state_dict=wrapped.state_dict())
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor.detach().clone() for name, tensor in state.items()}
    merged = wrapped.double().merge_and_unload().layer
    bias_change = None if base_bias is None else merged.bias.detach() - base_bias.double()
    return Sample(base, tensors, merged.weight.detach() - base.double(), base_bias, bias_change)


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], init_lora_weights=False, **more)


def lora_with_bias() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], lora_bias=True)


def loha(**more: Any) -> LoHaConfig:
    return LoHaConfig(r=RANK, alpha=ALPHA, target_modules=["layer"], init_weights=False, **more)


def lokr(**more: Any) -> LoKrConfig:
    return LoKrConfig(r=RANK, alpha=ALPHA, target_modules=["layer"], init_weights=False, **more)


def in_kohyas_manner(sample: Sample) -> dict[str, Tensor]:
    """The same tensors under the names that kohya and LyCORIS use."""
    renamed = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    tensors = {renamed.get(name, name): tensor for name, tensor in sample.tensors.items()}
    magnitude = tensors.pop("lora_magnitude_vector", None)
    if magnitude is not None:
        tensors["dora_scale"] = magnitude.reshape(-1, *[1] * (sample.base.ndim - 1))
    return tensors


KINDS: dict[str, Callable[[], PeftConfig]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "LoHa": loha,
    "LoHa with cores": lambda: loha(use_effective_conv2d=True),
    "LoKr": lokr,
    "LoKr of two products": lambda: lokr(decompose_both=True, decompose_factor=16),
    "LoKr with a core": lambda: lokr(use_effective_conv2d=True),
}
