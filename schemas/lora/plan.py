"""What a LoRA file would change in a model, or why it is refused: all that can be told without its weights."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from schemas.lora.adapter_config import AdapterConfig
from schemas.lora.alpha import ALPHA_FORMATS, read_alpha
from schemas.lora.errors import LoraUnusable
from schemas.lora.header import Header, shown
from schemas.lora.keys import BUNDLED_EMBEDDING, Parts, group_parts
from schemas.lora.kinds import Change, Kind, Shape, fits, squeezed, weight_change
from schemas.lora.shapes import ModelShapes
from schemas.lora.trained_for import refuse_other_bases

_DTYPES = ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_PROMPT_PROJECTION = re.compile(r"attn2[._]to_[kv]$")
_MADE_FOR = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL refiner", 2048: "SDXL"}


@dataclass(frozen=True, slots=True)
class PlannedDelta:
    """The change of one parameter: `part` (weight or bias) of `module`.

    `tensors`: the names of its tensors by part, as in `keys.Parts`. `alpha / rank` scales what they make; both are None
    where nothing is to be scaled. `magnitude`: DoRA's tensor of lengths; `magnitude_axis`: 0 where it has one for each
    output, 1 for each input.
    """

    module: str
    part: str
    kind: Kind
    tensors: Mapping[str, str]
    rank: int | None = None
    alpha: float | None = None
    magnitude: str | None = None
    magnitude_axis: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors whose numbers count."""
        return (*self.tensors.values(), *([] if self.magnitude is None else [self.magnitude]))

    @property
    def factor(self) -> float:
        """`alpha / rank`; 1 where nothing is to be scaled."""
        return 1.0 if self.alpha is None or self.rank is None else self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """The changes of one file, and the names of its LoRA tensors that match nothing in the model."""

    deltas: tuple[PlannedDelta, ...]
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Module:
    """The tensors of one module: their names by part, and what they make of its weight."""

    parts: Parts
    change: Change | None


def plan(path: Path, header: Header, model: ModelShapes) -> LoraPlan:
    """What the LoRA file at `path`, whose header this is, changes in a model: names, dtypes, shapes and alphas.

    Raises LoraUnusable for every file that is not wholly understood, and OSError where it cannot be read.
    """
    embeddings = [name for name in header.tensors if name.startswith(BUNDLED_EMBEDDING)]
    parts_by_alias = group_parts(name for name in header.tensors if not name.startswith(BUNDLED_EMBEDDING))
    _refuse_dtypes(header)
    modules = {
        alias: _Module(parts, weight_change(alias, parts, header.tensors)) for alias, parts in parts_by_alias.items()
    }
    _refuse_other_prompt_width(modules, model)
    matched, skipped = _match(modules, model)
    # Prompts as wide as this model's tell more than metadata do: some scripts that merge LoRAs guess these.
    if not any(_PROMPT_PROJECTION.search(name) for name, _ in matched):
        refuse_other_bases(header.metadata)
    with path.open("rb") as file:
        planner = _Planner(model, AdapterConfig(header.metadata), header, file)
        deltas = [delta for name, module in matched for delta in planner.deltas(name, module)]
    skipped += [*planner.skipped, *embeddings]
    _refuse_nothing(deltas, skipped)
    return LoraPlan(_each_once(deltas), tuple(map(shown, skipped)))


def _refuse_dtypes(header: Header) -> None:
    for name, tensor in header.tensors.items():
        allowed = ALPHA_FORMATS if name.endswith(".alpha") else _DTYPES
        if tensor.dtype not in allowed:
            raise LoraUnusable(
                f"The LoRA's tensors must be {', '.join(allowed)}; '{shown(name)}' is {tensor.dtype}.",
                details={"tensor": shown(name), "dtype": tensor.dtype},
            )


def _refuse_other_prompt_width(modules: Mapping[str, _Module], model: ModelShapes) -> None:
    # First of the meanings: such a file mostly names modules that this model has not, or has in another size.
    for alias, module in modules.items():
        made = module.change.made if module.change else ()
        if len(made) < 2 or made[1] == model.cross_attention_dim or not _PROMPT_PROJECTION.search(alias):
            continue
        name = model.names.get(alias)
        known = name or next((name for name in model.weights if _PROMPT_PROJECTION.search(name)), None)
        looks_like = _MADE_FOR.get(made[1], "another model")
        raise LoraUnusable(
            f"The LoRA is for {looks_like}: its prompts are {made[1]} wide, this model's {model.cross_attention_dim}.",
            details={
                "module": name or shown(alias),
                "file_shape": [*made],
                "model_shape": [*model.weights[known]] if known else None,
                "looks_like": looks_like,
            },
        )


def _match(modules: Mapping[str, _Module], model: ModelShapes) -> tuple[list[tuple[str, _Module]], list[str]]:
    matched: list[tuple[str, _Module]] = []
    skipped: list[str] = []
    for alias, module in modules.items():
        name = model.names.get(alias)
        if name is None:
            skipped += module.parts.values()
        else:
            matched.append((name, module))
    return matched, skipped


