"""The report of a benchmark: reading and writing it, tables for terminal and README, the figure."""
from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..util.files import replacing, write_json
from ..util.machine import processor
from .measure import NOISY, RUNTIMES, BenchError, group_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 100
"""Columns of the tables for a terminal."""

def save_report(report: dict[str, Any], path: str | Path) -> None:
    """Write the report as JSON, whole or not at all."""
    write_json(Path(path), report)


def load_report(path: str | Path) -> dict[str, Any]:
    """Read what `save_report` wrote.

    Raises:
        BenchError: When the file is something else.
    """
    try:
        report = json.loads(Path(path).read_text(encoding='utf-8'))
    except OSError as error:
        raise BenchError(f'cannot read {path}: {error.strerror}.') from None
    except ValueError:
        report = None
    if not isinstance(report, dict) or report.get('format') != 1 or 'results' not in report:
        raise BenchError(f'{path} is not a report of timm-lfnsb bench --json.')
    return report


def groups(report: dict[str, Any]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """Rows to show by (task, runtime, batch): of each network and form the better memory format, or a failure."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in report['results']:
        rows = found.setdefault((row['task'], row['runtime'], row['batch']), [])
        same = [(other['model'], other['form']) for other in rows]
        if row['best'] and (row['model'], row['form']) in same:
            rows[same.index((row['model'], row['form']))] = row
        elif row['best'] or ('error' in row and (row['model'], row['form']) not in same):
            rows.append(row)
    return {key: rows for key, rows in found.items() if rows}


_LAYOUTS = {None: '', 'contiguous': 'NCHW', 'channels_last': 'NHWC'}


def _form(row: dict[str, Any]) -> str:
    known = {'reparameterised': 'repar.', 'unoptimised': 'unopt.', 'convolutions': 'convs'}
    return known.get(row['form'], _shorten(row['form'], 6))


def _sharing_limit(report: dict[str, Any]) -> float:
    """Microseconds for an operator on two threads, up to which a round counts as one of quick threads."""
    times = [time for rounds in report.get('sharing_us', {}).values() for time in rounds]
    return 1.2 * min(times, default=0.)


def ratios_by_sharing(report: dict[str, Any]) -> list[tuple[dict[str, Any], list[float], list[float]]]:
    """Rows with their ratios in rounds of quick threads and in the others, where the whole run had some of both."""
    limit = _sharing_limit(report)
    found = []
    for key, rows in groups(report).items():
        times = report.get('sharing_us', {}).get(group_name(*key), [])
        for row in rows:
            if row['form'] == 'unoptimised' or report['models'][row['model']]['peer'] or not row.get('ratio'):
                continue
            quick: list[float] = []
            slow: list[float] = []
            for time, ratio in zip(times, row['ratio'].get('rounds', []), strict=False):
                (quick if time <= limit else slow).append(ratio)
            found.append((row, quick, slow))
    return found if any(quick for _, quick, _ in found) and any(slow for _, _, slow in found) else []


def fastest_ratio(report: dict[str, Any], row: dict[str, Any]) -> float:
    """A row's fastest call over the peer's in the same group, for a row that has a ratio: near to a quiet machine's."""
    group = groups(report)[row['task'], row['runtime'], row['batch']]
    peer = next(other for other in group if other['model'] == report['settings']['peer'])
    return row['ms_per_image']['min'] / peer['ms_per_image']['min']


def _median(ratios: Sequence[float]) -> str:
    return f'{statistics.median(ratios):.2f} ({len(ratios)} round{"s" if len(ratios) > 1 else ""})' if ratios else '-'


def format_report(report: dict[str, Any]) -> str:
    """The report as tables for a terminal, 100 columns wide."""
    peer = report['settings']['peer']
    width = min(22, max([5, *(len(name) for name in report['models'])]))
    lines = [*textwrap.wrap(_footnote(report), WIDTH), '']
    for name, info in report['models'].items():
        accuracy = '' if info['accuracy'] is None else f', FER+ test accuracy {100 * info["accuracy"]:.1f} %'
        lines.append(
            f'{name:<{width}}  {info["params"] / 1e6:7.3f} M parameters, {info["macs"] / 1e6:8.1f} M MACs at '
            f'{info["input_size"][1]}x{info["input_size"][2]}{accuracy}')
    noisy = False
    failures: list[dict[str, Any]] = []
    for key, rows in groups(report).items():
        rate = next((row['matmul_gflops'] for row in rows if 'matmul_gflops' in row), None)
        lines += ['', group_name(*key) + (f' (matrix product: {rate:.0f} GFLOP/s)' if rate else '')]
        lines.append(
            f'{"model":<{width}}  {"form":<6} {"layout":<6} {"ms/image":>9} {"quartiles":>15} {"images/s":>8} '
            f'{"ratio":>6} {"GFLOP/s":>8} {"share":>5} {"MB":>5}')
        for row in rows:
            start = f'{_shorten(row["model"], width):<{width}}  {_form(row):<6} '
            start += f'{_LAYOUTS[row["memory_format"]]:<6}'
            if 'ms_per_image' not in row:
                lines.append(f'{start} failed ({len(failures) + 1})')
                failures.append(row)
                continue
            ms = row['ms_per_image']
            noisy |= row['noisy']
            ratio = f'{row["ratio"]["median"]:.2f}' if row.get('ratio') else '-'
            gflops = f'{row["gflops"]:.1f}' if 'gflops' in row else '-'
            share = f'{row["gflops"] / row["matmul_gflops"]:.0%}' if 'gflops' in row else ''
            memory = f'{row.get("gpu_peak_mb", row["peak_mb"]):.0f}' if 'peak_mb' in row else '-'
            lines.append(
                f'{start} {_number(ms["median"])}{"~" if row["noisy"] else " "} '
                f'{_number(ms["q1"]).strip() + " - " + _number(ms["q3"]).strip():>15} '
                f'{row["images_per_second"]:>8.1f} {ratio:>6} {gflops:>8} {share:>5} {memory:>5}')
        seconds = [f'{row["model"]} {row["compile_seconds"]:.0f} s' for row in rows if 'compile_seconds' in row]
        if seconds:
            lines += textwrap.wrap(f'compiled in: {", ".join(seconds)}', WIDTH)
    sharing = ratios_by_sharing(report)
    if sharing:
        limit = f'{_sharing_limit(report):.1f}'
        lines += ['', *textwrap.wrap(SHARING_NOTE, WIDTH)]
        lines.append(
            f'{"model":<{width}}  {"form":<6} {"":<26}{"up to " + limit + " us":>17}{"more":>17}{"fastest":>9}')
        for row, quick, slow in sharing:
            name = group_name(row['task'], row['runtime'], row['batch'])
            lines.append(
                f'{_shorten(row["model"], width):<{width}}  {_form(row):<6} {_shorten(name, 26):<26}'
                f'{_median(quick):>17} {_median(slow):>16} {fastest_ratio(report, row):>8.2f}')
    for row in _profiled(report):
        name = group_name(row['task'], row['runtime'], row['batch'])
        lines += ['', *textwrap.wrap(f'where the time goes: {row["model"]}, {row["form"]}, {name}', WIDTH)]
        lines += textwrap.wrap(_profile_line(row), WIDTH, initial_indent='  ', subsequent_indent='  ')
    cold = [row for rows in groups(report).values() for row in rows if 'cold_start' in row]
    if cold:
        lines += ['', f'cold start, batch {cold[0]["batch"]}, seconds (median of fresh processes)']
        lines.append(
            f'{"model":<{width}}  {"form":<6} {"runtime":<14} {"import":>7} {"create":>7} {"first":>7} {"total":>7}  '
            'range')
        for row in cold:
            start = row['cold_start']
            lines.append(
                f'{_shorten(row["model"], width):<{width}}  {_form(row):<6} {RUNTIMES[row["runtime"]]:<14} '
                f'{start["import"]:>7.2f} {start["create"]:>7.2f} {start["first"]:>7.2f} {start["total"]:>7.2f}  '
                f'{start["min"]:.2f} - {start["max"]:.2f} ({start["runs"]})')
    if report['import']:
        lines += ['', _import_line(report)]
    failures += [row for row in report['results'] if 'error' in row and row not in failures]
    if failures:
        lines += ['', 'failed']
        for number, row in enumerate(failures, start=1):
            name = f'({number}) {row["model"]}, {group_name(row["task"], row["runtime"], row["batch"])}: '
            lines += textwrap.wrap(name + row['error'], WIDTH, subsequent_indent='    ')
    notes = [
        (f'ratio: time relative to {peer}, round by round; ' if peer else '') +
        'GFLOP/s: two for each multiply-accumulate; share: GFLOP/s relative to the matrix product of torch (a runtime '
        'can be ahead of it); MB: peak memory of a fresh process.']
    if any(row['form'] == 'convolutions' for row in report['results']):
        notes.append(f'convs: {FLOOR_NOTE}')
    if noisy:
        notes.append(f'~ The quartiles lie more than {NOISY:.0%} of the median apart: something else ran meanwhile.')
    cores, load = report['machine']['cores'], report['load'][0]
    if load is not None and load > 0.5 * cores:
        notes.append(f'The machine was busy when this began (load {load:.1f} on {cores} cores): repeat it on a '
                     'quiet one.')
    if not report['complete']:
        notes.append('Incomplete: the run was interrupted.')
    lines.append('')
    for note in notes:
        lines += textwrap.wrap(note, WIDTH)
    return '\n'.join(lines)


FLOOR_NOTE = (
    'the network without PReLU and the attention of its blocks, which is another function: a floor for what the '
    'convolutions of this runtime can give.')

SHARING_NOTE = (
    'ratio by the time that an operator of 65538 multiplications takes on two threads or more: longer where their '
    'cores share no cache, or other work disturbs them; fastest: by the fastest call of each, about what a quiet '
    'machine gives')

PROFILE_SHARE = 0.02
"""Least share of an operator that is shown by its name."""


def _profiled(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in groups(report).values() for row in rows if row.get('profile')]


def _profile_line(row: dict[str, Any]) -> str:
    """The largest shares of a profile, with the number of calls."""
    entries = [entry for entry in row['profile'] if entry['share'] >= PROFILE_SHARE]
    parts = [
        f'{entry["operator"].removeprefix("aten::")} {entry["share"]:.0%} ({entry["calls"]:.0f})' for entry in entries]
    if len(entries) < len(row['profile']):
        parts.append(f'others {1 - sum(entry["share"] for entry in entries):.0%}')
    return ', '.join(parts)


def format_markdown(report: dict[str, Any]) -> str:
    """The report as tables for a README: milliseconds an image and, in brackets, the ratio to the first peer."""
    shown = groups(report)
    forms = list(dict.fromkeys((row['model'], row['form']) for rows in shown.values() for row in rows))
    several = {model for model, _ in forms if len({form for other, form in forms if other == model}) > 1}
    peer = report['settings']['peer']

    def table(columns: Sequence[tuple[str, str, int]], cell: Callable[[dict[str, Any]], str]) -> list[str]:
        out = ['| model | ' + ' | '.join(group_name(*key) for key in columns) + ' |', '|---' * (len(columns) + 1) + '|']
        for model, form in forms:
            cells = []
            for key in columns:
                row = next((row for row in shown[key] if (row['model'], row['form']) == (model, form)), None)
                cells.append('' if row is None else cell(row))
            if any(cells):
                name = f'`{model}`' + (f', {form}' if model in several else '')
                out.append(f'| {name} | ' + ' | '.join(cells) + ' |')
        return out

    def speed(row: dict[str, Any]) -> str:
        if 'ms_per_image' not in row:
            return 'fails'
        ratio = f' ({row["ratio"]["median"]:.2f})' if row.get('ratio') else ''
        return f'{_number(row["ms_per_image"]["median"]).strip()} ms{ratio}'

    def start(row: dict[str, Any]) -> str:
        return f'{row["cold_start"]["total"]:.2f} s, {row["peak_mb"]:.0f} MB' if 'cold_start' in row else ''

    lines = []
    for task in ('predict', 'train'):
        columns = [key for key in shown if key[0] == task]
        if columns:
            lines += [*table(columns, speed), '']
    lines[-1:] = ['', 'Milliseconds an image' + (f', and the ratio to {peer} in brackets' if peer else '') + '.', '']
    if any(form == 'convolutions' for _, form in forms):
        lines += [f'"convolutions": {FLOOR_NOTE}', '']
    sharing = ratios_by_sharing(report)
    if sharing:
        lines += [
            f'| ratio to {peer} in rounds of | up to {_sharing_limit(report):.1f} µs | more | fastest |',
            '|---|---|---|---|']
        for row, quick, slow in sharing:
            name = group_name(row['task'], row['runtime'], row['batch'])
            lines.append(
                f'| `{row["model"]}`, {row["form"]}, {name} | {_median(quick)} | {_median(slow)} | '
                f'{fastest_ratio(report, row):.2f} |')
        lines += ['', SHARING_NOTE[0].upper() + SHARING_NOTE[1:] + '.', '']
    profiled = _profiled(report)
    if profiled:
        lines += ['| where the time goes | shares of the operators (calls) |', '|---|---|']
        for row in profiled:
            name = group_name(row['task'], row['runtime'], row['batch'])
            lines.append(f'| `{row["model"]}`, {row["form"]}, {name} | {_profile_line(row)} |')
        lines += ['', 'By the profilers of the runtimes, which slow small operators more than large ones.', '']
    columns = [key for key, rows in shown.items() if any('cold_start' in row for row in rows)]
    if columns:
        lines += [*table(columns, start), '', 'Cold start (from nothing to the first prediction) and peak memory of a '
                  'fresh process.', '']
    if report['import']:
        lines += [_import_line(report), '']
    lines.append(_footnote(report) + ('' if report['complete'] else ' Incomplete: the run was interrupted.'))
    return '\n'.join(lines)


def _import_line(report: dict[str, Any]) -> str:
    times = report['import']
    return (f'`import timm_lfnsb` takes {times["ratio"]:.2f} times as long as `import timm` '
            f'({times["timm_lfnsb"]:.2f} s and {times["timm"]:.2f} s of CPU time).')


def _footnote(report: dict[str, Any]) -> str:
    machine, commit = report['machine'], report['commit']
    versions = ', '.join(f'{name} {number}' for name, number in report['versions'].items() if number)
    dtype = 'bfloat16 autocast' if report['settings']['amp'] else 'float32'
    commit = f', commit {commit[:10]}{"+" if commit.endswith("+") else ""}' if commit else ''
    return (f'{machine["gpu"] or processor(machine)}, {_threads(report)} on {machine["cores"]} cores, {dtype}; '
            f'{versions}{commit}, {report["date"][:10]}.')


def _threads(report: dict[str, Any]) -> str:
    threads = report['machine']['threads']
    return f'{threads} thread' + ('s' if threads > 1 else '')


def _number(value: float) -> str:
    """Three digits or more, in nine columns less the mark behind it."""
    return f'{value:>8.{max(0, 2 - math.floor(math.log10(value)))}f}'


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 1] + '…'


