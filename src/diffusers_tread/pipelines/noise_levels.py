# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The noise level of each model call, and guidance in an interval of noise levels (arXiv 2404.07724)."""

import math
from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin


def noise_levels(scheduler: SchedulerMixin) -> list[float]:
    """Noise level of each entry of `scheduler.timesteps`, in the scheduler's own unit.

    EDM: the noise's standard deviation sigma. Flow matching: the share t of noise, in [0, 1]. DDPM: the ratio of the
    noise's standard deviation to the signal's, sqrt((1 - abar) / abar).

    Args:
        scheduler: A scheduler of diffusers or this package, after `set_timesteps`.

    Raises:
        ValueError: It has neither a level per call nor DDPM's `alphas_cumprod`.
    """
    num_calls, sigmas = len(scheduler.timesteps), getattr(scheduler, "sigmas", ())
    if num_calls <= len(sigmas) <= num_calls + 1:
        return torch.as_tensor(sigmas[:num_calls]).tolist()  # one wait for the device
    if hasattr(scheduler, "alphas_cumprod"):
        alphas = scheduler.alphas_cumprod[scheduler.timesteps.long().cpu()].double()
        return ((1 - alphas) / alphas).sqrt().tolist()
    raise ValueError(
        f"Expected a scheduler that tells the noise level of each model call, got {type(scheduler).__name__}. Use "
        "another one, or a guider's start and stop, which are shares of the calls."
    )


def check_interval(interval: Sequence[float]) -> None:
    """Raises ValueError unless `interval` is two noise levels, 0 <= low < high; high may be infinite."""
    if len(interval) != 2 or not 0.0 <= interval[0] < interval[1] or interval[0] == math.inf:
        raise ValueError(f"Expected an interval of two noise levels, 0 <= low < high, got {tuple(interval)}.")


def steps_inside(scheduler: SchedulerMixin, interval: Sequence[float]) -> list[int]:
    """Indices of the model calls, 0-based, whose noise level lies in (low, high], as in arXiv 2404.07724.

    Both are compared in float32, in which schedulers keep their levels, so that 0.7 is inside (0.1, 0.7].

    Raises:
        ValueError: There is none; see also `noise_levels`.
    """
    low, high = torch.tensor(interval, dtype=torch.float32)
    levels = torch.tensor(noise_levels(scheduler), dtype=torch.float32)
    inside = ((low < levels) & (levels <= high)).nonzero().flatten().tolist()
    if not inside:
        raise ValueError(
            f"Expected a noise level of {type(scheduler).__name__} in guidance_interval={tuple(interval)}, got levels "
            f"from {levels.min():.4g} to {levels.max():.4g} in {len(levels)} calls. Without guidance leave it out."
        )
    return inside
