# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the network is trained to predict: noise, target, per-sample loss, and the scheduler that samples it.

Every draw and all arithmetic outside the network are float32, whatever the dtype of the latents: in bfloat16 a noise
level has three significant digits. The network gets its input in the dtype of the latents.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..schedulers.scheduling_edm_heun import EDMHeunScheduler, edm_preconditioning
from .masked_losses import check_masked_loss, masked_loss


if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


# diffusers' flow schedulers call the network with sigma * num_train_timesteps.
_FLOW_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True, kw_only=True)
class EDMObjective:
    """Denoising with EDM's preconditioning and noise distribution (Karras et al. 2022, arXiv 2206.00364, Table 1).

    Raises:
        ValueError: if a field is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_tread.training import EDMObjective
        >>> def denoiser(hidden_states, timestep, class_labels, return_dict):
        ...     return (torch.zeros_like(hidden_states),)
        >>> objective = EDMObjective()
        >>> loss = objective.loss(denoiser, torch.randn(8, 4, 16, 16), torch.zeros(8, dtype=torch.long))
        >>> loss.shape, objective.scheduler().config.sigma_data
        (torch.Size([8]), 0.5)
    """

    name: ClassVar[str] = "edm"

    sigma_data: float = 0.5
    """Standard deviation of the latents, > 0."""
    P_mean: float = -1.2
    """Mean of ln(sigma) in training."""
    P_std: float = 1.2
    """Standard deviation of ln(sigma) in training, > 0."""
    reconstruction_weight: float | None = None
    """The loss of TREAD's first version, see `masked_loss`: only the tokens that a route keeps are denoised, those it
    routes away reconstruct the noisy latents with this weight (its lambda: 0.1 in the text; 0.0, no reconstruction, in
    the released run). None (default): the final version's plain loss of all tokens. Dense forwards have the plain loss
    in any case."""

    def __post_init__(self):
        _check_fields(self, positive=("sigma_data", "P_std"), finite=("P_mean",))

    def loss(
        self,
        denoiser: Callable[..., tuple[torch.Tensor, ...]],
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The weighted denoising loss of each sample, with noise levels and noise drawn in that order.

        EDM's loss lambda(sigma) (D - x)^2, with lambda = 1 / c_out^2, is the squared error of the network's own output
        (Equation 8). That form is the one computed: at sigma = 0.002 lambda is 250,000 and would blow up the rounding
        of D - x, while the network's target has unit variance at every sigma.

        Args:
            denoiser: called as `denoiser(hidden_states, timestep=, class_labels=, return_dict=False)[0]` with
                hidden_states `[B, C, H, W]` in the latents' dtype and timestep `[B]`, ln(sigma) / 4 in float32.
            latents: `[B, C, H, W]`, clean samples of standard deviation `sigma_data`, floating-point.
            class_labels: `[B]`, handed to the denoiser as they are.
            generator: source of the draws; a CPU generator gives the same draws for latents on any device.

        Returns:
            `[B]`, float32, the mean over C, H and W; with `reconstruction_weight` over the routes, as `masked_loss`.

        Raises:
            ValueError: if the latents are not `[B, C, H, W]` floats or the denoiser returns another shape; with
                `reconstruction_weight` as `check_masked_loss`.
        """
        log_sigma, noise = _draw(latents, generator)
        log_sigma = self.P_mean + self.P_std * log_sigma
        sigma = log_sigma.exp()[:, None, None, None]

        # The network's target is (x - c_skip (x + sigma noise)) / c_out, written without its cancellation.
        x = latents.float()
        c_skip, c_out, c_in = edm_preconditioning(sigma, self.sigma_data)
        noisy = x + sigma * noise
        return _loss(
            denoiser,
            (c_in * noisy).to(latents.dtype),
            log_sigma / 4,
            class_labels,
            target=c_in * (sigma / self.sigma_data * x - self.sigma_data * noise),
            noisy=noisy,
            denoise=lambda prediction: c_skip * noisy + c_out * prediction,
            reconstruction_weight=self.reconstruction_weight,
        )

    def scheduler(self) -> EDMHeunScheduler:
        """The sampler with this objective's preconditioning."""
        return EDMHeunScheduler(sigma_data=self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class FlowMatchingObjective:
    """Rectified flow in diffusers' direction: t = 1 is noise, the network predicts noise - x (Esser et al. 2024, arXiv
    2403.03206, Section 3.1 for the times, Equation 23 for the shift).

    Raises:
        ValueError: if a field is outside its range.

    Example:
        >>> import torch
        >>> from diffusers_tread.training import FlowMatchingObjective
        >>> def denoiser(hidden_states, timestep, class_labels, return_dict):
        ...     return (torch.zeros_like(hidden_states),)
        >>> objective = FlowMatchingObjective(shift=3.0)
        >>> loss = objective.loss(denoiser, torch.randn(8, 4, 16, 16), torch.zeros(8, dtype=torch.long))
        >>> loss.shape, objective.scheduler().config.shift
        (torch.Size([8]), 3.0)
    """

    name: ClassVar[str] = "flow"

    weighting_scheme: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the training times before the shift."""
    logit_mean: float = 0.0
    """Mean of logit(t); read by `logit_normal` only."""
    logit_std: float = 1.0
    """Standard deviation of logit(t), > 0; read by `logit_normal` only."""
    shift: float = 1.0
    """t becomes shift t / (1 + (shift - 1) t), in training and in the scheduler; > 0, above 1 for more noise."""
    reconstruction_weight: float | None = None
    """The loss of TREAD's first version, see `masked_loss`: only the tokens that a route keeps are denoised, those it
    routes away reconstruct the noisy latents with this weight (its lambda: 0.1 in the text; 0.0, no reconstruction, in
    the released run). None (default): the final version's plain loss of all tokens. Dense forwards have the plain loss
    in any case."""

    def __post_init__(self):
        if self.weighting_scheme not in ("logit_normal", "uniform"):
            raise ValueError(
                f"Expected weighting_scheme to be 'logit_normal' or 'uniform', got {self.weighting_scheme!r}. Use one."
            )
        _check_fields(self, positive=("logit_std", "shift"), finite=("logit_mean",))

    def loss(
        self,
        denoiser: Callable[..., tuple[torch.Tensor, ...]],
        latents: torch.Tensor,
        class_labels: torch.Tensor | None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The squared error of the velocity for each sample, with times and noise drawn in that order.

        Args:
            denoiser: called as `denoiser(hidden_states, timestep=, class_labels=, return_dict=False)[0]` with
                hidden_states `[B, C, H, W]` in the latents' dtype and timestep `[B]`, 1000 t in float32.
            latents: `[B, C, H, W]`, clean samples, floating-point.
            class_labels: `[B]`, handed to the denoiser as they are.
            generator: source of the draws; a CPU generator gives the same draws for latents on any device.

        Returns:
            `[B]`, float32, the mean over C, H and W; with `reconstruction_weight` over the routes, as `masked_loss`.

        Raises:
            ValueError: if the latents are not `[B, C, H, W]` floats or the denoiser returns another shape; with
                `reconstruction_weight` as `check_masked_loss`.
        """
        normal, noise = _draw(latents, generator)
        if self.weighting_scheme == "logit_normal":
            t = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        else:
            t = torch.special.ndtr(normal)  # the normal's distribution function makes it uniform
        t = self.shift * t / (1 + (self.shift - 1) * t)

        x, t_map = latents.float(), t[:, None, None, None]
        noisy = (1 - t_map) * x + t_map * noise
        return _loss(
            denoiser,
            noisy.to(latents.dtype),
            _FLOW_TRAIN_TIMESTEPS * t,
            class_labels,
            target=noise - x,
            noisy=noisy,
            denoise=lambda prediction: noisy - t_map * prediction,
            reconstruction_weight=self.reconstruction_weight,
        )

    def scheduler(self) -> "FlowMatchEulerDiscreteScheduler":
        """The sampler with this objective's shift, calling the network with 1000 t."""
        from diffusers import FlowMatchEulerDiscreteScheduler  # which imports scipy.stats where it is installed

        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=_FLOW_TRAIN_TIMESTEPS, shift=self.shift)


def _check_fields(objective, *, positive: tuple[str, ...], finite: tuple[str, ...]) -> None:
    for field in positive + finite:
        value = getattr(objective, field)
        if not math.isfinite(value) or (field in positive and value <= 0):
            kind = "positive, finite" if field in positive else "finite"
            raise ValueError(f"Expected {field} to be a {kind} number, got {value}. Correct that field.")
    weight = objective.reconstruction_weight
    if weight is not None and not (isinstance(weight, (int, float)) and 0 <= weight < math.inf):
        raise ValueError(f"Expected reconstruction_weight to be a finite number >= 0 or None, got {weight}. Use 0.1.")


def _draw(latents: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A standard normal number per sample, `[B]`, then one per element, `[B, C, H, W]`, both float32."""
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(
            f"Expected latents [B, C, H, W] of a floating-point dtype, got {tuple(latents.shape)} of {latents.dtype}. "
            "Scale images to floats and add the batch dimension."
        )
    options = {"generator": generator, "device": latents.device, "dtype": torch.float32}
    return randn_tensor(latents.shape[:1], **options), randn_tensor(latents.shape, **options)


def _loss(
    denoiser, hidden_states, timestep, class_labels, *, target, noisy, denoise, reconstruction_weight
) -> torch.Tensor:
    """`[B]`: the squared error of the prediction; `denoise` maps the prediction to clean latents."""
    patch_size = check_masked_loss(denoiser, reconstruction_weight=reconstruction_weight)
    prediction, *kept = denoiser(hidden_states, timestep=timestep, class_labels=class_labels, return_dict=False)
    if prediction.shape != target.shape:
        raise ValueError(
            f"Expected the denoiser to return {tuple(target.shape)}, the latents' shape, got "
            f"{tuple(prediction.shape)}. Use a model with as many output as input channels."
        )
    prediction = prediction.float()
    error = (prediction - target).square()
    if patch_size is None or not kept:
        return error.mean(dim=(1, 2, 3))
    return masked_loss(
        error,
        denoised=denoise(prediction),
        noisy=noisy,
        kept_token_ids=kept[0],
        patch_size=patch_size,
        reconstruction_weight=reconstruction_weight,
    )