def _refuse_nothing(deltas: list[PlannedDelta], skipped: list[str]) -> None:
    if not deltas:
        raise LoraUnusable(
            "Nothing in the LoRA matches this model.", details={"tensors": [shown(name) for name in skipped[:3]]}
        )


def _each_once(deltas: list[PlannedDelta]) -> tuple[PlannedDelta, ...]:
    found: dict[tuple[str, str], PlannedDelta] = {}
    for delta in deltas:
        if found.setdefault((delta.module, delta.part), delta) is not delta:
            raise LoraUnusable(
                f"The file has two LoRAs for the module {delta.module}.", details={"module": delta.module}
            )
    return tuple(deltas)


class _Planner:
    """Makes the deltas of one module after the other. `skipped`: tensors of biases that the model has not."""

    def __init__(self, model: ModelShapes, config: AdapterConfig, header: Header, file: BinaryIO) -> None:
        self._model = model
        self._config = config
        self._header = header
        self._file = file
        # PEFT's lengths under LyCORIS' name: those of a linear layer are a vector, in LyCORIS never
        self._renamed = any(name.endswith(".dora_scale") and len(it.shape) == 1 for name, it in header.tensors.items())
        self.skipped: list[str] = []

    def deltas(self, name: str, module: _Module) -> Iterator[PlannedDelta]:
        rank, alpha = None, None
        if module.change is not None:
            rank = module.change.rank
            alpha = None if rank is None else self._alpha(name, module.parts, rank)
            yield self._weight(name, module.parts, module.change, alpha)
        if "diff_b" in module.parts:
            yield from self._bias(name, module.parts["diff_b"], None, None)
        if "up_bias" in module.parts:
            if self._magnitude(name, module.parts) is not None:
                raise LoraUnusable(f"The LoRA for {name} has a bias beside DoRA.", details={"module": name})
            yield from self._bias(name, module.parts["up_bias"], rank, alpha)

    def _alpha(self, name: str, parts: Parts, rank: int) -> float:
        if "alpha" in parts:
            alpha = read_alpha(parts["alpha"], self._header, self._file)
        else:
            alpha = self._config.alpha(name, rank)
        if alpha == 0:
            raise LoraUnusable(f"The LoRA's alpha for {name} is 0.", details={"module": name})
        return alpha

    def _weight(self, name: str, parts: Parts, change: Change, alpha: float | None) -> PlannedDelta:
        weight = self._model.weights.get(name) or (self._model.vectors[f"{name}.weight"],)
        if not fits(change.made, weight):
            raise _misfit(name, change.made, weight)
        magnitude = self._magnitude(name, parts)
        axis = 0 if magnitude is None else self._axis(name, magnitude, weight, "dora_scale" in parts)
        return PlannedDelta(name, "weight", change.kind, change.tensors, change.rank, alpha, magnitude, axis)

    def _bias(self, name: str, tensor: str, rank: int | None, alpha: float | None) -> Iterator[PlannedDelta]:
        length = self._model.vectors.get(f"{name}.bias")
        if length is None:
            self.skipped.append(tensor)
            return
        shape = self._header.tensors[tensor].shape
        if shape != (length,):
            raise _misfit(name, shape, (length,))
        yield PlannedDelta(name, "bias", Kind.FULL, {"diff": tensor}, rank, alpha)

    def _magnitude(self, name: str, parts: Parts) -> str | None:
        if "dora_scale" in parts and "magnitude" in parts:
            raise LoraUnusable(f"The file has two LoRAs for the module {name}.", details={"module": name})
        magnitude = parts.get("dora_scale", parts.get("magnitude"))
        if magnitude is None and "down" in parts and self._config.uses_dora(name):
            raise LoraUnusable(f"The LoRA for '{name}' lacks its magnitude part.", details={"module": name})
        return magnitude

    def _axis(self, name: str, magnitude: str, weight: Shape, is_dora_scale: bool) -> int:
        """Of which axis of the weight DoRA sets the lengths.

        LyCORIS and kohya keep [out, 1, ...], or [1, in, ...] in older files; PEFT [out], and [1, out, 1, 1] for
        convolutions, which some rename to LyCORIS' dora_scale.
        """
        shape = squeezed(self._header.tensors[magnitude].shape)
        outputs, inputs = weight[0], math.prod(weight[1:2])
        of_peft = not is_dora_scale or (self._renamed and len(weight) > 2)
        if shape in ((outputs,), (outputs, 1)) or (of_peft and shape == (1, outputs)):
            return 0
        if is_dora_scale and len(weight) > 1 and shape == (1, inputs):
            return 1
        raise _misfit(name, self._header.tensors[magnitude].shape, weight)


def _misfit(name: str, shape: Shape, weight: Shape) -> LoraUnusable:
    return LoraUnusable(
        f"The LoRA does not fit the model: {name} is {list(weight)}, the file is for {list(shape)}.",
        details={"module": name, "file_shape": [*shape], "model_shape": [*weight]},
    )
