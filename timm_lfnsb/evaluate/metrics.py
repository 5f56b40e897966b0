"""Figures of predictions with 95 % intervals, as fractions between 0 and 1, and the comparison of two models."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from ..errors import UserError
from .predictions import Predictions

CALIBRATION_BINS = 15
RESAMPLES = 1000
FIGURES = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
"""What every table shows, by key."""


def _wilson(successes: int, trials: int) -> list[float] | None:
    """Wilson score interval of a proportion; None without trials."""
    return [*map(float, binomtest(successes, trials).proportion_ci(0.95, method='wilson'))] if trials else None


def compute_metrics(predictions: Predictions, averaged: Sequence[str] | None = None) -> dict[str, Any]:
    """Compute the figures of a classifier, as a dict that JSON can hold.

    Averages run over the classes that occur in the data, as in scikit-learn, or those named in `averaged`. A class that
    is never predicted has precision 0, one that does not occur None throughout. `confusion` has true classes in rows.

    Intervals: Wilson's for accuracy, precision and recall; the same, through the Jaccard index, for F1 ("Wilson
    indirect" of arXiv 2309.14621); for balanced accuracy and macro F1 the percentiles of 1000 bootstrap resamples
    within each class, with a fixed seed, too narrow for classes of few images. `ece` is the expected calibration error
    of arXiv 1706.04599, equation (3); it has none, because resamples only enlarge it. Its 15 bins (low, high] of the
    highest probability are in `calibration`.
    """
    total = len(predictions.labels)
    names = list(predictions.label_names)
    confusion = confusion_matrix(predictions.labels, predictions.predicted, labels=range(len(names)))
    precision, recall, f1, counts = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=range(len(names)), zero_division=0)
    hits, predicted, present = confusion.diagonal(), confusion.sum(axis=0), counts > 0

    per_class: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        # F1 = 2 J / (1 + J), where J, hits among all that were or should have been this class, is a proportion.
        jaccard = _wilson(hits[i], counts[i] + predicted[i] - hits[i]) or ()
        figures = {
            'precision': float(precision[i]), 'precision_interval': _wilson(hits[i], predicted[i]),
            'recall': float(recall[i]), 'recall_interval': _wilson(hits[i], counts[i]),
            'f1': float(f1[i]), 'f1_interval': [2 * bound / (1 + bound) for bound in jaccard],
        }
        per_class[name] = {'count': int(counts[i]), **(figures if present[i] else dict.fromkeys(figures))}

    # Resampling a class's n images draws its number of hits from the binomial distribution of n and its recall.
    rng, over = np.random.default_rng(0), np.flatnonzero(present)
    if averaged is not None:
        over = np.array([names.index(name) for name in averaged])
    resampled = rng.binomial(counts[over], recall[over], (RESAMPLES, len(over))) / counts[over]
    # And its row of the confusion matrix from the multinomial one; F1 = 2 hits / (true + predicted).
    draws = {i: rng.multinomial(counts[i], confusion[i] / counts[i], RESAMPLES) for i in np.flatnonzero(present)}
    drawn_hits = np.stack([draws[i][:, i] for i in over], axis=1)
    drawn_f1 = 2 * drawn_hits / (counts + sum(draws.values()))[:, over]

    confidence = predictions.probabilities.max(axis=1).astype(np.float64)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)
    calibration, ece = [], 0.
    for i, (low, high) in enumerate(pairwise(edges.tolist())):
        inside, right, sure = bins == i, None, None
        if inside.any():
            right, sure = float(predictions.correct[inside].mean()), float(confidence[inside].mean())
            ece += float(inside.mean()) * abs(right - sure)
        calibration.append(
            {'low': low, 'high': high, 'count': int(inside.sum()), 'accuracy': right, 'confidence': sure})
    return {
        'count': total,
        'accuracy': float(hits.sum() / total),
        'accuracy_interval': _wilson(hits.sum(), total),
        'balanced_accuracy': float(recall[over].mean()),
        'balanced_accuracy_interval': np.percentile(resampled.mean(axis=1), (2.5, 97.5)).tolist(),
        'macro_f1': float(f1[over].mean()),
        'macro_f1_interval': np.percentile(drawn_f1.mean(axis=1), (2.5, 97.5)).tolist(),
        'ece': ece,
        'label_names': names,
        'absent': [name for name, there in zip(names, present, strict=True) if not there],
        'per_class': per_class,
        'confusion': confusion.tolist(),
        'calibration': calibration,
    }


def compute_coverage(predictions: Predictions) -> list[dict[str, Any]]:
    """Accuracy of the surest images alone, in steps of 5 % of all, as a list that JSON can hold.

    `threshold` is the least confidence, the highest probability of an image, among the `count` images of a row; others
    that are just as sure belong to it. `coverage` is their share of all, `accuracy` has Wilson's interval.
    """
    total = len(predictions.labels)
    confidence = predictions.probabilities.max(axis=1)
    rows = {}
    for threshold in np.sort(confidence)[::-1][(np.arange(1, 21) * total - 1) // 20]:
        right = predictions.correct[confidence >= threshold]
        rows[len(right)] = {
            'coverage': len(right) / total, 'threshold': float(threshold), 'count': len(right),
            'accuracy': float(right.mean()), 'accuracy_interval': _wilson(right.sum(), len(right))}
    return list(rows.values())


def compare_predictions(first: Predictions, second: Predictions) -> dict[str, Any]:
    """Compare two models, whose class orders may differ, on the same images.

    `p_value` is of McNemar's exact test, two-sided. The interval of `difference`, accuracy of the first minus that of
    the second, is the percentiles of 1000 paired bootstrap resamples of the images, with a fixed seed.

    Raises:
        UserError: When the images are not the same.
    """
    total = len(first.files)
    if list(first.files) != list(second.files):
        raise UserError('the two predictions are of different images: predict the same folder.')
    (neither, only_second), (only_first, both) = confusion_matrix(
        first.correct, second.correct, labels=[False, True]).tolist()
    discordant = only_first + only_second
    # Resampling images draws the two discordant numbers from a multinomial distribution.
    draws = np.random.default_rng(0).multinomial(
        total, np.array([only_first, only_second, total - discordant]) / total, RESAMPLES)
    return {
        'count': total,
        'both_right': both, 'only_first_right': only_first, 'only_second_right': only_second, 'both_wrong': neither,
        'p_value': float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        'difference': (only_first - only_second) / total,
        'difference_interval': np.percentile((draws[:, 0] - draws[:, 1]) / total, (2.5, 97.5)).tolist(),
    }


def percent(figures: Mapping[str, Any], key: str, sign: str = '') -> str:
    """A figure as text in percent, with its interval in brackets where there is one."""
    value, *bounds = (f'{100 * value:{sign}.1f}' for value in (figures[key], *(figures.get(f'{key}_interval') or ())))
    return value + (f" [{', '.join(bounds)}]" if bounds else '')
