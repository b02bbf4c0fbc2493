# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Bidirectional WKV against the plain sum, the shift against a loop, and what both mean on the rows that are kept."""

import pytest
import torch
from backbones import make_backbone

from diffusers_tread import TokenRoute, TokenRouter
from diffusers_tread.models.rwkv_tread_2d import bidirectional_wkv, q_shift


def plain_wkv(key, value, decay, bonus):
    """arXiv 2403.02308, equation 4: [B, N, N, D] weights of each token at each, added up."""
    position = torch.arange(key.shape[1])
    between = ((position.unsqueeze(1) - position).abs() - 1).unsqueeze(-1)  # N N 1
    exponent = torch.where(between < 0, bonus, -decay * between / key.shape[1]) + key.unsqueeze(1)  # B N N D
    return (torch.softmax(exponent, dim=2) * value.unsqueeze(1)).sum(dim=2)


@pytest.fixture
def draw():
    """Keys, values, decays from exp(-1) to exp(-100) over the tokens, and bonuses."""

    def draw(num_tokens, dim=6, key_scale=1.0, decay=None):
        generator = torch.Generator().manual_seed(num_tokens)
        key, value = torch.randn(2, 2, num_tokens, dim, dtype=torch.float64, generator=generator)
        decay = torch.linspace(1, 100, dim) if decay is None else torch.full((dim,), decay)
        bonus = torch.randn(dim, generator=generator)
        return key_scale * key, value, decay.double(), bonus.double()

    return draw


@pytest.mark.parametrize("num_tokens", [1, 20, 32, 75, 128])
def test_wkv_equals_the_plain_sum_in_float64_with_its_gradients(draw, num_tokens):
    inputs = [tensor.requires_grad_() for tensor in draw(num_tokens, key_scale=5.0)]
    found, expected = bidirectional_wkv(*inputs), plain_wkv(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    towards = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, towards), torch.autograd.grad(expected, inputs, towards), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("key_size, decay", [(1, 1.0), (30, 400.0), (30, 5000.0), (1000, 300.0)])
def test_wkv_is_stable_in_float32(draw, key_size, decay):
    """Keys up to 30 with any decay, keys of any size with decays up to exp(-60) in 32 of 256 tokens."""
    key, value, decay, bonus = draw(256, decay=decay)
    inputs = [key.tanh() * key_size, value, decay, bonus]
    inputs = [tensor.float().requires_grad_() for tensor in inputs]
    found = bidirectional_wkv(*inputs)
    expected = plain_wkv(*(tensor.detach().double() for tensor in inputs))
    # Exponents of 1000 are rounded to 6e-5.
    assert (found - expected).abs().max() < max(1e-5, 5e-7 * key_size) * expected.abs().max()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), inputs))


def test_wkv_of_keys_and_decays_without_bounds_is_finite(draw):
    key, value, decay, bonus = draw(128, decay=1e5)
    inputs = [tensor.float().requires_grad_() for tensor in (1000 * key, value, decay, bonus)]
    found = bidirectional_wkv(*inputs)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(found.sum(), inputs))


def test_wkv_reversed_is_wkv_of_the_reversed(draw):
    key, value, decay, bonus = draw(75)
    found = bidirectional_wkv(key.flip(1), value.flip(1), decay, bonus).flip(1)
    torch.testing.assert_close(found, bidirectional_wkv(key, value, decay, bonus), atol=1e-12, rtol=1e-12)


def test_wkv_without_decay_and_bonus_is_the_softmax_average(draw):
    key, value, decay, bonus = draw(75)
    expected = (torch.softmax(key, dim=1) * value).sum(dim=1, keepdim=True).expand_as(value)
    torch.testing.assert_close(bidirectional_wkv(key, value, 0 * decay, 0 * bonus), expected, atol=1e-12, rtol=1e-12)


def test_wkv_decays_by_the_share_of_the_sequence(draw):
    """Each token twice, an infinitely small distance apart in the limit: nearly the average of each once."""
    key, value, decay, bonus = draw(512, dim=2, decay=2.0)
    once = bidirectional_wkv(key, value, decay, 0 * bonus)
    twice = bidirectional_wkv(key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), decay, 0 * bonus)
    torch.testing.assert_close(twice[:, ::2], once, atol=2e-3, rtol=0)


def test_wkv_computes_in_float32_under_autocast(draw):
    inputs = [tensor.float() for tensor in draw(75)]
    expected = bidirectional_wkv(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bidirectional_wkv(*inputs), expected)
        half = bidirectional_wkv(inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:])
    assert half.dtype == torch.bfloat16 and (half - expected).norm() < 0.02 * expected.norm()


def test_q_shift_equals_a_loop():
    batch_size, height, width, dim = 2, 3, 5, 8
    tokens = torch.randn(batch_size, height * width, dim)
    expected = torch.zeros(batch_size, height, width, dim)
    grid = tokens.view(batch_size, height, width, dim)
    for row in range(height):
        for column in range(width):
            neighbours = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
            for quarter, (other_row, other_column) in enumerate(neighbours):
                if 0 <= other_row < height and 0 <= other_column < width:
                    part = slice(quarter * dim // 4, (quarter + 1) * dim // 4)
                    expected[:, row, column, part] = grid[:, other_row, other_column, part]
    assert torch.equal(q_shift(tokens, width), expected.flatten(1, 2))


def test_of_kept_rows_the_shift_is_the_dense_one_where_the_neighbours_are_kept():
    height, width, dim = 8, 4, 8
    tokens = torch.randn(1, height * width, dim)
    router = TokenRouter(TokenRoute(start=0, end=0, selection_ratio=0.5, unit="row"), num_layers=4)
    (ids,) = router.plan(tokens, training=True, seed=torch.tensor(4), grid_size=(height, width))
    rows = (ids[0, ::width] // width).tolist()
    dense = q_shift(tokens, width).view(height, width, dim)[rows]
    kept = q_shift(tokens[:, ids[0]], width).view(len(rows), width, dim)

    # Columns: always. Rows: from the next kept one, the dense one's where that is next to it.
    assert torch.equal(kept[..., dim // 2 :], dense[..., dim // 2 :])
    above, below = slice(0, dim // 4), slice(dim // 4, dim // 2)
    grid = tokens.view(height, width, dim)
    for index in range(1, len(rows)):
        assert torch.equal(kept[index, :, above], grid[rows[index - 1], :, above])
        assert torch.equal(kept[index - 1, :, below], grid[rows[index], :, below])
        assert torch.equal(kept[index, :, above], dense[index, :, above]) == (rows[index] == rows[index - 1] + 1)


def test_every_token_of_a_block_sees_every_other():
    block = make_backbone("rwkv", routes=None).double().transformer_blocks[0]
    tokens, conditioning = torch.randn(2, 16, 16).double(), torch.randn(2, 16).double()
    tokens[1, :9], tokens[1, 10:], conditioning[1] = tokens[0, :9], tokens[0, 10:], conditioning[0]
    one, other = block(tokens, conditioning, 4)
    assert (one != other).any(dim=-1).all()
