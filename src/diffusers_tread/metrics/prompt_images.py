# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples of a text-to-image pipeline of diffusers as images to extract features from and to score."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from ..fingerprint import weights_fingerprint
from ..finite import check_finite
from .pipeline_images import component_config, describe_components, pipeline_networks, sample_generator


# Arguments that are set here, or that would change the number or the kind of the images.
_RESERVED = ("prompt", "generator", "output_type", "return_dict", "num_images_per_prompt", "num_inference_steps")
_RESERVED += ("guidance_scale", "height", "width")


class PromptImages:
    """Samples of a text-to-image pipeline; each depends only on its prompt, the seed and its index.

    Sample i has the prompt i mod len(prompts) and a generator seeded with `derive_seed(seed, "evaluate", i)`, which is
    always on the CPU. The networks are in evaluation mode during sampling.

    Args:
        pipeline: Any pipeline of diffusers, on its device, whose call takes `prompt`, `generator` and `output_type`
            and returns `images`; or a wrapper with the same call that has it as `pipeline`, and a `guider`.
        prompts: At least one text.
        num_images: Number of samples; None for one per prompt.
        num_inference_steps: Steps of the sampler; None for the pipeline's default.
        guidance_scale: Scale of guidance; None for the pipeline's default.
        height: Height in pixels; None for the pipeline's default.
        width: Width in pixels; None for the pipeline's default.
        seed: Seed of the noise.
        call_options: More arguments of the pipeline's call (JSON), the same for all samples, such as
            {"negative_prompt": "blurry"}.

    Raises:
        ValueError: There are no prompts, or empty ones; the pipeline's call lacks an argument; or a network has
            weights with NaN or infinity.
    """

    def __init__(
        self,
        pipeline,
        prompts: Sequence[str],
        *,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        call_options: Mapping[str, Any] | None = None,
    ):
        self.pipeline, self.prompts, self.seed = pipeline, tuple(prompts), seed
        self.wrapped = getattr(pipeline, "pipeline", pipeline)
        self.num_images = len(self.prompts) if num_images is None else num_images
        options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        options |= {"height": height, "width": width}
        self.options = {name: value for name, value in options.items() if value is not None}
        self.call_options = dict(call_options or {})
        check_prompts(self.prompts)
        self._check_call()
        for name, network in self._networks().items():
            check_finite(network.state_dict(), what=f"weights of the {name}")

    def __len__(self) -> int:
        return self.num_images

    def prompt(self, index: int) -> str:
        """Chooses the prompt of a sample."""
        return self.prompts[index % len(self.prompts)]

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Makes the samples start .. stop - 1, [B, 3, H, W] uint8, rounded like the pipeline's PIL images.

        Raises:
            ValueError: A sample is not finite, or images have neither 1 nor 3 channels.
        """
        # "pt" is in [0, 1] or in [-1, 1], depending on the pipeline; "np" is always in [0, 1].
        has_no_vae = self.wrapped.components.get("vae", self) is None
        generators = [sample_generator(self.seed, index) for index in range(start, stop)]
        patches = _timesteps_repeated(self.wrapped), _noise_from(generators, self.wrapped.scheduler)
        with evaluation_mode(self._networks().values()), patches[0], patches[1]:
            images = self.pipeline(
                prompt=[self.prompt(index) for index in range(start, stop)],
                generator=generators,
                output_type="pt" if has_no_vae else "np",
                **self.options,
                **self.call_options,
            ).images

        # To [0, 1], then to uint8.
        if has_no_vae:  # PRX in pixel space returns its latents, which are pixels in [-1, 1]
            images = images.float() / 2 + 0.5  # B C H W
        else:
            images = torch.from_numpy(np.asarray(images, dtype=np.float32)).permute(0, 3, 1, 2)  # B H W C to B C H W
        return _to_uint8(images, start)

    @property
    def description(self) -> dict[str, Any]:
        """Lists everything that the samples depend on: weights, tokenizers, sampler, prompts, seed."""
        return self._description

    @cached_property  # separate, because type checkers do not accept it as the protocol's property
    def _description(self) -> dict[str, Any]:
        # Guidance, which may have a network of its own.
        pipeline, guider = self.wrapped, getattr(self.pipeline, "guider", None)
        guidance = {} if guider is None else {"guider": {"class": type(guider).__name__, **component_config(guider)}}
        if interval := getattr(self.pipeline, "guidance_interval", None):
            guidance["guidance_interval"] = interval
        if routes := getattr(getattr(pipeline.components.get("transformer"), "token_router", None), "routes", ()):
            guidance["routes"] = [route.to_dict() for route in routes]
        if other := self._guidance_networks():
            guidance["guidance_weights"] = {name: weights_fingerprint(network) for name, network in other.items()}

        # The pipeline, and its call.
        settings = {name: value for name, value in pipeline.config.items() if name not in pipeline.components}
        return {
            "pipeline": {"class": type(pipeline).__name__}
            | {name: value for name, value in settings.items() if not name.startswith("_")},
            **describe_components(pipeline),
            "tokenizers": {
                name: _tokenizer_hash(part) for name, part in pipeline.components.items() if hasattr(part, "get_vocab")
            },
            **guidance,
            **self.options,
            "call_options": self.call_options,
            "prompts": {"num_prompts": len(self.prompts), "sha256": _json_hash(self.prompts)},
            "seed": self.seed,
        }

    def _networks(self) -> dict[str, torch.nn.Module]:
        return pipeline_networks(self.wrapped) | self._guidance_networks()

    def _guidance_networks(self) -> dict[str, torch.nn.Module]:
        network = getattr(self.pipeline, "guidance_transformer", None)
        return {} if network is None or self.wrapped is self.pipeline else {"guidance_transformer": network}

    def _check_call(self) -> None:
        known = list(inspect.signature(self.wrapped.__call__).parameters)
        if missing := [name for name in ("prompt", "generator", "output_type", *self.options) if name not in known]:
            raise ValueError(
                f"Expected a text-to-image pipeline whose call takes {missing}, got {type(self.wrapped).__name__}, "
                f"which takes {known}. Leave out what it does not take, or use another pipeline."
            )
        wrong = [name for name in self.call_options if name not in known or name in _RESERVED]
        if wrong:
            free = [name for name in known if name not in _RESERVED]
            raise ValueError(
                f"Expected call options that {type(self.wrapped).__name__} takes, got {wrong}. Use some of {free}; "
                "steps, scale, height, width and seed have arguments of their own."
            )


def check_prompts(prompts: Sequence[str], *, where: str = "the prompts") -> None:
    """Raises ValueError unless there is at least one prompt, and each is a text that is not blank."""
    if not prompts:
        raise ValueError(f"Expected at least one prompt in {where}, got none.")
    wrong = [index for index, text in enumerate(prompts) if not isinstance(text, str) or not text.strip()]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ValueError(
            f"Expected a text in each row of {where}, got none in rows {wrong[:10]}{more}, counted from 0. Take these "
            "rows away."
        )


@contextmanager
def evaluation_mode(networks: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Puts networks into evaluation mode; at the end, modules that were in training mode are put back."""
    training = [module for network in networks for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _timesteps_repeated(pipeline) -> Iterator[None]:
    """Gives a transformer one timestep per sample even if its pipeline gives it one per half of the batch.

    PRX does the latter, and so fails with classifier-free guidance of several prompts:
    https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/prx/pipeline_prx.py
    """

    def repeat(module, args, kwargs):
        times, samples = kwargs.get("timestep"), kwargs.get("hidden_states")
        if isinstance(times, torch.Tensor) and times.ndim == 1 and 1 < len(times) < len(samples):
            kwargs = kwargs | {"timestep": times.repeat_interleave(len(samples) // len(times))}
        return args, kwargs

    if (transformer := pipeline.components.get("transformer")) is None:
        yield
        return
    hook = transformer.register_forward_pre_hook(repeat, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _noise_from(generators: list[torch.Generator], scheduler) -> Iterator[None]:
    """Makes a scheduler draw the noise of its steps from the generators, which many pipelines do not pass on to it.

    With Stable Diffusion 3 and Flux, samples of an SDE would otherwise depend on torch's default generator:
    https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/pipelines/flux/pipeline_flux.py
    """
    if "generator" not in inspect.signature(scheduler.step).parameters:
        yield
        return
    scheduler.step = partial(scheduler.step, generator=generators)
    try:
        yield
    finally:
        del scheduler.step


def _to_uint8(images: torch.Tensor, start: int) -> torch.Tensor:
    """Rounds images [B, C, H, W] in [0, 1] to [B, 3, H, W] uint8; `start` is the index of the first, for the error."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"Expected a pipeline of images with 1 or 3 channels, got {images.shape[1]}.")
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        wrong = [start + row for row in (~finite).nonzero().flatten().tolist()]
        raise ValueError(
            f"Expected finite samples, got NaN or infinity in {wrong[:10]}. Look at the weights, use float32 or "
            "bfloat16, or a smaller guidance scale."
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def _tokenizer_hash(tokenizer) -> str:
    """Identifies a tokenizer by its vocabulary and its limit."""
    limit = min(getattr(tokenizer, "model_max_length", 0), 2**31)  # without a limit: 1e30
    return _json_hash([limit, sorted(tokenizer.get_vocab().items())])


def _json_hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
