"""Is one way of training better than another, beyond chance? Paired tests over seeds and over images."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import ttest_rel


def compare_with_baseline(baseline: np.ndarray, others: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Compare ways of training with a baseline, each trained with the same seeds and measured on the same images.

    Two paired t-tests of equal accuracy, two-sided, because chance enters twice. Over seeds: pairs are trainings of one
    seed, and what varies is the training; there are few, so only large or very steady differences show. Over images:
    pairs are the shares of seeds that get an image right, and what varies is which images were drawn; the trained
    networks count as given. A difference stands where both reject.

    Args:
        baseline: Whether each seed's network is right on each image, bool (S, N).
        others: The same of each way that is compared.

    Returns:
        For each of `others`: `seeds` S, `difference` of the mean accuracies and its sample standard deviation over
        seeds `difference_std`, `p_seeds`, `p_images`, and these as Holm (1979) corrects them for the number of others,
        `p_seeds_holm` and `p_images_holm`. None where there is one seed.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, correct in others.items():
        differences = correct.mean(axis=1) - baseline.mean(axis=1)
        results[name] = {
            'seeds': len(differences), 'difference': float(differences.mean()),
            'difference_std': float(differences.std(ddof=1)) if len(differences) > 1 else None,
            'p_seeds': _p_value(correct.mean(axis=1), baseline.mean(axis=1)),
            'p_images': _p_value(correct.mean(axis=0), baseline.mean(axis=0)),
        }
    for key in ('p_seeds', 'p_images'):
        tested = [name for name in results if results[name][key] is not None]
        corrected = dict(zip(tested, holm([results[name][key] for name in tested]), strict=True))
        for name, result in results.items():
            result[f'{key}_holm'] = corrected.get(name)
    return results


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction of p-values for their number: below a level, all are wrong at most that often.

    Source: Holm, `A Simple Sequentially Rejective Multiple Test Procedure`, Scandinavian Journal of Statistics 6, 1979.
    """
    values = np.asarray(p_values, dtype=float)
    order = values.argsort()
    corrected = np.empty_like(values)
    corrected[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1)
    return corrected.tolist()


def _p_value(first: np.ndarray, second: np.ndarray) -> float | None:
    """Of the paired t-test; 1 where no pair differs, None for a single pair or where all differ alike."""
    differences = first - second
    if len(differences) > 1 and not differences.any():
        return 1.
    if np.ptp(differences) < 1e-12:
        return None
    return float(ttest_rel(first, second).pvalue)
