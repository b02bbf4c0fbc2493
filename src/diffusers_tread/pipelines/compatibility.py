# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which components of `TREADPipeline` belong together."""

import inspect
import sys
from collections.abc import Sequence

import torch
from diffusers import EDMEulerScheduler, ModelMixin, SchedulerMixin

from ..objectives import OBJECTIVES, FlowMatchingObjective, find_objective


def check_scheduler(scheduler: SchedulerMixin, transformer: ModelMixin) -> None:
    """Raises ValueError if `scheduler` cannot sample from the transformer, or nobody said what that is trained for."""
    name = transformer.config.get("objective")
    if name is None:
        raise ValueError(
            f"Expected a transformer with an objective in its config, got {type(transformer).__name__} without. Say "
            f"what it was trained for, one of {list(OBJECTIVES)}: transformer.register_to_config(objective=...)."
        )
    objective = find_objective(name)
    if not objective.accepts(scheduler):
        raise ValueError(
            f"Expected a scheduler for the transformer's objective {name!r}, got {type(scheduler).__name__} "
            f"(prediction_type {scheduler.config.get('prediction_type')!r}). Use {objective.scheduler_advice}."
        )


def check_sigmas(scheduler: SchedulerMixin, sigmas: Sequence[float]) -> None:
    """Raises ValueError if `scheduler` takes no noise levels, or these make no schedule."""
    # diffusers' EDMEulerScheduler takes `sigmas` for positions in [0, 1] of its own schedule (`set_timesteps`):
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/schedulers/scheduling_edm_euler.py
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes_sigmas or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"Expected a scheduler that takes noise levels, got {type(scheduler).__name__}. Leave sigmas out, or use "
            "EDMHeunScheduler or FlowMatchEulerDiscreteScheduler."
        )
    levels = [*map(float, sigmas), 0.0]
    largest = 1.0 if FlowMatchingObjective.accepts(scheduler) else sys.float_info.max
    is_decreasing = all(sigma > following for sigma, following in zip(levels, levels[1:], strict=False))
    if len(levels) == 1 or not is_decreasing or levels[0] > largest:
        limit = "at most 1 (flow matching)" if largest == 1.0 else "finite"
        raise ValueError(
            f"Expected sigmas positive, {limit} and strictly decreasing, got {levels[:-1]}. Leave out the final 0: "
            "the scheduler appends it."
        )


def check_channels(transformer: ModelMixin, vae: ModelMixin | None) -> None:
    """Raises ValueError if the transformer's output is not of its input's kind, or the VAE cannot decode it."""
    config = transformer.config
    if config.get("out_channels") not in (None, config.in_channels):
        raise ValueError(
            f"Expected a transformer with as many output as input channels ({config.in_channels}), "
            f"got out_channels={config.out_channels}."
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"Expected a VAE with the transformer's {config.in_channels} channels, got {type(vae).__name__} with "
            f"{vae.config.latent_channels}. Use the VAE that made the training latents."
        )


def check_guidance_transformer(transformer: ModelMixin, guidance_transformer: ModelMixin | None) -> None:
    """Raises ValueError if the predictions of the two cannot be combined; None is not checked."""
    if guidance_transformer is None:
        return
    for name in ("in_channels", "patch_size", "num_classes", "objective"):
        expected, got = transformer.config.get(name), guidance_transformer.config.get(name)
        if expected != got:
            raise ValueError(
                f"Expected a guidance_transformer with the transformer's {name} ({expected!r}), got {got!r}. Use an "
                "earlier checkpoint of the same training run."
            )
    check_channels(guidance_transformer, None)


def check_no_dropout(transformer: ModelMixin | None) -> None:
    """Raises ValueError if the transformer would drop values at random: sampling leaves its mode as it is."""
    if transformer is None or not transformer.training:
        return
    kinds = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.AlphaDropout)
    for name, module in transformer.named_modules():
        if isinstance(module, kinds) and module.training and module.p > 0.0:
            raise ValueError(
                f"Expected a transformer without active dropout, got {name} with p={module.p} in training mode. Call "
                "transformer.eval() before sampling."
            )
