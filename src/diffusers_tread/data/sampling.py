# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""Stateless randomness: every draw of a run is a function of what it is for, so a resumed run needs no saved state."""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def derive_seed(*keys: int | str) -> int:
    """Hashes what a draw is for into a seed in [0, 2**63).

    Args:
        keys: What tells this draw from every other one, such as the run's seed, a purpose, the step and the rank.
            Integers and strings do not collide: 1 and "1" give different seeds.

    Returns:
        The same integer on every machine and in every process.

    Example:
        >>> from diffusers_tread.data import derive_seed
        >>> derive_seed(0, "noise", 12) == derive_seed(0, "noise", 12) != derive_seed(0, "noise", 13)
        True
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class EpochBatchSampler(Sampler):
    """The batches of one rank: an endless pass over shuffled epochs that can start anywhere.

    The samples of all epochs form one sequence. Every global batch takes its next `batch_size * num_ranks` samples and
    rank r the r-th part of them, so each rank gets as many batches as it asks for, no sample is lost at the end of an
    epoch, and the order does not depend on how many ranks share it.

    Args:
        num_samples: Samples in an epoch, at least 1.
        batch_size: Samples per batch and rank.
        seed: The run's seed.
        rank: This process, in [0, num_ranks).
        num_ranks: Processes that share the data.
        first_sample: Position in the sequence to start at: the samples that all ranks have already seen.

    Yields:
        Lists of `batch_size` pairs (epoch, index in the data set).
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1, first_sample: int = 0
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks, self.first_sample = rank, num_ranks, first_sample

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = None, None
        start = self.first_sample + self.rank * self.batch_size
        while True:
            batch = []
            for position in range(start, start + self.batch_size):
                epoch, place = divmod(position, self.num_samples)
                if epoch != order_epoch:
                    order_epoch, order = epoch, self._order(epoch)
                batch.append((epoch, int(order[place])))
            yield batch
            start += self.batch_size * self.num_ranks

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", epoch))
        return torch.randperm(self.num_samples, generator=generator)
