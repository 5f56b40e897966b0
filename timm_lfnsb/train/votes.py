"""Labels drawn from crowd votes: each epoch, each face's label is drawn anew from what people said about it.

Probabilistic label drawing of Barsoum et al. 2016 (arXiv 1608.01041, section 3.2.2), their best scheme on FER+.
"""
from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from ..labels import EXPRESSIONS_8, canonical_name
from .datasets import DatasetWrapper

_logger = logging.getLogger(__name__)

FILE_COLUMN = 'file'
OTHER_COLUMNS = ('split', 'label', 'usage')
"""Columns that a file of votes may have and that are not votes."""
NO_CLASS = ('unknown', 'not_a_face', 'nf')
"""What people could also vote for; such votes are left out."""


def read_votes(path: Path, label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a CSV file of votes: a column `file` and one column of counts for each label.

    Args:
        path: The file. Columns are matched to labels by name (synonyms as in `labels`); votes for unknown and for not a
            face are left out, and so are votes for expressions that the run does not have.
        label_names: The run's labels in the order of its classes.

    Returns:
        Votes (C,) of each image by its file name without folders.

    Raises:
        ValueError: When the file cannot be read, a column is missing or unknown, a count is not a number from 0 on, or
            a file is listed twice.
    """
    names = [canonical_name(name) for name in label_names]
    votes: dict[str, np.ndarray] = {}
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            rows = csv.DictReader(file, strict=True)
            columns = {(field or '').strip(): canonical_name(field or '') for field in rows.fieldnames or ()}
            rows.fieldnames = list(columns)
            if FILE_COLUMN not in columns:
                raise ValueError(f"has no column '{FILE_COLUMN}'")
            missing = [label for label, name in zip(label_names, names, strict=True) if name not in columns.values()]
            if missing:
                raise ValueError(f"has no column for {', '.join(missing)}")
            known = {FILE_COLUMN, *OTHER_COLUMNS, *NO_CLASS, *EXPRESSIONS_8, *names}
            strange = [field for field, name in columns.items() if name not in known]
            if strange:
                raise ValueError(
                    f"has columns that are no label of this run: {', '.join(strange)} (its labels: "
                    f"{', '.join(label_names)})")
            fields = [next(field for field, column in columns.items() if column == name) for name in names]
            for row in rows:
                name = PurePath(row[FILE_COLUMN] or '').name
                try:
                    counts = np.array([float(row[field]) for field in fields])
                except (TypeError, ValueError):
                    counts = np.array([np.nan])
                if not name or not np.isfinite(counts).all() or (counts < 0).any():
                    raise ValueError(f'line {rows.line_num}: a file name and counts from 0 on are expected')
                if name in votes:
                    raise ValueError(f'line {rows.line_num}: {name} is listed twice')
                votes[name] = counts
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f'{path} {getattr(error, "strerror", None) or error}.') from None
    return votes


def match_votes(
        votes: Mapping[str, np.ndarray], files: Sequence[str], targets: Sequence[int], num_classes: int) -> np.ndarray:
    """Probability of each label for each image of a training set.

    Args:
        votes: What `read_votes` returned.
        files: Names of the images, folders may stand before them.
        targets: Their folders' class numbers, which images without votes keep.
        num_classes: Number of classes.

    Returns:
        Probabilities (N, C), each row summing to 1.

    Raises:
        ValueError: When the votes do not fit the images: none or few are named, two images share a name, or most votes
            are against the folders' labels.
    """
    names = [PurePath(file).name for file in files]
    if len(set(names)) != len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f'two images are called {twice}, so their votes cannot be told apart.')
    probabilities = np.eye(num_classes)[np.asarray(targets)]
    voted = np.array([i for i, name in enumerate(names) if name in votes and votes[name].sum() > 0], dtype=int)
    if 2 * len(voted) < len(names):
        raise ValueError(
            f'it has votes for {len(voted)} of {len(names)} images ({names[0]}, ...; it lists '
            f'{next(iter(votes), "none")}, ...): it belongs to other images.')
    counts = np.stack([votes[names[i]] for i in voted])
    probabilities[voted] = counts / counts.sum(axis=1, keepdims=True)
    agree = (counts[np.arange(len(voted)), np.asarray(targets)[voted]] == counts.max(axis=1)).mean()
    if agree < 0.5:
        raise ValueError(f"only {agree:.0%} of the images lie in the folder that most votes are for: the labels' names "
                         'or the images are mixed up.')
    return probabilities


class DrawnReader:
    """A reader of timm whose targets are others than its own."""

    def __init__(self, reader: Any, targets: torch.Tensor):
        self.reader = reader
        self.targets = targets

    def __getitem__(self, index: int) -> Any:
        image, _, *rest = self.reader[index]
        return image, int(self.targets[index]), *rest

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == 'reader' or name.startswith('__'):  # not there yet while a worker unpickles this
            raise AttributeError(name)
        return getattr(self.reader, name)

    @property
    def samples(self) -> list[tuple[Any, int]]:
        """Files and their targets of the present epoch."""
        return [(file, target) for (file, _), target in zip(self.reader.samples, self.targets.tolist(), strict=True)]


class VotedDataset(DatasetWrapper):
    """Training set whose labels are drawn from votes, anew in each epoch.

    The label of an image is a function of seed, epoch and its file name alone: it does not depend on the order of the
    images, on the process or worker that reads it, or on the epochs before.

    Args:
        dataset: A folder dataset of timm, whose reader lists its samples and targets.
        path: File of votes, see `read_votes`.
        label_names: The run's labels in the order of its classes.
        seed: The run's seed.

    Attributes:
        probabilities: Share of the votes (N, C) of each image.

    Raises:
        ValueError: When the file does not fit the dataset.
    """

    def __init__(self, dataset: Any, path: Path, label_names: Sequence[str], seed: int = 0):
        super().__init__(dataset)
        try:
            files, folders = zip(*dataset.reader.samples, strict=True)
            self.names = [PurePath(getattr(file, 'name', file)).name for file in files]
        except (AttributeError, TypeError, ValueError):
            raise ValueError('votes need a folder of images as --data-dir, not --dataset.') from None
        self.probabilities = match_votes(read_votes(path, label_names), self.names, folders, len(label_names))
        self.seed = seed
        # In shared memory: worker processes that live on from epoch to epoch keep the dataset they were started with.
        self.targets = torch.tensor(folders).share_memory_()
        dataset.reader = DrawnReader(dataset.reader, self.targets)
        self.set_epoch(0)
        _logger.info('Labels are drawn from votes, expected images of an epoch: ' + ', '.join(
            f'{name} {folders.count(i)} -> {share:.0f}'
            for i, (name, share) in enumerate(zip(label_names, self.probabilities.sum(axis=0), strict=True))))

    def set_epoch(self, epoch: int) -> None:
        """Draw the labels of an epoch; timm's train script calls this before each."""
        digests = (
            hashlib.blake2b(f'{self.seed} {epoch} {name}'.encode(), digest_size=8).digest() for name in self.names)
        uniform = np.frombuffer(b''.join(digests), dtype='<u8') / 2.0 ** 64
        drawn = (self.probabilities.cumsum(axis=1) <= uniform[:, None]).sum(axis=1)
        # Rounding may leave the last sum below 1: take the last label that has votes at all.
        last = self.probabilities.shape[1] - 1 - (self.probabilities[:, ::-1] > 0).argmax(axis=1)
        self.targets.copy_(torch.from_numpy(np.minimum(drawn, last)))