def benchmark_figure(report: dict[str, Any]) -> Figure:
    """Draw each network's time an image: accuracy over it where at least two networks have one, else parameters.

    One panel for each batch size of predictions; colours are networks, markers runtimes, lines the quartiles.

    Raises:
        BenchError: When the report has no predictions.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    shown = {key: rows for key, rows in groups(report).items() if key[0] == 'predict'}
    rows = [row for group in shown.values() for row in group if 'ms_per_image' in row]
    if not rows:
        raise BenchError('there are no predictions in the report to draw.')
    models = [name for name in report['models'] if any(row['model'] == name for row in rows)]
    accuracies = [name for name in models if report['models'][name]['accuracy'] is not None]
    by_accuracy = len(accuracies) > 1
    if by_accuracy:
        models = accuracies
    batches = sorted({row['batch'] for row in rows})
    runtimes = [runtime for runtime in RUNTIMES if any(row['runtime'] == runtime for row in rows)]
    markers = dict(zip(RUNTIMES, 'oD^s', strict=True))
    figure = Figure(figsize=(3 + max(5., 4. * len(batches)), 5), dpi=150, layout='constrained')
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for axes, batch in zip(panels, batches, strict=True):
        for row in rows:
            if row['batch'] != batch or row['model'] not in models or row['form'] == 'convolutions':
                continue
            info, ms = report['models'][row['model']], row['ms_per_image']
            height = 100 * info['accuracy'] if by_accuracy else info['params'] / 1e6
            colour = f'C{models.index(row["model"])}'
            axes.errorbar(
                ms['median'], height, xerr=[[ms['median'] - ms['q1']], [ms['q3'] - ms['median']]], color=colour,
                marker=markers[row['runtime']], markersize=7, capsize=2, linewidth=1,
                markerfacecolor='white' if row['form'] in ('plain', 'unoptimised') and not info['peer'] else colour)
        axes.set_xlim(left=0)
        axes.set_title(f'batch {batch}')
        axes.set_xlabel('milliseconds an image')
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('FER+ test accuracy, %' if by_accuracy else 'parameters, millions')
    if not by_accuracy:
        panels[0].set_ylim(bottom=0)
    names = [
        Line2D([], [], color=f'C{i}', linewidth=4, label=f'{name} ({report["models"][name]["macs"] / 1e6:.0f} M MACs)')
        for i, name in enumerate(models)]
    kinds = [
        Line2D([], [], color='0.3', linestyle='', marker=markers[runtime], label=RUNTIMES[runtime])
        for runtime in runtimes]
    if any(row['form'] in ('plain', 'unoptimised') and not report['models'][row['model']]['peer'] for row in rows):
        kinds.append(Line2D(
            [], [], color='0.3', linestyle='', marker='o', markerfacecolor='white', label='not optimised'))
    figure.legend(handles=names + kinds, loc='outside right upper')
    machine = report['machine']
    figure.suptitle(f'{machine["gpu"] or machine["cpu"]}, {_threads(report)}', fontsize='medium')
    return figure


def save_figure(report: dict[str, Any], path: str | Path) -> None:
    """Write `benchmark_figure`, whole or not at all; the ending of the name says the format."""
    figure = benchmark_figure(report)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary)
