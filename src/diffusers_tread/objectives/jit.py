# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Flow matching with a network that predicts the clean sample, for pixels (JiT, arXiv 2511.13720)."""

from dataclasses import dataclass

import torch

from ..field_docs import with_field_docs
from .base import CorruptedLatents
from .flow import FlowMatchingObjective


# Lower bound of t where a velocity is divided by it.
_SMALLEST_TIME = 0.05


def velocity_from_clean(clean: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """v = (z_t - x) / max(t, 0.05), JiT's velocity for an estimate of the clean sample (arXiv 2511.13720).

    The paper writes (x - z_t) / (1 - t) with data at t = 1 and clips the denominator at 0.05. For the true x this is
    noise - x if t >= 0.05, and t / 0.05 times that below.

    Args:
        clean: [B, C, H, W], x or an estimate of it.
        noisy: [B, C, H, W], z_t = (1 - t) x + t noise.
        timestep: [B] or one for all, 1000 t.
    """
    t = (timestep.to(noisy.device, noisy.dtype) / 1000).clamp(min=_SMALLEST_TIME)
    return (noisy - clean) / t.reshape(-1, 1, 1, 1)


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class JiTObjective(FlowMatchingObjective):
    """Flow matching whose network predicts x; the loss is on the velocity that x implies (arXiv 2511.13720).

    Noise, times and schedulers are those of `FlowMatchingObjective`; the pipeline passes them the velocity. In patches
    of many pixels x lies on a low-dimensional manifold, while noise and velocity fill all dimensions. JiT's t is 1 for
    data, with mean -0.8 of logit(t); here t = 1 is noise, so the mean is 0.8.

    Raises:
        ValueError: A field is out of range.

    Example:
        >>> import torch
        >>> from diffusers_tread import JiTObjective, TREADTransformer2DModel
        >>> size = {"sample_size": 32, "in_channels": 3, "patch_size": 8, "patch_bottleneck_dim": 16}
        >>> model = TREADTransformer2DModel(num_layers=6, objective="jit", **size)
        >>> labels = torch.zeros(8, dtype=torch.long)
        >>> JiTObjective().loss(model, torch.rand(8, 3, 32, 32) * 2 - 1, class_labels=labels).shape
        torch.Size([8])
    """

    logit_mean: float = 0.8
    """Mean of logit(t), above 0 for more noise; used by `logit_normal` only."""
    logit_std: float = 0.8
    """Standard deviation of logit(t), > 0; used by `logit_normal` only."""

    def corrupt(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CorruptedLatents:
        noised = super().corrupt(latents, generator)
        noisy, timestep = noised.noisy, noised.timestep
        t = (timestep / 1000).clamp(min=_SMALLEST_TIME)[:, None, None, None]
        return CorruptedLatents(
            hidden_states=noised.hidden_states,
            timestep=timestep,
            target=velocity_from_clean(latents.float(), noisy, timestep),
            noisy=noisy,
            denoise=lambda prediction: noisy - t * prediction,
        )

    @classmethod
    def for_scheduler(cls, output: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return velocity_from_clean(output, noisy, timestep)
