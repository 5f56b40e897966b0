"""Results of experiments: gathered as JSON, drawn, and written as Markdown beside the paper's."""
from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluate.figures import confusion_figure, loss_curves_figure
from ..train.history import read_curve
from ..util.files import read_json
from ..util.text import markdown_table
from .losses import COLUMNS, compare_losses, draw_losses, loss_cells, losses_notes, run_distances, trial_results
from .plan import EXPERIMENTS, Plan, Run

METRICS = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
RESULTS_DIR = Path(__file__).parent.parent / 'results'
PAPER = read_json(RESULTS_DIR / 'paper.json')
"""Accuracies in percent that the paper prints, by experiment and row."""


def collect(plan: Plan) -> dict[str, Any]:
    """Gather the results of the finished runs of an experiment."""
    paper, rows = PAPER.get(plan.experiment, {}), []
    tests = compare_losses(plan) if plan.experiment == 'losses' else {}
    for row in plan.rows:
        seeds = [_measurement(run) for run in plan.runs if run.row == row and run.is_finished]
        printed = paper.get(row.name) or paper.get(row.loss.kind if row.loss else '')
        figures = {**_mean_and_std(seeds), 'paper': printed, 'seeds': seeds}
        figures |= {'against_baseline': tests[row.name]} if row.name in tests else {}
        rows.append({'name': row.name, 'options': row.flags, **figures})
    done = [seed for row in rows for seed in row['seeds']]

    def joined(values: Iterable[Any]) -> str:
        return ' and '.join(dict.fromkeys(map(str, values)))

    results = {
        'experiment': plan.experiment, 'title': EXPERIMENTS[plan.experiment],
        'complete': len(done) == len(plan.runs),
        'recipe': {'name': plan.recipe_file.stem, 'settings': plan.recipe},
        'epochs': plan.epochs, 'seeds': plan.seeds, 'extra': plan.extra,
        'data': {
            'name': plan.dataset['name'], 'sha256': plan.dataset['sha256'], 'subset': plan.subset, 'folds': plan.folds,
            'train_images': round(len(plan.images) * (1 - 1 / plan.folds if plan.folds else 1)),
        },
        'measured': {
            'split': plan.measured,
            'images': sorted({seed['count'] for seed in done}),
            'checkpoint': 'best' if plan.val_split else 'last',
            'checkpoint_split': plan.measured if plan.folds else plan.val_split,
        },
        'device': joined(seed['device'] for seed in done), 'commit': joined(seed['commit'] for seed in done),
        'versions': {key: joined(seed['versions'][key] for seed in done) for key in ('timm', 'torch', 'timm_lfnsb')},
        'rows': rows,
    }
    if plan.folds and len(done) == len(plan.runs):
        means = [row['mean'] for row in rows]
        best = {'mean': max(means, key=lambda mean: mean['accuracy']), 'std': None}
        results['summary'] = [
            {'name': name, **figures, 'paper': paper[name]}
            for name, figures in (('mean of the folds', _mean_and_std(means)), ('best fold', best))]
    if plan.trials:
        results['trials'] = trial_results(plan)
    return results


def _measurement(run: Run) -> dict[str, Any]:
    metrics, curve = read_json(run.report / 'metrics.json'), run.plan.experiment == 'figure5'
    keys = [*METRICS, 'count', *(['confusion', 'label_names'] if run.plan.experiment == 'figure6' else [])]
    return {
        'seed': run.seed, **{key: metrics[key] for key in keys}, **read_json(run.report / 'checkpoint.json'),
        **read_json(run.folder / 'trained.json'), **({'curve': read_curve(run.last.parent)} if curve else {}),
        **({'distances': run_distances(run)} if run.keeps_features else {})}


