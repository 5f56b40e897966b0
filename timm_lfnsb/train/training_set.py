"""The training set of a run: labels from votes, class balance, seeds of epochs, each where it is asked for."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from ..errors import UserError
from .balance import BalancedDataset, folder_targets
from .checkpoints import run_label_names
from .options import rank
from .seeds import SeededDataset
from .votes import VotedDataset


def training_set(dataset: Any, options: argparse.Namespace) -> tuple[Dataset, torch.Tensor]:
    """Wrap a folder dataset of timm as the options say.

    Returns:
        The dataset, and how many images of each class (C,) training is expected to have, for --logit-adjustment; empty
        without it.

    Raises:
        UserError: When an option does not fit the dataset.
    """
    seed = getattr(options, 'seed', 0)
    counts = torch.empty(0)
    option = ''
    try:
        if options.label_votes:
            option = f'--label-votes {options.label_votes}'
            names = run_label_names(options)
            if names is None:
                raise ValueError('votes need a folder of images as --data-dir, not --dataset.')
            dataset = VotedDataset(dataset, Path(options.label_votes), names, seed)
        if options.logit_adjustment:
            option = '--logit-adjustment'
            if isinstance(dataset, VotedDataset):
                counts = torch.from_numpy(dataset.probabilities.sum(axis=0))
            else:
                classes = getattr(options, 'num_classes', None) or 0
                counts = folder_targets(dataset).bincount(minlength=classes).double()
            counts = counts.clamp(min=1) ** (1 - options.balance_power)
        if options.balance_power:
            option = '--balance-power'
            dataset = BalancedDataset(dataset, options.balance_power, seed)
    except ValueError as error:
        raise UserError(f'{option}: {error}') from None
    if not options.no_epoch_seeds:
        dataset = SeededDataset(dataset, seed, rank())
    return dataset, counts


def prepend_transform(dataset: Any, first: Any) -> None:
    """Put a transform of PIL images before those that timm's loader gave a dataset."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    # With --train-img-sizes timm's own come later, outside of the dataset.
    dataset.transform = first if dataset.transform is None else Compose([first, dataset.transform])
