# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What a run shows during training: a pipeline of its current weights, and a grid of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator, init_empty_weights

from ..models import make_denoiser
from ..pictures import add_labels, make_grid, name_classes
from ..pipelines import TREADPipeline
from ..seeds import derive_seed
from .ema import whole_weights


def snapshot_pipeline(
    accelerator: Accelerator,
    weights: Sequence[torch.Tensor],
    names: Sequence[str],
    *,
    model_class: str,
    model_config: dict[str, Any],
    **components: Any,
) -> TREADPipeline:
    """Makes a pipeline with a transformer of its own, not compiled and not routed; the training is not affected.

    All processes call this together, because sharded weights are gathered.

    Args:
        accelerator: The run's accelerator.
        weights: The parameters or their averages, whole or sharded.
        names: Their names, in the same order.
        model_class: Class of the denoiser, a name in `diffusers_tread.models.DENOISERS`.
        model_config: Config of the denoiser.
        **components: The pipeline's other components: `scheduler`, `vae`, `id2label`.
    """
    with init_empty_weights():
        transformer = make_denoiser(model_class, **model_config)
    transformer.load_state_dict(whole_weights(weights, names, device=accelerator.device), assign=True)
    transformer.requires_grad_(False).to(accelerator.device)
    transformer.forward = accelerator.autocast()(transformer.forward)
    pipeline = TREADPipeline(transformer=transformer, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample_grid(
    pipeline: TREADPipeline, *, num_images: int, seed: int, num_inference_steps: int, guidance_scale: float
) -> PIL.Image.Image:
    """Samples a grid that cycles through the classes and shows their names, with a progress bar.

    Args:
        pipeline: The pipeline to sample.
        num_images: Number of samples.
        seed: The run's seed; the noise of each image is the same in every grid.
        num_inference_steps: Sampling steps.
        guidance_scale: Scale of classifier-free guidance; 1 for none.
    """
    # Sample.
    num_classes = pipeline.transformer.config.num_classes
    labels = [index % max(num_classes, 1) for index in range(num_images)]
    seeds = [derive_seed(seed, "validation", index) for index in range(num_images)]
    pipeline.set_progress_bar_config(desc="Samples", leave=False)
    images = pipeline(
        class_labels=labels,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    pipeline.set_progress_bar_config(disable=True)

    # Draw the grid.
    columns, texts = name_classes(labels, num_classes=num_classes, id2label=pipeline.config.id2label)
    grid = make_grid(images, columns=columns)
    return add_labels(grid, **texts) if texts else grid


def last_grid(output_dir: str | Path, *, step: int) -> PIL.Image.Image | None:
    """The newest sample grid up to a step; later ones belong to a branch that the run has left."""
    pictures = sorted(Path(output_dir, "samples").glob("step-*.png"))
    pictures = [path for path in pictures if path.stem <= f"step-{step:07d}"]
    return PIL.Image.open(pictures[-1]) if pictures else None


def log_grid(accelerator: Accelerator, grid: PIL.Image.Image, *, step: int) -> None:
    """Sends a grid to the trackers that accept images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):  # not all have it
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid.convert("RGB"))[None]}, step=step, **options)
