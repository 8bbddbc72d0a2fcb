"""Nearest-neighbour upsampling by two and a 3x3 convolution, as one 2x2 convolution of the small picture.

Every row of the large picture meets two rows of the small one: the even rows 2i meet i - 1 and i, the odd rows 2i + 1
meet i and i + 1; likewise columns. So each of the four phases (even or odd row, even or odd column) is a 2x2
convolution whose weights are sums of the 3x3 ones. With padding 1 the four of them are one convolution with four times
the channels and 4/9 of the work; `Ops.interleave` puts its results where they belong.
"""

import torch
from torch import Tensor


def phase_weight(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] to [4 * out, in, 2, 2], summed in float32, in channels-last memory."""
    kernel = weight.float()
    rows = _pairs(kernel, 2)
    phases = [phase for row in rows for phase in _pairs(row, 3)]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _pairs(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What an even and what an odd place of the large picture makes of three taps along `dim`."""
    before, middle, after = kernel.unbind(dim)
    return torch.stack([before, middle + after], dim), torch.stack([before + middle, after], dim)
