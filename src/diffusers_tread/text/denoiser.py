# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Wraps a text-to-image pipeline of diffusers as a denoiser with gradients.

The prediction goes through the pipeline's own `__call__`, so that positions, masks, packed latents and signs are right
for every transformer and size, without code for each model.
"""

import copy
import inspect
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from ..models.modeling_outputs import DenoiserOutput
from ..objectives import FlowMatchingObjective
from ..routing import RoutingCall, token_routing


_PROBES = (250.0, 500.0, 750.0)


class PipelineDenoiser(torch.nn.Module):
    """Predicts what a flow-matching pipeline passes to its scheduler: the velocity noise - data, [B, C, H, W].

    Args:
        pipeline: A text-to-image pipeline. It is not changed; its transformer is trained.
        latents_shape: A shape [C, H, W] of latents, for a trial call.
        text: A caption encoded by `PromptEncoder`, for the trial call.
        pixels_per_latent: Image pixels per side of one latent pixel, from which the image size is computed.
        call_options: Further arguments of the pipeline's `__call__`, such as `guidance_scale` for distilled models.

    Raises:
        ValueError: The pipeline is not for flow matching, does not work in the usual way, or its parts do not fit each
            other.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        latents_shape: Sequence[int],
        text: tuple[Any, ...],
        pixels_per_latent: int,
        call_options: dict[str, Any] | None = None,
    ):
        super().__init__()
        if not FlowMatchingObjective.accepts(pipeline.scheduler):
            raise ValueError(
                f"Expected a pipeline for flow matching, with {FlowMatchingObjective.scheduler_advice}, got one with "
                f"{type(pipeline.scheduler).__name__}."
            )

        # The transformer.
        self.transformer = pipeline.transformer  # Accelerate wraps, moves and synchronises it
        classes = {type(module).__name__ for module in self.transformer.modules()}
        kept = getattr(self.transformer, "_no_split_modules", None) or []
        self.is_routed = hasattr(self.transformer, "token_router")
        self._no_split_modules = [name for name in kept if name in classes]  # FSDP's units
        self.pixels_per_latent = pixels_per_latent

        # A copy of the pipeline with a scheduler for one step and without a text encoder.
        self.pipeline = copy.copy(pipeline)
        self.pipeline.scheduler = _OneStepScheduler()
        self.pipeline.encode_prompt = lambda *args, **kwargs: self._asked.text
        self.pipeline.set_progress_bar_config(disable=True)
        self.call = inspect.unwrap(type(pipeline).__call__)  # without torch.no_grad
        self.call_options = _call_options(self.call) | (call_options or {})
        scale = self.call_options.get("guidance_scale", 1.0)
        if scale != 1.0 and not self.transformer.config.get("guidance_embeds", False):
            raise ValueError(
                f"Expected a transformer with guidance_embeds for a guidance_scale other than 1 in training, got "
                f"{type(self.transformer).__name__} without and {scale}. Leave it out of the call's options."
            )

        # Each sample gets a timestep of its own.
        self._asked = threading.local()
        names = list(inspect.signature(type(self.transformer).forward).parameters)[1:]
        self.timestep_name = next((name for name in ("timestep", "t") if name in names), None)
        if self.timestep_name is None:
            raise ValueError(f"Expected {type(self.transformer).__name__}.forward to take a timestep, got {names}.")
        self.timestep_place = names.index(self.timestep_name)
        self.transformer.register_forward_pre_hook(self._before_transformer, with_kwargs=True)

        self.inputs = self._try_out(latents_shape, text)
        """Arguments of the transformer for one sample, for `forward_flops`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text: tuple[Any, ...],
        routing: RoutingCall | None = None,
    ) -> DenoiserOutput:
        """Predicts the velocity.

        Args:
            hidden_states: Noisy latents, [B, C, H, W].
            timestep: 1000 t, [B], with t in [0, 1] and noise at t = 1.
            text: The captions encoded by `PromptEncoder`.
            routing: How to route; None for the routing that is active around the call.
        """
        asked = {name: value for name, value in vars(routing or RoutingCall()).items() if value is not None}
        with token_routing(self.transformer, **asked) if asked and self.is_routed else nullcontext():
            return DenoiserOutput(sample=self._predict(hidden_states, text, timestep=timestep))

    def _predict(self, latents: torch.Tensor, text: tuple[Any, ...], **asked: Any) -> torch.Tensor:
        packed, order = self._pack(latents)
        height, width = (side * self.pixels_per_latent for side in latents.shape[2:])
        vars(self._asked).update(text=text, **asked)
        try:
            self.call(
                self.pipeline, prompt=[""] * len(latents), latents=packed, height=height, width=width,
                num_inference_steps=1, output_type="latent", **self.call_options,
            )  # fmt: skip
        except _Predicted as predicted:
            return _unpack(predicted.args[0], latents.shape, order)
        finally:
            vars(self._asked).clear()
        raise ValueError(
            f"Expected {type(self.pipeline).__name__} to call its scheduler's step, but it did not. It is not a "
            "flow-matching text-to-image pipeline of the usual kind."
        )

    def _pack(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packs latents as the pipeline needs them (Flux and others: 2x2 patches); also says where each value went."""
        if not hasattr(self.pipeline, "_pack_latents"):  # this function is also used by diffusers' training scripts
            return latents, None
        shape = latents.shape
        places = torch.arange(shape[1:].numel(), device=latents.device).view(1, *shape[1:])
        pack = self.pipeline._pack_latents
        return pack(latents, *shape), pack(places, 1, *shape[1:]).flatten()

    def _before_transformer(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Gives the transformer a timestep for each sample; the pipeline only has one for all."""
        asked = vars(self._asked)
        if not asked:
            return args, kwargs
        named, place = self.timestep_name in kwargs, self.timestep_place
        given = kwargs[self.timestep_name] if named else args[place]
        if "timestep" not in asked:
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            raise _Called(given, dict(zip(names, args, strict=False)) | kwargs)
        # This timestep is on the device, unlike the scheduler's.
        timestep = asked["timestep"] / self.timestep_divisor + self.timestep_offset
        if named:
            return args, kwargs | {self.timestep_name: timestep}
        return (*args[:place], timestep, *args[place + 1 :]), kwargs

    def _try_out(self, latents_shape: Sequence[int], text: tuple[Any, ...]) -> dict[str, Any]:
        """Finds how the pipeline computes the transformer's timestep from the scheduler's; this must be linear."""
        # Call the pipeline with several timesteps.
        self.timestep_divisor, self.timestep_offset = 1.0, 0.0
        self.try_shape(latents_shape, text)
        latents, values = torch.zeros(1, *latents_shape, device=self.transformer.device), []
        for probe in _PROBES:
            self.pipeline.scheduler.probe = probe
            try:
                self._predict(latents, text)
            except _Called as called:
                values.append(called.args[0].double().mean().item())
                inputs = called.args[1]

        # Fit a line.
        low, middle, high = values
        if abs(low + high - 2 * middle) > 1e-4 * abs(high - low) or low == high:
            raise ValueError(
                f"Expected {type(self.pipeline).__name__} to make its transformer's timestep linearly of the "
                f"scheduler's, got {values} of {_PROBES}. It cannot be trained so."
            )
        self.timestep_divisor = round((_PROBES[2] - _PROBES[0]) / (high - low), 6)
        self.timestep_offset = round(low - _PROBES[0] / self.timestep_divisor, 6)
        return inputs

    def try_shape(self, latents_shape: Sequence[int], text: tuple[Any, ...]) -> None:
        """Checks the shapes by one prediction.

        Args:
            latents_shape: Shape [C, H, W] of latents.
            text: An encoded caption.

        Raises:
            ValueError: Transformer, latents and text do not fit each other.
        """
        latents = torch.zeros(1, *latents_shape, device=self.transformer.device)
        patch_size = self.transformer.config.get("patch_size", 1)
        try:
            # PRX before diffusers 0.42 silently drops incomplete patches.
            if isinstance(patch_size, int) and any(side % patch_size for side in latents_shape[1:]):
                raise ValueError(f"patches of {patch_size}x{patch_size} do not fill these latents")
            with torch.no_grad(), token_routing(self.transformer, enabled=False) if self.is_routed else nullcontext():
                prediction = self._predict(latents, text, timestep=torch.zeros(1, device=latents.device))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            shapes = [list(one.shape) for one in text if isinstance(one, torch.Tensor)]
            raise ValueError(
                f"Expected a {type(self.transformer).__name__} for latents {list(latents_shape)} and texts {shapes}, "
                f"got parts that do not fit each other: {error}. Compare its config with the VAE's and the text "
                "encoders' widths, and the sides of the images with its patches."
            ) from error
        if prediction.shape != latents.shape:
            raise ValueError(
                f"Expected predictions {list(latents.shape)}, got {list(prediction.shape)}: transformer and VAE do "
                "not fit each other. Compare their numbers of channels."
            )


class _Predicted(Exception):
    """Carries the prediction out of the pipeline's denoising loop."""


class _Called(Exception):
    """Carries the transformer's arguments out of the pipeline's denoising loop."""


class _OneStepScheduler(FlowMatchEulerDiscreteScheduler):
    """Makes a pipeline predict once. Its timestep is replaced before it reaches the transformer."""

    init_noise_sigma = 1.0
    probe = _PROBES[0]

    def set_timesteps(self, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        self.timesteps = torch.tensor([self.probe])  # on the CPU, where reading it waits for nothing
        self.sigmas, self.num_inference_steps = self.timesteps / 1000, 1

    def scale_model_input(self, sample, timestep):
        return sample

    def step(self, model_output, timestep, sample, **kwargs):
        raise _Predicted(model_output)


def _call_options(call) -> dict[str, Any]:
    """Arguments that turn off guidance and changes of the image size."""
    parameters = inspect.signature(call).parameters
    wanted = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "use_resolution_binning": False}
    # A default guidance_scale of None means that it is for distilled models.
    return {
        name: value for name, value in wanted.items() if name in parameters and parameters[name].default is not None
    }


def _unpack(prediction: torch.Tensor, shape: torch.Size, order: torch.Tensor | None) -> torch.Tensor:
    """Unpacks a prediction to [B, C, H, W]."""
    if order is None:
        return prediction
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return prediction.flatten(1).index_select(1, places).view(shape)
