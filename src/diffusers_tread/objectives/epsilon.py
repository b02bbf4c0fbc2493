# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""DDPM's noise prediction (Ho et al. 2020, arXiv 2006.11239), as DiT was trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from diffusers import SchedulerMixin

from ..field_docs import with_field_docs
from .base import CorruptedLatents, Objective, check_fields, draw


if TYPE_CHECKING:
    from diffusers import DDIMScheduler


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class EpsilonObjective(Objective):
    """The network predicts the noise of z_t = sqrt(abar_t) x + sqrt(1 - abar_t) noise (arXiv 2006.11239, Equation 14).

    Betas rise linearly and t is uniform over the steps, as in DDPM and DiT. The network's timestep is t, 0 for the
    least noise.

    Raises:
        ValueError: A field is out of range.

    Example:
        >>> import torch
        >>> from diffusers_tread import EpsilonObjective, TREADTransformer2DModel
        >>> model = TREADTransformer2DModel(num_layers=6, sample_size=8, objective="epsilon")
        >>> labels = torch.zeros(8, dtype=torch.long)
        >>> EpsilonObjective().loss(model, torch.randn(8, 4, 8, 8), class_labels=labels).shape
        torch.Size([8])
    """

    scheduler_advice = "DDIMScheduler or another of DDPM's, prediction_type 'epsilon'"

    num_train_timesteps: int = 1000
    """Number of noise levels."""
    beta_start: float = 1e-4
    """Variance of the first step's noise, > 0."""
    beta_end: float = 0.02
    """Variance of the last step's noise, > 0."""

    def __post_init__(self):
        check_fields(self, positive=("num_train_timesteps", "beta_start", "beta_end"))

    def corrupt(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CorruptedLatents:
        # Times.
        normal, noise = draw(latents, generator)
        uniform = torch.special.ndtr(normal)
        t = (uniform * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)  # B

        # Noisy latents.
        betas = torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, device=latents.device)
        alpha_bar = (1.0 - betas).cumprod(dim=0)[t][:, None, None, None]
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        noisy = signal * latents.float() + sigma * noise
        return CorruptedLatents(
            hidden_states=noisy.to(latents.dtype),
            timestep=t.float(),
            target=noise,
            noisy=noisy,
            denoise=lambda prediction: (noisy - sigma * prediction) / signal,
        )

    def scheduler(self) -> "DDIMScheduler":
        """The deterministic scheduler with this objective's noise levels."""
        from diffusers import DDIMScheduler

        return DDIMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule="linear",
            clip_sample=False,
        )

    @classmethod
    def accepts(cls, scheduler: SchedulerMixin) -> bool:
        config = scheduler.config
        is_epsilon = config.get("prediction_type") == "epsilon" and "sigma_data" not in config
        return is_epsilon and not config.get("use_flow_sigmas", False)
