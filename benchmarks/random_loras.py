"""LoRAs of every kind and extent, drawn in memory: as many as one likes, for nothing but their numbers' memory."""

from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor

from consumer.lora.algebra import DoraDelta, FullDelta, HadamardDelta, KroneckerDelta, Matrix
from consumer.lora.deltas import Delta, LowRankDelta

SCALES = (0.0, 0.3, 0.8, 1.0, -0.5)
EXTENTS = ("everything", "linears", "attention", "text encoders", "some", "two")
_STRENGTH = 1e-3  # of a change, beside weights of about 0.02
_ODD_MODULES = 12  # what is no low-rank product is computed one parameter at a time


class RandomLoras:
    """`parameters`: what may be patched, by name. The numbers are views of one pool of normal noise in float16."""

    def __init__(self, parameters: Mapping[str, Tensor], *, seed: int) -> None:
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._random = Random(seed)
        largest = max(parameter.numel() for parameter in parameters.values())
        self._noise = torch.randn(2 * largest + 4096, generator=torch.Generator().manual_seed(seed)).half()

    def draw(self) -> list[Delta]:
        """A LoRA of some kind, extent and rank."""
        names = self.weights(self._random.choice(EXTENTS))
        if self._random.random() < 0.7:
            return [*self.low_rank(names, int(2 ** self._random.uniform(0, 7)))]
        odd = [self._odd(name) for name in self._random.sample(names, min(len(names), _ODD_MODULES))]
        vectors = [name for name, shape in self._shapes.items() if len(shape) == 1]
        return [*odd, *(self._full(name) for name in self._random.sample(vectors, min(len(vectors), 200)))]

    def low_rank(self, names: list[str], rank: int) -> list[LowRankDelta]:
        """One LoRA of a rank for the named weights."""
        return [self._low_rank(name, rank) for name in names]

    def weights(self, extent: str) -> list[str]:
        """The names of the weights that a LoRA of an extent touches."""
        weights = {name: shape for name, shape in self._shapes.items() if len(shape) > 1}
        everything = list(weights)
        linears = [name for name, shape in weights.items() if len(shape) == 2 and name.startswith("unet.")]
        return {
            "everything": everything,
            "linears": [name for name in linears if ".transformer_blocks." in name or ".proj_" in name],
            "attention": [name for name in linears if ".attn" in name],
            "text encoders": [name for name in everything if name.startswith("text_encoder")],
            "some": self._random.sample(everything, len(everything) // 3),
            "two": self._random.sample(everything, 2),
        }[extent]

    def _low_rank(self, name: str, rank: int) -> LowRankDelta:
        outputs, inputs = self._sides(name)
        down, up = self._numbers(rank, inputs), self._numbers(outputs, rank)
        return LowRankDelta(_module(name), down, up, _STRENGTH * rank**0.5)

    def _odd(self, name: str) -> Delta:
        kind = self._random.choice(("LoHa", "LoKr", "full", "DoRA"))
        outputs, inputs = self._sides(name)
        if kind == "LoHa":
            first, second = (Matrix(self._numbers(outputs, 4), self._numbers(4, inputs)) for _ in range(2))
            return HadamardDelta(_module(name), first, second, _STRENGTH / 4)
        if kind == "LoKr":
            sides = 2 if outputs % 2 == 0 else 1, 4 if inputs % 4 == 0 else 1
            right = self._numbers(outputs // sides[0], inputs // sides[1])
            return KroneckerDelta(_module(name), Matrix(self._numbers(*sides)), Matrix(right), _STRENGTH)
        if kind == "DoRA":
            return DoraDelta(self._low_rank(name, 8), self._numbers(outputs).abs(), 0)
        return self._full(name)

    def _full(self, name: str) -> FullDelta:
        return FullDelta(_module(name), name.rpartition(".")[2], self._numbers(*self._shapes[name]), _STRENGTH)

    def _numbers(self, *shape: int) -> Tensor:
        size = torch.Size(shape).numel()
        start = self._random.randrange(len(self._noise) - size)
        return self._noise[start : start + size].view(shape)

    def _sides(self, name: str) -> tuple[int, int]:
        outputs, *inputs = self._shapes[name]
        return outputs, torch.Size(inputs).numel()


def _module(name: str) -> str:
    return name.rpartition(".")[0]
