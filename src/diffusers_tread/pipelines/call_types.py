# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""For type checkers only: the arguments of `TREADPipeline.__call__`, and its output by `output_type`."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from diffusers import ImagePipelineOutput
from PIL.Image import Image


class CallOptions(TypedDict, total=False):
    """The arguments of `TREADPipeline.__call__` except the labels, `output_type` and `return_dict`."""

    height: int | None
    width: int | None
    num_inference_steps: int
    sigmas: "Sequence[float] | np.ndarray | None"
    guidance_scale: float | None
    num_images_per_prompt: int
    generator: "torch.Generator | list[torch.Generator] | None"
    latents: torch.Tensor | None
    callback_on_step_end: Callable[..., dict | None] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float


class PILOutput(ImagePipelineOutput):
    """The output for "pil"."""

    images: list[Image]


class ArrayOutput(ImagePipelineOutput):
    """The output for "np"."""

    images: np.ndarray


class TensorOutput(ImagePipelineOutput):
    """The output for "pt" and "latent"."""

    images: torch.Tensor  # type: ignore[assignment] # diffusers declares lists and arrays, but returns tensors too


Labels = int | str | Sequence[int | str] | torch.Tensor
