"""How tensors are named in LoRA files: which part of which module's change, or what makes a file another kind."""

import re
from collections.abc import Iterable, Mapping

from schemas.lora.errors import LoraUnusable
from schemas.lora.header import shown

# PEFT: lora_A, lora_B, with the adapter's name or without; kohya: lora_down, lora_up; diffusers before PEFT: the rest.
# LyCORIS and PEFT share the names of LoHa's and LoKr's parts.
_PART = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?P<down>\.lora_A(?:\.[^.]+)?\.weight|\.lora_down\.weight|\.lora\.down\.weight|\.lora_linear_layer\.down\.weight"
    r"|(?<=_lora)\.down\.weight)"
    r"|(?P<up>\.lora_B(?:\.[^.]+)?\.weight|\.lora_up\.weight|\.lora\.up\.weight|\.lora_linear_layer\.up\.weight"
    r"|(?<=_lora)\.up\.weight)"
    r"|(?P<up_bias>\.lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<mid>\.lora_mid\.weight)"
    r"|(?P<alpha>\.alpha)"
    r"|(?P<dora_scale>\.dora_scale)"
    r"|(?P<magnitude>\.lora_magnitude_vector(?:\.[^.]+){0,2})"
    r"|\.(?P<product>hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)"
    r"|(?P<diff>\.diff|\.w_norm)"
    r"|(?P<diff_b>\.diff_b|\.b_norm)"
    r")"
)
_FLAT = ("lora_unet_", "lora_unet.", "lora_te", "lycoris_")
_OLD_PROJECTION = re.compile(r"(?P<attention>.+)\.to_(?P<letter>q|k|v|out)_lora")

_UNSUPPORTED_KINDS = (
    (re.compile(r"(?m)\.oft_|\.boft_"), "OFT"),
    (re.compile(r"(?m)\.ia3_|\.on_input$"), "(IA)^3"),
    (re.compile(r"(?m)^vera_|\.vera_"), "VeRA"),
    (re.compile(r"(?m)\.(a1|a2|b1|b2|bm)\.weight$|\.glora_"), "GLoRA"),
    (re.compile(r"(?m)xlora_"), "X-LoRA"),
    (re.compile(r"(?m)\.lora_(ups|downs|experts|route)\b"), "a mixture of LoRAs (HydraLoRA and the like)"),
    (re.compile(r"(?m)\.lora_E$|\.ranknum$"), "AdaLoRA"),
    (re.compile(r"(?m)\.(lambda_layer|p_layer|q_layer)\b"), "T-LoRA"),
    (
        re.compile(r"(?m)\.fourierft_|\.vblora_|\.randlora_|\.hra_|\.bone_|\.miss_|\.shira_|\.waveft_"),
        "FourierFT or the like",
    ),
)
_OTHER_MODELS = (
    (re.compile(r"(?m)double_blocks|single_blocks|single_transformer_blocks"), "Flux"),
    (re.compile(r"(?m)joint_blocks|joint_transformer_blocks|lora_te3_|text_encoder_3"), "SD 3"),
    (re.compile(r"(?m)^transformer\.|^lora_transformer_"), "SD 3 or another diffusion transformer"),
)
_CHECKPOINT = re.compile(
    r"model\.diffusion_model\.|first_stage_model\.|conditioner\.embedders\.|cond_stage_model\."
    r"|(unet\.)?(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding)\..*\.?(weight|bias)"
)

BUNDLED_EMBEDDING = "bundle_emb."
"""OneTrainer's prefix for textual inversions that it packs beside a LoRA."""

Parts = dict[str, str]
"""The names of one module's tensors in the file, by what they are: `down`, `up`, `alpha`, `hada_w1_a`, ..."""


def group_parts(names: Iterable[str]) -> Mapping[str, Parts]:
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
        parts = modules.setdefault(_module(match["module"]), {})
        part = match["product"] or str(match.lastgroup)
        if part in parts:
            raise LoraUnusable(f"Two tensors of the file are the same part of one LoRA: '{shown(name)}' is the second.")
        parts[part] = name
    if unknown:
        _refuse_unknown(unknown, any_lora=bool(modules))
    return modules


def is_down(name: str) -> bool:
    """Whether a tensor is the down half of a delta, [rank, inputs, ...]."""
    match = _PART.fullmatch(name)
    return match is not None and match["down"] is not None


def _module(name: str) -> str:
    if name.startswith(_FLAT):
        return name.replace(".", "_")  # diffusers' conversion to kohya's names leaves a dot in those of DoRA's lengths
    name = name.replace("base_model.model.", "").replace(".processor.", ".")
    if old := _OLD_PROJECTION.fullmatch(name):
        letter = old["letter"]
        if name.startswith("text_encoder"):
            return f"{old['attention']}.{letter}_proj"
        return f"{old['attention']}.to_out.0" if letter == "out" else f"{old['attention']}.to_{letter}"
    return name


def _refuse_other_models(names: list[str]) -> None:
    for pattern, model in _OTHER_MODELS:
        if found := _first(pattern, names):
            raise LoraUnusable(
                f"The LoRA is for {model}, not for SDXL.", details={"looks_like": model, "tensor": shown(found)}
            )


def _refuse_other_kinds(names: list[str]) -> None:
    for pattern, kind in _UNSUPPORTED_KINDS:
        if found := _first(pattern, names):
            raise LoraUnusable(
                f"The adapter is of a kind that is not supported: {kind}.",
                details={"kind": kind, "tensor": shown(found)},
            )


def _first(pattern: re.Pattern[str], names: list[str]) -> str | None:
    # one long text is searched ten times as fast as a thousand names
    return next(filter(pattern.search, names), None) if pattern.search("\n".join(names)) else None


def _refuse_unknown(unknown: list[str], *, any_lora: bool) -> None:
    examples = [shown(name) for name in unknown[:3]]
    if not any_lora and any(map(_CHECKPOINT.match, unknown)):
        raise LoraUnusable("The file is a full checkpoint, not a LoRA.", details={"tensors": [*examples]})
    problem = "has tensors that belong to no kind of LoRA" if any_lora else "has no LoRA tensors"
    raise LoraUnusable(f"The file {problem}: {', '.join(examples)}.", details={"tensors": [*examples]})
