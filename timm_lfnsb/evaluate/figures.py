"""Figures of evaluations and of training; matplotlib figures without pyplot, so that no global state changes."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def confusion_figure(confusion: Sequence[Sequence[int]] | np.ndarray, label_names: Sequence[str]) -> Figure:
    """Draw a confusion matrix of counts (C, C), true classes in rows, as row percentages: the paper's Figure 6."""
    counts = np.asarray(confusion)
    totals = counts.sum(axis=1)
    size = 3 + 0.75 * len(counts)
    figure = Figure(figsize=(size, size - 1.4), dpi=150, layout='compressed')
    axes = figure.add_subplot(facecolor='0.92')  # what a row without images shows
    percent = np.ma.masked_invalid(100 * counts / np.where(totals, totals, np.nan)[:, None])
    image = axes.imshow(percent, cmap='Blues', vmin=0, vmax=100)
    for (row, column), value in np.ma.ndenumerate(percent):
        axes.text(column, row, f'{value:.1f}', ha='center', va='center', color='white' if value > 50 else 'black')
    for row in np.flatnonzero(totals == 0).tolist():
        axes.text((len(counts) - 1) / 2, row, 'no images', ha='center', va='center', color='0.4')
    axes.set_xticks(range(len(counts)), label_names, rotation=45, ha='right', rotation_mode='anchor')
    axes.set_yticks(range(len(counts)), [f'{name} ({n})' for name, n in zip(label_names, totals, strict=True)])
    axes.set(xlabel='predicted', ylabel='true (number of images)')
    figure.colorbar(image, ax=axes, label='% of the true class', shrink=0.8)
    return figure


def reliability_figure(calibration: Sequence[Mapping[str, Any]], ece: float) -> Figure:
    """Draw accuracy over confidence from the `calibration` of metrics, and the number of images in each bin below."""
    figure = Figure(figsize=(7, 7.3), dpi=150, layout='constrained')
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, 1))
    filled = [row for row in calibration if row['count']]
    lows, width = [row['low'] for row in calibration], calibration[0]['high'] - calibration[0]['low']
    upper.plot([0, 1], [0, 1], color='0.5', linestyle='--', label='perfect calibration')
    upper.bar(lows, [row['accuracy'] or 0 for row in calibration], width, align='edge', color='tab:blue',
              edgecolor='white', label='accuracy')
    upper.plot([row['confidence'] for row in filled], [row['accuracy'] for row in filled], 'o', color='black',
               markersize=4, clip_on=False, zorder=3, label='at the mean confidence of the bin')
    upper.set(ylabel='accuracy', ylim=(0, 1.02), title=f'expected calibration error {100 * ece:.1f} %')
    figure.legend(loc='outside lower center', ncols=3)
    bars = lower.bar(lows, [row['count'] for row in calibration], width, align='edge', color='0.6', edgecolor='white')
    lower.bar_label(bars, fontsize='small', padding=1)
    lower.margins(y=0.15)
    lower.set(xlim=(0, 1), ylabel='images', xlabel='confidence (highest probability)')
    return figure


def loss_curves_figure(curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]]) -> Figure:
    """Draw training and validation loss over the epochs, as in the paper's Figure 5.

    The training loss of a run with the Cosine-Harmony loss includes that term; the validation loss is the cross entropy
    of every run.

    Args:
        curves: For each kind of run its seeds, and for each seed its epochs with `epoch`, `train_loss` and perhaps
            `eval_loss` (the columns of timm's summary.csv).
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
