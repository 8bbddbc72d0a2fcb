"""Noise levels and times of a picture's steps: diffusers' EulerDiscreteScheduler, without its imports."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from consumer.engine.fast.configs import SchedulerConfig


@dataclass(frozen=True, slots=True)
class Schedule:
    """`timesteps`: float32 [steps]. `sigmas`: float32 [steps + 1], the last one 0. `first_scale`: of the noise."""

    timesteps: npt.NDArray[np.float32]
    sigmas: npt.NDArray[np.float32]
    first_scale: float


@lru_cache
def euler_schedule(config: SchedulerConfig, steps: int) -> Schedule:
    """The schedule of a picture of so many steps."""
    total = config.num_train_timesteps
    betas = _betas(config)
    kept = torch.cumprod(1.0 - betas, 0)
    trained = (((1 - kept) / kept) ** 0.5).numpy()
    if config.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps, dtype=np.float32)[::-1].copy()
    elif config.timestep_spacing == "leading":
        timesteps = (np.arange(steps) * (total // steps))[::-1].astype(np.float32) + config.steps_offset
    else:  # trailing
        timesteps = np.arange(total, 0, -total / steps).round().astype(np.float32) - 1
    sigmas = np.append(np.interp(timesteps, np.arange(total), trained), 0.0).astype(np.float32)
    highest = float(sigmas[0])
    first_scale = (highest**2 + 1) ** 0.5 if config.timestep_spacing == "leading" else highest
    return Schedule(timesteps.astype(np.float32), sigmas, first_scale)


def _betas(config: SchedulerConfig) -> torch.Tensor:
    start, end, total = config.beta_start, config.beta_end, config.num_train_timesteps
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, total, dtype=torch.float32) ** 2
    return torch.linspace(start, end, total, dtype=torch.float32)
