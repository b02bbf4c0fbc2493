# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from diffusers_tread.metrics import inception_score, precision_recall


@pytest.mark.parametrize("num_splits", [1, 7, 10])
def test_the_inception_score_is_torch_fidelity_s(torch_fidelity, num_splits):
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.randn(95, 11) * 3
    score = inception_score(logits, num_splits=num_splits)
    expected = isc_features_to_metric(logits, splits=num_splits, shuffle=False)
    assert score.mean == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert score.std == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_the_inception_score_is_the_number_of_classes_that_are_certain_and_even():
    logits = torch.eye(5).repeat(8, 1) * 2000  # probabilities that underflow
    assert inception_score(logits, num_splits=4).mean == pytest.approx(5)
    assert inception_score(torch.zeros(10, 5), num_splits=2).mean == pytest.approx(1)


def test_the_splits_of_the_inception_score_are_consecutive():
    logits = torch.eye(2).repeat_interleave(10, dim=0) * 100  # sorted by class: each half knows one class
    assert inception_score(logits, num_splits=2).mean == pytest.approx(1)
    assert inception_score(logits, num_splits=1).mean == pytest.approx(2)


@pytest.mark.parametrize("num_splits", [0, 6])
def test_a_number_of_splits_out_of_range_is_refused(num_splits):
    with pytest.raises(ValueError, match=f"from 1 to the number of samples .5., got {num_splits}"):
        inception_score(torch.zeros(5, 3), num_splits=num_splits)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block_size", [16, 1024])
def test_precision_and_recall_are_torch_fidelity_s(torch_fidelity, k, block_size):
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, generated = torch.randn(120, 6), torch.randn(90, 6) * 0.7 + 0.3
    result = precision_recall(real, generated, k=k, block_size=block_size)
    expected = prc_features_to_metric(generated, real, prc_neighborhood=k, prc_batch_size=1000, verbose=False)
    assert (result.precision, result.recall) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)
    assert 0 < result.recall < result.precision < 1


def test_precision_and_recall_by_hand():
    # On a line, k = 1. Real radii: 1, 1, 2. Generated: the radii are 0.5, 0.5, 93.
    real = torch.tensor([[0.0], [1.0], [3.0]])
    generated = torch.tensor([[6.5], [7.0], [100.0]])
    assert precision_recall(real, generated, k=1).precision == 0
    assert precision_recall(real, generated, k=1).recall == 0
    result = precision_recall(real, torch.tensor([[4.5], [-0.9], [-50.0]]), k=1)
    # 4.5 is within 2 of 3, -0.9 within 1 of 0, -50 of none. Radii 5.4, 5.4, 49.1: every real one is within some.
    assert result.precision == pytest.approx(2 / 3) and result.recall == 1


def test_a_set_has_full_precision_and_recall_of_itself_even_with_copies_in_it():
    features = torch.randn(40, 2048)
    features[10:20] = features[0]  # more copies than neighbours: their radius is zero
    result = precision_recall(features, features.clone(), block_size=16)
    assert (result.precision, result.recall) == (1, 1)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="Expected the same features"):
        precision_recall(torch.zeros(9, 4), torch.zeros(9, 5))
    with pytest.raises(ValueError, match="Expected k from 1 to the samples less one .3., got 4"):
        precision_recall(torch.rand(9, 4), torch.rand(4, 4), k=4)
    with pytest.raises(ValueError, match="Expected finite features"):
        precision_recall(torch.rand(9, 4), torch.full((9, 4), math.nan))
