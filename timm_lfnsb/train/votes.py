"""Labels drawn from crowd votes, anew in each epoch.

Probabilistic label drawing of Barsoum et al. 2016 (arXiv 1608.01041, section 3.2.2), their best scheme on FER+.
"""
from __future__ import annotations

import csv
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from ..errors import UserError, did_you_mean
from ..labels import canonical_name
from .datasets import DatasetWrapper, folder_targets
from .options import rank

_logger = logging.getLogger(__name__)


def read_votes(path: Path, label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a CSV file of votes: a column `file` and one column of counts for each label.

    Columns are matched to the run's labels by name, synonyms included; votes in other columns are left out.

    Returns:
        Votes (C,) of each image by its file name without folders.

    Raises:
        UserError: When a column is missing, or a count is not a number from 0 on.
    """
    names = [canonical_name(name) for name in label_names]
    votes: dict[str, np.ndarray] = {}
    with path.open(newline='', encoding='utf-8-sig') as file:
        rows = csv.reader(file, strict=True)
        try:
            columns = [canonical_name(field) for field in next(rows, [])]
            if missing := [name for name in ('file', *names) if name not in columns]:
                raise ValueError(f"no column for {', '.join(missing)}{did_you_mean(missing[0], columns)}")
            for row in filter(None, rows):
                values = dict(zip(columns, row, strict=True))
                name = PurePath(values['file']).name
                counts = np.array([float(values[label]) for label in names])
                if not (np.isfinite(counts) & (counts >= 0)).all():
                    raise ValueError('counts from 0 on are expected')
                votes[name] = counts
        except (csv.Error, ValueError) as error:
            raise UserError(f'--label-votes {path}, line {rows.line_num}: {error}.') from None
    return votes


def match_votes(
        votes: Mapping[str, np.ndarray], files: Sequence[str], targets: Sequence[int], num_classes: int) -> np.ndarray:
    """Probabilities (N, num_classes) of the labels of N images, from what `read_votes` returned.

    `files` are their names, after folders or without; `targets` the class numbers, which images without votes keep.

    Raises:
        UserError: When few images have votes, two share a name, or most votes are against the folders' labels.
    """
    names = [PurePath(file).name for file in files]
    [(name, times)] = Counter(names).most_common(1)
    if times > 1:
        raise UserError(f'--label-votes: two images are called {name}, so their votes cannot be told apart.')
    labels = np.asarray(targets)
    voted = np.array([i for i, name in enumerate(names) if name in votes and votes[name].any()], dtype=int)
    if 2 * len(voted) < len(names):
        raise UserError(
            f'--label-votes has votes for {len(voted)} of {len(names)} images ({names[0]}, ...; it lists '
            f'{next(iter(votes), "none")}, ...): it belongs to other images.')
    counts = np.stack([votes[names[i]] for i in voted])
    agree = (counts[np.arange(len(voted)), labels[voted]] == counts.max(axis=1)).mean()
    if agree < 0.5:
        raise UserError(f"--label-votes: only {agree:.0%} of the images lie in the folder that most votes are for: the "
                        "labels' names or the images are mixed up.")
    probabilities = np.eye(num_classes)[labels]
    probabilities[voted] = counts / counts.sum(axis=1, keepdims=True)
    return probabilities


class DrawnSamples(Sequence):
    """Files and their labels of the present epoch, in place of the list that a reader of timm keeps."""

    def __init__(self, files: Sequence[Any], targets: torch.Tensor):
        self.files = files
        self.targets = targets

    def __getitem__(self, index: Any) -> Any:
        return self.files[index], int(self.targets[index])

    def __len__(self) -> int:
        return len(self.files)


class VotedDataset(DatasetWrapper):
    """Training set whose labels are drawn from votes, anew in each epoch.

    A label is a function of seed, epoch and file name alone, whatever the order of the images and the process. The
    attribute `probabilities` (N, C) is the share of the votes of each image.

    Raises:
        UserError: When the file (see `read_votes`) does not fit the dataset, a folder dataset of timm.
    """

    def __init__(self, dataset: Any, path: Path, label_names: Sequence[str] | None, seed: int = 0):
        super().__init__(dataset)
        folders = folder_targets(dataset)
        if label_names is None:
            raise UserError('--label-votes: the labels of the run are not known: give a --class-map.')
        files = [file for file, _ in dataset.reader.samples]
        self.names = [PurePath(getattr(file, 'name', file)).name for file in files]  # one in a tar file has a name
        self.probabilities = match_votes(read_votes(path, label_names), self.names, folders.tolist(), len(label_names))
        self.seed = seed
        self.targets = folders.clone().share_memory_()
        dataset.reader.samples = DrawnSamples(files, self.targets)
        self.set_epoch(0)
        if rank() == 0:
            counts = folders.bincount(minlength=len(label_names)), self.probabilities.sum(0)
            _logger.info('Labels are drawn from votes, expected images of an epoch: ' + ', '.join(
                f'{name} {before} -> {after:.0f}' for name, before, after in zip(label_names, *counts, strict=True)))

    def set_epoch(self, epoch: int) -> None:
        """Draw the labels of an epoch; timm's train script calls this before each."""
        digests = (
            hashlib.blake2b(f'{self.seed} {epoch} {name}'.encode(), digest_size=8).digest() for name in self.names)
        uniform = (np.frombuffer(b''.join(digests), dtype='<u8') >> 11) / 2.0 ** 53  # below 1, also when rounded
        cumulated = self.probabilities.cumsum(axis=1)  # up to 1, give or take a rounding error
        drawn = (cumulated <= uniform[:, None] * cumulated[:, -1:]).sum(axis=1)
        self.targets.copy_(torch.from_numpy(drawn))
