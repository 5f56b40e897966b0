"""Figures by group of people or pictures: who a model serves worse, and by how much."""
from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..labels import match_labels
from .metrics import FIGURES, compute_metrics
from .predictions import Predictions, folder_name

Groups = dict[str, dict[str, str]]
"""Group of each image, by column and image."""


def read_groups(path: str | Path, known: Sequence[str], needed: Sequence[str]) -> Groups:
    """Read a CSV file with the column `image` (LABEL/FILE, as in predictions.csv) and a column for each grouping.

    Args:
        known: Images that the file may name.
        needed: Images that it must name.

    Raises:
        UserError: When it is no such file, an image is unknown, missing or there twice, a cell is empty, or a column
            has a single group, or groups that have no class in common.
    """
    with open(path, newline='', encoding='utf-8-sig') as file:
        try:
            header, *rows = ([cell.strip() for cell in row] for row in csv.reader(file, strict=True) if row)
        except (ValueError, csv.Error):  # an empty file, other encodings
            raise UserError(f'{path} is no CSV file of images and their groups.') from None
    if header[0] != 'image' or len(header) < 2 or len(set(header)) < len(header) or '' in header:
        raise UserError(f"{path} must begin with a line of different column names, image and one or more for groups, "
                        f"not {', '.join(header)}.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header) or '' in row:
            raise UserError(f'{path} has an empty or missing cell, or one too many, in row {number}: every image needs '
                            'one group in every column.')
    images = [row[0].replace('\\', '/') for row in rows]
    for what, wrong in (
            ('names images more than once', [image for image, count in Counter(images).items() if count > 1]),
            ('names images that are not in the data', set(images) - set(known)),
            ('lacks images of the data, LABEL/FILE,', set(needed) - set(images)),
    ):
        if wrong:
            raise UserError(f'{path} {what} ({len(wrong)}, such as {min(wrong)}).')
    groups = {column: {image: row[i] for image, row in zip(images, rows, strict=True)}
              for i, column in enumerate(header) if i}
    for column, of_image in groups.items():
        if len({of_image[image] for image in needed}) < 2 or not _shared_labels(needed, of_image):
            raise UserError(f'{path} has nothing to compare in the column {column}: that takes two groups or more, and '
                            'a class that all of them have.')
    return groups


def _shared_labels(files: Sequence[str], of_image: Mapping[str, str]) -> set[str]:
    """Names of the label folders that have images of every group."""
    labels: dict[str, set[str]] = {}
    for file in files:
        labels.setdefault(of_image[file], set()).add(folder_name(file))
    return set.intersection(*labels.values())


def measure_groups(predictions: Predictions, groups: Groups) -> dict[str, Any]:
    """All of `compute_metrics` for each group, and the largest gap between two groups in each figure.

    A gap's interval is that of the difference of two independent estimates, from their intervals (Newcombe, 1998,
    method 10; Zou and Donner, 2008). It does not know that the two were chosen for their gap: of many groups, the
    largest gap is large by chance, too. Averages run over the classes that occur in every group of the column: others
    would make gaps by themselves.

    Returns:
        By column, those `classes`, `groups` with the metrics of each, and `largest_gap`, which has for each figure, by
        its key, `gap`, `gap_interval` where both groups have one, and the groups `high` and `low`; None where fewer
        than two groups have the figure.
    """
    measured = {}
    for column, of_image in groups.items():
        values = np.array([of_image[file] for file in predictions.files])
        shared = match_labels(_shared_labels(predictions.files, of_image), predictions.label_names)
        classes = [predictions.label_names[i] for i in sorted(shared.values())]
        by_group = {}
        for name in sorted(set(values.tolist())):
            inside = np.flatnonzero(values == name).tolist()
            by_group[name] = compute_metrics(replace(
                predictions, files=[predictions.files[i] for i in inside], labels=predictions.labels[inside],
                probabilities=predictions.probabilities[inside]), classes)
        measured[column] = {'classes': classes, 'groups': by_group, 'largest_gap': {
            **{key: _largest_gap(by_group, key) for key in FIGURES},
            'per_class': {label: {
                key: _largest_gap({name: metrics['per_class'][label] for name, metrics in by_group.items()}, key)
                for key in ('precision', 'recall', 'f1')} for label in predictions.label_names}}}
    return measured


def _largest_gap(by_group: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any] | None:
    known = {name: figures for name, figures in by_group.items() if figures[key] is not None}
    if len(known) < 2:
        return None
    high, low = (chosen(known, key=lambda name: known[name][key]) for chosen in (max, min))
    top, bottom = known[high][key], known[low][key]
    result = {'gap': top - bottom, 'high': high, 'low': low}
    if (upper := known[high].get(f'{key}_interval')) and (lower := known[low].get(f'{key}_interval')):
        result['gap_interval'] = [
            top - bottom - math.hypot(top - upper[0], lower[1] - bottom),
            top - bottom + math.hypot(upper[1] - top, bottom - lower[0])]
    return result


def group_rows(measured: Mapping[str, Any], text: Callable[[Mapping[str, Any], str], str]) -> list[list[Any]]:
    """Rows of a table of what `measure_groups` returns: column, group, images, `FIGURES`; the largest gaps last.

    `text` makes a figure, which it finds by its key, into text.
    """
    rows: list[list[Any]] = []
    for column, of_column in measured.items():
        rows += [[column, name, metrics['count'], *(text(metrics, key) for key in FIGURES)]
                 for name, metrics in of_column['groups'].items()]
        gaps = (of_column['largest_gap'][key] for key in FIGURES)
        rows.append([column, 'largest gap', '', *(f"{text(gap, 'gap')} {gap['high']} - {gap['low']}" for gap in gaps)])
    return rows
