# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Which tokens are kept: uniform, independent and reproducible.

All statistics are of fixed seeds, so a bound of 4.5 standard deviations never fails by chance; it would by a bias.
"""

import math
from collections import Counter
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from diffusers_tread.routing.subset import magnitude_priority, random_priority, select_kept_tokens, subset_hashes


MAX_Z = 4.5


def kept_ids(seed, *, batch_size, num_tokens, num_kept, route_index=0):
    seed = torch.as_tensor(seed, dtype=torch.int64)
    hashes = subset_hashes(seed, route_index=route_index, batch_size=batch_size, num_tokens=num_tokens)
    return select_kept_tokens(random_priority(hashes), num_kept)


def membership(ids, num_tokens):
    """[B, K] ids to [B, N] booleans."""
    return torch.zeros(ids.shape[0], num_tokens, dtype=torch.bool).scatter(1, ids, True)


# The four ways to get many subsets: samples of a batch, steps, routes, and one seed per sample.
SOURCES = {
    "rows": lambda n, k: kept_ids(7, batch_size=4096, num_tokens=n, num_kept=k),
    "steps": lambda n, k: torch.cat([kept_ids(s, batch_size=1, num_tokens=n, num_kept=k) for s in range(4096)]),
    "routes": lambda n, k: torch.cat(
        [kept_ids(7, batch_size=1, num_tokens=n, num_kept=k, route_index=r) for r in range(4096)]
    ),
    "sample_seeds": lambda n, k: kept_ids(torch.arange(4096) << 31, batch_size=4096, num_tokens=n, num_kept=k),
}


@cache
def subsets(source, num_tokens, num_kept):
    return SOURCES[source](num_tokens, num_kept)


@pytest.mark.parametrize("source", SOURCES)
def test_every_position_is_kept_equally_often(source):
    ids = subsets(source, 16, 6)
    rate = 6 / 16
    z = (membership(ids, 16).sum(0) - 4096 * rate) / math.sqrt(4096 * rate * (1 - rate))
    assert z.abs().max() < MAX_Z
    assert z.abs().max() > 0.1  # exactly even counts would not be random


@pytest.mark.parametrize("source", SOURCES)
def test_every_pair_of_positions_is_kept_equally_often(source):
    kept = membership(subsets(source, 16, 6), 16).double()
    rate = 6 * 5 / (16 * 15)
    together = kept.T @ kept
    for first, second in combinations(range(16), 2):
        z = (together[first, second] - 4096 * rate) / math.sqrt(4096 * rate * (1 - rate))
        assert abs(z) < MAX_Z, (first, second)


@pytest.mark.parametrize("source", SOURCES)
def test_every_subset_is_equally_likely(source):
    counts = Counter(map(tuple, subsets(source, 6, 3).tolist()))
    expected = 4096 / math.comb(6, 3)
    chi_square = sum((counts[subset] - expected) ** 2 / expected for subset in combinations(range(6), 3))
    degrees = math.comb(6, 3) - 1
    assert abs(chi_square - degrees) < MAX_Z * math.sqrt(2 * degrees)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("distance", [1, 2, 64])
def test_subsets_are_independent_of_each_other(source, distance):
    """The overlap of two independent subsets is hypergeometric."""
    kept = membership(subsets(source, 16, 6), 16)
    overlaps = Counter((kept[distance:] & kept[:-distance]).sum(1).tolist())
    total = 4096 - distance
    for size in range(7):
        probability = math.comb(6, size) * math.comb(10, 6 - size) / math.comb(16, 6)
        z = (overlaps[size] - total * probability) / math.sqrt(total * probability * (1 - probability))
        assert abs(z) < MAX_Z, size


def test_subsets_have_the_exact_size_and_are_sorted_without_repeats():
    for num_tokens in (1, 2, 7, 64, 256):
        for num_kept in {1, (num_tokens + 1) // 2, num_tokens}:
            ids = kept_ids(5, batch_size=9, num_tokens=num_tokens, num_kept=num_kept)
            assert ids.shape == (9, num_kept) and ids.dtype == torch.int64
            for row in ids.tolist():
                assert row == sorted(set(row)) and 0 <= row[0] and row[-1] < num_tokens


@pytest.mark.parametrize("shift", [0, 1, 31, 32, 33, 61])
def test_every_bit_of_the_seed_counts(shift):
    first, second = (kept_ids(s, batch_size=4, num_tokens=64, num_kept=32) for s in (12345, 12345 ^ (1 << shift)))
    assert (first != second).any(dim=1).all()


def numpy_kept_ids(seed, *, route_index, row, num_tokens, num_kept):
    """The subset written again with wrapping 32-bit unsigned integers and a plain sort."""

    def mix(x):
        x = np.asarray(x, dtype=np.uint32).reshape(-1)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97)
        return x ^ (x >> np.uint32(15))

    state = mix(seed & 0xFFFFFFFF)
    for word in ((seed >> 32) & 0xFFFFFFFF, route_index, row):
        state = mix(state ^ np.uint32(word))
    hashes = mix(state ^ mix(np.arange(1, num_tokens + 1)))
    return sorted(sorted(range(num_tokens), key=lambda i: (int(hashes[i]), i))[-num_kept:])


@pytest.mark.parametrize("seed", [0, 1, 123456789, 2**32, 2**62 - 1, -1, -(2**63)])
@pytest.mark.parametrize("route_index", [0, 3])
def test_the_ids_equal_those_of_numpy(seed, route_index):
    settings = {"route_index": route_index, "num_tokens": 50, "num_kept": 17}
    ids, seeds = kept_ids(seed, batch_size=3, **settings), [seed, 11, -22]
    samples = kept_ids(seeds, batch_size=3, **settings)  # a sample with its own seed has its subset in every batch
    for row in range(3):
        assert ids[row].tolist() == numpy_kept_ids(seed, row=row, **settings)
        assert samples[row].tolist() == numpy_kept_ids(seeds[row], row=0, **settings)


def test_forced_tokens_come_before_all_others():
    hashes = torch.randint(0, 2**32, (64, 12))
    hashes[:, 3] = 0
    hashes[:, 4] = 2**32 - 1
    force_keep = torch.zeros(12, dtype=torch.bool)
    force_keep[3] = True
    assert (select_kept_tokens(random_priority(hashes, force_keep=force_keep), 1) == 3).all()
    hidden_states = torch.randn(64, 12, 5)
    for mix in (-1.0, -0.5, 0.5, 1.0):
        priority = magnitude_priority(hashes, hidden_states, magnitude_mix=mix, force_keep=force_keep)
        assert (select_kept_tokens(priority, 1) == 3).all()


def test_the_other_tokens_stay_uniform_when_some_are_forced():
    hashes = subset_hashes(torch.tensor(3), route_index=0, batch_size=4096, num_tokens=10)
    force_keep = torch.zeros(10, dtype=torch.bool)
    force_keep[[2, 7]] = True
    counts = membership(select_kept_tokens(random_priority(hashes, force_keep=force_keep), 5), 10).sum(0)
    rate = 3 / 8
    z = (counts[~force_keep] - 4096 * rate) / math.sqrt(4096 * rate * (1 - rate))
    assert (counts[force_keep] == 4096).all() and z.abs().max() < MAX_Z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", [-1.0, -0.3, 0.3, 1.0])
def test_the_magnitude_mix_equals_its_formula(mix, dtype):
    hidden_states = torch.randn(3, 11, 6).to(dtype)
    hashes = torch.randint(0, 2**32, (3, 11))
    norm = np.abs(hidden_states.double().numpy()).sum(-1)
    low, high = norm.min(1, keepdims=True), norm.max(1, keepdims=True)
    magnitude = (norm - low) / (high - low)
    magnitude = 1 - magnitude if mix < 0 else magnitude
    expected = (1 - abs(mix)) * hashes.numpy() / 2**32 + abs(mix) * magnitude

    priority = magnitude_priority(hashes, hidden_states, magnitude_mix=mix)
    assert priority.dtype == torch.float32
    np.testing.assert_allclose(priority.numpy(), expected, atol=1e-6)


def test_equal_magnitudes_leave_the_choice_to_chance():
    hashes = torch.randint(0, 2**32, (3, 11))
    priority = magnitude_priority(hashes, torch.ones(3, 11, 6), magnitude_mix=0.5)
    assert torch.equal(priority.argsort(1), hashes.argsort(1))


def test_no_gradient_flows_through_the_choice():
    hidden_states = torch.randn(1, 4, 3, requires_grad=True)
    hashes = torch.randint(0, 2**32, (1, 4))
    assert not magnitude_priority(hashes, hidden_states, magnitude_mix=0.5).requires_grad
