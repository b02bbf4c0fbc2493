# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from diffusers_tread.metrics import inception_score


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
