"""Wrappers of a training set that draw anew in each epoch, as a function of seed and epoch alone.

So a run that is resumed repeats what it would have done. What worker processes need is in shared memory: they live on
from epoch to epoch, with the dataset they were started with.
"""
from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from timm.utils import random_seed
from torch.utils.data import Dataset, RandomSampler, WeightedRandomSampler, get_worker_info

from ..errors import UserError
from .options import rank

_logger = logging.getLogger(__name__)


class DatasetWrapper(Dataset):
    """A map-style dataset of timm in another dress: what a subclass does not define is the wrapped dataset's."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == 'dataset' or name.startswith('__'):  # not there yet while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.dataset, name)

    # timm's loader sets the transform after the dataset is made.
    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform


def folder_targets(dataset: Any) -> torch.Tensor:
    """Class numbers (N,) of the images of a folder dataset of timm, of their folders or drawn from votes."""
    if not hasattr(getattr(dataset, 'reader', None), 'samples'):
        raise UserError('--label-votes, --balance-power and --logit-adjustment need a folder of images as --data-dir.')
    return torch.tensor([target for _, target in dataset.reader.samples])


class BalancedDataset(DatasetWrapper):
    """Training set whose images are drawn with replacement, and those of rare classes more often.

    An epoch stays as long as it was. A class of n images gets a share of it that is proportional to n ** (1 - power):
    power 0 leaves the classes as they are, 1 draws all of them equally often. All processes of a distributed run make
    the same draw, so that the sampler can divide it among them.
    """

    def __init__(self, dataset: Any, power: float, seed: int = 0):
        super().__init__(dataset)
        counts = folder_targets(dataset).bincount()
        self.indices = torch.arange(len(dataset)).share_memory_()
        self.power = power
        self.seed = seed
        self.set_epoch(0)
        if rank() == 0:
            shares = counts.double() ** (1 - power) * (counts > 0)
            expected = shares / shares.sum() * len(self)
            _logger.info(f'Class balance with power {power:g}, images of an epoch: ' + ', '.join(
                f'{name} {before} -> {after:.0f}' for name, before, after in zip(
                    self.reader.class_to_idx, counts, expected, strict=False)))

    def set_epoch(self, epoch: int) -> None:
        """Draw the images of an epoch; timm's train script calls this before each."""
        if hasattr(self.dataset, 'set_epoch'):  # labels that are drawn anew make other classes rare
            self.dataset.set_epoch(epoch)
        targets = folder_targets(self.dataset)
        weights = targets.bincount().double()[targets] ** -self.power
        generator = torch.Generator().manual_seed(self.seed + epoch)
        drawn = WeightedRandomSampler(weights, len(self), generator=generator)  # type: ignore[arg-type]
        self.indices.copy_(torch.tensor(list(drawn)))

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.indices[index])]


class SeededDataset(DatasetWrapper):
    """Training set that seeds each worker process anew in each epoch, by seed, epoch, rank and worker number."""

    def __init__(self, dataset: Any, seed: int, rank: int = 0):
        super().__init__(dataset)
        self.seed = seed
        self.rank = rank
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._seeded_epoch = -1

    def __getitem__(self, index: Any) -> Any:
        worker = get_worker_info()
        if worker is not None and (epoch := int(self.epoch)) != self._seeded_epoch:
            random_seed(mix_seed(self.seed, epoch, self.rank, 1 + worker.id), 0)
            self._seeded_epoch = epoch
        return self.dataset[index]


def mix_seed(*numbers: int) -> int:
    """One 32-bit seed for several numbers; unlike their sum, it is another one for each combination."""
    return int(np.random.SeedSequence([number % 2 ** 32 for number in numbers]).generate_state(1)[0])


def seed_epoch(loader: Any, seed: int, epoch: int, rank: int = 0) -> None:
    """Seed what an epoch draws from: order of images, worker processes, and the global generators of this process.

    The loader is timm's, over a `SeededDataset`; `rank` is the number of this process in a distributed run.
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
