# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What the network is trained to predict: noise, target, per-sample loss, and the scheduler that samples it.

Every draw and all arithmetic outside the network are float32, whatever the dtype of the latents: in bfloat16 a noise
level has three significant digits. The network gets its input in the dtype of the latents.

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
    """Latents with noise, as a network gets them, and what it should say of them."""

    hidden_states: torch.Tensor
    """[B, C, H, W], the network's input, in the latents' dtype."""

    timestep: torch.Tensor
    """[B] float32, the network's time."""

    target: torch.Tensor
    """[B, C, H, W] float32, what a prediction should be: a network's output as a scheduler takes it."""

    noisy: torch.Tensor
    """[B, C, H, W] float32, the latents with their noise, not scaled for the network."""

    denoise: Callable[[torch.Tensor], torch.Tensor]
    """Maps a prediction, [B, C, H, W] float32, to the clean latents that it stands for."""


class Objective(ABC):
    """A way to train a denoiser, and the sampler that goes with it.

    An objective of your own is a frozen dataclass in one file with `corrupt`, `scheduler` and `accepts`, and one line
    `register_objective("name", MyObjective)`.
    """

    name: ClassVar[Any] = None
    """As in a model's config; set by `register_objective`."""

    scheduler_advice: ClassVar[str]
    """Which schedulers `accepts`, for error messages."""

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
        """A sampler for models trained so."""

    @classmethod
    @abstractmethod
    def accepts(cls, scheduler: SchedulerMixin) -> bool:
        """Whether `scheduler` samples from models trained so."""

    @classmethod
    def for_scheduler(cls, output: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What schedulers and the loss take for the prediction: here the network's output itself.

        Args:
            output: [B, C, H, W] float32, of the network.
            noisy: [B, C, H, W] float32, the latents with their noise, as the sampler has them.
            timestep: [B] or one for all, the network's time.
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
        """The loss of each sample: the mean squared error of the prediction, `for_scheduler`, and `terms`.

        Args:
            denoiser: Called as `denoiser(hidden_states, timestep=..., **conditions)`; gives an object with `sample`.
                A diffusers model, wrapped or not, or any function. If it has a config with an `objective`, it must be
                this one.
            latents: [B, C, H, W], clean samples of the scale that the model is meant for (about unit variance, images
                in [-1, 1]), floating-point. Values are looked at on the CPU alone, because each step would have to
                wait for an accelerator: images in [0, 255] there train without a word.
            generator: As in `corrupt`.
            routing: How the forward routes, handed to the denoiser; None leaves it to what surrounds the call.
            terms: Added to the denoising loss.
            images: [B, 3 or 1, height, width] in [-1, 1], those that the latents are of, for terms that want them.
            image_features: [B, N, E], what a vision encoder made of them, for terms that take it instead.
            step: Optimiser steps done before this one, for terms that end.
            **conditions: Handed to the denoiser, such as `class_labels` [B]. Labels are not looked at: check them
                where they come from.

        Returns:
            [B] float32.

        Raises:
            ValueError: The denoiser is trained for another objective, returns another shape, or not the tokens that a
                term asks for; two terms take the denoising loss's place; the latents are not [B, C, H, W] floats, or
                look like images in [0, 255].
        """
        self.check_denoiser(denoiser)
        if sum(term.replaces_denoising for term in terms) > 1:
            raise ValueError(f"Expected one term at most in the denoising loss's place, got {list(terms)}.")
        noised = self.corrupt(latents, generator)

        # The network's forward, with what the terms want of it.
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
        prediction = self.for_scheduler(output.sample.float(), noised.noisy, noised.timestep)
        if not terms:
            return (prediction - noised.target).square().mean(dim=(1, 2, 3))

        # The terms.
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
        """Raises ValueError for a model whose config says that it is for another objective."""
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
        ValueError: The latents are not [B, C, H, W] floats; on a CPU, they are of the scale of images in [0, 255]; the
            generator is on an accelerator and the latents are elsewhere.
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
    """Raises ValueError for a field that is not a finite number, or not a positive one."""
    for field in positive + finite:
        value = getattr(objective, field)
        if not math.isfinite(value) or (field in positive and value <= 0):
            kind = "positive, finite" if field in positive else "finite"
            raise ValueError(f"Expected {field} to be a {kind} number, got {value}. Correct that field.")
