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

from ..labels import EXPRESSIONS_8, canonical_name
from .datasets import DatasetWrapper, folder_targets
from .options import rank

_logger = logging.getLogger(__name__)

# What else a file of votes may have: people could also vote for the last three.
OTHER_COLUMNS = ('file', 'split', 'label', 'usage', 'unknown', 'not_a_face', 'nf')


def read_votes(path: Path, label_names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read a CSV file of votes: a column `file` and one column of counts for each label.

    Columns are matched to the run's labels by name, synonyms included. Votes for unknown, for not a face and for
    expressions that the run does not have are left out.

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
            rows = csv.reader(file, strict=True)
            columns = [canonical_name(field) for field in next(rows, [])]
            if 'file' not in columns:
                raise ValueError("has no column 'file'")
            if missing := [name for name in names if name not in columns]:
                raise ValueError(f"has no column for {', '.join(missing)}")
            if strange := set(columns) - {*OTHER_COLUMNS, *EXPRESSIONS_8, *names}:
                raise ValueError(f"has columns that are no label of this run ({', '.join(label_names)}): "
                                 f"{', '.join(sorted(strange))}")
            for row in filter(None, rows):
                values = dict(zip(columns, row, strict=False))
                name = PurePath(values.get('file', '')).name
                try:
                    counts = np.array([float(values[label]) for label in names])
                except (KeyError, ValueError):
                    counts = np.array([np.nan])
                if not name or not np.isfinite(counts).all() or (counts < 0).any():
                    raise ValueError(f'line {rows.line_num}: a file name and counts from 0 on are expected')
                if name in votes:
                    raise ValueError(f'line {rows.line_num}: {name} is listed twice')
                votes[name] = counts
    except (OSError, csv.Error, ValueError) as error:
        raise ValueError(f'{path} {getattr(error, "strerror", None) or error}.') from None
    return votes


def match_votes(
        votes: Mapping[str, np.ndarray], files: Sequence[str], targets: Sequence[int], num_classes: int) -> np.ndarray:
    """Probabilities (N, num_classes) of the labels of N images, from what `read_votes` returned.

    `files` are their names, after folders or without; `targets` the class numbers, which images without votes keep.

    Raises:
        ValueError: When few images have votes, two share a name, or most votes are against the folders' labels.
    """
    names = [PurePath(file).name for file in files]
    [(name, times)] = Counter(names).most_common(1)
    if times > 1:
        raise ValueError(f'two images are called {name}, so their votes cannot be told apart.')
    labels = np.asarray(targets)
    voted = np.array([i for i, name in enumerate(names) if name in votes and votes[name].any()], dtype=int)
    if 2 * len(voted) < len(names):
        raise ValueError(
            f'it has votes for {len(voted)} of {len(names)} images ({names[0]}, ...; it lists '
            f'{next(iter(votes), "none")}, ...): it belongs to other images.')
    counts = np.stack([votes[names[i]] for i in voted])
    agree = (counts[np.arange(len(voted)), labels[voted]] == counts.max(axis=1)).mean()
    if agree < 0.5:
        raise ValueError(f"only {agree:.0%} of the images lie in the folder that most votes are for: the labels' names "
                         'or the images are mixed up.')
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
        ValueError: When the file (see `read_votes`) does not fit the dataset, a folder dataset of timm.
    """

    def __init__(self, dataset: Any, path: Path, label_names: Sequence[str] | None, seed: int = 0):
        super().__init__(dataset)
        folders = folder_targets(dataset)
        if label_names is None:
            raise ValueError('the labels of the run are not known: give a folder of images as --data-dir.')
        files = [file for file, _ in dataset.reader.samples]
        self.names = [PurePath(getattr(file, 'name', file)).name for file in files]
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
