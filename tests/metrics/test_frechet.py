# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import logging

import pytest
import torch

from diffusers_tread.metrics import FeatureStatistics, frechet_distance


def make_features(count, dim, seed, dtype=torch.float32):
    """Correlated, not centred, with a spectrum that falls."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / torch.arange(1, dim + 1)
    return (torch.randn(count, dim, generator=generator) @ mixing + torch.rand(dim, generator=generator)).to(dtype)


def test_the_distance_is_clean_fid_s_and_torch_fidelity_s(cleanfid, torch_fidelity):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    one, other = make_features(400, 48, seed=0), make_features(500, 48, seed=1) * 1.2
    distance = frechet_distance(FeatureStatistics.from_features(one), FeatureStatistics.from_features(other))

    both = [fid_features_to_statistics(features.double()) for features in (one, other)]
    expected = fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"]
    assert distance == pytest.approx(expected, rel=1e-6)
    try:
        expected = cleanfid.frechet_distance(both[0]["mu"], both[0]["sigma"], both[1]["mu"], both[1]["sigma"])
    except TypeError:
        pytest.skip("this scipy has no sqrtm as clean-fid calls it")
    assert distance == pytest.approx(expected, rel=1e-6)


def test_the_distance_of_gaussians_that_commute_has_a_closed_form():
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    means, spreads = torch.rand(2, 6, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64) + 0.1
    one, other = (
        FeatureStatistics(mean=mean, covariance=rotation @ torch.diag(spread**2) @ rotation.T, count=None)
        for mean, spread in zip(means, spreads, strict=True)
    )
    expected = (means[0] - means[1]).square().sum() + (spreads[0] - spreads[1]).square().sum()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-12)


def test_the_distance_is_symmetric_and_does_not_see_a_rotation():
    one, other = make_features(90, 16, seed=2).double(), make_features(80, 16, seed=3).double()
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))
    distance = frechet_distance(FeatureStatistics.from_features(one), FeatureStatistics.from_features(other))
    for left, right in ((other, one), (one @ rotation, other @ rotation)):
        left, right = FeatureStatistics.from_features(left), FeatureStatistics.from_features(right)
        assert frechet_distance(left, right) == pytest.approx(distance, rel=1e-10)


def test_covariances_without_full_rank_keep_the_distance_exact():
    # 10 samples of 64 features that differ by a shift: the distance is its square.
    features = make_features(10, 64, seed=4).double() * 10
    one, other = FeatureStatistics.from_features(features), FeatureStatistics.from_features(features + 0.001)
    # What rounding the 64 eigenvalues leaves, of which the largest are of the order of the trace. 2e-4 without a root
    # of each covariance.
    rounding = 64 * torch.finfo(torch.float64).eps * (one.covariance.trace() + other.covariance.trace()).item()
    assert frechet_distance(one, one) == pytest.approx(0, abs=rounding)
    assert frechet_distance(one, other) == pytest.approx(64e-6, abs=rounding)


def test_covariances_without_full_rank_and_of_different_samples_give_the_nuclear_norm_of_their_product():
    # Tr (S1 S2)^½ is the nuclear norm of the product of the centred features, a 10 x 12 matrix.
    one, other = make_features(10, 64, seed=5).double(), make_features(12, 64, seed=6).double()
    distance = frechet_distance(FeatureStatistics.from_features(one), FeatureStatistics.from_features(other))
    left, right = ((x - x.mean(dim=0)) / (len(x) - 1) ** 0.5 for x in (one, other))
    cross = torch.linalg.matrix_norm(left @ right.T, ord="nuc")
    shift = one.mean(dim=0) - other.mean(dim=0)
    expected = shift.square().sum() + left.square().sum() + right.square().sum() - 2 * cross
    assert distance == pytest.approx(expected.item(), rel=1e-12)


def test_rounding_makes_no_distance_negative():
    for seed in range(20):
        statistics = FeatureStatistics.from_features(make_features(40, 6, seed))
        assert 0 <= frechet_distance(statistics, statistics) < 1e-12


def test_too_few_samples_are_refused_or_reported(caplog):
    single = FeatureStatistics.from_features(make_features(1, 4, seed=0))
    few, many = (FeatureStatistics.from_features(make_features(count, 4, seed=1)) for count in (4, 5))
    with pytest.raises(ValueError, match="Expected at least 2 samples for a covariance, got 1"):
        frechet_distance(many, single)
    with caplog.at_level(logging.WARNING):
        frechet_distance(many, many)
        assert not caplog.records
        frechet_distance(many, few)
    (record,) = caplog.records
    assert "4 features from 4 samples" in record.getMessage()


@pytest.mark.parametrize("combine", [frechet_distance, FeatureStatistics.merge])
def test_statistics_of_other_features_are_refused(combine):
    one = FeatureStatistics.from_features(make_features(9, 4, seed=0), extractor="a:1")
    other = FeatureStatistics.from_features(make_features(9, 5, seed=0), extractor="a:1")
    with pytest.raises(ValueError, match="got 4 and 5 features"):
        combine(one, other)
    other = FeatureStatistics.from_features(make_features(9, 4, seed=0), extractor="b:2")
    with pytest.raises(ValueError, match="got a:1 and b:2"):
        combine(one, other)
    other.extractor = None  # not known
    combine(one, other)
