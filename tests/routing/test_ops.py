# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Taking tokens out and putting them back, against plain Python loops."""

import pytest
import torch

from diffusers_tread.routing import put_tokens, take_tokens


def _ids(batch_size, num_tokens, num_kept):
    return torch.stack([torch.randperm(num_tokens)[:num_kept].sort().values for _ in range(batch_size)])


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("shape, num_kept", [((3, 7, 5), 4), ((1, 1, 2), 1), ((2, 6, 3), 6), ((4, 9, 2, 3), 2)])
def test_taking_and_putting_tokens_equal_a_loop(shape, num_kept):
    hidden_states, ids = torch.randn(shape), _ids(*shape[:2], num_kept)
    before, expected = hidden_states.clone(), hidden_states.clone()
    taken, kept = take_tokens(hidden_states, ids), torch.randn(shape[0], num_kept, *shape[2:])
    assert taken.shape == kept.shape
    for sample in range(shape[0]):
        for place, token in enumerate(ids[sample].tolist()):
            assert torch.equal(taken[sample, place], hidden_states[sample, token])
            expected[sample, token] = kept[sample, place]
    assert torch.equal(put_tokens(hidden_states, ids, kept), expected)
    assert torch.equal(hidden_states, before)


def test_the_order_of_the_ids_is_the_order_of_the_tokens():
    hidden_states, ids = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 3]])
    kept = take_tokens(hidden_states, ids)
    assert torch.equal(kept[0], hidden_states[0, [4, 0]])
    assert torch.equal(put_tokens(hidden_states, ids, kept), hidden_states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_other_dtypes_keep_their_bits(dtype):
    hidden_states, ids = torch.randn(2, 8, 4).mul(3).to(dtype), _ids(2, 8, 3)
    kept = take_tokens(hidden_states, ids)
    assert kept.dtype == dtype
    assert torch.equal(put_tokens(hidden_states, ids, kept), hidden_states)


def test_tokens_not_kept_keep_every_bit():
    hidden_states = torch.randn(2, 8, 3)
    hidden_states[0, 0] = torch.tensor([float("nan"), float("-inf"), -0.0])
    ids = torch.tensor([[2, 5], [1, 7]])
    full = put_tokens(hidden_states, ids, torch.zeros(2, 2, 3))
    for sample in range(2):
        for token in set(range(8)) - set(ids[sample].tolist()):
            assert torch.equal(_bits(full[sample, token]), _bits(hidden_states[sample, token]))


def test_put_tokens_keeps_the_dtype_of_the_sequence():
    hidden_states, ids = torch.randn(1, 4, 2), torch.tensor([[1]])
    kept = torch.tensor([[[0.1, 0.2]]], dtype=torch.bfloat16)
    full = put_tokens(hidden_states, ids, kept)
    assert full.dtype == torch.float32
    assert torch.equal(full[0, 1], kept[0, 0].float())


def test_a_sequence_that_is_not_contiguous_is_read_right():
    hidden_states, ids = torch.randn(5, 2, 3).transpose(0, 1), torch.tensor([[0, 4], [2, 3]])
    assert torch.equal(take_tokens(hidden_states, ids)[1], hidden_states[1, [2, 3]])
    assert torch.equal(put_tokens(hidden_states, ids, take_tokens(hidden_states, ids)), hidden_states)


def test_gradients_equal_finite_differences():
    hidden_states = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    kept = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3], [1, 4]])
    assert torch.autograd.gradcheck(lambda x: take_tokens(x, ids).sin(), hidden_states)
    assert torch.autograd.gradcheck(lambda x, k: put_tokens(x, ids, k).sin(), (hidden_states, kept))