def _mean_and_std(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric, and the sample standard deviation from two values on."""
    return {
        'mean': {key: statistics.fmean(value[key] for value in values) for key in METRICS} if values else None,
        'std': {key: statistics.stdev(value[key] for value in values) for key in METRICS} if len(values) > 1 else None,
    }


def draw(plan: Plan, results: Mapping[str, Any]) -> list[Path]:
    """Draw an experiment that has pictures, once it has a row; returns their paths."""
    rows = [row for row in results['rows'] if row['seeds']]
    path = plan.out / f'{plan.name}.png'
    if plan.experiment == 'losses':
        return draw_losses(plan, results)
    if rows and plan.experiment == 'figure5':
        loss_curves_figure({row['name']: [seed['curve'] for seed in row['seeds']] for row in rows}).savefig(path)
        return [path]
    if rows and plan.experiment == 'figure6':
        seed = rows[0]['seeds'][0]
        confusion_figure(seed['confusion'], seed['label_names']).savefig(path)
        return [path]
    return []


def committed_results() -> list[Path]:
    """The experiments among the results that come with this package."""
    return sorted(path for path in RESULTS_DIR.glob('*.json') if path.name.startswith(tuple(EXPERIMENTS)))


def read_results(path: Path) -> dict[str, Any]:
    """Read what `reproduce` has written, or say that the file is something else."""
    with suppress(ValueError, TypeError):
        results = read_json(path)
        if {'experiment', 'rows', 'measured', 'data'} <= set(results):
            return results
    raise UserError(f'{path} does not hold results of timm-lfnsb reproduce.')


def results_markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown section: heading, table, and what it was made with."""
    rows, compares = [], results['experiment'] == 'losses'
    for row in [*results['rows'], *results.get('summary', [])]:
        cells = ['-'] * 3
        if row['mean']:
            std = {key: f' ± {100 * value:.2f}' for key, value in (row['std'] or {}).items()}
            cells = [f"{100 * row['mean'][key]:.2f}{std.get(key, '')}" for key in METRICS[:3]]
        if 'seeds' in row and len(row['seeds']) < results['seeds']:
            cells[0] += f" ({len(row['seeds'])} of {results['seeds']} runs)"
        rows.append([row['name'], *cells, *(loss_cells(row) if compares else []), row['paper'] or '-'])
    columns = COLUMNS if compares else ()
    table = markdown_table(['', 'accuracy', 'balanced accuracy', 'macro F1', *columns, "the paper's accuracy"], rows)
    parts = [f"### {results['title']}", table, _caption(results), *([losses_notes(results)] if compares else [])]
    return '\n\n'.join(parts)


def _caption(results: Mapping[str, Any]) -> str:
    data, measured, seeds = results['data'], results['measured'], results['seeds']
    last = measured['checkpoint'] == 'last'
    facts = [
        ' '.join([f"Recipe {results['recipe']['name']}", *results['extra']]),
        f"{results['epochs']} epochs",
        f'{seeds} seeds, mean ± standard deviation' if seeds > 1 else 'one seed',
        f"{data['name']}, {data['train_images']:,} training images"
        + (' (a fixed stratified subset)' if data['subset'] else '')
        + (f" in each of {data['folds']} folds, near-identical images in one fold" if data['folds'] else ''),
        f"percent on {measured['split']} ({' or '.join(f'{n:,}' for n in measured['images']) or 'no'} images)",
        'last epoch' if last else f"best epoch by accuracy on {measured['checkpoint_split']}",
        results['device'], f"timm {results['versions']['timm']}, torch {results['versions']['torch']}"]
    few = seeds == 1 and len(results['rows']) > 1 and not data['folds'] and not data['subset']
    notes = {
        'The split that chose the epoch also measures it, which flatters all rows a little.':
            not last and measured['split'] == measured['checkpoint_split'],
        'Not complete.': not results['complete'],
        'The split that chose the weights also measures them, which flatters the losses beside cross entropy.':
            results.get('trials') and results['trials']['split'] == measured['split'],
        'A trial of the commands on few images: no conclusion can be drawn from it.': data['subset'] and seeds == 1,
        'Few images: with all of them the rows may come out in another order.': data['subset'] and seeds > 1,
        'One seed: differences between the rows may be chance.': few,
        "The paper's figures are for its own data sets.": True,
    }
    return ' '.join(['; '.join(filter(None, facts)) + '.', *(note for note, holds in notes.items() if holds)])
