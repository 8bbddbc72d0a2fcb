"""How tensors are named in LoRA files: which part of which module's delta, or what makes a file another kind."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import shown

# PEFT: lora_A, lora_B, with the adapter's name or without; kohya: lora_down, lora_up; diffusers before PEFT: the rest.
_PART = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?P<down>\.lora_A(?:\.[^.]+)?\.weight|\.lora_down\.weight|\.lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|(?<=_lora)\.down\.weight)"
    r"|(?P<up>\.lora_B(?:\.[^.]+)?\.weight|\.lora_up\.weight|\.lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    r"|(?<=_lora)\.up\.weight)"
    r"|(?P<alpha>\.alpha))"
)
_OLD_PROJECTION = re.compile(r"(?P<attention>.+)\.to_(?P<letter>q|k|v|out)_lora")

_UNSUPPORTED_KINDS = (
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.dora_scale$|\.lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.lora_mid\."), "LoCon with a Tucker core (CP decomposition)"),
    (re.compile(r"\.oft_|\.boft_"), "OFT"),
    (re.compile(r"\.ia3_|\.on_input$"), "(IA)^3"),
    (re.compile(r"\.diff(_b)?$"), "full weight differences"),
    (re.compile(r"^vera_|\.vera_"), "VeRA"),
)
_OTHER_MODELS = (
    (re.compile(r"double_blocks|single_blocks|single_transformer_blocks"), "Flux"),
    (re.compile(r"joint_blocks|joint_transformer_blocks|lora_te3_|text_encoder_3"), "SD 3"),
    (re.compile(r"^transformer\.|^lora_transformer_"), "SD 3 or another diffusion transformer"),
)
_CHECKPOINT = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.|conditioner\.embedders\.|cond_stage_model\."
    r"|(unet\.)?(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\..*\.?(weight|bias)"
)


@dataclass(slots=True)
class Parts:
    """The names of one delta's tensors in the file."""

    down: str | None = None
    up: str | None = None
    alpha: str | None = None


def group_parts(names: Iterable[str]) -> dict[str, Parts]:
    """The tensors of a LoRA file by the module they name, in the words of `ModelShapes.names`.

    Raises LoraUnusable for a file that holds anything else, and says by name what it is where it can tell.
    """
    names = list(names)
    _refuse_other_models(names)
    _refuse_other_kinds(names)
    modules: dict[str, Parts] = {}
    unknown = []
    for name in names:
        match = _PART.fullmatch(name)
        if match is None:
            unknown.append(name)
            continue
        part = "down" if match["down"] else "up" if match["up"] else "alpha"
        parts = modules.setdefault(_module(match["module"]), Parts())
        if getattr(parts, part) is not None:
            raise LoraUnusable(f"Two tensors of the file are the same part of one LoRA: '{shown(name)}' is the second.")
        setattr(parts, part, name)
    if unknown:
        _refuse_unknown(unknown, any_lora=bool(modules))
    return modules


def is_down(name: str) -> bool:
    """Whether a tensor is the down half of a delta, [rank, inputs, ...]."""
    match = _PART.fullmatch(name)
    return match is not None and match["down"] is not None


def _module(name: str) -> str:
    name = name.replace("base_model.model.", "").replace(".processor.", ".")
    if old := _OLD_PROJECTION.fullmatch(name):
        letter = old["letter"]
        if name.startswith("text_encoder"):
            return f"{old['attention']}.{letter}_proj"
        return f"{old['attention']}.to_out.0" if letter == "out" else f"{old['attention']}.to_{letter}"
    return name


def _refuse_other_models(names: list[str]) -> None:
    for pattern, model in _OTHER_MODELS:
        if found := next(filter(pattern.search, names), None):
            raise LoraUnusable(
                f"The LoRA is for {model}, not for SDXL.", details={"looks_like": model, "tensor": shown(found)}
            )


def _refuse_other_kinds(names: list[str]) -> None:
    for pattern, kind in _UNSUPPORTED_KINDS:
        if found := next(filter(pattern.search, names), None):
            raise LoraUnusable(
                f"The adapter is of a kind that is not supported: {kind}.",
                details={"kind": kind, "tensor": shown(found)},
            )


def _refuse_unknown(unknown: list[str], *, any_lora: bool) -> None:
    examples = [shown(name) for name in unknown[:3]]
    if not any_lora and any(map(_CHECKPOINT.match, unknown)):
        raise LoraUnusable("The file is a full checkpoint, not a LoRA.", details={"tensors": [*examples]})
    problem = "has tensors that belong to no kind of LoRA" if any_lora else "has no LoRA tensors"
    raise LoraUnusable(f"The file {problem}: {', '.join(examples)}.", details={"tensors": [*examples]})
