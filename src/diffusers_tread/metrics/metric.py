# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""What all metrics have in common: features in float64 to start from, values with a spread to end with."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class MeanStd:
    """A value that is computed on several parts of the samples."""

    mean: float
    """Mean over the parts."""
    std: float
    """Standard deviation over the parts, of the population."""


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
