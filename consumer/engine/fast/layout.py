"""The parameters of an SDXL model by name and shape, in the order of the modules of diffusers and transformers.

The one liberty: a text encoder's q, k and v come in this order, as in the UNet.
"""

from collections.abc import Iterator

from consumer.engine.fast.configs import TextConfig, UNetConfig, VaeConfig

Parameter = tuple[str, tuple[int, ...]]
EMBEDDINGS = ("token_embedding.weight", "position_embedding.weight")


def unet(config: UNetConfig) -> Iterator[Parameter]:
    """[out, in] or [out, in, height, width] for weights, [out] for biases and norms."""
    first, time = config.channels[0], 4 * config.channels[0]
    yield from _convolution("conv_in", config.in_channels, first, 3)
    for name, width in (("time_embedding", first), ("add_embedding", config.added_width)):
        yield from _linear(f"{name}.linear_1", width, time)
        yield from _linear(f"{name}.linear_2", time, time)
    last = len(config.channels) - 1
    for level, width in enumerate(config.channels):
        inputs = [config.channels[max(level - 1, 0)]] + [width] * (config.resnets - 1)
        yield from _level(config, f"down_blocks.{level}", level, inputs)
        if level < last:
            yield from _convolution(f"down_blocks.{level}.downsamplers.0.conv", width, width, 3)
    for index, level in enumerate(range(last, -1, -1)):
        width = config.channels[level]
        before = [config.channels[min(level + 1, last)]] + [width] * config.resnets
        skips = [width] * config.resnets + [config.channels[max(level - 1, 0)]]
        yield from _level(config, f"up_blocks.{index}", level, [sum(pair) for pair in zip(before, skips, strict=True)])
        if level:
            yield from _convolution(f"up_blocks.{index}.upsamplers.0.conv", width, width, 3)
    yield from _transformer(config, "mid_block.attentions.0", last)
    for index in range(2):
        yield from _resnet(f"mid_block.resnets.{index}", config.channels[last], config.channels[last], time)
    yield from _pair("conv_norm_out", first, first)
    yield from _convolution("conv_out", first, config.out_channels, 3)


def vae(config: VaeConfig) -> Iterator[Parameter]:
    """The decoder's, and those of `post_quant_conv`."""
    latent, deepest = config.latent_channels, config.channels[-1]
    yield from _convolution("decoder.conv_in", latent, deepest, 3)
    before = deepest
    for index, width in enumerate(reversed(config.channels)):
        block = f"decoder.up_blocks.{index}"
        for resnet in range(config.resnets + 1):
            yield from _resnet(f"{block}.resnets.{resnet}", before, width, None)
            before = width
        if index < len(config.channels) - 1:
            yield from _convolution(f"{block}.upsamplers.0.conv", width, width, 3)
    attention = "decoder.mid_block.attentions.0"
    yield from _pair(f"{attention}.group_norm", deepest, deepest)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{attention}.{part}", deepest, deepest)
    for index in range(2):
        yield from _resnet(f"decoder.mid_block.resnets.{index}", deepest, deepest, None)
    yield from _pair("decoder.conv_norm_out", config.channels[0], config.channels[0])
    yield from _convolution("decoder.conv_out", config.channels[0], 3, 3)
    yield from _convolution("post_quant_conv", latent, latent, 1)


def text_encoder(config: TextConfig) -> Iterator[Parameter]:
    """Named as transformers 5 does: an encoder with a projection has everything else within `text_model`."""
    prefix = "" if config.projection is None else "text_model."
    width = config.width
    yield f"{prefix}embeddings.token_embedding.weight", (config.tokens, width)
    yield f"{prefix}embeddings.position_embedding.weight", (config.positions, width)
    for index in range(config.layers):
        layer = f"{prefix}encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{part}", width, width)
        yield from _pair(f"{layer}.layer_norm1", width, width)
        yield from _linear(f"{layer}.mlp.fc1", width, config.inner_width)
        yield from _linear(f"{layer}.mlp.fc2", config.inner_width, width)
        yield from _pair(f"{layer}.layer_norm2", width, width)
    yield from _pair(f"{prefix}final_layer_norm", width, width)
    if config.projection is not None:
        yield "text_projection.weight", (config.projection, width)


def _level(config: UNetConfig, block: str, level: int, inputs: list[int]) -> Iterator[Parameter]:
    for index in range(len(inputs) if config.attention[level] else 0):
        yield from _transformer(config, f"{block}.attentions.{index}", level)
    for index, width in enumerate(inputs):
        yield from _resnet(f"{block}.resnets.{index}", width, config.channels[level], 4 * config.channels[0])


def _transformer(config: UNetConfig, name: str, level: int) -> Iterator[Parameter]:
    width = config.channels[level]
    yield from _pair(f"{name}.norm", width, width)
    yield from _linear(f"{name}.proj_in", width, width)
    for index in range(config.layers[level]):
        block = f"{name}.transformer_blocks.{index}"
        for number, source in ((1, width), (2, config.text_width)):
            attention = f"{block}.attn{number}"
            yield from _pair(f"{block}.norm{number}", width, width)
            yield f"{attention}.to_q.weight", (width, width)
            yield f"{attention}.to_k.weight", (width, source)
            yield f"{attention}.to_v.weight", (width, source)
            yield from _linear(f"{attention}.to_out.0", width, width)
        yield from _pair(f"{block}.norm3", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", width, 8 * width)
        yield from _linear(f"{block}.ff.net.2", 4 * width, width)
    yield from _linear(f"{name}.proj_out", width, width)


def _resnet(name: str, inputs: int, outputs: int, time: int | None) -> Iterator[Parameter]:
    yield from _pair(f"{name}.norm1", inputs, inputs)
    yield from _convolution(f"{name}.conv1", inputs, outputs, 3)
    if time is not None:
        yield from _linear(f"{name}.time_emb_proj", time, outputs)
    yield from _pair(f"{name}.norm2", outputs, outputs)
    yield from _convolution(f"{name}.conv2", outputs, outputs, 3)
    if inputs != outputs:
        yield from _convolution(f"{name}.conv_shortcut", inputs, outputs, 1)


def _convolution(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[Parameter]:
    return _pair(name, outputs, outputs, inputs, kernel, kernel)


def _linear(name: str, inputs: int, outputs: int) -> Iterator[Parameter]:
    return _pair(name, outputs, outputs, inputs)


def _pair(name: str, bias: int, *weight: int) -> Iterator[Parameter]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", (bias,)
