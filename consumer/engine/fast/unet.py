"""SDXL's UNet in plain functions over channels-last tensors.

What depends on the prompt alone is computed once per picture: `Conditions` holds the keys and values of every
cross-attention and, for every step, what the time embedding adds in every resnet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from consumer.engine.fast.configs import UNetConfig
from consumer.engine.fast.layers import Layers
from consumer.engine.fast.ops import Hidden, Ops
from consumer.lora.weights import PatchableWeights

_TRANSFORMER_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the UNet is told of one picture, at fixed addresses.

    `shifts`: float32 [steps, batch, channels of all resnets]. `texts`: for each cross-attention keys and values side by
    side, [batch, tokens, 2 * channels].
    """

    shifts: Tensor
    texts: dict[str, Tensor]


class UNet:
    """The network; its parameters may be patched in place at any time between two calls."""

    def __init__(
        self, parameters: Mapping[str, Tensor], weights: PatchableWeights, config: UNetConfig, ops: Ops
    ) -> None:
        self.layers = Layers(parameters, "unet.", ops, groups=config.groups, eps=config.eps)
        self._weights = weights
        self.config = config
        self._ops = ops
        self._resnets: dict[str, slice] = {}
        end = 0
        for name in self._resnet_names():
            start, end = end, end + self.layers.bias(f"{name}.conv1").shape[0]
            self._resnets[name] = slice(start, end)
        self._shift_channels = end

    @property
    def dtype(self) -> torch.dtype:
        return self.layers.weight("conv_in").dtype

    def conditions(self, steps: int, batch: int, tokens: int) -> Conditions:
        """Room for the conditions of a picture of at most so many steps."""
        weight = self.layers.weight("conv_in")
        texts = {}
        for name in self._transformer_blocks():
            channels = self.layers.weight(f"{name}.attn2.to_k").shape[0]
            texts[name] = weight.new_zeros(batch, tokens, 2 * channels)
        return Conditions(weight.new_zeros(steps, batch, self._shift_channels, dtype=torch.float32), texts)

    def condition(
        self, conditions: Conditions, prompts: Tensor, pooled: Tensor, sizes: Tensor, timesteps: Tensor
    ) -> None:
        """Fills `conditions`.

        `prompts`: [batch, tokens, channels]. `pooled`: [batch, channels]. `sizes`: float32 [batch, 6], SDXL's size and
        crop conditions. `timesteps`: float32 [steps].
        """
        dtype = prompts.dtype
        times = self._embed(_sinusoid(timesteps, self.config.channels[0]).to(dtype), "time_embedding")
        extra = _sinusoid(sizes.flatten(), self.config.time_ids_width).view(len(sizes), -1).to(dtype)
        added = self._embed(torch.cat([pooled, extra], -1), "add_embedding")
        embedding = functional.silu(times[:, None] + added[None])
        for name, channels in self._resnets.items():
            shift = self.layers.linear(embedding, f"{name}.time_emb_proj").float()
            conditions.shifts[:, :, channels] = shift + self.layers.bias(f"{name}.conv1").float()
        for name, text in conditions.texts.items():
            text.copy_(functional.linear(prompts, self._weights.rows(f"unet.{name}.attn2.to_k.weight", 2)))

    def predict(self, inputs: Tensor, conditions: Conditions, index: Tensor) -> Tensor:
        """The noise in `inputs`, [batch, height, width, 4] in the model's dtype. `index`: the step, int64 [1]."""
        width = inputs.shape[2]
        shifts = conditions.shifts.index_select(0, index)[0]
        x = self.layers.convolve(inputs.flatten(1, 2), width, "conv_in", bias=True)
        hidden, skips = self._down(Hidden(x, width), shifts, conditions)
        hidden = self._resnet(hidden, "mid_block.resnets.0", shifts)
        hidden = self._transformer(hidden, "mid_block.attentions.0", self.config.heads[-1], conditions)
        hidden = self._resnet(hidden, "mid_block.resnets.1", shifts)
        hidden = self._up(hidden, skips, shifts, conditions)
        x = self.layers.group_norm(hidden, "conv_norm_out", silu=True)
        return self.layers.convolve(x, width, "conv_out", bias=True).view(inputs.shape)

    def _down(self, hidden: Hidden, shifts: Tensor, conditions: Conditions) -> tuple[Hidden, list[Hidden]]:
        skips = [hidden]
        for level, heads in enumerate(self.config.heads):
            block = f"down_blocks.{level}"
            for resnet in self.layers.numbered(f"{block}.resnets", "conv1"):
                hidden = self._resnet(hidden, resnet, shifts)
                hidden = self._transformer(hidden, resnet.replace("resnets", "attentions"), heads, conditions)
                skips.append(hidden)
            downsampler = f"{block}.downsamplers.0.conv"
            if self.layers.has(downsampler):
                x = self.layers.convolve(hidden.x, hidden.width, downsampler, stride=2)
                hidden = self._ops.join(x, hidden.width // 2, bias=self.layers.bias(downsampler))
                skips.append(hidden)
        return hidden, skips

    def _up(self, hidden: Hidden, skips: list[Hidden], shifts: Tensor, conditions: Conditions) -> Hidden:
        upsampler = None
        for level, heads in enumerate(reversed(self.config.heads)):
            block = f"up_blocks.{level}"
            for resnet in self.layers.numbered(f"{block}.resnets", "conv1"):
                skip = skips.pop()
                if upsampler is not None:
                    hidden = self.layers.upsample(hidden, upsampler, skip.x)
                    upsampler = None
                else:
                    hidden = self._ops.concat(hidden.x, skip.x, hidden.width)
                hidden = self._resnet(hidden, resnet, shifts)
                hidden = self._transformer(hidden, resnet.replace("resnets", "attentions"), heads, conditions)
            if self.layers.has(f"{block}.upsamplers.0.conv"):
                upsampler = f"{block}.upsamplers.0.conv"
        return hidden

    def _resnet(self, hidden: Hidden, name: str, shifts: Tensor) -> Hidden:
        return self.layers.resnet(hidden, name, shifts[:, self._resnets[name]])

    def _transformer(self, hidden: Hidden, name: str, heads: int, conditions: Conditions) -> Hidden:
        if not self.layers.has(f"{name}.proj_in"):
            return hidden
        batch, _, channels = hidden.x.shape
        x = self.layers.group_norm(hidden, f"{name}.norm", silu=False, eps=_TRANSFORMER_EPS)
        x = self.layers.linear(x.view(-1, channels), f"{name}.proj_in")
        blocks = list(self.layers.numbered(f"{name}.transformer_blocks", "norm1"))
        normed = self._ops.layer_norm(x, *self._layer(f"{blocks[0]}.norm1"))
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            x, normed = self._add(
                x, self._attend(normed, block, batch, heads), f"{block}.attn1.to_out.0", f"{block}.norm2"
            )
            change = self._attend_text(normed, block, batch, heads, conditions.texts[block])
            x, normed = self._add(x, change, f"{block}.attn2.to_out.0", f"{block}.norm3")
            change = self._ops.geglu(normed, *self._layer(f"{block}.ff.net.0.proj"))
            if following is None:
                x = x + self.layers.linear(change, f"{block}.ff.net.2")
            else:
                x, normed = self._add(x, change, f"{block}.ff.net.2", f"{following}.norm1")
        x = self.layers.linear_without_bias(x, f"{name}.proj_out").view(hidden.x.shape)
        return self._ops.join(x, hidden.width, bias=self.layers.bias(f"{name}.proj_out"), residual=hidden.x)

    def _add(self, x: Tensor, change: Tensor, layer: str, norm: str) -> tuple[Tensor, Tensor]:
        """`x` plus a linear layer of `change`, and the LayerNorm of the sum."""
        change = self.layers.linear_without_bias(change, layer)
        return self._ops.add_layer_norm(x, change, self.layers.bias(layer), *self._layer(norm))

    def _attend(self, x: Tensor, block: str, batch: int, heads: int) -> Tensor:
        projected = functional.linear(x, self._weights.rows(f"unet.{block}.attn1.to_q.weight", 3))
        query, key, value = projected.view(batch, -1, 3, heads, x.shape[1] // heads).permute(2, 0, 3, 1, 4)
        return self._ops.attend(query, key, value).transpose(1, 2).reshape(x.shape)

    def _attend_text(self, x: Tensor, block: str, batch: int, heads: int, text: Tensor) -> Tensor:
        channels = x.shape[1]
        query = self.layers.linear_without_bias(x, f"{block}.attn2.to_q").view(batch, -1, heads, channels // heads)
        key, value = text.view(batch, -1, 2, heads, channels // heads).permute(2, 0, 3, 1, 4)
        return self._ops.attend_text(query.transpose(1, 2), key, value).transpose(1, 2).reshape(x.shape)

    def _layer(self, name: str) -> tuple[Tensor, Tensor]:
        return self.layers.weight(name), self.layers.bias(name)

    def _embed(self, x: Tensor, name: str) -> Tensor:
        return self.layers.linear(functional.silu(self.layers.linear(x, f"{name}.linear_1")), f"{name}.linear_2")

    def _resnet_names(self) -> list[str]:
        levels = len(self.config.heads)
        blocks = [f"{side}.{level}.resnets" for side in ("down_blocks", "up_blocks") for level in range(levels)]
        return [name for block in [*blocks, "mid_block.resnets"] for name in self.layers.numbered(block, "conv1")]

    def _transformer_blocks(self) -> list[str]:
        attentions = [name.replace("resnets", "attentions") for name in self._resnet_names()]
        return [
            block
            for attention in attentions
            for block in self.layers.numbered(f"{attention}.transformer_blocks", "norm1")
        ]


def _sinusoid(values: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of float32 [n] as [n, channels], cosines first, frequencies 10000^(-i / half)."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=values.device) * (-math.log(10000.0) / half))
    angles = values.float()[:, None] * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], -1)
