"""Any LoRA file becomes canonical deltas, or is refused with a reason."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor

from consumer.errors import LoraInvalid
from consumer.lora.adapter_config import AdapterConfig
from consumer.lora.deltas import Delta, ParsedLora
from consumer.lora.header import Header, read_header, read_tensors, shown
from consumer.lora.keys import Parts, group_parts
from consumer.lora.shapes import ModelShapes

MAX_RANK = 1024
# Beyond it a weight overflows in half precision, and the picture is NaN.
MAX_CHANGE = torch.finfo(torch.float16).max

_DTYPES = ("F32", "F16", "BF16")
_ALPHA_DTYPES = ("F64", "I64", "I32", "I16")
_PROMPT_PROJECTION = re.compile(r"attn2[._]to_[kv]$")
_MADE_FOR = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}


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


def parse(path: Path, model: ModelShapes) -> ParsedLora:
    """Reads a LoRA file for a model: PEFT's, diffusers' and kohya's names, linear and convolution layers.

    Raises LoraInvalid for every file that is not wholly understood, and OSError where it cannot be read. Tensor data
    are read only when names, dtypes and shapes have passed.
    """
    header = read_header(path)
    parts_by_alias = group_parts(header.tensors)
    _refuse_dtypes(header)
    pairs = {alias: _pair(alias, parts, header) for alias, parts in parts_by_alias.items()}
    _refuse_other_prompt_width(pairs, model)
    matched, skipped = _match(pairs, model)
    deltas = _read_deltas(path, matched, AdapterConfig(header.metadata))
    return ParsedLora(deltas, tuple(map(shown, skipped)))


def _refuse_dtypes(header: Header) -> None:
    for name, tensor in header.tensors.items():
        # trainers keep alpha as it was configured: an integer, or a double
        allowed = (*_DTYPES, *_ALPHA_DTYPES) if name.endswith(".alpha") else _DTYPES
        if tensor.dtype not in allowed:
            raise LoraInvalid(
                f"The LoRA's tensors must be {', '.join(_DTYPES)}; '{shown(name)}' is {tensor.dtype}.",
                details={"tensor": shown(name), "dtype": tensor.dtype},
            )


def _pair(alias: str, parts: Parts, header: Header) -> _Pair:
    details: dict[str, JsonValue] = {"module": shown(alias)}
    if parts.down is None or parts.up is None:
        missing = " and ".join(part for part in ("down", "up") if getattr(parts, part) is None)
        raise LoraInvalid(f"The LoRA for '{shown(alias)}' lacks its {missing} part.", details=details)
    down, up = header.tensors[parts.down].shape, header.tensors[parts.up].shape
    if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
        raise LoraInvalid(
            f"The two parts of the LoRA for '{shown(alias)}' do not fit each other.",
            details=details | {"down_shape": [*down], "up_shape": [*up]},
        )
    if down[0] > MAX_RANK:
        raise LoraInvalid(f"The LoRA's rank is {down[0]}, more than {MAX_RANK}.", details=details)
    if parts.alpha is not None and math.prod(header.tensors[parts.alpha].shape) != 1:
        raise LoraInvalid(f"The alpha of '{shown(alias)}' is not one number.", details=details)
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
        raise LoraInvalid(
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
            raise LoraInvalid(f"The file has two LoRAs for the module {module}.", details={"module": module})
        _check_shape(module, model.weights[module], pair)
        matched[module] = pair
    if not matched:
        examples: list[JsonValue] = [shown(name) for name in skipped[:3]]
        raise LoraInvalid("Nothing in the LoRA matches this model.", details={"tensors": examples})
    return matched, skipped


def _check_shape(module: str, weight: tuple[int, ...], pair: _Pair) -> None:
    rank, (outputs, inputs, *kernel) = pair.down_shape[0], weight
    downs, ups = [(rank, inputs, *kernel)], [(outputs, rank), (outputs, rank, 1, 1)]
    if math.prod(kernel) == 1:
        downs = [(rank, inputs), (rank, inputs, 1, 1)]
    if pair.down_shape not in downs or pair.up_shape not in ups:
        shape = pair.weight_shape
        raise LoraInvalid(
            f"The LoRA does not fit the model: {module} is {list(weight)}, the file is for {list(shape)}.",
            details={"module": module, "file_shape": [*shape], "model_shape": [*weight]},
        )


def _read_deltas(path: Path, matched: dict[str, _Pair], config: AdapterConfig) -> tuple[Delta, ...]:
    tensors = read_tensors(path, [name for pair in matched.values() for name in pair.names])
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LoraInvalid(f"The tensor '{shown(name)}' has NaN or Inf.", details={"tensor": shown(name)})
    deltas = []
    for module, pair in matched.items():
        down, up = tensors[pair.down].flatten(1), tensors[pair.up].flatten(1)
        alpha = config.alpha(module, down.shape[0]) if pair.alpha is None else float(tensors[pair.alpha].item())
        deltas.append(_checked(Delta(module, down, up, alpha)))
    return tuple(deltas)


def _checked(delta: Delta) -> Delta:
    if delta.alpha == 0:
        raise LoraInvalid(f"The LoRA's alpha for {delta.module} is 0.", details={"module": delta.module})
    # By Cauchy-Schwarz no entry of up @ down is larger than this.
    bound = abs(delta.factor) * _largest_norm(delta.up, dim=1) * _largest_norm(delta.down, dim=0)
    if not bound < MAX_CHANGE:
        raise LoraInvalid(
            f"The LoRA's values for {delta.module} are too large: weights would overflow.",
            details={"module": delta.module},
        )
    return delta


def _largest_norm(matrix: Tensor, dim: int) -> float:
    return float(torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float32).max())
