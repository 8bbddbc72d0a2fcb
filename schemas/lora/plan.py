"""What a LoRA file would change in a model, or why it is refused: all that can be told without its weights."""

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import JsonValue

from schemas.lora.adapter_config import AdapterConfig
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import Header, not_safetensors, shown
from schemas.lora.keys import Parts, group_parts
from schemas.lora.shapes import ModelShapes

MAX_RANK = 1024

_DTYPES = ("F32", "F16", "BF16")
_ALPHA_DTYPES = ("F64", "I64", "I32", "I16")
_ALPHA_FORMATS = {"F64": "<d", "F32": "<f", "BF16": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h"}
_PROMPT_PROJECTION = re.compile(r"attn2[._]to_[kv]$")
_MADE_FOR = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}


@dataclass(frozen=True, slots=True)
class PlannedDelta:
    """The delta of one module. `down`, `up`: the names of its two tensors. `alpha / rank` scales their product."""

    down: str
    up: str
    rank: int
    alpha: float


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """The deltas of one file by module, and the names of its LoRA tensors that match no module of the model."""

    deltas: Mapping[str, PlannedDelta]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    """One delta as the header has it. The names of its tensors, and the shapes of two of them."""

    down: str
    up: str
    alpha: str | None
    down_shape: tuple[int, ...]
    up_shape: tuple[int, ...]

    @property
    def names(self) -> list[str]:
        return [name for name in (self.down, self.up, self.alpha) if name is not None]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight that the file was made for: [out, in, ...]."""
        return (self.up_shape[0], *self.down_shape[1:])


def plan(path: Path, header: Header, model: ModelShapes) -> LoraPlan:
    """What the LoRA file at `path`, whose header this is, changes in a model: names, dtypes, shapes and alphas.

    Understood are PEFT's, diffusers' and kohya's names, linear and convolution layers. Raises LoraUnusable for every
    file that is not wholly understood, and OSError where it cannot be read.
    """
    parts_by_alias = group_parts(header.tensors)
    _refuse_dtypes(header)
    pairs = {alias: _pair(alias, parts, header) for alias, parts in parts_by_alias.items()}
    _refuse_other_prompt_width(pairs, model)
    matched, skipped = _match(pairs, model)
    config = AdapterConfig(header.metadata)
    with path.open("rb") as file:
        deltas = {module: _planned(module, pair, config, header, file) for module, pair in matched.items()}
    return LoraPlan(deltas, tuple(map(shown, skipped)))


def _refuse_dtypes(header: Header) -> None:
    for name, tensor in header.tensors.items():
        # trainers keep alpha as it was configured: an integer, or a double
        allowed = (*_DTYPES, *_ALPHA_DTYPES) if name.endswith(".alpha") else _DTYPES
        if tensor.dtype not in allowed:
            raise LoraUnusable(
                f"The LoRA's tensors must be {', '.join(_DTYPES)}; '{shown(name)}' is {tensor.dtype}.",
                details={"tensor": shown(name), "dtype": tensor.dtype},
            )


def _pair(alias: str, parts: Parts, header: Header) -> _Pair:
    details: dict[str, JsonValue] = {"module": shown(alias)}
    if parts.down is None or parts.up is None:
        missing = " and ".join(part for part in ("down", "up") if getattr(parts, part) is None)
        raise LoraUnusable(f"The LoRA for '{shown(alias)}' lacks its {missing} part.", details=details)
    down, up = header.tensors[parts.down].shape, header.tensors[parts.up].shape
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        raise LoraUnusable(
            f"The two parts of the LoRA for '{shown(alias)}' do not fit each other.",
            details=details | {"down_shape": [*down], "up_shape": [*up]},
        )
    if down[0] > MAX_RANK:
        raise LoraUnusable(f"The LoRA's rank is {down[0]}, more than {MAX_RANK}.", details=details)
    if parts.alpha is not None and math.prod(header.tensors[parts.alpha].shape) != 1:
        raise LoraUnusable(f"The alpha of '{shown(alias)}' is not one number.", details=details)
    return _Pair(parts.down, parts.up, parts.alpha, down, up)


def _refuse_other_prompt_width(pairs: dict[str, _Pair], model: ModelShapes) -> None:
    # First of the meanings: such a file mostly names modules that this model has not, or has in another size.
    for alias, pair in pairs.items():
        width = pair.down_shape[1]
        if width == model.cross_attention_dim or not _PROMPT_PROJECTION.search(alias):
            continue
        module = model.names.get(alias)
        known = module or next((name for name in model.weights if _PROMPT_PROJECTION.search(name)), None)
        looks_like = _MADE_FOR.get(width, "another model")
        raise LoraUnusable(
            f"The LoRA is for {looks_like}: its prompts are {width} wide, this model's {model.cross_attention_dim}.",
            details={
                "module": module or shown(alias),
                "file_shape": [*pair.weight_shape],
                "model_shape": [*model.weights[known]] if known else None,
                "looks_like": looks_like,
            },
        )


def _match(pairs: dict[str, _Pair], model: ModelShapes) -> tuple[dict[str, _Pair], list[str]]:
    matched: dict[str, _Pair] = {}
    skipped: list[str] = []
    for alias, pair in pairs.items():
        module = model.names.get(alias)
        if module is None:
            skipped += pair.names
            continue
        if module in matched:
            raise LoraUnusable(f"The file has two LoRAs for the module {module}.", details={"module": module})
        _check_shape(module, model.weights[module], pair)
        matched[module] = pair
    if not matched:
        examples: list[JsonValue] = [shown(name) for name in skipped[:3]]
        raise LoraUnusable("Nothing in the LoRA matches this model.", details={"tensors": examples})
    return matched, skipped


def _check_shape(module: str, weight: tuple[int, ...], pair: _Pair) -> None:
    rank, (outputs, inputs, *kernel) = pair.down_shape[0], weight
    downs, ups = [(rank, inputs, *kernel)], [(outputs, rank), (outputs, rank, 1, 1)]
    if math.prod(kernel) == 1:
        downs = [(rank, inputs), (rank, inputs, 1, 1)]
    if pair.down_shape not in downs or pair.up_shape not in ups:
        shape = pair.weight_shape
        raise LoraUnusable(
            f"The LoRA does not fit the model: {module} is {list(weight)}, the file is for {list(shape)}.",
            details={"module": module, "file_shape": [*shape], "model_shape": [*weight]},
        )


def _planned(module: str, pair: _Pair, config: AdapterConfig, header: Header, file: BinaryIO) -> PlannedDelta:
    rank = pair.down_shape[0]
    alpha = config.alpha(module, rank) if pair.alpha is None else _read_alpha(pair.alpha, header, file)
    if alpha == 0:
        raise LoraUnusable(f"The LoRA's alpha for {module} is 0.", details={"module": module})
    return PlannedDelta(pair.down, pair.up, rank, alpha)


def _read_alpha(name: str, header: Header, file: BinaryIO) -> float:
    tensor = header.tensors[name]
    file.seek(header.data_start + tensor.start)
    raw = file.read(tensor.end - tensor.start)
    if tensor.dtype == "BF16":
        raw = b"\0\0" + raw  # the upper half of a float32
    try:
        (number,) = struct.unpack(_ALPHA_FORMATS[tensor.dtype], raw)
    except struct.error:
        raise not_safetensors("it was cut short while it was read") from None
    alpha = float(number)
    if not math.isfinite(alpha):
        raise LoraUnusable(f"The tensor '{shown(name)}' has NaN or Inf.", details={"tensor": shown(name)})
    return alpha
