"""Class balance: draw the training images of rare classes more often."""
from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils.data import WeightedRandomSampler

from .datasets import DatasetWrapper
from .options import rank

_logger = logging.getLogger(__name__)


def folder_targets(dataset: Any) -> torch.Tensor:
    """Class numbers (N,) of the images of a folder dataset of timm, of their folders or drawn from votes.

    Raises:
        ValueError: When the dataset does not tell its targets without loading images.
    """
    try:
        return torch.tensor([target for _, target in dataset.reader.samples])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        raise ValueError('this needs a folder of images as --data-dir, not --dataset.') from None


class BalancedDataset(DatasetWrapper):
    """Training set whose images are drawn anew each epoch, with replacement, and those of rare classes more often.

    An epoch stays as long as it was. A class of n images gets a share of it that is proportional to n ** (1 - power):
    power 0 leaves the classes as they are, 1 draws all of them equally often. The draw is a function of seed and epoch
    alone, so that all processes of a distributed run share it, and a resumed run repeats it.

    Args:
        dataset: A folder dataset of timm, whose reader lists its samples and targets.
        power: In [0, 1].
        seed: The run's seed.

    Raises:
        ValueError: When the dataset does not tell its targets without loading images.
    """

    def __init__(self, dataset: Any, power: float, seed: int = 0):
        super().__init__(dataset)
        counts = folder_targets(dataset).bincount()
        # In shared memory: worker processes that live on from epoch to epoch keep the dataset they were started with.
        self.indices = torch.arange(len(dataset)).share_memory_()
        self.power = power
        self.seed = seed
        self.set_epoch(0)
        if rank() == 0:
            shares = counts.double() ** (1 - power) * (counts > 0)
            expected = shares / shares.sum() * len(self)
            _logger.info(f'Class balance with power {power:g}, images of an epoch: ' + ', '.join(
                f'{name} {counts[i]} -> {expected[i]:.0f}' for name, i in self.reader.class_to_idx.items()
                if i < len(counts) and counts[i]))

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

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """File name of an image of this epoch, as timm's own datasets give it."""
        return self.dataset.filename(int(self.indices[index]), basename, absolute)
