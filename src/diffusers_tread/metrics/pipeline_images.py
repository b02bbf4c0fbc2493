# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Samples of a pipeline as images to extract features from."""

import json
from functools import cached_property
from typing import Any

import torch

from ..fingerprint import weights_fingerprint
from ..finite import check_finite
from ..seeds import derive_seed


class PipelineImages:
    """Samples of a `TREADPipeline`; each depends only on the seed and its index.

    Sample i starts from a generator seeded with `derive_seed(seed, "evaluate", i)`, which is always on the CPU.

    Args:
        pipeline: The pipeline, on its device.
        num_images: Number of samples.
        num_inference_steps: Steps of the sampler.
        guidance_scale: Scale of plain classifier-free guidance; None for the pipeline's guider, if it has one.
        seed: Seed of the noise and of random labels.
        random_labels: False for class i mod num_classes, so that all classes are equally frequent; True for
            independent uniform draws, as in ADM's and DiT's sampling scripts. A model without classes has only the
            label of the null class.
        guidance_interval: Noise levels (low, high] in which guidance acts; None for all. See `TREADPipeline.__call__`.
        guidance_rescale: Strength of the rescaling of plain classifier-free guidance, in [0, 1].

    Raises:
        ValueError: A network of the pipeline has weights with NaN or infinity.
    """

    def __init__(
        self,
        pipeline,
        *,
        num_images: int,
        num_inference_steps: int,
        guidance_scale: float | None = None,
        seed: int = 0,
        random_labels: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
    ):
        self.pipeline, self.num_images, self.seed, self.random_labels = pipeline, num_images, seed, random_labels
        self.call_options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        """Arguments of each call of the pipeline besides the labels and the noise."""
        more = {"guidance_interval": guidance_interval, "guidance_rescale": guidance_rescale}
        self.call_options |= {name: value for name, value in more.items() if value}
        for name, part in pipeline_networks(pipeline).items():
            check_finite(part.state_dict(), what=f"weights of the {name}")

    def __len__(self) -> int:
        return self.num_images

    def label(self, index: int) -> int:
        """Chooses the class of a sample."""
        choice = derive_seed(self.seed, "class", index) if self.random_labels else index
        return choice % max(self.pipeline.transformer.config.num_classes, 1)

    def generator(self, index: int) -> torch.Generator:
        """Makes the generator of all random numbers of a sample."""
        return sample_generator(self.seed, index)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Makes the samples start .. stop - 1, [B, 3, H, W] uint8, rounded like the pipeline's PIL images.

        Raises:
            ValueError: A sample is not finite, or images have neither 1 nor 3 channels.
        """
        images = self.pipeline(
            class_labels=[self.label(index) for index in range(start, stop)],
            **self.call_options,
            generator=[self.generator(index) for index in range(start, stop)],
            output_type="pt",
        ).images  # B C H W in [0, 1]
        if images.shape[1] not in (1, 3):
            raise ValueError(f"Expected a pipeline of images with 1 or 3 channels, got {images.shape[1]}.")
        return (images.float() * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()

    @property
    def description(self) -> dict[str, Any]:
        """Lists everything that the samples depend on: weights, sampler, guidance, labels, seed."""
        return self._description

    @cached_property  # separate, because type checkers do not accept it as the protocol's property
    def _description(self) -> dict[str, Any]:
        # Guidance.
        pipeline, guider = self.pipeline, self.pipeline.guider
        options = dict(self.call_options)
        scale, num_steps = options.pop("guidance_scale"), options.pop("num_inference_steps")
        if scale is not None or guider is None:
            scale = scale or 1.0
            guidance = {"kind": "classifier-free" if scale > 1.0 else "none", "guidance_scale": scale}
        else:
            guidance = {"kind": type(guider).__name__, **component_config(guider)}

        # Weights, their precision, and the rest.
        return {
            **describe_components(pipeline),
            "num_inference_steps": num_steps,
            "guidance": guidance | options,
            "labels": "random" if self.random_labels else "balanced",
            "seed": self.seed,
        }


def sample_generator(seed: int, index: int) -> torch.Generator:
    """Makes the generator of all random numbers of sample `index`, on the CPU."""
    return torch.Generator().manual_seed(derive_seed(seed, "evaluate", index))


def pipeline_networks(pipeline) -> dict[str, torch.nn.Module]:
    """Finds the components of a pipeline that have weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


def describe_components(pipeline) -> dict[str, Any]:
    """Identifies a pipeline's weights, their precision and its scheduler (JSON)."""
    networks = pipeline_networks(pipeline)
    return {
        "weights": {name: weights_fingerprint(part) for name, part in networks.items()},
        "dtype": {name: str(part.dtype).removeprefix("torch.") for name, part in networks.items()},
        "scheduler": {"class": type(pipeline.scheduler).__name__, **component_config(pipeline.scheduler)},
    }


def component_config(component) -> dict[str, Any]:
    """Reads a component's settings, as in its JSON file."""
    config = json.loads(component.to_json_string())
    return {key: value for key, value in config.items() if not key.startswith("_")}
