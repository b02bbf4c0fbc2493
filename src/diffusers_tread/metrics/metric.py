# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The description of a metric, and what metrics start from and end with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from ..field_docs import with_field_docs


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class MeanStd:
    """A value that is computed on several parts of the samples."""

    mean: float
    """Mean over the parts."""
    std: float
    """Standard deviation over the parts, of the population."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class MeanError:
    """The mean of a value of each image."""

    mean: float
    """Mean over the images."""
    standard_error: float
    """Standard deviation of the images, of the sample, over the root of their number."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a metric is computed from, and how."""

    label: str
    """Name in tables and model cards, such as "FID"."""
    compute: Callable[..., float | MeanStd]
    """Called as `compute(samples, reference)`, or as `compute(samples)` if the metric needs no reference."""
    takes: Literal["statistics", "features"]
    """Type of these arguments. "statistics": `FeatureStatistics`, which a file may hold, and which are gathered batch
    by batch; "features": a float32 tensor [N, D] of all images in their order, on a device that has float64."""
    output: str
    """Output of the extractor that it is computed from: "features" (pooled), "spatial", "logits" or another one."""
    higher_is_better: bool
    """Direction in which samples are better."""
    needs_reference: bool = True
    """Whether samples are compared with a reference."""
    min_samples: int = 2
    """Fewest samples, and fewest images of the reference, that give a value."""


def as_features(features: torch.Tensor, *, device: str | torch.device = "cpu") -> torch.Tensor:
    """Checks features [N, D] and converts them to float64.

    Args:
        features: One row per image.
        device: Where the result is to lie.

    Raises:
        ValueError: The features have another shape or are not finite.
    """
    features = torch.as_tensor(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"Expected features [N, D] with N and D at least 1, got {tuple(features.shape)}. Flatten and batch them."
        )
    features = features.to(device, torch.float64)
    if not features.isfinite().all():
        raise ValueError(
            f"Expected finite features, got {(~features.isfinite()).any(dim=1).sum()} of {len(features)} samples with "
            "others. Look at the images and at the network's weights."
        )
    return features
