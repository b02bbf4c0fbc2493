# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch

from diffusers_tread.metrics import FeatureStatistics


def make_features(count, dim, seed):
    """Correlated, not centred."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mixing + torch.rand(dim, generator=generator)


def gather(parts):
    statistics = FeatureStatistics.from_features(parts[0])
    for part in parts[1:]:
        statistics.update(part)
    return statistics


def merge_in_pairs(parts):
    statistics = [FeatureStatistics.from_features(part) for part in parts]
    while len(statistics) > 1:
        for one, other in zip(statistics[::2], statistics[1::2], strict=False):
            one.merge(other)
        statistics = statistics[::2]
    return statistics[0]


@pytest.mark.parametrize("combine", [gather, merge_in_pairs])
@pytest.mark.parametrize("sizes", [[300], [1, 299], [1] * 20 + [280], [37, 200, 63], [100, 1, 1, 98, 100]])
def test_pieces_in_any_order_give_numpy_s_mean_and_covariance(sizes, combine):
    features = make_features(300, 12, seed=1).double()
    parts = list(features.split(sizes))
    for order in (parts, parts[::-1]):
        statistics = combine(order)
        assert statistics.count == 300
        np.testing.assert_allclose(statistics.mean, features.numpy().mean(axis=0), rtol=1e-10)
        np.testing.assert_allclose(
            statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10, atol=1e-12
        )


def test_a_large_mean_does_not_cancel_a_small_spread():
    spread = torch.randn(1000, 3, dtype=torch.float64) * 1e-2
    statistics = gather(list((spread + 1e4).split(10)))
    expected = np.cov(spread.numpy(), rowvar=False)
    # 1e4 / 1e-2 times the rounding of the sum above is what float64 leaves.
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-8, atol=1e-12)


def test_merging_leaves_the_other_statistics_alone():
    one, other = (FeatureStatistics.from_features(make_features(20, 4, seed)) for seed in (0, 1))
    mean, covariance = other.mean.clone(), other.covariance.clone()
    one.merge(other)
    assert other.count == 20 and torch.equal(other.mean, mean) and torch.equal(other.covariance, covariance)


def test_statistics_without_a_count_are_not_merged():
    one, other = (FeatureStatistics.from_features(make_features(9, 4, seed=0)) for _ in range(2))
    other.count = None
    with pytest.raises(ValueError, match="number of samples to merge"):
        one.merge(other)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 3, 4)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"Expected features \[N, D\]"):
        FeatureStatistics.from_features(torch.zeros(shape))


def test_features_that_are_not_finite_are_refused():
    features = make_features(9, 4, seed=0)
    features[2, 1], features[5] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="got 2 of 9 samples"):
        FeatureStatistics.from_features(features)
