# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Checks that the components of `TREADPipeline` fit together and can sample."""

import copy
import inspect
import sys
from collections.abc import Sequence

import torch
from diffusers import EDMEulerScheduler, ModelMixin, SchedulerMixin

from ..data.latents.codec import latent_channels
from ..objectives import OBJECTIVES, FlowMatchingObjective, find_objective


# Settings that need something the pipeline does not provide. Some schedulers ignore them instead of failing.
_NOT_GIVEN = {
    "variance_type": (("learned", "learned_range"), "the network predicts no variance"),
    "use_dynamic_shifting": ((True,), "the pipeline gives no mu"),
    "invert_sigmas": ((True,), "sampling goes from noise to data"),
}


def check_scheduler(scheduler: SchedulerMixin, transformer: ModelMixin) -> None:
    """Raises ValueError if `scheduler` cannot sample from the transformer, or the transformer names no objective."""
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


def check_can_sample(scheduler: SchedulerMixin) -> None:
    """Runs a short trial sampling with a copy of the scheduler.

    Many diffusers schedulers accept settings with which they later fail or return NaN: Karras' sigmas for a flow,
    betas above 1, solvers that need more than a prediction.

    Raises:
        ValueError: A step fails or does not return a finite sample; the steps go from data to noise; or a setting
            needs something the pipeline does not provide.
    """
    # Settings.
    for name, (values, reason) in _NOT_GIVEN.items():
        if scheduler.config.get(name) in values:
            raise ValueError(
                f"Expected a scheduler that can sample, got {type(scheduler).__name__} with "
                f"{name}={scheduler.config[name]!r}: {reason}. Use the default of {name}."
            )

    # The trial.
    trial = copy.deepcopy(scheduler)
    sample = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)  # B C H W
    try:
        with torch.random.fork_rng(devices=[]):
            trial.set_timesteps(8)
            times = trial.timesteps.tolist()
            if not trial.timesteps.isfinite().all() or times[-1] > times[0]:
                raise ValueError(f"its timesteps go from {times[0]:g} to {times[-1]:g}")
            for timestep in trial.timesteps:
                scaled = trial.scale_model_input(sample, timestep) if hasattr(trial, "scale_model_input") else sample
                following = trial.step(torch.zeros_like(scaled), timestep, sample, return_dict=False)[0]
                if following.shape != sample.shape or not following.isfinite().all():
                    raise ValueError(f"its step at {timestep:g} gives NaN, infinity or another shape")
                sample = following
    except Exception as error:  # schedulers raise errors of any kind
        defaults = inspect.signature(type(scheduler).__init__).parameters
        changes = [
            f"{name}={value!r:.40}"
            for name, value in scheduler.config.items()
            if name in defaults and repr(value) != repr(defaults[name].default)
        ]
        raise ValueError(
            f"Expected a scheduler that can sample, got {type(scheduler).__name__}({', '.join(changes)}), with which "
            f"sampling fails: {error}. Use the defaults of its settings, or another scheduler."
        ) from error


def check_sigmas(scheduler: SchedulerMixin, sigmas: Sequence[float]) -> None:
    """Raises ValueError if `scheduler` takes no noise levels, or these are not a valid schedule."""
    # diffusers' EDMEulerScheduler reads `sigmas` as positions in [0, 1] of its own schedule (`set_timesteps`):
    # https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/schedulers/scheduling_edm_euler.py
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes_sigmas or isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(
            f"Expected a scheduler that takes noise levels, got {type(scheduler).__name__}. Leave sigmas out, or use "
            "EDMHeunScheduler or FlowMatchEulerDiscreteScheduler."
        )

    # The levels.
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
    """Raises ValueError if the transformer's output channels differ from its input's, or the VAE has others."""
    config = transformer.config
    if config.get("out_channels") not in (None, config.in_channels):
        raise ValueError(
            f"Expected a transformer with as many output as input channels ({config.in_channels}), "
            f"got out_channels={config.out_channels}."
        )
    if vae is not None and latent_channels(vae) != config.in_channels:
        raise ValueError(
            f"Expected a VAE with the transformer's {config.in_channels} channels, got {type(vae).__name__} with "
            f"{latent_channels(vae)}. Use the VAE that made the training latents."
        )


def check_guidance_transformer(transformer: ModelMixin, guidance_transformer: ModelMixin | None) -> None:
    """Raises ValueError if the predictions of the two transformers cannot be combined; None is not checked."""
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
    """Raises ValueError if the transformer has active dropout, because sampling does not change its mode."""
    if transformer is None or not transformer.training:
        return
    kinds = (torch.nn.Dropout, torch.nn.Dropout1d, torch.nn.Dropout2d, torch.nn.AlphaDropout)
    for name, module in transformer.named_modules():
        if isinstance(module, kinds) and module.training and module.p > 0.0:
            raise ValueError(
                f"Expected a transformer without active dropout, got {name} with p={module.p} in training mode. Call "
                "transformer.eval() before sampling."
            )


def check_finite_samples(latents: torch.Tensor, images: torch.Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError for NaN or infinity in latents [B, C, H, W] or in the images decoded from them."""
    finite = torch.stack([tensor.isfinite().flatten(1).all(dim=1) for tensor in (latents, images)]).all(dim=0)  # B
    if not finite.all():
        raise ValueError(
            f"Expected finite samples, got NaN or infinity in {(~finite).sum()} of {len(finite)}. The weights are "
            f"damaged, or the network's {dtype} overflows: look at the weights, use torch.bfloat16 or torch.float32, "
            "or a smaller guidance scale."
        )
