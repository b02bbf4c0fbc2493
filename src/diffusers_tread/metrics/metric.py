# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The description of a metric, and the types of its inputs and results."""

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
    """Population standard deviation over the parts."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class MeanError:
    """The mean of a value that is computed for each image."""

    mean: float
    """Mean over the images."""
    standard_error: float
    """Sample standard deviation over the images, divided by the root of their number."""


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a metric is computed, and from which features."""

    label: str
    """Name in tables and model cards, such as "FID"."""
    compute: Callable[..., float | MeanStd]
    """Called as `compute(samples, reference)`, or as `compute(samples)` if the metric needs no reference."""
    takes: Literal["statistics", "features"]
    """Type of these arguments. "statistics": `FeatureStatistics`, which are gathered batch by batch or read from a
    file; "features": a float32 tensor [N, D] of all images in order, on a device that supports float64."""
    output: str
    """Output of the extractor to compute it from: "features" (pooled), "spatial", "logits" or another one."""
    higher_is_better: bool
    """Whether a higher value means better samples."""
    needs_reference: bool = True
    """Whether samples are compared with a reference."""
    min_samples: int = 2
    """Smallest number of samples, and of images of the reference, for which it can be computed."""


def as_features(features: torch.Tensor, *, device: str | torch.device = "cpu") -> torch.Tensor:
    """Checks features [N, D] and converts them to float64.

    Args:
        features: One row per image.
        device: Device of the result.

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
