# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Denoising with EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364)."""

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin

from ..field_docs import with_field_docs
from ..schedulers.scheduling_edm_heun import EDMHeunScheduler, edm_preconditioning
from .base import CorruptedLatents, Objective, check_fields, draw


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class EDMObjective(Objective):
    """Denoising with EDM's preconditioning and noise distribution (arXiv 2206.00364, Table 1).

    EDM's loss lambda(sigma) (D - x)^2, with lambda = 1 / c_out^2, equals the squared error of the network's own output
    (Equation 8), which is what is computed here: at sigma = 0.002 lambda is 250,000 and would amplify the rounding of
    D - x, while the network's target has unit variance at every sigma. The network's timestep is ln(sigma) / 4.

    Raises:
        ValueError: A field is out of range.

    Example:
        >>> import torch
        >>> from diffusers_tread import EDMObjective, TREADTransformer2DModel
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, objective="edm")
        >>> objective = EDMObjective()
        >>> loss = objective.loss(model, torch.randn(8, 4, 8, 8), class_labels=torch.zeros(8, dtype=torch.long))
        >>> loss.shape, objective.scheduler().config.sigma_data
        (torch.Size([8]), 0.5)
    """

    scheduler_advice = (
        "EDMHeunScheduler, EDMEulerScheduler or EDMDPMSolverMultistepScheduler, prediction_type 'epsilon'"
    )

    sigma_data: float = 0.5
    """Standard deviation of the latents, > 0."""
    P_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    P_std: float = 1.2
    """Standard deviation of ln(sigma) in training, > 0."""

    def __post_init__(self):
        check_fields(self, positive=("sigma_data", "P_std"), finite=("P_mean",))

    def corrupt(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CorruptedLatents:
        # Noise levels.
        log_sigma, noise = draw(latents, generator)
        log_sigma = self.P_mean + self.P_std * log_sigma
        sigma = log_sigma.exp()[:, None, None, None]

        # The target is (x - c_skip (x + sigma noise)) / c_out, rearranged to avoid cancellation.
        x = latents.float()
        c_skip, c_out, c_in = edm_preconditioning(sigma, self.sigma_data)
        noisy = x + sigma * noise
        return CorruptedLatents(
            hidden_states=(c_in * noisy).to(latents.dtype),
            timestep=log_sigma / 4,
            target=c_in * (sigma / self.sigma_data * x - self.sigma_data * noise),
            noisy=noisy,
            denoise=lambda prediction: c_skip * noisy + c_out * prediction,
        )

    def scheduler(self) -> EDMHeunScheduler:
        """The scheduler with this objective's preconditioning."""
        return EDMHeunScheduler(sigma_data=self.sigma_data)

    @classmethod
    def accepts(cls, scheduler: SchedulerMixin) -> bool:
        return "sigma_data" in scheduler.config and scheduler.config.get("prediction_type") == "epsilon"
