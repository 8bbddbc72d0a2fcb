"""Everything that one picture size needs on the device, at fixed addresses, so that its steps are CUDA graphs."""

from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from consumer.engine.fast.capture import Captured, Pool
from consumer.engine.fast.decoder import Decoder
from consumer.engine.fast.ops import Ops
from consumer.engine.fast.prompts import Prompts
from consumer.engine.fast.staging import Staging, Value
from consumer.engine.fast.unet import UNet
from consumer.engine.protocol import Pixels


class Canvas:
    """Pictures of one size, of `prompts`' batch. `latents`: float32 [1, height / 8, width / 8, 4]."""

    def __init__(
        self, height: int, width: int, unet: UNet, decoder: Decoder, prompts: Prompts, ops: Ops, pool: Pool | None
    ) -> None:
        device = prompts.sigmas.device
        rows, columns, channels = decoder.latent_shape(height, width)
        shape = (1, rows, columns, channels)
        self._noise = Staging({"noise": Value("float32", (1, channels, rows, columns))}, device)
        self.latents = torch.zeros(shape, device=device)
        self._pixels = torch.zeros(height, width, 3, dtype=torch.uint8, device=device)
        self._finite = torch.zeros((), dtype=torch.bool, device=device)
        self._inputs = torch.zeros(prompts.batch, *shape[1:], dtype=unet.dtype, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._unet = unet
        self._decoder = decoder
        self._prompts = prompts
        self._ops = ops
        self._beginning, self._stepping, self._decoding = (Captured(pool) for _ in range(3))

    def begin(self, noise: npt.NDArray[np.float32]) -> None:
        """Starts from `noise`, [1, 4, height / 8, width / 8], at the first step of what the prompts were told."""
        self._noise.host["noise"][:] = noise
        self._noise.send()
        self._beginning(self._begin)

    def step(self) -> None:
        """The next step; the first one of a size takes longer."""
        self._stepping(self._step)

    def decode(self) -> None:
        """Makes the picture that `download` fetches."""
        self._decoding(partial(self._decode, self._decoder))

    def run_once(self) -> None:
        """Goes through a step and a decoding without recording them."""
        self._index.zero_()  # where the last picture has left it there may be no step
        self._step()
        self._decode(self._decoder)

    @torch.no_grad()
    def decode_by(self, decoder: Decoder) -> None:
        """Decodes by another decoder, this once."""
        self._decode(decoder)

    def download(self) -> tuple[Pixels, bool]:
        """The decoded picture, uint8 [height, width, 3], and whether every value of it was finite."""
        pixels = torch.empty(self._pixels.shape, dtype=torch.uint8, pin_memory=self._pixels.is_cuda)
        pixels.copy_(self._pixels, non_blocking=True)
        finite = bool(self._finite)  # waits for both
        return pixels.numpy(), finite

    def has_finite_latents(self) -> bool:
        return bool(torch.isfinite(self.latents).all())

    def _begin(self) -> None:
        prompts = self._prompts
        self.latents.copy_(self._noise.device["noise"].permute(0, 2, 3, 1)).mul_(prompts.first_scale)
        self._inputs.copy_((self.latents / (prompts.sigmas[0] ** 2 + 1).sqrt()).expand_as(self._inputs))
        self._index.zero_()

    def _step(self) -> None:
        predicted = self._unet.predict(self._inputs, self._prompts.conditions, self._index)
        prompts = self._prompts
        self._ops.euler(predicted, self.latents, self._inputs, prompts.sigmas, self._index, prompts.guidance)
        self._index.add_(1)

    def _decode(self, decoder: Decoder) -> None:
        picture = decoder.decode(self.latents)[0].float()
        self._finite.copy_(torch.isfinite(picture).all())
        self._pixels.copy_((picture / 2 + 0.5).clamp(0, 1).mul(255).round())
