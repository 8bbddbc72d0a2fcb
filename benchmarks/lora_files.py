"""LoRA files as large as real ones, of random numbers, for whatever SDXL-like model a folder holds.

Shapes are read from the headers of the model's files: no model is built, and a file of 93 MB takes a tenth of a second.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Layers = Mapping[str, tuple[int, int]]

_ATTENTION = re.compile(r"\.attn[12]\.")
_POOL = 1 << 21


def attention_layers(model: Path) -> dict[str, tuple[int, int]]:
    """The UNet's attention layers in the diffusers folder `model`: `unet.<path>` to (outputs, inputs)."""
    layers = {}
    for file in sorted((model / "unet").glob("*.safetensors")):
        for name, shape in _shapes(file).items():
            if _ATTENTION.search(name) and name.endswith(".weight") and len(shape) == 2:
                layers[f"unet.{name.removesuffix('.weight')}"] = (shape[0], shape[1])
    if not layers:
        raise ValueError(f"no attention layers in {model}")
    return layers


class LoraWriter:
    """Writes LoRAs for `layers` as diffusers and PEFT name them, in float16; no two seeds give the same file.

    `strength`: about how large a change is beside the weight that it is added to.
    """

    def __init__(self, layers: Layers, *, strength: float = 0.05) -> None:
        self._layers = layers
        self._strength = strength
        self._noise = np.random.default_rng(0).standard_normal(_POOL, np.float32)
        self._pools: dict[float, npt.NDArray[np.float16]] = {}

    def write(self, path: Path, *, rank: int, seed: int) -> Path:
        """Writes one file; 93 MB for SDXL's attention layers at rank 32."""
        random = np.random.default_rng(seed)
        tensors = {}
        for name, (outputs, inputs) in self._layers.items():
            tensors[f"{name}.lora_A.weight"] = self._drawn(random, (rank, inputs), inputs**-0.5)
            tensors[f"{name}.lora_B.weight"] = self._drawn(random, (outputs, rank), self._strength * rank**-0.5)
        save_file(tensors, path)
        return path

    def write_all(self, folder: Path, ranks: Sequence[int]) -> list[Path]:
        """Writes one file for each of `ranks` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        return [
            self.write(folder / f"{number:03d}-rank{rank}.safetensors", rank=rank, seed=number)
            for number, rank in enumerate(ranks)
        ]

    def _drawn(self, random: np.random.Generator, shape: tuple[int, int], deviation: float) -> npt.NDArray[np.float16]:
        # a piece of one pool: to draw and round every number anew would take longer than all the rest
        pool = self._pools.get(deviation)
        if pool is None:
            pool = self._pools[deviation] = (self._noise * deviation).astype(np.float16)
        count = shape[0] * shape[1]
        start = int(random.integers(0, pool.size - count))
        return pool[start : start + count].reshape(shape)


def _shapes(file: Path) -> dict[str, list[int]]:
    with file.open("rb") as opened:
        [length] = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
