"""Both CLIP text encoders of SDXL, as plain functions over weights that a LoRA may have patched.

Nothing here waits for the device or depends on values, so all of it can be captured in a CUDA graph. Matrix products
are in the weights' type; the sum of the layers, norms and activations are in float32, which is nearer to an encoder in
float32 than transformers' own half precision.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from consumer.engine.fast.configs import TextConfig
from consumer.engine.fast.tokens import ClipTokenizer

Weights = Mapping[str, Tensor]
_LEGACY_EOS = 2  # configurations of old say so where they mean the highest id there is


def token_ids(tokenizers: Sequence[ClipTokenizer], prompts: Sequence[str]) -> Tensor:
    """int64 [tokenizers, prompts, 77], on the CPU."""
    return torch.tensor([[tokenizer.ids(prompt) for prompt in prompts] for tokenizer in tokenizers])


def conditions(
    weights: Weights, configs: tuple[TextConfig, TextConfig], ids: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """What the UNet is told of prompts: embeddings [batch, 77, both widths] and pooled ones [batch, projection].

    They are of the weights' type. `weights` are looked up by name, as `text_encoder.final_layer_norm.weight`. `ids`:
    int64 [2, batch, 77], as from `token_ids`. `present`: bool [batch]; where it is false, both results are zeros.
    """
    first, _ = _hidden(weights, "text_encoder.", configs[0], ids[0])
    second, last = _hidden(weights, "text_encoder_2.text_model.", configs[1], ids[1])
    pooled = functional.linear(_at_the_end(last, ids[1], configs[1]), weights["text_encoder_2.text_projection.weight"])
    embeddings = torch.cat([first, second], dim=-1)
    return torch.where(present[:, None, None], embeddings, 0), torch.where(present[:, None], pooled, 0)


def _hidden(weights: Weights, prefix: str, config: TextConfig, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, 77, width], both in the weights' type: before the last layer, and after the final norm.

    An encoder without a projection is run without its last layer; its second result means nothing.
    """
    tokens = weights[f"{prefix}embeddings.token_embedding.weight"]
    positions = weights[f"{prefix}embeddings.position_embedding.weight"]
    x = functional.embedding(ids, tokens).float() + positions
    for layer in range(config.layers - 1):
        x = _layer(weights, f"{prefix}encoder.layers.{layer}.", config, x)
    before = x.to(tokens.dtype)
    if config.projection is None:
        return before, before
    x = _layer(weights, f"{prefix}encoder.layers.{config.layers - 1}.", config, x)
    return before, _norm(weights, f"{prefix}final_layer_norm", config, x)


def _layer(weights: Weights, prefix: str, config: TextConfig, x: Tensor) -> Tensor:
    h = _norm(weights, f"{prefix}layer_norm1", config, x)
    query, key, value = (
        _linear(weights, f"{prefix}self_attn.{part}_proj", h).view(*h.shape[:2], config.heads, -1).transpose(1, 2)
        for part in ("q", "k", "v")
    )
    h = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    x = x + _linear(weights, f"{prefix}self_attn.out_proj", h)
    h = _norm(weights, f"{prefix}layer_norm2", config, x)
    h = _linear(weights, f"{prefix}mlp.fc1", h)
    h = _linear(weights, f"{prefix}mlp.fc2", _activation(h, config))
    return x + h


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _norm(weights: Weights, name: str, config: TextConfig, x: Tensor) -> Tensor:
    """A layer norm of float32 [..., width] whose result is of the weights' type."""
    weight = weights[f"{name}.weight"]
    normal = functional.layer_norm(x, (config.width,), eps=config.eps)
    return torch.addcmul(weights[f"{name}.bias"], normal, weight).to(weight.dtype)


def _activation(x: Tensor, config: TextConfig) -> Tensor:
    """Computed in float32 and rounded once, as torch's gelu does by itself."""
    if config.activation == "gelu":
        return functional.gelu(x)
    exact = x.float()
    return (exact * torch.sigmoid(1.702 * exact)).to(x.dtype)


def _at_the_end(x: Tensor, ids: Tensor, config: TextConfig) -> Tensor:
    """[batch, width] of x [batch, tokens, width], where the ids [batch, tokens] end."""
    ends = ids if config.eos_token_id == _LEGACY_EOS else (ids == config.eos_token_id).int()
    index = ends.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])
    return x.gather(1, index)[:, 0]
