"""Figures of evaluations and of training, each a matplotlib Figure."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay


def confusion_figure(confusion: Sequence[Sequence[int]] | np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of counts (C, C), true classes in rows, as row percentages: the paper's Figure 6."""
    counts = np.asarray(confusion)
    totals = counts.sum(axis=1)
    size = 3 + 0.75 * len(counts)
    figure = Figure(figsize=(size, size - 1.4), dpi=150, layout='constrained')
    rows = [f'{name} ({total})' for name, total in zip(label_names, totals, strict=True)]
    axes = ConfusionMatrixDisplay(100 * counts / np.maximum(totals, 1)[:, None], display_labels=label_names).plot(
        ax=figure.add_subplot(), cmap='Blues', values_format='.1f', xticks_rotation=45,
        im_kw={'vmin': 0, 'vmax': 100, 'aspect': 'auto'}).ax_
    axes.set(xlabel='predicted', ylabel='true (number of images), in % of the row', yticklabels=rows)
    return figure


def reliability_figure(calibration: Sequence[Mapping[str, Any]], ece: float) -> Figure:
    """Draw accuracy over confidence from the `calibration` of metrics, with the number of images in each bin."""
    figure = Figure(figsize=(7, 6), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color='0.5', linestyle='--', label='perfect calibration')
    filled = [row for row in calibration if row['count']]
    accuracies = [row['accuracy'] for row in filled]
    bars = axes.bar([row['low'] for row in filled], accuracies, calibration[0]['high'], align='edge', edgecolor='white',
                    label='accuracy (images)')
    axes.bar_label(bars, [row['count'] for row in filled], padding=6)
    axes.plot([row['confidence'] for row in filled], accuracies, 'o', color='black', markersize=4, clip_on=False,
              label='at the mean confidence')
    axes.set(xlim=(0, 1), ylim=(0, 1.1), xlabel='confidence (highest probability)', ylabel='accuracy',
             title=f'expected calibration error {100 * ece:.1f} %')
    figure.legend(loc='outside lower center', ncols=3)
    return figure


def coverage_figure(coverage: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw accuracy over the share of images that get an answer, the surest first, from `compute_coverage`."""
    figure = Figure(figsize=(7, 5), dpi=150, layout='constrained')
    axes = figure.add_subplot()
    shares, accuracies = ([100 * row[key] for row in coverage] for key in ('coverage', 'accuracy'))
    low, high = 100 * np.array([row['accuracy_interval'] for row in coverage]).T
    axes.fill_between(shares, low, high, alpha=0.2, label='95 % interval')
    axes.plot(shares, accuracies, 'o-', markersize=4, clip_on=False, label='accuracy')
    axes.axhline(accuracies[-1], color='0.5', linestyle='--', label='accuracy of all')
    for row in coverage[1:-1:3]:  # as many thresholds as fit
        axes.annotate(f"{row['threshold']:.2f}", (100 * row['coverage'], 100 * row['accuracy']), (0, 9),
                      textcoords='offset points', ha='center')
    axes.set(xlim=(0, 100), ylim=(max(0, min(low) - 5), max(high) + 5),
             xlabel='images with an answer, the surest first, in %', ylabel='accuracy of these, in %',
             title='beside the points: the least of their probabilities')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3)
    return figure


def loss_curves_figure(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Figure:
    """Draw training loss, with the Cosine-Harmony term where there is one, and validation loss: the paper's Figure 5.

    `curves` has for each kind of run its seeds, and for each seed its epochs as `history.read_curve` gives them.
    """
    figure = Figure(figsize=(9, 4), dpi=150, layout='constrained')
    panels = figure.subplots(1, 2)
    titles = {'train_loss': 'training loss', 'eval_loss': 'validation loss (cross entropy)'}
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        for i, (name, seeds) in enumerate(curves.items()):
            for j, curve in enumerate(seeds):
                points = np.array([(row['epoch'] + 1, row[key]) for row in curve if key in row]).reshape(-1, 2)
                axes.plot(*points.T, color=f'C{i}', linewidth=1.5, alpha=1 if len(seeds) == 1 else 0.6,
                          marker='o' if len(points) < 15 else None, markersize=4, label=name if j == 0 else None)
        axes.set(title=title, xlabel='epoch', ylabel='loss')
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=len(curves))
    return figure


def features_figure(
        panels: Mapping[str, np.ndarray], labels: np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draw where the same faces of classes (N,) lie in each network's features, given as points (N, 2) by title."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.3 * rows + 0.6), dpi=150, layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, points) in zip(grid, panels.items(), strict=False):
        for i, name in enumerate(label_names):
            axes.scatter(*points[labels == i].T, s=6, color=f'C{i}', alpha=0.7, linewidths=0, label=name)
        axes.set(title=title, xticks=[], yticks=[])
        axes.title.set_fontsize('medium')
    for axes in grid[len(panels):]:
        axes.set_axis_off()
    figure.legend(*grid[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(8, 2 * columns),
                  markerscale=3)
    return figure


def distances_figure(distances: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw distances within and between classes, as `features.class_distances` gives them for each seed, by name."""
    figure = Figure(figsize=(10, 1.6 + 0.38 * len(distances)), dpi=150, layout='constrained')
    panels = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(distances))
    units = {'cosine': 'cosine distance', 'euclidean': 'Euclidean distance\n(1 = mean distance from the center of all)'}
    for axes, (metric, unit) in zip(panels, units.items(), strict=True):
        for kind, shift, what in (('intra', -0.2, 'a face and the mean of its class'),
                                  ('inter', 0.2, 'the means of two classes')):
            values = [[seed[f'{metric}_{kind}'] for seed in seeds] for seeds in distances.values()]
            axes.barh(places + shift, [np.mean(row) for row in values], 0.4, label=what,
                      xerr=[np.std(row, ddof=1) if len(row) > 1 else 0 for row in values])
        axes.set(xlabel=unit)
        axes.locator_params(axis='x', nbins=5)
        axes.grid(axis='x', alpha=0.3)
    panels[0].set_yticks(places, list(distances))
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure
