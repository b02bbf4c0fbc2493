# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch

from diffusers_tread.metrics import precision, recall


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block_size", [16, 1024])
def test_precision_and_recall_are_torch_fidelity_s(torch_fidelity, k, block_size):
    from torch_fidelity.metric_prc import prc_features_to_metric

    reference, samples = torch.randn(120, 6), torch.randn(90, 6) * 0.7 + 0.3
    result = [compute(samples, reference, k=k, block_size=block_size) for compute in (precision, recall)]
    expected = prc_features_to_metric(samples, reference, prc_neighborhood=k, prc_batch_size=1000, verbose=False)
    assert result == pytest.approx([expected["precision"], expected["recall"]], abs=1e-6)
    assert 0 < result[1] < result[0] < 1


def test_precision_and_recall_by_hand():
    # On a line, k = 1. Radii of the reference: 1, 1, 2. Of the samples: 0.5, 0.5, 93.
    reference = torch.tensor([[0.0], [1.0], [3.0]])
    samples = torch.tensor([[6.5], [7.0], [100.0]])
    assert precision(samples, reference, k=1) == recall(samples, reference, k=1) == 0
    # 4.5 is within 2 of 3, -0.9 within 1 of 0, -50 of none.
    samples = torch.tensor([[4.5], [-0.9], [-50.0]])
    assert precision(samples, reference, k=1) == pytest.approx(2 / 3)
    # Radii of the samples: 5.4, 5.4, 49.1. Each of the reference is within some.
    assert recall(samples, reference, k=1) == 1


def test_a_set_has_full_precision_and_recall_of_itself_even_with_copies_in_it():
    features = torch.randn(40, 2048)
    features[10:20] = features[0]  # more copies than neighbours: their radius is zero
    for compute in (precision, recall):
        assert compute(features, features.clone(), block_size=16) == 1


@pytest.mark.parametrize("k", [0, 4])
def test_a_neighbour_that_is_not_there_is_refused(k):
    nine, four = torch.rand(9, 4), torch.rand(4, 4)
    for compute, features in ((precision, (nine, four)), (recall, (four, nine))):
        with pytest.raises(ValueError, match=f"Expected k from 1 to the images less one .3., got {k}"):
            compute(*features, k=k)


def test_features_that_are_not_finite_have_no_neighbours():
    with pytest.raises(ValueError, match="Expected finite features"):
        precision(torch.rand(9, 4), torch.full((9, 4), math.nan))
