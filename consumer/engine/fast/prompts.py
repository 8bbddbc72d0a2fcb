"""What one picture is told: its prompts, its size, its times and its guidance, at fixed addresses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from consumer.engine.fast.capture import Captured, Pool
from consumer.engine.fast.schedule import Schedule
from consumer.engine.fast.staging import Staging, Value
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
        self._staging = Staging(
            {
                "ids": Value("int64", (2, batch, _TOKENS)),
                "present": Value("bool", (batch,)),
                "sizes": Value("float32", (batch, 6)),
                "timesteps": Value("float32", (MAX_STEPS,)),
                "sigmas": Value("float32", (MAX_STEPS + 1,)),
                "first_scale": Value("float32", (1,)),
                "guidance": Value("float32", (1,)),
            },
            device,
        )
        told = self._staging.device
        self.sigmas, self.first_scale, self.guidance = told["sigmas"], told["first_scale"], told["guidance"]
        self._unet = unet
        self._encode = encode
        self._computing = Captured(pool)

    def tell(
        self, ids: Tensor, present: Sequence[bool], *, size: tuple[int, int], schedule: Schedule, guidance: float
    ) -> None:
        """Encodes the prompts, and computes all that does not change from step to step.

        `ids`: int64 [2, batch, 77], on the CPU. `present`: which prompts are not to be encoded as zeros. `size`: height
        and width.
        """
        host = self._staging.host
        host["ids"][:] = ids.numpy()
        host["present"][:] = present
        host["sizes"][:] = [*size, 0.0, 0.0, *size]
        host["timesteps"][: len(schedule.timesteps)] = schedule.timesteps
        host["sigmas"][: len(schedule.sigmas)] = schedule.sigmas
        host["first_scale"][:] = schedule.first_scale
        host["guidance"][:] = guidance
        self._staging.send()
        self._computing(self._fill_conditions)

    def _fill_conditions(self) -> None:
        told = self._staging.device
        prompts, pooled = self._encode(told["ids"], told["present"])
        self._unet.condition(self.conditions, prompts, pooled, told["sizes"], told["timesteps"])
