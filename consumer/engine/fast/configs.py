"""What the configurations of a diffusers SDXL folder say, read strictly.

The fast engine draws exactly one architecture. A key or a value that is not known here makes the model an unknown one,
which the stock engine may draw. Defaults are those of diffusers and transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from consumer.engine.fast.fields import Fields

_PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
_UP = {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"}
_HEAD_WIDTHS = (16, 32, 64, 128)  # of which the kernels make tiles
_TOKENIZERS = [["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]]


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """`attention`, `layers` and `heads` have one entry a level, from the outermost in: whether it has transformers, how
    many blocks each of them has, and into how many heads its width is split. `eps`: of its resnets' norms."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    resnets: int
    groups: int
    eps: float
    in_channels: int
    out_channels: int
    text_width: int
    time_ids_width: int
    added_width: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Raises UnknownModel."""
        fields = Fields("unet", values)
        channels = fields.integers("block_out_channels")
        downs = fields.require("down_block_types", values.get("down_block_types"))
        if not isinstance(downs, list) or len(downs) != len(channels) or not set(downs) <= set(_UP):
            raise fields.unknown("down_block_types", downs)
        fields.require("up_block_types", [_UP[down] for down in reversed(downs)])
        _refuse_variants(fields)
        config = cls(
            channels=channels,
            attention=tuple(down == "CrossAttnDownBlock2D" for down in downs),
            layers=fields.integers("transformer_layers_per_block", len(channels), 1),
            heads=fields.integers("attention_head_dim", len(channels), 8),  # diffusers' name is a mistake of its own
            resnets=fields.integer("layers_per_block", 2),
            groups=fields.integer("norm_num_groups", 32),
            eps=fields.number("norm_eps", 1e-5),
            in_channels=fields.integer("in_channels", 4),
            out_channels=fields.integer("out_channels", 4),
            text_width=fields.integer("cross_attention_dim", 1280),
            time_ids_width=fields.integer("addition_time_embed_dim"),
            added_width=fields.integer("projection_class_embeddings_input_dim"),
        )
        fields.end()
        for width, heads, attends in zip(config.channels, config.heads, config.attention, strict=True):
            if attends and (width % heads or width // heads not in _HEAD_WIDTHS):
                raise fields.unknown("attention_head_dim", list(config.heads))
        return config


def _refuse_variants(fields: Fields) -> None:
    """Of everything else that a UNet may do differently, SDXL does nothing."""
    fields.require("use_linear_projection", True)
    fields.require("addition_embed_type", "text_time")
    fields.take("mid_block_type", "UNetMidBlock2DCrossAttn")
    fields.take("act_fn", "silu")
    fields.take("flip_sin_to_cos", True)
    fields.take("resnet_time_scale_shift", "default")
    fields.take("time_embedding_type", "positional")
    fields.take("attention_type", "default")
    for key in ("mid_block_scale_factor", "resnet_out_scale_factor", "downsample_padding"):
        fields.take(key, 1)
    for key in ("conv_in_kernel", "conv_out_kernel"):
        fields.take(key, 3)
    for key in ("freq_shift", "dropout"):
        fields.take(key, 0)
    for key in (
        *("center_input_sample", "only_cross_attention", "dual_cross_attention", "upcast_attention"),
        *("resnet_skip_time_act", "class_embeddings_concat", "mid_block_only_cross_attention", "cross_attention_norm"),
        *("num_attention_heads", "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"),
        *("time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim"),
        "reverse_transformer_layers_per_block",
    ):
        fields.take(key, None, False)
    fields.ignore("sample_size", "addition_embed_type_num_heads")


@dataclass(frozen=True, slots=True)
class VaeConfig:
    """The decoder. `channels` from the outermost level in. `upcast`: it overflows in float16."""

    channels: tuple[int, ...]
    resnets: int
    groups: int
    latent_channels: int
    scaling_factor: float
    upcast: bool

    @property
    def factor(self) -> int:
        """How many pixels of the picture a latent is wide."""
        return 1 << (len(self.channels) - 1)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Raises UnknownModel."""
        fields = Fields("vae", values)
        channels = fields.integers("block_out_channels")
        fields.require("up_block_types", ["UpDecoderBlock2D"] * len(channels))
        fields.take("act_fn", "silu")
        fields.take("out_channels", 3)
        for key in ("use_post_quant_conv", "mid_block_add_attention"):
            fields.take(key, True)
        for key in ("shift_factor", "latents_mean", "latents_std"):
            fields.take(key, None)
        fields.ignore("in_channels", "down_block_types", "sample_size", "use_quant_conv")  # the encoder's
        config = cls(
            channels=channels,
            resnets=fields.integer("layers_per_block", 1),
            groups=fields.integer("norm_num_groups", 32),
            latent_channels=fields.integer("latent_channels", 4),
            scaling_factor=fields.number("scaling_factor", 0.18215),
            upcast=fields.take("force_upcast", True, False),
        )
        fields.end()
        return config


