"""What one picture is told: its prompts, its size, its times and its guidance, at fixed addresses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consumer.engine.fast.capture import Captured, Pool
from consumer.engine.fast.schedule import Schedule
from consumer.engine.fast.unet import UNet

MAX_STEPS = 50
_TOKENS = 77

# int64 [2, batch, 77] and bool [batch] to prompts [batch, 77, channels] and pooled [batch, channels]
Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Prompts:
    """The conditions of pictures with a batch of 1 (the prompt alone) or 2 (the negative one, then the prompt)."""

    def __init__(self, batch: int, unet: UNet, encode: Encode, device: torch.device, pool: Pool | None) -> None:
        self.batch = batch
        self.conditions = unet.conditions(MAX_STEPS, batch, _TOKENS)
        self.timesteps = torch.zeros(MAX_STEPS, device=device)
        self.sigmas = torch.zeros(MAX_STEPS + 1, device=device)
        self.guidance = torch.zeros(1, device=device)
        self._ids = torch.zeros(2, batch, _TOKENS, dtype=torch.int64, device=device)
        self._present = torch.zeros(batch, dtype=torch.bool, device=device)
        self._sizes = torch.zeros(batch, 6, device=device)
        self._unet = unet
        self._encode = encode
        self._compute = Captured(self._fill_conditions, pool)

    def tell(
        self, ids: Tensor, present: Sequence[bool], *, size: tuple[int, int], schedule: Schedule, guidance: float
    ) -> None:
        """Encodes the prompts, and computes all that does not change from step to step.

        `ids`: int64 [2, batch, 77]. `present`: which prompts are not to be encoded as zeros. `size`: height and width.
        """
        self._ids.copy_(ids, non_blocking=True)
        self._present.copy_(torch.tensor(present), non_blocking=True)
        self._sizes.copy_(torch.tensor([*size, 0.0, 0.0, *size]), non_blocking=True)
        self.timesteps[: len(schedule.timesteps)].copy_(torch.from_numpy(schedule.timesteps), non_blocking=True)
        self.sigmas[: len(schedule.sigmas)].copy_(torch.from_numpy(schedule.sigmas), non_blocking=True)
        self.guidance.fill_(guidance)
        self._compute()

    def _fill_conditions(self) -> None:
        prompts, pooled = self._encode(self._ids, self._present)
        self._unet.condition(self.conditions, prompts, pooled, self._sizes, self.timesteps)
