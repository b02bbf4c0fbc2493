# Copyright 2026 The diffusers-tread authors. Licensed under the Apache License, Version 2.0.
"""The order in which a run sees its samples."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from ..seeds import derive_seed


class EpochBatchSampler(Sampler):
    """Yields the batches of one rank: an endless pass over shuffled epochs that can start at any sample.

    The samples of all epochs form one sequence. Each global batch takes the next `batch_size * num_ranks` samples, of
    which rank r gets the r-th part. So every rank gets as many batches as it asks for, no sample is lost at the end of
    an epoch, and the order does not depend on the number of ranks.

    Args:
        num_samples: Samples in an epoch, at least 1.
        batch_size: Samples per batch and rank.
        seed: The run's seed.
        rank: Rank of this process, in [0, num_ranks).
        num_ranks: Number of processes that share the data.
        first_sample: Position in the sequence to start at: the number of samples that all ranks have already seen.

    Yields:
        Lists of `batch_size` pairs (epoch, index in the data set).
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1, first_sample: int = 0
    ):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.num_ranks, self.first_sample = rank, num_ranks, first_sample

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order_epoch, order = None, range(0)
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
