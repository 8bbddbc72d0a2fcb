"""A diffusers SDXL model as the fast engine takes it: configurations, tokenizers, and parameters on the device."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from consumer.engine.fast import layout
from consumer.engine.fast.configs import SchedulerConfig, TextConfig, UNetConfig, VaeConfig, read_index
from consumer.engine.fast.fields import UnknownModel
from consumer.engine.fast.files import STEMS, model_folder, read_json, vae_folder, weight_files
from consumer.engine.fast.reading import read_tensors
from consumer.engine.fast.tokens import ClipTokenizer
from schemas.lora.shapes import ModelShapes

_VARIANT = "fp16"
_NEVER_LOADED = ("encoder.", "quant_conv.")  # of the autoencoder
# its attention, as diffusers named it before 0.17
_OLD_PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_PROJECTION = re.compile(rf"\.({'|'.join(_OLD_PROJECTIONS)})\.")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`parameters`: on the device, by names as `unet.conv_in.weight`, each part's in the order of `layout`.

    They are of the engine's type, except the autoencoder's where that is float16 and `vae.upcast`: float32. Of the
    autoencoder there is only what decodes. `zeros`: whether an empty negative prompt is zeros (not its encoding).
    """

    unet: UNetConfig
    vae: VaeConfig
    text_encoders: tuple[TextConfig, TextConfig]
    scheduler: SchedulerConfig
    tokenizers: tuple[ClipTokenizer, ClipTokenizer]
    zeros: bool
    parameters: dict[str, Tensor]

    def patchable(self) -> dict[str, Tensor]:
        """The parameters that a LoRA may change: all but the autoencoder's and the embeddings."""
        return {
            name: parameter
            for name, parameter in self.parameters.items()
            if not name.startswith("vae.") and not name.endswith(layout.EMBEDDINGS)
        }

    def shapes(self) -> ModelShapes:
        """The modules that a LoRA may change."""
        patchable = self.patchable().items()
        weights = {name.removesuffix(".weight"): tuple(matrix.shape) for name, matrix in patchable if matrix.dim() > 1}
        vectors = {name: len(vector) for name, vector in patchable if vector.dim() == 1}
        return ModelShapes.of(weights, self.unet.text_width, vectors)


def load_checkpoint(
    model: str, *, vae: str | None, device: torch.device, dtype: torch.dtype, token: str | None
) -> Checkpoint:
    """Reads a diffusers folder or hub id, safetensors only; for a GPU each part's `fp16` weights where it has them.

    `vae`: the folder or hub id of another autoencoder. Raises UnknownModel for what the fast engine does not draw as
    the stock pipeline does, and OSError, ValueError, SafetensorError and the hub's errors for what cannot be read.
    """
    variant = _VARIANT if device.type == "cuda" else None
    folder = model_folder(model, token, variant)
    decoder_folder = folder / "vae" if vae is None else vae_folder(vae, token)
    zeros = read_index(read_json(folder / "model_index.json"))
    unet = UNetConfig.read(read_json(folder / "unet" / "config.json"))
    decoder = VaeConfig.read(read_json(decoder_folder / "config.json"))
    first = TextConfig.read("text_encoder", read_json(folder / "text_encoder" / "config.json"))
    second = TextConfig.read("text_encoder_2", read_json(folder / "text_encoder_2" / "config.json"))
    _fit(unet, decoder, first, second)
    vae_type = torch.float32 if decoder.upcast and dtype == torch.float16 else dtype
    parts = [
        _Part("unet", folder / "unet", variant, dtype, dict(layout.unet(unet))),
        _Part("text_encoder", folder / "text_encoder", variant, dtype, dict(layout.text_encoder(first))),
        _Part("text_encoder_2", folder / "text_encoder_2", variant, dtype, dict(layout.text_encoder(second))),
        _Part("vae", decoder_folder, variant if vae is None else None, vae_type, dict(layout.vae(decoder))),
    ]
    return Checkpoint(
        unet=unet,
        vae=decoder,
        text_encoders=(first, second),
        scheduler=SchedulerConfig.read(read_json(folder / "scheduler" / "scheduler_config.json")),
        tokenizers=(ClipTokenizer.read(folder / "tokenizer"), ClipTokenizer.read(folder / "tokenizer_2")),
        zeros=zeros,
        parameters={f"{part.name}.{name}": tensor for part in parts for name, tensor in part.read(device).items()},
    )


def _fit(unet: UNetConfig, vae: VaeConfig, first: TextConfig, second: TextConfig) -> None:
    if second.projection is None or unet.added_width != second.projection + 6 * unet.time_ids_width:
        raise UnknownModel("The UNet is made for other added conditions.")
    if unet.text_width != first.width + second.width:
        raise UnknownModel("The UNet is made for other text encoders.")
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise UnknownModel("The UNet is made for another autoencoder.")


@dataclass(frozen=True, slots=True)
class _Part:
    """One folder of weights. `parameters`: the names and shapes that it must have, in the order of the result."""

    name: str
    folder: Path
    variant: str | None
    dtype: torch.dtype
    parameters: dict[str, tuple[int, ...]]

    def read(self, device: torch.device) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for path in weight_files(self.folder, STEMS[self.name], self.variant):
            tensors = read_tensors(path, device, self._is_wanted)
            found |= {self._modern(name): tensor.to(self.dtype) for name, tensor in tensors.items()}
        self._refuse(found.keys() - self.parameters.keys(), "has")
        self._refuse(self.parameters.keys() - found.keys(), "has no")
        self._refuse((name for name, shape in self.parameters.items() if found[name].shape != shape), "has another")
        return {name: found[name] for name in self.parameters}

    def _is_wanted(self, name: str) -> bool:
        if self.name == "vae":
            return not name.startswith(_NEVER_LOADED)
        return not name.endswith(".position_ids")  # a buffer of old

    def _modern(self, name: str) -> str:
        if self.name == "vae":
            return _OLD_PROJECTION.sub(lambda old: f".{_OLD_PROJECTIONS[old[1]]}.", name)
        return name.removeprefix("text_model.") if self.name == "text_encoder" else name

    def _refuse(self, names: Iterable[str], what: str) -> None:
        for name in sorted(names):
            raise UnknownModel(f"{self.name}: it {what} {name}")
