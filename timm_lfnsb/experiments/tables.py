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
from .plan import EXPERIMENTS, Plan, read_json

PAPER: dict[str, dict[str, dict[str, Any]]] = {
    'table2': {
        'lfnsb': {'RAF-DB': 91.07, 'AffectNet-7': 66.57, 'AffectNet-8': 63.12, 'note': 'Tables 6-8, best fold'},
        'mfn': {'RAF-DB': 90.32}, 'mobilefacenet': {'RAF-DB': 87.52},
    },
    'table3': {
        'cross entropy': {'RAF-DB': 89.57, 'AffectNet-7': 64.26, 'note': 'LFN'},
        '+ reference': {'RAF-DB': 90.22, 'AffectNet-7': 65.45, 'note': 'LFN'},
    },
    'table4': {f'alpha {alpha}': {'RAF-DB': accuracy, 'note': 'LFN'} for alpha, accuracy in (
        (0.1, 90.22), (0.2, 90.12), (0.3, 89.96), (0.4, 90.03), (0.5, 89.86))},
    'table5': {
        'lfn_small': {'RAF-DB': 90.22, 'AffectNet-7': 65.45}, 'lfnsb': {'RAF-DB': 91.07, 'AffectNet-7': 66.57}},
    'table9': {
        'mean of the folds': {'RAF-DB': 90.45, 'AffectNet-7': 65.62, 'note': "mean of the paper's own folds"},
        'best fold': {'RAF-DB': 91.07, 'AffectNet-7': 66.57},
    },
}
"""Accuracies in percent that the paper prints, by experiment, row and data set; all of its tables: results/paper.md.

It prints 90.34 and 65.72 as the means of Table 9, which are not the means of its folds. It does not say which variant
of the loss it trained with; the released code has `reference`.
"""

METRICS = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
RESULTS_DIR = Path(__file__).parent.parent / 'results'


def collect(plan: Plan) -> dict[str, Any]:
    """Gather the results of the finished runs of an experiment."""
    rows, trained, measured = [], [], set()
    label_names: list[str] = []
    for row in plan.rows:
        seeds = []
        for run in plan.runs:
            if run.row != row or not run.is_finished:
                continue
            metrics = read_json(run.report / 'metrics.json')
            trained.append(read_json(run.folder / 'trained.json'))
            measured.add(metrics['count'])
            label_names = metrics['label_names']
            seeds.append({
                'seed': run.seed,
                **{key: metrics[key] for key in (*METRICS, 'accuracy_interval')},
                **read_json(run.report / 'checkpoint.json'),
                **{key: trained[-1][key] for key in ('seconds', 'resumed_after_epoch')},
                **({'curve': read_curve(run.last.parent)} if plan.experiment == 'figure5' else {}),
                **({'confusion': metrics['confusion']} if plan.experiment == 'figure6' else {}),
            })
        paper = PAPER.get(plan.experiment, {}).get(row.name)
        rows.append({'name': row.name, 'options': row.flags, **_mean_and_std(seeds), 'paper': paper, 'seeds': seeds})
        if plan.experiment == 'table2':
            count = count_model(row.model, num_classes=plan.options['num_classes'])
            rows[-1].update(
                params=count.params, macs=count.macs, input_size=list(count.input_size), paper_size=count.paper)
    held_out = 'the fold held out' if plan.folds else None
    results = {
        'experiment': plan.experiment,
        'title': EXPERIMENTS[plan.experiment],
        'complete': all(len(row['seeds']) == plan.seeds for row in rows),
        'recipe': {'name': plan.recipe_file.stem, 'settings': plan.recipe},
        'epochs': plan.epochs,
        'seeds': plan.seeds,
        'extra': plan.extra,
        'data': {
            **plan.dataset, 'subset': plan.subset, 'folds': plan.folds,
            'train_images': round(len(plan.images) * ((plan.folds - 1) / plan.folds if plan.folds else 1)),
        },
        'measured': {
            'split': held_out or plan.split, 'images': sorted(measured),
            'checkpoint': plan.checkpoint if plan.val_split else 'last',
            'checkpoint_split': held_out or plan.val_split,
        },
        'device': _joined(run['device'] for run in trained),
        'versions': {key: _joined(run['versions'][key] for run in trained) for key in ('timm', 'torch', 'timm_lfnsb')},
        'commit': _joined(run['commit'] for run in trained),
        'label_names': label_names,
        'rows': rows,
    }
    if plan.folds:
        stored = plan.parts_dir / 'folds.json'
        results['data']['fold_images'] = read_json(stored) if stored.is_file() else None
        means = [row['mean'] for row in rows if row['mean']]
        if len(means) == plan.folds:
            best = {'mean': max(means, key=lambda mean: mean['accuracy']), 'std': None}
            results['summary'] = [
                {'name': name, **figures, 'paper': PAPER['table9'][name]}
                for name, figures in (('mean of the folds', _mean_and_std(means)), ('best fold', best))]
    return results


