"""Which modules of a model a LoRA may change, and every name that files use for them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

_KOHYA_PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}
# ComfyUI's own names, as its nodes save them.
_COMFY_PREFIXES = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
_SGM_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_SGM_IN_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """The modules of a model that a LoRA may change.

    `weights`: the name of a linear or convolution layer (component and path, as in `unet.conv_in`) to its weight's
    shape: [out, in] or [out, in, kernel height, kernel width]. `names`: every name that a file may use, dotted or in
    kohya's manner, to the module's. `sgm`: a module of the UNet to its path in the original (SGM) code.
    `cross_attention_dim`: the width of the prompt embeddings. `vectors`: the name of every bias, and of the norm
    layers' weights (`unet.conv_in.bias`, `unet.conv_norm_out.weight`) to its length.
    """

    weights: Mapping[str, tuple[int, ...]]
    names: Mapping[str, str]
    sgm: Mapping[str, str]
    cross_attention_dim: int
    vectors: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, tuple[int, ...]],
        cross_attention_dim: int,
        vectors: Mapping[str, int] | None = None,
    ) -> "ModelShapes":
        """Finds the names from the modules' own."""
        vectors = vectors or {}
        modules = dict.fromkeys([*weights, *(name.rsplit(".", 1)[0] for name in vectors)])
        paths = [name.removeprefix("unet.") for name in modules if name.startswith("unet.")]
        sgm = {f"unet.{path}": original for path, original in _sgm_paths(paths).items()}
        names = {alias: name for name in modules for alias in _aliases(name, sgm.get(name))}
        return cls(weights, names, sgm, cross_attention_dim, vectors)


def _aliases(name: str, sgm: str | None) -> Iterator[str]:
    component, path = name.split(".", 1)
    if component == "unet":
        paths = [path] if sgm is None else [path, sgm]
        yield from (name, path, _COMFY_PREFIXES[component] + paths[-1])
    else:
        # transformers 5 has no `text_model` in the first encoder; files and older versions have it.
        stem = path.removeprefix("text_model.")
        paths = [stem, f"text_model.{stem}"]
        yield from (f"{component}.{path}" for path in paths)
        yield from (_COMFY_PREFIXES[component] + path for path in paths)
    for prefix in _KOHYA_PREFIXES[component]:
        yield from (prefix + path.replace(".", "_") for path in paths)


def _sgm_paths(paths: list[str]) -> dict[str, str]:
    parts = {path.rsplit(".", depth)[0] for path in paths for depth in range(path.count(".") + 1)}
    blocks = dict(_sgm_blocks(parts)) | _SGM_OUTSIDE_BLOCKS
    found = {}
    for path in paths:
        for depth in range(path.count(".") + 1):
            prefix = path.rsplit(".", depth)[0]
            if prefix in blocks:
                rest = path[len(prefix) + 1 :]
                rest = _SGM_IN_RESNET.get(rest, rest)
                found[path] = f"{blocks[prefix]}.{rest}" if rest else blocks[prefix]
                break
    return found


def _sgm_blocks(parts: set[str]) -> Iterator[tuple[str, str]]:
    index = 1
    for block in _children("down_blocks", parts):
        for layer, resnet in enumerate(_children(f"{block}.resnets", parts)):
            yield resnet, f"input_blocks.{index}.0"
            yield f"{block}.attentions.{layer}", f"input_blocks.{index}.1"
            index += 1
        if f"{block}.downsamplers.0" in parts:
            yield f"{block}.downsamplers.0.conv", f"input_blocks.{index}.0.op"
            index += 1
    yield "mid_block.resnets.0", "middle_block.0"
    yield "mid_block.attentions.0", "middle_block.1"
    yield "mid_block.resnets.1", "middle_block.2"
    index = 0
    for block in _children("up_blocks", parts):
        upsampler = 2 if f"{block}.attentions.0" in parts else 1
        for layer, resnet in enumerate(_children(f"{block}.resnets", parts)):
            yield resnet, f"output_blocks.{index}.0"
            yield f"{block}.attentions.{layer}", f"output_blocks.{index}.1"
            index += 1
        yield f"{block}.upsamplers.0.conv", f"output_blocks.{index - 1}.{upsampler}.conv"


def _children(parent: str, parts: set[str]) -> Iterator[str]:
    for index in count():
        if f"{parent}.{index}" not in parts:
            return
        yield f"{parent}.{index}"
