# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
from itertools import islice

import torch

from diffusers_tread.data import EpochBatchSampler
from diffusers_tread.seeds import derive_seed


def batches(count, **options):
    return list(islice(EpochBatchSampler(10, seed=3, **options), count))


def test_derived_seeds_differ_in_every_key_and_fit_a_generator():
    keys = [(seed, purpose, step) for seed in range(20) for purpose in ("noise", "labels") for step in range(50)]
    seeds = [derive_seed(*key) for key in keys] + [derive_seed(1), derive_seed("1"), derive_seed(1, 1)]
    assert len(set(seeds)) == len(keys) + 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.Generator().manual_seed(max(seeds))


def test_derived_seeds_are_unbiased_in_their_lowest_bit():
    heads = sum(derive_seed(0, "flip", 0, index) % 2 for index in range(4000))
    assert abs(heads - 2000) < 4 * (4000 * 0.25) ** 0.5


def test_every_epoch_holds_every_sample_once_in_another_order():
    pairs = [pair for batch in batches(15, batch_size=4) for pair in batch]  # six epochs of ten
    orders = [[index for epoch, index in pairs if epoch == wanted] for wanted in range(6)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_ranks_share_the_sequence_of_one_rank_without_overlap():
    together = batches(6, batch_size=6)
    shared = [batches(6, batch_size=2, rank=rank, num_ranks=3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shared, strict=True)] == together


def test_starting_at_a_position_gives_the_rest_of_the_sequence():
    whole = batches(9, batch_size=2, rank=1, num_ranks=2)
    assert batches(5, batch_size=2, rank=1, num_ranks=2, first_sample=16) == whole[4:]
