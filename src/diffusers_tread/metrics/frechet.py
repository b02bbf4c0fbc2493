# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Fréchet distance between two sets of features (arXiv 1706.08500).

It is called FID on the pooled features of Inception, sFID on its spatial features (arXiv 2103.03841), and FDD on the
features of DINOv2 (arXiv 2306.04675).
"""

import logging

import torch

from .feature_statistics import FeatureStatistics, check_same_features
from .metric import Metric


logger = logging.getLogger(__name__)


def frechet_distance(samples: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Computes the squared Fréchet distance between two Gaussians (arXiv 1706.08500, eq. 6).

    The distance is `|m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½)`. The trace of the root is computed as the sum of the
    singular values of S1^½ S2^½. These are real, and exact to rounding even if a covariance does not have full rank,
    unlike the root of the product.

    Raises:
        ValueError: The statistics are of different features, or of fewer than two samples.
    """
    check_same_features(samples, reference)
    for statistics in (samples, reference):
        _check_count(statistics)
    product = _square_root(samples.covariance) @ _square_root(reference.covariance)
    distance = (
        (samples.mean - reference.mean).square().sum()
        + samples.covariance.trace()
        + reference.covariance.trace()
        - 2 * torch.linalg.svdvals(product).sum()
    )
    return max(distance.item(), 0.0)  # rounding may leave equal sets a little below zero


def _check_count(statistics: FeatureStatistics) -> None:
    if statistics.count is None:
        return
    if statistics.count < 2:
        raise ValueError(f"Expected at least 2 samples for a covariance, got {statistics.count}. Use more images.")
    if statistics.count <= statistics.num_features:
        logger.warning(
            f"The covariance of {statistics.num_features} features from {statistics.count} samples has no full rank: "
            f"the distance is biased upwards. Use more than {statistics.num_features} images; papers use 50,000."
        )


def _square_root(covariance: torch.Tensor) -> torch.Tensor:
    """Computes the symmetric root of a positive semi-definite matrix; eigenvalues below rounding error become zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T


FID = Metric(label="FID", compute=frechet_distance, takes="statistics", output="features", higher_is_better=False)
SFID = Metric(label="sFID", compute=frechet_distance, takes="statistics", output="spatial", higher_is_better=False)
