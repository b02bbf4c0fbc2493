# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The base class of objectives: noise, target, per-sample loss, and the scheduler that samples the model.

All draws and all arithmetic outside the network are float32, whatever the dtype of the latents: in bfloat16 a noise
level would have only three significant digits. The network gets its input in the dtype of the latents.

Shapes: B batch, C channels, H and W latent size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..field_docs import with_field_docs
from ..routing import RoutingCall
from .terms import ForwardRecord, LossTerm


@with_field_docs
@dataclass(frozen=True, kw_only=True, eq=False)
class CorruptedLatents:
    """Noisy latents as the network gets them, and the target of its prediction."""

    hidden_states: torch.Tensor
    """[B, C, H, W], the network's input, in the latents' dtype."""

    timestep: torch.Tensor
    """[B] float32, the network's timestep."""

    target: torch.Tensor
    """[B, C, H, W] float32, the target of the prediction, which is the output after `Objective.for_scheduler`."""

    noisy: torch.Tensor
    """[B, C, H, W] float32, the noisy latents, not scaled for the network."""

    denoise: Callable[[torch.Tensor], torch.Tensor]
    """Maps a prediction, [B, C, H, W] float32, to the clean latents that it implies."""


class Objective(ABC):
    """A way to train a denoiser, and the matching scheduler.

    An objective of your own is a frozen dataclass in one file with `corrupt`, `scheduler` and `accepts`, and one line
    `register_objective("name", MyObjective)`.
    """

    name: ClassVar[Any] = None
    """The name in a model's config; set by `register_objective`."""

    scheduler_advice: ClassVar[str]
    """The schedulers that `accepts` allows, for error messages."""

    @abstractmethod
    def corrupt(self, latents: torch.Tensor, generator: torch.Generator | None = None) -> CorruptedLatents:
        """Draws noise levels and noise, in that order.

        Args:
            latents: [B, C, H, W], clean samples, floating-point.
            generator: Source of the draws; a CPU generator gives the same draws for latents on any device.

        Raises:
            ValueError: As `draw`.
        """

    @abstractmethod
    def scheduler(self) -> SchedulerMixin:
        """A scheduler for models trained with this objective."""

    @classmethod
    @abstractmethod
    def accepts(cls, scheduler: SchedulerMixin) -> bool:
        """Whether `scheduler` can sample from models trained with this objective."""

    @classmethod
    def for_scheduler(cls, output: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Converts the network's output to the prediction that schedulers and the loss use; here they are the same.

        Args:
            output: [B, C, H, W] float32, the network's output.
            noisy: [B, C, H, W] float32, the noisy latents, as the sampler has them.
            timestep: [B] or one for all, the network's timestep.
        """
        return output

    def loss(
        self,
        denoiser: Callable[..., Any],
        latents: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        routing: RoutingCall | None = None,
        terms: Sequence[LossTerm] = (),
        images: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        step: int | None = None,
        **conditions: Any,
    ) -> torch.Tensor:
        """The loss of each sample: the mean squared error of the prediction (after `for_scheduler`), plus `terms`.

        Args:
            denoiser: Called as `denoiser(hidden_states, timestep=..., **conditions)`; returns an object with `sample`.
                A diffusers model, wrapped or not, or any function. If it has a config with an `objective`, it must be
                this one.
            latents: [B, C, H, W], clean samples of the scale that the model is meant for (about unit variance, images
                in [-1, 1]), floating-point. Values are checked on the CPU only, because each step would have to wait
                for an accelerator: there, images in [0, 255] train without an error.
            generator: As in `corrupt`.
            routing: How the forward routes, passed to the denoiser; None leaves it to `token_routing` and defaults.
            terms: Added to the denoising loss.
            images: [B, 3 or 1, height, width] in [-1, 1], the images of the latents, for terms that need them.
            image_features: [B, N, E], a vision encoder's features of the images, for terms that accept these instead.
            step: Optimiser steps done before this one, for terms that stop at some step.
            **conditions: Passed to the denoiser, such as `class_labels` [B]. Labels are not checked here: check them
                where they come from.

        Returns:
            [B] float32.

        Raises:
            ValueError: The denoiser is trained for another objective, returns another shape, or does not return the
                tokens that a term needs; two terms replace the denoising loss; the latents are not [B, C, H, W]
                floats, or look like images in [0, 255].
        """
        # Noisy latents.
        self.check_denoiser(denoiser)
        if sum(term.replaces_denoising for term in terms) > 1:
            raise ValueError(f"Expected one term at most in the denoising loss's place, got {list(terms)}.")
        noised = self.corrupt(latents, generator)

        # The network's forward, which also returns what the terms need.
        wanted = tuple(index for term in terms for index in term.hidden_states_at)
        asked = {} if routing is None else {"routing": routing}
        asked |= {"hidden_states_at": wanted} if wanted else {}
        output = denoiser(noised.hidden_states, timestep=noised.timestep, **conditions, **asked)
        if output.sample.shape != noised.target.shape:
            raise ValueError(
                f"Expected the denoiser to return {tuple(noised.target.shape)}, the latents' shape, got "
                f"{tuple(output.sample.shape)}. Use a model with as many output as input channels."
            )
        if wanted and getattr(output, "hidden_states", None) is None:
            raise ValueError(
                f"Expected the denoiser to give the tokens after blocks {sorted(set(wanted))} as `hidden_states`, "
                "which a loss term asks for, got none. Take a denoiser of this package, or leave the term out."
            )

        # The denoising loss alone.
        prediction = self.for_scheduler(output.sample.float(), noised.noisy, noised.timestep)
        if not terms:
            return (prediction - noised.target).square().mean(dim=(1, 2, 3))

        # The loss with terms.
        record = ForwardRecord(
            latents=latents,
            noisy=noised.noisy,
            timestep=noised.timestep,
            target=noised.target,
            prediction=prediction,
            denoise=noised.denoise,
            conditions=conditions,
            kept_token_ids=getattr(output, "kept_token_ids", None),
            hidden_states=getattr(output, "hidden_states", None),
            projected_states=getattr(output, "projected_states", None),
            images=images,
            image_features=image_features,
            step=step,
        )
        losses = [term(record) for term in terms]
        if not any(term.replaces_denoising for term in terms):
            losses.append((prediction - noised.target).square().mean(dim=(1, 2, 3)))
        return torch.stack(losses).sum(dim=0)

    def check_denoiser(self, denoiser: Callable[..., Any]) -> None:
        """Raises ValueError for a model whose config names another objective."""
        module = denoiser
        while getattr(module, "config", None) is None:
            module = getattr(module, "_orig_mod", None) or getattr(module, "module", None)
            if module is None:
                return
        theirs = module.config.get("objective") if hasattr(module.config, "get") else None
        if theirs is not None and theirs != self.name:
            raise ValueError(
                f"Expected a denoiser for the objective {self.name!r}, got {type(module).__name__} with "
                f"objective={theirs!r}. Use the objective it was made for, or make it with objective={self.name!r}."
            )


def draw(latents: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A standard normal number per sample, [B], then one per element, [B, C, H, W], both float32.

    Raises:
        ValueError: The latents are not [B, C, H, W] floats; on a CPU, they look like images in [0, 255]; the generator
            is on an accelerator and the latents are elsewhere.
    """
    if latents.ndim != 4 or not latents.is_floating_point():
        raise ValueError(
            f"Expected latents [B, C, H, W] of a floating-point dtype, got {tuple(latents.shape)} of {latents.dtype}. "
            "Scale images to floats in [-1, 1] and add the batch dimension."
        )
    check_scale(latents)
    options = {"generator": generator, "device": latents.device, "dtype": torch.float32}
    return randn_tensor(latents.shape[:1], **options), randn_tensor(latents.shape, **options)


def check_scale(latents: torch.Tensor) -> None:
    """Raises ValueError for latents on the CPU that look like images in [0, 255]."""
    if latents.device.type == "cpu" and latents.numel() and latents.abs().amax() > 100:
        raise ValueError(
            "Expected latents of about unit variance or images in [-1, 1], got values up to "
            f"{latents.abs().amax():g}. Scale them: images in [0, 255] by images / 127.5 - 1."
        )


def check_fields(objective: Objective, *, positive: tuple[str, ...] = (), finite: tuple[str, ...] = ()) -> None:
    """Raises ValueError for a field that is not a finite number, or, in `positive`, not above 0."""
    for field in positive + finite:
        value = getattr(objective, field)
        if not math.isfinite(value) or (field in positive and value <= 0):
            kind = "positive, finite" if field in positive else "finite"
            raise ValueError(f"Expected {field} to be a {kind} number, got {value}. Correct that field.")
