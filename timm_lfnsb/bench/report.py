"""The report of a benchmark: its file, its tables in Markdown, its figure."""
from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError, one_sentence
from ..util.files import replacing
from ..util.machine import processor
from ..util.text import markdown_table
from .measure import RUNTIMES, group_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load_report(path: str | Path) -> dict[str, Any]:
    """Read the JSON of a report.

    Raises:
        UserError: When the file is something else.
    """
    with one_sentence(f'{path} is not a report of timm-lfnsb bench --json'):
        report = json.loads(Path(path).read_text(encoding='utf-8'))
        if report['format'] != 2:
            raise ValueError('another version wrote it')
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report in Markdown: the networks, a table for each task, runtime and batch size, and notes."""
    networks = [
        [name, *(f'{info[key] / 1e6:.2f} M' if info[key] else '-' for key in ('params', 'macs')),
         'x'.join(map(str, info['input_size'][1:])), f'{100 * info["accuracy"]:.1f} %' if info['accuracy'] else '-']
        for name, info in report['models'].items()]
    groups: dict[str, list[list[str]]] = {}
    notes = []
    for row in report['results']:
        name = group_name(row['task'], row['runtime'], row['batch'])
        groups.setdefault(name, []).append(_cells(row))
        if 'error' in row:
            notes.append(f'{row["model"]} fails in {name}: {row["error"]}')
    parts = [markdown_table(['network', 'parameters', 'multiply-accumulates', 'image', 'FER+ test accuracy'], networks)]
    for name, cells in groups.items():
        headers = ['network', 'ms an image', 'quartiles', 'ratio', 'cold start, s', 'MB']
        parts += [f'**{name}**', markdown_table(headers, cells)]
    if report['settings']['peer']:
        notes.append(f'ratio: time relative to {report["settings"]["peer"]}, round by round')
    if any('peak_mb' in row for row in report['results']):
        notes.append('cold start: from nothing to the first prediction of a fresh process; MB: its peak memory')
    versions = ', '.join(f'{name} {number}' for name, number in report['versions'].items())
    notes.append(
        f'{_where(report)} on {report["machine"]["cores"]} cores, float32; {versions}, '
        f'commit {(report["commit"] or "unknown")[:10]}, {report["date"][:10]}')
    return '\n\n'.join([*parts, '\n'.join(f'- {note}' for note in notes)])


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row['model'], 'fails', '', '', '', '']
    if ms := row.get('ms_per_image'):
        cells[1:3] = [f'{ms["median"]:.2f}', f'{ms["q1"]:.2f} - {ms["q3"]:.2f}']
    if 'ratio' in row:
        cells[3] = f'{row["ratio"]["median"]:.2f}'
    if 'peak_mb' in row:
        cells[4:] = [f'{row["cold_start_s"]:.2f}', f'{row["peak_mb"]:.0f}']
    return cells


def _where(report: dict[str, Any]) -> str:
    machine = report['machine']
    return f'{processor(machine)}, {machine["threads"]} thread{"s" * (machine["threads"] > 1)}'


def check_figure(path: str | Path) -> None:
    """Raise UserError where no figure can be written: matplotlib is missing, or does not know the ending."""
    with one_sentence('--plot cannot draw'):
        from matplotlib.figure import Figure
    if Path(path).suffix[1:] not in Figure().canvas.get_supported_filetypes():
        raise UserError(f'--plot {path}: give a file name that ends in .png, .svg or .pdf.')


def benchmark_figure(report: dict[str, Any]) -> Figure:
    """Draw each network's time an image: accuracy over it where at least two networks have one, else parameters.

    One panel for each batch size; colours are networks, markers runtimes, lines the quartiles.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    models = report['models']
    heights = {name: 100 * info['accuracy'] for name, info in models.items() if info['accuracy']}
    label = 'FER+ test accuracy, %'
    if len(heights) < 2:
        heights = {name: info['params'] / 1e6 for name, info in models.items() if info['params']}
        label = 'parameters, millions'
    rows = [row for row in report['results']
            if row['task'] == 'predict' and 'ms_per_image' in row and row['model'] in heights]
    batches = sorted({row['batch'] for row in rows})
    figure = Figure(figsize=(3 + max(5., 4. * len(batches)), 5), dpi=150, layout='constrained')
    panels = dict(zip(batches, figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], strict=True))
    colours = {name: f'C{i}' for i, name in enumerate(heights)}
    markers = dict(zip(RUNTIMES, 'oD^s', strict=True))
    for row in rows:
        low, median, high = (row['ms_per_image'][key] for key in ('q1', 'median', 'q3'))
        panels[row['batch']].errorbar(
            median, heights[row['model']], xerr=[[median - low], [high - median]], color=colours[row['model']],
            marker=markers[row['runtime']], markersize=7, capsize=2, linewidth=1)
    for batch, axes in panels.items():
        axes.set(title=f'batch {batch}', xlabel='milliseconds an image', xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[batches[0]].set_ylabel(label)
    shown = {row['runtime'] for row in rows}
    figure.legend(loc='outside right upper', handles=[
        *(Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in colours.items()),
        *(Line2D([], [], color='0.3', linestyle='', marker=markers[name], label=RUNTIMES[name]) for name in shown)])
    figure.suptitle(_where(report), fontsize='medium')
    return figure


def save_figure(report: dict[str, Any], path: str | Path) -> None:
    """Write `benchmark_figure`, whole or not at all; the ending of the name says the format."""
    figure = benchmark_figure(report)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary)
