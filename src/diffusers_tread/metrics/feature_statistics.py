# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Mean and covariance of features, gathered batch by batch and merged across processes or runs, in float64.

clean-fid and torch-fidelity are not used because they hold all features in memory at once, cannot merge statistics,
and import torchvision.

Shapes: N samples, D features.
"""

from dataclasses import dataclass

import torch

from ..field_docs import with_field_docs
from .metric import as_features


@with_field_docs
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
    """Mean, [D] float64."""
    covariance: torch.Tensor
    """Covariance, [D, D] float64, normalised by N - 1; zeros for one sample."""
    count: int | None
    """Number of samples N; None for a foreign file that does not say it."""
    extractor: str | None = None
    """`FeatureExtractor.fingerprint` of the network; None for a foreign file that does not say it."""

    @classmethod
    def from_features(cls, features: torch.Tensor, *, extractor: str | None = None) -> "FeatureStatistics":
        """Computes the statistics of features [N, D], N at least 1.

        Raises:
            ValueError: The features have another shape or are not finite.
        """
        features = as_features(features)
        mean = features.mean(dim=0)
        deviations = features - mean
        covariance = deviations.T @ deviations / max(len(features) - 1, 1)
        return cls(mean=mean, covariance=covariance, count=len(features), extractor=extractor)

    @property
    def num_features(self) -> int:
        """The number of features D."""
        return len(self.mean)

    def update(self, features: torch.Tensor) -> None:
        """Adds features [N, D].

        Raises:
            ValueError: As for `from_features` and `merge`.
        """
        self.merge(FeatureStatistics.from_features(features, extractor=self.extractor))

    def merge(self, other: "FeatureStatistics") -> None:
        """Adds the samples of `other`, which must be different samples (Chan, Golub & LeVeque 1979, eq. 2.1).

        Raises:
            ValueError: The statistics are of other features, or their number of samples is unknown.
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


def check_same_features(one: FeatureStatistics, other: FeatureStatistics) -> None:
    """Raises ValueError if the features have different sizes or were made by different networks."""
    if one.num_features != other.num_features:
        raise ValueError(
            f"Expected statistics of the same features, got {one.num_features} and {other.num_features} features. "
            "Make both with the same extractor."
        )
    if None not in (one.extractor, other.extractor) and one.extractor != other.extractor:
        raise ValueError(
            f"Expected statistics of one extractor, got {one.extractor} and {other.extractor}. Make both with one."
        )
