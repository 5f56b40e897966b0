"""Results of experiments: gathered as JSON, drawn, and written as Markdown beside the paper's."""
from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..evaluate.figures import confusion_figure, loss_curves_figure
from ..models.count import count_model
from ..train.history import read_curve
from ..util.files import replacing
from ..util.text import markdown_table
from .plan import EXPERIMENTS, Plan, Run, read_json

METRICS = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
RESULTS_DIR = Path(__file__).parent.parent / 'results'
PAPER = read_json(RESULTS_DIR / 'paper.json')
"""Accuracies in percent that the paper prints, by experiment, row and data set."""


def collect(plan: Plan) -> dict[str, Any]:
    """Gather the results of the finished runs of an experiment."""
    rows = []
    for row in plan.rows:
        seeds = [_measurement(run) for run in plan.runs if run.row == row and run.is_finished]
        paper = PAPER.get(plan.experiment, {}).get(row.name)
        rows.append({'name': row.name, 'options': row.flags, **_mean_and_std(seeds), 'paper': paper, 'seeds': seeds})
        if plan.experiment == 'table2':
            count = count_model(row.model, num_classes=plan.options['num_classes'])
            rows[-1].update(
                params=count.params, macs=count.macs, input_size=list(count.input_size), paper_size=count.paper)
    done = [seed for row in rows for seed in row['seeds']]

    def joined(values: Iterable[Any]) -> str:
        return ' and '.join(dict.fromkeys(map(str, values)))

    held_out = 'the fold held out' if plan.folds else None
    results: dict[str, Any] = {
        'experiment': plan.experiment,
        'title': EXPERIMENTS[plan.experiment],
        'complete': len(done) == len(plan.runs),
        'recipe': {'name': plan.recipe_file.stem, 'settings': plan.recipe},
        'epochs': plan.epochs,
        'seeds': plan.seeds,
        'extra': plan.extra,
        'data': {
            **plan.dataset, 'subset': plan.subset, 'folds': plan.folds,
            'train_images': round(len(plan.images) * (1 - 1 / plan.folds if plan.folds else 1)),
        },
        'measured': {
            'split': held_out or plan.split,
            'images': sorted({seed['count'] for seed in done}),
            'checkpoint': plan.checkpoint if plan.val_split else 'last',
            'checkpoint_split': held_out or plan.val_split,
        },
        'device': joined(seed['device'] for seed in done),
        'versions': {key: joined(seed['versions'][key] for seed in done) for key in ('timm', 'torch', 'timm_lfnsb')},
        'commit': joined(seed['commit'] for seed in done),
        'rows': rows,
    }
    if plan.folds:
        means = [row['mean'] for row in rows if row['mean']]
        if len(means) == plan.folds:
            best = {'mean': max(means, key=lambda mean: mean['accuracy']), 'std': None}
            results['summary'] = [
                {'name': name, **figures, 'paper': PAPER['table9'][name]}
                for name, figures in (('mean of the folds', _mean_and_std(means)), ('best fold', best))]
        results['data']['fold_images'] = read_json(plan.parts_dir / 'folds.json')
    return results


def _measurement(run: Run) -> dict[str, Any]:
    metrics = read_json(run.report / 'metrics.json')
    keys = [*METRICS, 'accuracy_interval', 'count']
    keys += ['confusion', 'label_names'] if run.plan.experiment == 'figure6' else []
    curve = {'curve': read_curve(run.last.parent)} if run.plan.experiment == 'figure5' else {}
    return {
        'seed': run.seed, **{key: metrics[key] for key in keys}, **read_json(run.report / 'checkpoint.json'),
        **read_json(run.folder / 'trained.json'), **curve}


def _mean_and_std(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric, and the sample standard deviation from two values on."""
    return {
        'mean': {key: statistics.fmean(value[key] for value in values) for key in METRICS} if values else None,
        'std': {key: statistics.stdev(value[key] for value in values) for key in METRICS} if len(values) > 1 else None,
    }


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Draw an experiment that is a figure, once it has a row."""
    rows = [row for row in results['rows'] if row['seeds']]
    if rows and results['experiment'] == 'figure5':
        figure = loss_curves_figure({row['name']: [seed['curve'] for seed in row['seeds']] for row in rows})
    elif rows and results['experiment'] == 'figure6':
        seed = rows[0]['seeds'][0]
        figure = confusion_figure(seed['confusion'], seed['label_names'])
    else:
        return
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')


def committed_results() -> list[Path]:
    """The experiments among the results that come with this package."""
    return sorted(path for path in RESULTS_DIR.glob('*.json') if path.name.startswith(tuple(EXPERIMENTS)))


def read_results(path: Path) -> dict[str, Any]:
    """Read what `reproduce` has written, or say that the file is something else."""
    results = read_json(path)
    if not {'experiment', 'rows', 'measured', 'data'} <= set(results):
        raise UserError(f'{path} does not hold results of timm-lfnsb reproduce.')
    return results


def results_markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown section: heading, table, and what it was made with."""
    sizes = results['experiment'] == 'table2'
    rows = []
    for row in [*results['rows'], *results.get('summary', [])]:
        cells = [row['name']]
        if sizes:
            paper = '{:.3f} M / {:.2f} M'.format(*row['paper_size']) if row['paper_size'] else '-'
            cells += [f"{row['params'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.1f} M", paper]
        for key in METRICS[:3]:
            std = f" ± {100 * row['std'][key]:.2f}" if row['std'] else ''
            cells.append(f"{100 * row['mean'][key]:.2f}{std}" if row['mean'] else '-')
        if len(row.get('seeds', [])) < results['seeds'] and 'seeds' in row:
            cells[-3] += f" ({len(row['seeds'])} of {results['seeds']} runs)"
        printed = dict(row['paper'] or {'note': '-'})
        note = printed.pop('note', '')
        figures = ', '.join(f'{data} {value:.2f}' for data, value in printed.items())
        rows.append([*cells, f'{figures} ({note})' if figures and note else figures or note])
    headers = ['', *(['parameters', 'MACs', "paper's parameters / FLOPs"] if sizes else []),
               'accuracy', 'balanced accuracy', 'macro F1', "the paper's accuracy"]
    return f"### {results['title']}\n\n{markdown_table(headers, rows)}\n\n{_caption(results)}"


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
        'A trial of the commands on few images: no conclusion can be drawn from it.': data['subset'],
        'One seed: differences between the rows may be chance.': few,
        "The paper's figures are for its own data sets.": True,
    }
    return ' '.join(['; '.join(filter(None, facts)) + '.', *(note for note, holds in notes.items() if holds)])
