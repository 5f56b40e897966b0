"""What the comparison of losses has beyond other experiments: features, tests against cross entropy, chosen weights."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..data.subsets import choose_subset
from ..evaluate.comparison import compare_with_baseline
from ..evaluate.features import class_distances, predict_features, project
from ..evaluate.figures import distances_figure, features_figure
from ..util.files import replacing
from ..util.text import markdown_table
from .plan import Plan, Run
from .rows import BASELINE

FACES_DRAWN = 1000


def write_features(model: Any, run: Run) -> None:
    """Write the features of the images that a run is measured on, and which of them its network names right."""
    predictions, features = predict_features(model, run.measured_dir, run.plan.split, workers=0, progress=False)
    run.features.parent.mkdir(parents=True, exist_ok=True)
    with replacing(run.features) as path:
        np.savez(path, features=features, correct=predictions.correct, labels=predictions.labels,
                 label_names=predictions.label_names, files=predictions.files)


def run_distances(run: Run) -> dict[str, float]:
    """Distances within and between the classes in the features of a run."""
    with np.load(run.features) as arrays:
        return class_distances(arrays['features'], arrays['labels'])


def compare_losses(plan: Plan) -> dict[str, dict[str, Any]]:
    """The tests of `compare_with_baseline` for each row all of whose runs are finished, once cross entropy's are."""
    correct = {}
    for row in plan.rows:
        runs = [run for run in plan.runs if run.row == row]
        if all(run.is_finished for run in runs):
            correct[row.name] = np.stack([np.load(run.features)['correct'] for run in runs])
    baseline = correct.pop(BASELINE, None)
    return {} if baseline is None else compare_with_baseline(baseline, correct)


def trial_results(plan: Plan) -> dict[str, Any]:
    """The weights that were tried and what they gave, one seed each; the accuracy is None where training failed."""
    trials = plan.trials
    assert trials
    chosen = {row.loss for row in plan.rows}
    rows = [{'name': run.row.name, 'loss': str(run.row.loss), 'accuracy': run.accuracy if run.is_finished else None,
             'used': run.row.loss in chosen} for run in trials.runs]
    return {'epochs': trials.epochs, 'split': trials.split, 'rows': rows}


def draw_losses(plan: Plan, results: Mapping[str, Any]) -> list[Path]:
    """Draw the features and distances of the rows that have a finished run; returns the paths of the pictures."""
    rows = [row for row in results['rows'] if row['seeds']]
    if not rows:
        return []
    first = {run.row.name: run for run in reversed(plan.runs) if run.is_finished}
    panels = {}
    for row in rows:
        with np.load(first[row['name']].features) as arrays:
            labels, names, files = (arrays[key] for key in ('labels', 'label_names', 'files'))
            drawn = np.isin(files, choose_subset(files, min(FACES_DRAWN, len(files))))
            title = f"{row['name']}\n{100 * row['seeds'][0]['accuracy']:.1f} %"
            panels[title] = project(arrays['features'][drawn])
    distances = {row['name']: [seed['distances'] for seed in row['seeds']] for row in rows}
    pictures = {plan.out / f'{plan.name}-features.png': features_figure(panels, labels[drawn], names),
                plan.out / f'{plan.name}-distances.png': distances_figure(distances)}
    for path, figure in pictures.items():
        with replacing(path) as temporary:
            figure.savefig(temporary)
    return list(pictures)


COLUMNS = ('difference', 'p over seeds', 'p over images', 'within / between')


def loss_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's cells below `COLUMNS`."""
    tests, cells = row.get('against_baseline'), ['-'] * 3
    if tests:
        std = '' if tests['difference_std'] is None else f" ± {100 * tests['difference_std']:.2f}"
        p_values = (tests[f'p_{pairs}_holm'] for pairs in ('seeds', 'images'))
        cells = [f"{100 * tests['difference']:+.2f}{std}", *('-' if p is None else f'{p:.2g}' for p in p_values)]
    distances = [seed['distances'] for seed in row['seeds']]
    ratios = [each['cosine_intra'] / max(each['cosine_inter'], 1e-12) for each in distances]  # 0 where all collapsed
    return [*cells, f'{np.mean(ratios):.2f}' if ratios else '-']


def losses_notes(results: Mapping[str, Any]) -> str:
    """What the columns mean, and the table of weights that were tried."""
    text = (
        'Difference: accuracy minus that of cross entropy, in points, mean ± standard deviation over seeds. The '
        'p-values are of paired t-tests, two-sided, corrected by Holm for the number of losses. Over seeds, pairs are '
        'trainings from one seed (the same first weights, order and augmentation): would another training show the '
        'difference again? With few seeds only a large or very steady one is found. Over images, pairs are the shares '
        'of seeds that get an image right: would other images show it? A difference is beyond noise where both '
        'p-values are below 0.05. Within / between: mean cosine distance of a feature to the mean of its class, by '
        'that of the means of two classes; less is more compact.')
    if trials := results.get('trials'):
        rows = [[row['name'], '-' if row['accuracy'] is None else f"{100 * row['accuracy']:.2f}",
                 'yes' if row['used'] else ''] for row in trials['rows']]
        text += (f"\n\nWeights tried before, one seed, {trials['epochs']} epochs, accuracy on {trials['split']}:\n\n"
                 + markdown_table(['', 'accuracy', 'in the table above'], rows))
    return text
