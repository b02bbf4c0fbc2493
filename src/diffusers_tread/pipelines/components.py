# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which components of `TREADPipeline` belong together."""

import inspect
import sys
from collections.abc import Sequence
from typing import Literal

from diffusers import (
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    ModelMixin,
    SchedulerMixin,
)

from ..models import TREADTransformer2DModel


# These say by their class, not by their `prediction_type`, that the network predicts noise - data.
_FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)


def scheduler_kind(scheduler: SchedulerMixin) -> Literal["edm", "flow", "epsilon"] | None:
    """The objective of the models that `scheduler` samples from; None for another one."""
    prediction = scheduler.config.get("prediction_type")
    if "sigma_data" in scheduler.config:
        return "edm" if prediction == "epsilon" else None
    if isinstance(scheduler, _FLOW_SCHEDULERS):
        return "flow"
    # Solvers of several kinds say with `use_flow_sigmas` whose noise levels they have.
    if prediction == "flow_prediction":
        return "flow" if scheduler.config.get("use_flow_sigmas", True) else None
    return "epsilon" if prediction == "epsilon" and not scheduler.config.get("use_flow_sigmas", False) else None


def check_scheduler(scheduler: SchedulerMixin, objective: str | None) -> None:
    """Raises ValueError if `scheduler` cannot sample from a model trained with `objective`; None is not checked."""
    if objective is not None and scheduler_kind(scheduler) != objective:
        advice = {
            "edm": "EDMHeunScheduler, EDMEulerScheduler or EDMDPMSolverMultistepScheduler, prediction_type 'epsilon'",
            "flow": "FlowMatchEulerDiscreteScheduler, or a solver with prediction_type='flow_prediction', "
            "use_flow_sigmas=True",
            "epsilon": "DDIMScheduler or another of DDPM's, prediction_type 'epsilon'",
        }[objective]
        raise ValueError(
            f"Expected a scheduler for the transformer's objective {objective!r}, got {type(scheduler).__name__} "
            f"(prediction_type {scheduler.config.get('prediction_type')!r}). Use {advice}."
        )


def check_sigmas(scheduler: SchedulerMixin, sigmas: Sequence[float]) -> None:
    """Raises ValueError if `scheduler` takes no noise levels, or these make no schedule."""
    # diffusers' EDMEulerScheduler (seen in 0.36 and 0.42) takes `sigmas` for positions in [0, 1] of its own schedule.
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes_sigmas or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"Expected a scheduler that takes noise levels, got {type(scheduler).__name__}. Leave sigmas out, or use "
            "EDMHeunScheduler or FlowMatchEulerDiscreteScheduler."
        )
    levels = [*map(float, sigmas), 0.0]
    largest = 1.0 if scheduler_kind(scheduler) == "flow" else sys.float_info.max
    is_decreasing = all(sigma > following for sigma, following in zip(levels, levels[1:], strict=False))
    if len(levels) == 1 or not is_decreasing or levels[0] > largest:
        limit = "at most 1 (flow matching)" if largest == 1.0 else "finite"
        raise ValueError(
            f"Expected sigmas positive, {limit} and strictly decreasing, got {levels[:-1]}. Leave out the final 0: "
            "the scheduler appends it."
        )


def check_channels(transformer: TREADTransformer2DModel, vae: ModelMixin | None) -> None:
    """Raises ValueError if the transformer's output is not of its input's kind, or the VAE cannot decode it."""
    config = transformer.config
    if config.out_channels not in (None, config.in_channels):
        raise ValueError(
            f"Expected a transformer with as many output as input channels ({config.in_channels}), "
            f"got out_channels={config.out_channels}."
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"Expected a VAE with the transformer's {config.in_channels} channels, got {type(vae).__name__} with "
            f"{vae.config.latent_channels}. Use the VAE that made the training latents."
        )


def check_guidance_transformer(
    transformer: TREADTransformer2DModel, guidance_transformer: TREADTransformer2DModel | None
) -> None:
    """Raises ValueError if the predictions of the two cannot be combined; None is not checked."""
    if guidance_transformer is None:
        return
    for name in ("in_channels", "patch_size", "num_classes", "objective"):
        expected, got = transformer.config[name], guidance_transformer.config.get(name)
        if expected != got:
            raise ValueError(
                f"Expected a guidance_transformer with the transformer's {name} ({expected!r}), got {got!r}. Use an "
                "earlier checkpoint of the same training run."
            )
    check_channels(guidance_transformer, None)
