"""Triton kernels of norms, which ride along with the sums before them; `consumer.engine.fast.ops` says what they make.

Every tensor is contiguous along its channels. Sizes of a picture are no compile-time constants: one compilation serves
all of them.
"""

import triton
import triton.language as tl


@triton.jit
def _load_first(
    first, batch, row, channel, mask, rows, first_channels, width, IS_PHASES: tl.constexpr
):  # pragma: no cover
    if IS_PHASES:
        y = row // width
        x = row % width
        half = width // 2 + 1
        corner = (batch * (rows // width // 2 + 1) + (y + 1) // 2) * half + (x + 1) // 2
        source = corner * 4 * first_channels + ((y % 2) * 2 + x % 2) * first_channels
    else:
        source = (batch * rows + row) * first_channels
    return tl.load(first + source[:, None] + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "width"])
def moments(
    first,
    second,
    residual,
    bias,
    out,
    means,
    squares,
    rows,
    channels,
    first_channels,
    chunk_rows,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    IS_PHASES: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # pragma: no cover
    """Puts a sum or a concatenation together, writes it, and takes mean and sum of squared deviations per channel.

    A program looks at `chunk_rows` rows of some channels; deviations are taken from the mean of what it has seen, so
    that nothing cancels (Chan et al. 1979).
    """
    chunk = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    is_first = channel < first_channels
    mean = tl.zeros([BLOCK_CHANNELS], tl.float32)
    square = tl.zeros([BLOCK_CHANNELS], tl.float32)
    seen = 0.0
    end = tl.minimum((chunk + 1) * chunk_rows, rows)
    for start in range(chunk * chunk_rows, end, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        is_row = row < end
        mask = is_row[:, None] & is_first[None, :]
        x = _load_first(first, batch, row, channel, mask, rows, first_channels, width, IS_PHASES)
        if HAS_BIAS:
            x += tl.load(bias + channel, mask=is_first, other=0.0).to(tl.float32)[None, :]
        place = (batch * rows + row)[:, None] * channels + channel[None, :]
        if HAS_SECOND:
            others = (batch * rows + row)[:, None] * (channels - first_channels) + (channel - first_channels)[None, :]
            mask_second = is_row[:, None] & (is_channel & (channel >= first_channels))[None, :]
            x += tl.load(second + others, mask=mask_second, other=0.0).to(tl.float32)
        mask = is_row[:, None] & is_channel[None, :]
        if HAS_RESIDUAL:
            x += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if WRITES:
            rounded = x.to(out.dtype.element_ty)
            tl.store(out + place, rounded, mask=mask)
            x = rounded.to(tl.float32)
        x = tl.where(mask, x, 0.0)
        count = tl.minimum(end - start, BLOCK_ROWS).to(tl.float32)
        block_mean = tl.sum(x, 0) / count
        deviation = tl.where(mask, x - block_mean[None, :], 0.0)
        difference = block_mean - mean
        total = seen + count
        mean += difference * (count / total)
        square += tl.sum(deviation * deviation, 0) + difference * difference * (seen * count / total)
        seen = total
    place_of_moments = (batch * tl.num_programs(1) + chunk) * channels + channel
    tl.store(means + place_of_moments, mean, mask=is_channel)
    tl.store(squares + place_of_moments, square, mask=is_channel)


@triton.jit(do_not_specialize=["rows", "chunk_rows", "chunks", "group"])
def normaliser(
    means,
    squares,
    shift,
    weight,
    bias,
    scales,
    offsets,
    rows,
    channels,
    chunk_rows,
    chunks,
    group,
    shift_stride,
    eps,
    HAS_SHIFT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
):  # pragma: no cover
    """From the moments of chunks to `x * scale + offset` per channel. `group`: channels per group."""
    batch = tl.program_id(1)
    lane = tl.arange(0, BLOCK_GROUP)
    channel = tl.program_id(0) * group + lane
    is_channel = lane < group
    if HAS_SHIFT:
        moved = tl.load(shift + batch * shift_stride + channel, mask=is_channel, other=0.0)
    else:
        moved = tl.zeros([BLOCK_GROUP], tl.float32)
    total = 0.0
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & is_channel[None, :]
        count = tl.minimum(rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        place = (batch * chunks + chunk)[:, None] * channels + channel[None, :]
        mean = tl.load(means + place, mask=mask, other=0.0) + moved[None, :]
        total += tl.sum(tl.sum(tl.where(mask, mean * count[:, None], 0.0), 0), 0)
    number = rows.to(tl.float32) * group.to(tl.float32)
    overall = total / number
    square = 0.0
    for start in range(0, chunks, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)
        mask = (chunk < chunks)[:, None] & is_channel[None, :]
        count = tl.minimum(rows - chunk * chunk_rows, chunk_rows).to(tl.float32)
        place = (batch * chunks + chunk)[:, None] * channels + channel[None, :]
        difference = tl.load(means + place, mask=mask, other=0.0) + moved[None, :] - overall
        inside = tl.load(squares + place, mask=mask, other=0.0)
        square += tl.sum(tl.sum(tl.where(mask, inside + difference * difference * count[:, None], 0.0), 0), 0)
    inverse = 1.0 / tl.sqrt(square / number + eps)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32) * inverse
    offset = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32) + (moved - overall) * scale
    tl.store(scales + batch * channels + channel, scale, mask=is_channel)
    tl.store(offsets + batch * channels + channel, offset, mask=is_channel)


@triton.jit(do_not_specialize=["rows"])
def normalise(
    x,
    scales,
    offsets,
    out,
    rows,
    channels,
    SILU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # pragma: no cover
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_channel = channel < channels
    scale = tl.load(scales + batch * channels + channel, mask=is_channel, other=0.0)
    offset = tl.load(offsets + batch * channels + channel, mask=is_channel, other=0.0)
    place = (batch * rows + row)[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & is_channel[None, :]
    y = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        y = y * tl.sigmoid(y)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def layer_norm(
    x,
    change,
    change_bias,
    weight,
    bias,
    total,
    out,
    rows,
    channels,
    ADDS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):  # pragma: no cover
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    channel = tl.arange(0, BLOCK_CHANNELS)
    is_channel = channel < channels
    mask = (row < rows)[:, None] & is_channel[None, :]
    place = row[:, None] * channels + channel[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(change + place, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(change_bias + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)
    mean = tl.sum(value, 1) / channels
    deviation = tl.where(mask, value - mean[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(deviation * deviation, 1) / channels + 1e-5)
    scale = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    y = deviation * inverse[:, None] * scale[None, :] + offset[None, :]
    tl.store(out + place, y.to(out.dtype.element_ty), mask=mask)
