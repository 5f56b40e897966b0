"""Make all randomness of a training epoch a function of seed and epoch, so that a resumed run equals a whole one.

timm's train script seeds once, at its start: from then on each epoch depends on those before it.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.utils import random_seed
from torch.utils.data import RandomSampler, get_worker_info

from .datasets import DatasetWrapper


def mix_seed(*numbers: int) -> int:
    """One 32-bit seed for several numbers; unlike their sum, it is another one for each combination."""
    return int(np.random.SeedSequence([number % 2 ** 32 for number in numbers]).generate_state(1)[0])


class SeededDataset(DatasetWrapper):
    """Training set that seeds each worker process anew in each epoch, by seed, epoch, rank and worker number.

    timm's loader keeps its workers from epoch to epoch, and torch seeds them only when they start.

    Args:
        dataset: A map-style dataset of timm.
        seed: The run's seed.
        rank: Number of this process in a distributed run.
    """

    def __init__(self, dataset: Any, seed: int, rank: int = 0):
        super().__init__(dataset)
        self.seed = seed
        self.rank = rank
        # In shared memory, where workers that live on see it change.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seeded_epoch = -1

    def __getitem__(self, index: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and (epoch := int(self.epoch)) != self._seeded_epoch:
            random_seed(mix_seed(self.seed, epoch, self.rank, 1 + worker.id), 0)
            self._seeded_epoch = epoch
        return self.dataset[index]


def seed_epoch(loader: Any, seed: int, epoch: int, rank: int = 0) -> None:
    """Seed what an epoch draws from: order of images, worker processes, and the global generators of this process.

    Args:
        loader: timm's training loader, over a `SeededDataset`.
        seed: The run's seed.
        epoch: The epoch that is about to start.
        rank: Number of this process in a distributed run.
    """
    random_seed(mix_seed(seed, epoch, rank), 0)
    dataset = loader.dataset
    while not isinstance(dataset, SeededDataset):  # timm wraps it for --aug-splits and --train-img-sizes
        dataset = dataset.dataset
    dataset.epoch.fill_(epoch)
    loader = getattr(loader, 'loader', loader)  # timm's PrefetchLoader
    # Else the first iteration takes one more number from the global generator than later ones, for its workers.
    loader.generator = torch.Generator().manual_seed(mix_seed(seed, epoch, rank, 0))
    if isinstance(loader.batch_sampler.sampler, RandomSampler):  # those of distributed runs go by the epoch already
        loader.batch_sampler.sampler.generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
