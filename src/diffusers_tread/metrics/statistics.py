# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance of features, gathered piece by piece, and the Fréchet distance between two of them.

Own formulas, because clean-fid and torch-fidelity hold all features at once, cannot merge what several processes or
runs gathered, and import torchvision; the tests hold the distance to both libraries'. Everything is float64.

Shapes: N samples, D features.
"""

import logging
from dataclasses import dataclass

import torch


logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of a set of features.

    Example:
        >>> statistics = FeatureStatistics.from_features(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> statistics.update(torch.tensor([[4.0, 0.0]]))
        >>> statistics.count, statistics.mean.tolist()
        (3, [2.0, 2.0])
    """

    mean: torch.Tensor
    """[D] float64."""
    covariance: torch.Tensor
    """[D, D] float64, normalised by N - 1; zeros for one sample."""
    count: int | None
    """N, or None where a foreign file does not say it."""
    extractor: str | None = None
    """`FeatureExtractor.fingerprint` of what made the features, or None where a foreign file does not say it."""

    @classmethod
    def from_features(cls, features: torch.Tensor, *, extractor: str | None = None) -> "FeatureStatistics":
        """The statistics of features [N, D], N at least 1.

        Raises:
            ValueError: Another shape, or values that are not finite.
        """
        features = as_features(features)
        mean = features.mean(dim=0)
        deviations = features - mean
        covariance = deviations.T @ deviations / max(len(features) - 1, 1)
        return cls(mean=mean, covariance=covariance, count=len(features), extractor=extractor)

    @property
    def num_features(self) -> int:
        """D."""
        return len(self.mean)

    def update(self, features: torch.Tensor) -> None:
        """Adds features [N, D].

        Raises:
            ValueError: As `from_features` and `merge`.
        """
        self.merge(FeatureStatistics.from_features(features, extractor=self.extractor))

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the samples of `other`, which share none with these (Chan, Golub & LeVeque 1979, eq. 2.1).

        Raises:
            ValueError: Statistics of other features, or whose number of samples is not known.
        """
        check_same_features(self, other)
        if self.count is None or other.count is None:
            raise ValueError(
                "Expected statistics with a number of samples to merge, got some without. Make them from the images."
            )
        count = self.count + other.count
        shift = other.mean - self.mean
        self.mean = self.mean + shift * (other.count / count)
        self.covariance = (
            (self.covariance * ((self.count - 1) / (count - 1)))
            .add_(other.covariance, alpha=(other.count - 1) / (count - 1))
            .addr_(shift, shift, alpha=self.count * other.count / (count * (count - 1)))
        )
        self.count = count


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """The squared Fréchet distance between two Gaussians: FID on Inception features (arXiv 1706.08500, eq. 6).

    |m1 - m2|² + Tr(S1 + S2 - 2 (S1 S2)^½). The trace of the root is the sum of the singular values of S1^½ S2^½: all
    real, and exact to rounding also where the covariances have no full rank, where the root of a product is not.

    Raises:
        ValueError: Statistics of other features, or of fewer than two samples.
    """
    check_same_features(one, other)
    for statistics in (one, other):
        _check_count(statistics)
    product = _square_root(one.covariance) @ _square_root(other.covariance)
    distance = (
        (one.mean - other.mean).square().sum()
        + one.covariance.trace()
        + other.covariance.trace()
        - 2 * torch.linalg.svdvals(product).sum()
    )
    return max(distance.item(), 0.0)  # rounding may leave equal sets a little below zero


def as_features(features: torch.Tensor) -> torch.Tensor:
    """Features [N, D] as float64 on the CPU.

    Raises:
        ValueError: Another shape, or values that are not finite.
    """
    features = torch.as_tensor(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(
            f"Expected features [N, D] with N and D at least 1, got {tuple(features.shape)}. Flatten and batch them."
        )
    features = features.to("cpu", torch.float64)
    if not features.isfinite().all():
        raise ValueError(
            f"Expected finite features, got {(~features.isfinite()).any(dim=1).sum()} of {len(features)} samples with "
            "others. Look at the images and at the network's weights."
        )
    return features


def check_same_features(one: FeatureStatistics, other: FeatureStatistics) -> None:
    """Refuses to compare what different networks made.

    Raises:
        ValueError: Another number of features or another recorded extractor.
    """
    if one.num_features != other.num_features:
        raise ValueError(
            f"Expected statistics of the same features, got {one.num_features} and {other.num_features} features. "
            "Make both with the same extractor."
        )
    if None not in (one.extractor, other.extractor) and one.extractor != other.extractor:
        raise ValueError(
            f"Expected statistics of one extractor, got {one.extractor} and {other.extractor}. Make both with one."
        )


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
    """The symmetric root of a positive semi-definite matrix; eigenvalues below its rounding are taken for zero."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > noise, 0).sqrt()) @ vectors.T
