"""The model's weights: patched in place from a pristine copy, and exactly themselves again afterwards."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from consumer.lora.deltas import Delta
from consumer.lora.shapes import lora_modules


class PatchableWeights:
    """Every weight that a LoRA may touch, and a pristine copy of each on the same device.

    Weights are written in place, so their addresses stay: a compiled or captured model goes on as it is. Nothing here
    is safe against another thread that runs the model at the same time.
    """

    def __init__(self, model: Any) -> None:
        self._live: dict[str, Tensor] = {name: module.weight.detach() for name, module in lora_modules(model)}
        self._pristine = {name: weight.clone() for name, weight in self._live.items()}
        self._dirty: set[str] = set()

    @torch.no_grad()
    def patch(self, loras: Sequence[tuple[Sequence[Delta], float]]) -> None:
        """Makes every weight `pristine + sum(scale * alpha / rank * up @ down)`, summed in float32 and rounded once.

        `loras`: the deltas of each LoRA and its scale. Weights that none of them touches become pristine. If this
        raises, the weights are in between, and the next `patch` or `restore` is exact all the same.
        """
        changes: dict[str, list[tuple[Delta, float]]] = {}
        for deltas, scale in loras:
            for delta in deltas if scale != 0 else ():
                changes.setdefault(delta.module, []).append((delta, scale * delta.factor))
        self._restore(self._dirty - changes.keys())
        for module, parts in changes.items():
            live, base = self._live[module], self._pristine[module]
            self._dirty.add(module)
            live.copy_(_changed_weight(base, parts))

    @torch.no_grad()
    def restore(self) -> None:
        """Makes every weight pristine."""
        self._restore(set(self._dirty))

    def changed(self) -> list[str]:
        """The modules whose weights differ from the pristine ones in any bit."""
        return [name for name, live in self._live.items() if not _same_bits(live, self._pristine[name])]

    def _restore(self, modules: set[str]) -> None:
        for module in modules:
            self._live[module].copy_(self._pristine[module])
            self._dirty.discard(module)


def _changed_weight(base: Tensor, parts: list[tuple[Delta, float]]) -> Tensor:
    weight = base.float().flatten(1)
    for delta, factor in parts:
        up = delta.up.to(base.device, non_blocking=True).float() * factor
        down = delta.down.to(base.device, non_blocking=True).float()
        weight = torch.addmm(weight, up, down)
    return weight.view(base.shape)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return torch.equal(left.view(bits), right.view(bits))
