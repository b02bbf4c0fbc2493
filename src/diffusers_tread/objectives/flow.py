# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Rectified flow (Esser et al. 2024, arXiv 2403.03206)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from diffusers import SchedulerMixin

from ..field_docs import with_field_docs
from .base import CorruptedLatents, Objective, check_fields, draw


if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


# diffusers' flow schedulers call the network with sigma * num_train_timesteps.
_TRAIN_TIMESTEPS = 1000


def dimension_shift(num_values: float) -> float:
    """sqrt(C H W / 4096): 1 for Stable Diffusion's latents at 256 pixels, more for larger ones (arXiv 2510.11690).

    The same noise level hides less of latents with more values, so larger latents are trained with more noise.

    Args:
        num_values: C H W of the latents, > 0.
    """
    return math.sqrt(num_values / 4096)


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class FlowMatchingObjective(Objective):
    """Rectified flow in diffusers' direction: t = 1 is noise, the network predicts noise - x.

    The source is arXiv 2403.03206: Section 3.1 for the times, Equation 23 for the shift. The network's timestep is
    1000 t.

    Raises:
        ValueError: A field is out of range.

    Example:
        >>> import torch
        >>> from diffusers_tread import FlowMatchingObjective, TREADTransformer2DModel
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, objective="flow")
        >>> objective = FlowMatchingObjective(shift=3.0)
        >>> loss = objective.loss(model, torch.randn(8, 4, 8, 8), class_labels=torch.zeros(8, dtype=torch.long))
        >>> loss.shape, objective.scheduler().config.shift
        (torch.Size([8]), 3.0)
    """

    scheduler_advice = (
        "FlowMatchEulerDiscreteScheduler, FlowSDEScheduler, or a solver with prediction_type='flow_prediction', "
        "use_flow_sigmas=True, and num_train_timesteps=1000"
    )

    weighting_scheme: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the training times before the shift."""
    logit_mean: float = 0.0
    """Mean of logit(t); used by `logit_normal` only."""
    logit_std: float = 1.0
    """Standard deviation of logit(t), > 0; used by `logit_normal` only."""
    shift: float = 1.0
    """t becomes shift t / (1 + (shift - 1) t), in training and in the scheduler; > 0, above 1 for more noise."""

    def __post_init__(self):
        if self.weighting_scheme not in ("logit_normal", "uniform"):
            raise ValueError(
                f"Expected weighting_scheme to be 'logit_normal' or 'uniform', got {self.weighting_scheme!r}. Use one."
            )
        check_fields(self, positive=("logit_std", "shift"), finite=("logit_mean",))

    def corrupt(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CorruptedLatents:
        # Times.
        normal, noise = draw(latents, generator)
        if self.weighting_scheme == "logit_normal":
            t = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        else:
            t = torch.special.ndtr(normal)  # the normal distribution function of a normal number is uniform
        t = self.shift * t / (1 + (self.shift - 1) * t)

        # Noisy latents.
        x, t_map = latents.float(), t[:, None, None, None]
        noisy = (1 - t_map) * x + t_map * noise
        return CorruptedLatents(
            hidden_states=noisy.to(latents.dtype),
            timestep=_TRAIN_TIMESTEPS * t,
            target=noise - x,
            noisy=noisy,
            denoise=lambda prediction: noisy - t_map * prediction,
        )

    def scheduler(self) -> "FlowMatchEulerDiscreteScheduler":
        """The scheduler with this objective's shift, which calls the network with 1000 t."""
        from diffusers import FlowMatchEulerDiscreteScheduler  # imports scipy.stats, if installed

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=_TRAIN_TIMESTEPS, shift=self.shift)

    @classmethod
    def accepts(cls, scheduler: SchedulerMixin) -> bool:
        # The class of these, not their `prediction_type`, implies that the network predicts noise - data.
        from diffusers import (
            FlowMatchEulerDiscreteScheduler,
            FlowMatchHeunDiscreteScheduler,
            FlowMatchLCMScheduler,
        )

        if scheduler.config.get("num_train_timesteps") != _TRAIN_TIMESTEPS:  # the network's time is 1000 t
            return False
        kinds = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
        # FlowSDEScheduler. Not isinstance: one from the Hub brings its own copy of the class.
        if isinstance(scheduler, kinds) or hasattr(scheduler, "diffusion_coefficient"):
            return True

        # Solvers that support several kinds of models say by `use_flow_sigmas` that they use flow noise levels.
        is_flow = scheduler.config.get("prediction_type") == "flow_prediction" and "sigma_data" not in scheduler.config
        return is_flow and scheduler.config.get("use_flow_sigmas", True)
