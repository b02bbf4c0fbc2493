# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The noise level of each model call, and guidance in an interval of noise levels (arXiv 2404.07724)."""

import math
from collections.abc import Sequence

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
        return [float(sigma) for sigma in sigmas[:num_calls]]
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

    Raises:
        ValueError: See `noise_levels`.
    """
    low, high = interval
    return [step for step, level in enumerate(noise_levels(scheduler)) if low < level <= high]
