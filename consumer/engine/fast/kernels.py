"""Triton kernels besides the norms. `consumer.engine.fast.ops` says what each of them computes."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def gate(x, out, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # pragma: no cover
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * (2 * width) + column[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    gating = tl.load(x + place + width, mask=mask, other=0.0).to(tl.float32)
    y = value * _gelu(gating)
    tl.store(out + row[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gelu(x):  # pragma: no cover
    """`x * P(X < x)` of a standard normal X, as `relu(x) - |x| * P(X < -|x|)`.

    That probability's logarithm to base 2 is a polynomial on [0, 6], fitted to a largest difference of 4.7e-6. It takes
    fewer instructions than `erf` and, where x is negative, cancels nothing, so that it is nearer to the exact value.
    Beyond 6 the product is less than the smallest float16.
    """
    size = tl.minimum(tl.abs(x), 6.0)
    power = tl.fma(size, -1.83478975e-06, 6.15978654e-05)
    power = tl.fma(size, power, -0.000930521473)
    power = tl.fma(size, power, 0.00850787737)
    power = tl.fma(size, power, -0.0539600399)
    power = tl.fma(size, power, -0.458464426)
    power = tl.fma(size, power, -1.15125103)
    power = tl.fma(size, power, -0.999995297)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * tl.exp2(power)


@triton.jit(do_not_specialize=["rows"])
def geglu(
    x, weight, bias, out, rows, width, depth, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # pragma: no cover
    """The linear layer and its gate at once. `depth`: inputs.

    `x`, `weight` and `out` are tensor descriptors, that of `weight` is [2, width, depth]: values and gates of a tile
    are one product, twice as wide, and end up in the same threads. A program makes one tile after another, so that the
    next one's inputs are on their way while this one is gated.
    """
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS) * tl.cdiv(width, BLOCK_WIDTH), tl.num_programs(0), flatten=True
    ):
        row, column = _place(tile, rows, width, BLOCK_ROWS, BLOCK_WIDTH)
        both = tl.zeros((BLOCK_ROWS, 2 * BLOCK_WIDTH), tl.float32)
        for start in range(0, depth, BLOCK):
            weights = weight.load([0, column, start]).reshape(2 * BLOCK_WIDTH, BLOCK)
            both = tl.dot(x.load([row, start]), weights.T, both)
        value, gating = both.reshape(BLOCK_ROWS, 2, BLOCK_WIDTH).permute(0, 2, 1).split()
        columns = column + tl.arange(0, BLOCK_WIDTH)
        value += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        gating += tl.load(bias + width + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
        out.store([row, column], (value * _gelu(gating)).to(out.dtype))


@triton.jit
def _place(tile, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):  # pragma: no cover
    """First row and column of a tile. Neighbours share rows of the inputs and of the weights in the cache."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    in_group = 8 * tl.cdiv(width, BLOCK_WIDTH)
    first = tile // in_group * 8
    size = tl.minimum(row_blocks - first, 8)
    return (first + tile % in_group % size) * BLOCK_ROWS, tile % in_group // size * BLOCK_WIDTH


@triton.jit(do_not_specialize=["rows", "tokens"])
def attend_text(
    query,
    key,
    value,
    out,
    query_batch,
    query_row,
    key_batch,
    key_row,
    rows,
    tokens,
    scale,
    HEAD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # pragma: no cover
    """Softmax attention where all keys, at most 80, are seen at once. `scale` is that of the scores, times log2(e)."""
    head = tl.program_id(1) * HEAD
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, HEAD)
    is_row = (row < rows)[:, None]
    many = tl.arange(0, 64)
    few = 64 + tl.arange(0, 16)
    place = row[:, None] * query_row + head + column[None, :]
    q = tl.load(query + batch * query_batch + place, mask=is_row, other=0.0)
    keys = key + batch * key_batch + head
    k_many = tl.load(keys + many[None, :] * key_row + column[:, None], mask=(many < tokens)[None, :], other=0.0)
    k_few = tl.load(keys + few[None, :] * key_row + column[:, None], mask=(few < tokens)[None, :], other=0.0)
    scores_many = tl.where((many < tokens)[None, :], tl.dot(q, k_many) * scale, float("-inf"))
    scores_few = tl.where((few < tokens)[None, :], tl.dot(q, k_few) * scale, float("-inf"))
    highest = tl.maximum(tl.max(scores_many, 1), tl.max(scores_few, 1))
    p_many = tl.exp2(scores_many - highest[:, None])
    p_few = tl.exp2(scores_few - highest[:, None])
    total = tl.sum(p_many, 1) + tl.sum(p_few, 1)
    values = value + batch * key_batch + head
    v_many = tl.load(values + many[:, None] * key_row + column[None, :], mask=(many < tokens)[:, None], other=0.0)
    v_few = tl.load(values + few[:, None] * key_row + column[None, :], mask=(few < tokens)[:, None], other=0.0)
    y = tl.dot(p_many.to(v_many.dtype), v_many)
    y = tl.dot(p_few.to(v_few.dtype), v_few, y)
    width = tl.num_programs(1) * HEAD
    place = (batch * rows + row)[:, None] * width + head + column[None, :]
    tl.store(out + place, (y / total[:, None]).to(out.dtype.element_ty), mask=is_row)


@triton.jit
def euler(
    noise, latents, inputs, sigmas, index, guidance, size, GUIDED: tl.constexpr, BLOCK: tl.constexpr
):  # pragma: no cover
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    step = tl.load(index)
    sigma = tl.load(sigmas + step)
    following = tl.load(sigmas + step + 1)
    predicted = tl.load(noise + place, mask=mask, other=0.0).to(tl.float32)
    if GUIDED:
        positive = tl.load(noise + size + place, mask=mask, other=0.0).to(tl.float32)
        predicted += tl.load(guidance) * (positive - predicted)
    latent = tl.load(latents + place, mask=mask, other=0.0) + predicted * (following - sigma)
    tl.store(latents + place, latent, mask=mask)
    scaled = (latent / tl.sqrt(following * following + 1.0)).to(inputs.dtype.element_ty)
    tl.store(inputs + place, scaled, mask=mask)
    if GUIDED:
        tl.store(inputs + size + place, scaled, mask=mask)