def _mean_and_std(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric, and the sample standard deviation from two values on."""
    return {
        'mean': {key: statistics.fmean(value[key] for value in values) for key in METRICS} if values else None,
        'std': {key: statistics.stdev(value[key] for value in values) for key in METRICS} if len(values) > 1 else None,
    }


def _joined(values: Iterable[Any]) -> str:
    return ' and '.join(dict.fromkeys(map(str, values)))


def draw(path: Path, results: Mapping[str, Any]) -> None:
    """Draw an experiment that is a figure, once it has a row."""
    rows = [row for row in results['rows'] if row['seeds']]
    if not rows or results['experiment'] not in ('figure5', 'figure6'):
        return
    if results['experiment'] == 'figure5':
        figure = loss_curves_figure({row['name']: [seed['curve'] for seed in row['seeds']] for row in rows})
    else:
        figure = confusion_figure(rows[0]['seeds'][0]['confusion'], results['label_names'])
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')


def committed_results() -> list[Path]:
    """The experiments among the results that come with this package."""
    return sorted(path for path in RESULTS_DIR.glob('*.json') if path.name.startswith(tuple(EXPERIMENTS)))


def read_results(path: Path) -> dict[str, Any]:
    """Read what `reproduce` has written.

    Raises:
        UserError: When the file is missing or holds something else.
    """
    if not path.is_file():
        raise UserError(f'there is no file {path}.')
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
    data, measured, versions = results['data'], results['measured'], results['versions']
    images = f"{data['train_images']:,} training images"
    if data['subset']:
        images += ' (a fixed stratified subset)'
    if data['folds']:
        images += f" in each of {data['folds']} folds of all splits, near-identical images in one fold"
    last = measured['checkpoint'] == 'last'
    parts = [
        f"Recipe {results['recipe']['name']}" + (f" with {' '.join(results['extra'])}" if results['extra'] else '')
        + f", {results['epochs']} epoch{'s' * (results['epochs'] > 1)}, "
        + (f"{results['seeds']} seeds, mean ± standard deviation" if results['seeds'] > 1 else 'one seed'),
        f"{data['name']}, {images}",
        f"percent on {measured['split']} ({' or '.join(f'{n:,}' for n in measured['images']) or 'no'} images), "
        + ('last epoch' if last else f"best epoch by accuracy on {measured['checkpoint_split']}"),
        results['device'] or 'unknown device',
        f"timm {versions['timm']}, torch {versions['torch']}"]
    notes = ["The paper's figures are for its own data sets."]
    if data['subset']:
        notes.insert(0, 'A trial of the commands on few images: no conclusion can be drawn from it.')
    elif results['seeds'] == 1 and len(results['rows']) > 1 and not data['folds']:
        notes.insert(0, 'One seed: differences between the rows may be chance.')
    if not results['complete']:
        notes.insert(0, 'Not complete.')
    if not last and measured['split'] == measured['checkpoint_split']:
        notes.insert(0, 'The split that chose the epoch also measures it, which flatters all rows a little.')
    return f"{'; '.join(parts)}. {' '.join(notes)}"