@dataclass(frozen=True, slots=True)
class TextConfig:
    """A CLIP text encoder. `projection`: the width of its pooled output, or None for an encoder without one."""

    width: int
    inner_width: int
    layers: int
    heads: int
    tokens: int
    positions: int
    activation: str
    eps: float
    eos_token_id: int
    projection: int | None

    @classmethod
    def read(cls, part: str, values: Mapping[str, Any]) -> Self:
        """`part`: text_encoder, or text_encoder_2 for the one with a projection. Raises UnknownModel."""
        fields = Fields(part, values)
        fields.take("architectures", [_PARTS[part][1]], None)
        fields.take("model_type", "clip_text_model")
        projection = fields.integer("projection_dim", 512)
        config = cls(
            width=fields.integer("hidden_size", 512),
            inner_width=fields.integer("intermediate_size", 2048),
            layers=fields.integer("num_hidden_layers", 12),
            heads=fields.integer("num_attention_heads", 8),
            tokens=fields.integer("vocab_size", 49408),
            positions=fields.take("max_position_embeddings", 77),
            activation=fields.take("hidden_act", "quick_gelu", "gelu"),
            eps=fields.number("layer_norm_eps", 1e-5),
            eos_token_id=fields.integer("eos_token_id", 49407),
            projection=projection if part == "text_encoder_2" else None,
        )
        fields.ignore("bos_token_id", "pad_token_id", "attention_dropout", "dropout", "dtype", "torch_dtype")
        fields.ignore("initializer_factor", "initializer_range", "transformers_version")
        fields.end()
        return config


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """diffusers' `EulerDiscreteScheduler` that predicts noise, with its own sigmas. The names are diffusers'."""

    num_train_timesteps: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    timestep_spacing: str
    steps_offset: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Raises UnknownModel."""
        fields = Fields("scheduler", values)
        fields.take("prediction_type", "epsilon")
        fields.take("interpolation_type", "linear")
        fields.take("timestep_type", "discrete")
        fields.take("final_sigmas_type", "zero")
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr"):
            fields.take(key, None, False)
        for key in ("trained_betas", "sigma_min", "sigma_max"):
            fields.take(key, None)
        # of other schedulers, from which this one was made
        fields.ignore("clip_sample", "clip_sample_range", "sample_max_value", "set_alpha_to_one", "skip_prk_steps")
        config = cls(
            num_train_timesteps=fields.integer("num_train_timesteps", 1000),
            beta_start=fields.number("beta_start", 0.0001),
            beta_end=fields.number("beta_end", 0.02),
            beta_schedule=fields.take("beta_schedule", "linear", "scaled_linear"),
            timestep_spacing=fields.take("timestep_spacing", "linspace", "leading", "trailing"),
            steps_offset=fields.integer("steps_offset", 0),
        )
        fields.end()
        return config


def read_index(values: Mapping[str, Any]) -> bool:
    """Reads `model_index.json`: whether an empty negative prompt is zeros. Raises UnknownModel."""
    fields = Fields("model_index.json", values)
    if values.get("_class_name") != "StableDiffusionXLPipeline":
        raise fields.unknown("_class_name", values.get("_class_name"))
    for part, (library, name) in _PARTS.items():
        fields.require(part, [library, name])
    for part in ("tokenizer", "tokenizer_2"):
        fields.require(part, *_TOKENIZERS)
    for part in ("feature_extractor", "image_encoder"):
        fields.take(part, [None, None], None)
    fields.ignore("add_watermarker")
    zeros: bool = fields.take("force_zeros_for_empty_prompt", True, False)
    fields.end()
    return zeros
