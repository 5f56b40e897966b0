"""Runs of timm's train script: their settings, curves and recipes, and one table of them all."""
from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from ..recipes import recipe_names, recipe_path
from ..util.text import markdown_table

# Settings that name places on the machine of the run, or say nothing about the weights.
_LEFT_OUT = {
    'data', 'data_dir', 'output', 'experiment', 'class_map', 'resume', 'initial_checkpoint', 'pretrained_path',
    'local_rank', 'rank', 'world_size', 'distributed', 'device_modules', 'prefetcher',
}
# Settings of a recipe that another machine may need otherwise without its being another recipe.
_OF_THE_MACHINE = {
    'device', 'workers', 'log_interval', 'recovery_interval', 'checkpoint_hist', 'channels_last', 'torchcompile', 'amp',
    'amp_dtype', 'pin_mem', 'validation_batch_size',
}


def clean_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say something about the weights: no paths, no machine, nothing that is off."""
    kept = {
        key: value for key, value in sorted(settings.items())
        if key not in _LEFT_OUT and value not in (None, '', [], {}, False)}
    for key in kept.keys() & {'model', 'kd_model_name'}:
        kept[key] = ','.join(
            f"local-dir:{Path(name.removeprefix('local-dir:')).name}" if name.startswith('local-dir:') else name
            for name in kept[key].split(','))
    if 'label_votes' in kept:
        kept['label_votes'] = Path(kept['label_votes']).name
    return kept


def read_curve(run: Path) -> list[dict[str, float]]:
    """The rows of a run's summary.csv, one an epoch; of an epoch that a resumed run did again, the later.

    Raises:
        UserError, OSError: When it is not train.py's, or there is none.
    """
    path = run / 'summary.csv'
    epochs: dict[float, dict[str, float]] = {}
    try:
        for row in csv.DictReader(path.read_text(encoding='utf-8').splitlines()):
            if row['epoch'] != 'epoch':  # the header, which a resumed run of timm writes again
                epochs[float(row['epoch'])] = {key: round(float(value), 5) for key, value in row.items() if value}
    except (KeyError, ValueError, TypeError):
        raise UserError(f'{path} is not the summary of a run of train.py: give another folder.') from None
    return [epochs[epoch] for epoch in sorted(epochs)]


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Settings, recipe and curve of the runs in a folder, sorted by path; no curve before the end of the first epoch.

    Raises:
        UserError: When there is none, or one is not train.py's.
    """
    runs = []
    for path in sorted(folder.rglob('args.yaml')):
        settings = yaml.safe_load(path.read_text(encoding='utf-8'))
        if not isinstance(settings, dict) or 'model' not in settings:
            raise UserError(f'{path} does not hold the settings of a run of train.py: give another folder.')
        settings = clean_settings(settings)
        curve = read_curve(path.parent) if path.with_name('summary.csv').is_file() else []
        runs.append({'name': path.parent.name, 'settings': settings, **find_recipe(settings), 'curve': curve})
    if not runs:
        raise UserError(f'{folder} has no run of train.py (a folder with args.yaml).')
    return runs


def embedded_runs(infos: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that led to embedded weights, from their JSON, as `runs_table` takes them."""
    return [{**run, 'name': f"{info['model']}, {i} of {len(info['runs'])}"}
            for info in infos for i, run in enumerate(info['runs'], 1)]


def find_recipe(settings: dict[str, Any]) -> dict[str, Any]:
    """The recipe of this package that a run followed, told by what `clean_settings` leaves of its settings.

    Returns:
        `recipe`, the one with the fewest settings that differ, and `overrides`, the run's values of those; None and an
        empty dict where more than a third of every recipe's settings differ.
    """
    candidates: list[tuple[str | None, dict[str, Any]]] = []
    for name in recipe_names():
        recipe = yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))
        if recipe['model'].startswith('local-dir:') and not str(settings.get('model')).startswith('local-dir:'):
            continue  # it goes on from a folder's weights, and the run did not
        wanted = {key: value or None for key, value in recipe.items() if key not in _LEFT_OUT | _OF_THE_MACHINE}
        # Off is 0, false, empty or not there.
        differ = {key: settings.get(key) for key, value in wanted.items() if (settings.get(key) or None) != value}
        if 3 * len(differ) <= len(wanted):
            candidates.append((name, differ))
    best, overrides = min(candidates, key=lambda candidate: len(candidate[1]), default=(None, {}))
    return {'recipe': best, 'overrides': overrides}


def runs_table(runs: Iterable[dict[str, Any]]) -> str:
    """Runs (as `read_runs` gives them) as a Markdown table; accuracies in percent, epochs counted from 0 as in timm."""
    rows = [run_cells(run) for run in runs]
    return markdown_table(list(rows[0]), [list(row.values()) for row in rows])


def run_cells(run: dict[str, Any]) -> dict[str, Any]:
    """One run's cells of `runs_table`, by the header of their column."""
    settings, curve = run['settings'], run['curve']
    overrides = ', '.join(
        f'no {key}' if value is None else f'{key} {value}' for key, value in run['overrides'].items())
    done, planned = int(curve[-1]['epoch']) + 1 if curve else 0, settings.get('epochs', 0)
    sizes = settings.get('train_img_sizes') or [settings.get('img_size') or (settings.get('input_size') or [0])[-1]]
    steps = settings.get('grad_accum_steps', 1)
    validated = [row for row in curve if 'eval_top1' in row]
    best = max(validated, key=lambda row: row['eval_top1'], default=None)
    points = min(6, len(validated))  # first, last and evenly spaced ones between them
    chosen = [validated[round(i * (len(validated) - 1) / max(points - 1, 1))]['eval_top1'] for i in range(points)]
    return {
        'run': run['name'],
        'model': settings['model'],
        'recipe': (run['recipe'] or '-') + (f' but {overrides}' if overrides else ''),
        'epochs': planned if done >= planned else f'{done} of {planned}',
        'size': '/'.join(map(str, sizes)) if any(sizes) else "model's",
        'batch': f"{settings.get('batch_size', '-')}" + (f' x {steps}' if steps > 1 else ''),
        'optimiser': _named(settings, {
            'opt': '', 'lr': 'lr', 'lr_base': 'lr base', 'weight_decay': 'wd', 'sched': '', 'model_ema_decay': 'EMA'}),
        'augmentation': _named(settings, {
            'scale': 'scale', 'hflip': 'flip', 'aa': 'auto', 'color_jitter': 'jitter', 'grayscale_prob': 'grey',
            'gaussian_blur_prob': 'blur', 'photo_look': 'photo look', 'reprob': 'erase', 'mixup': 'mixup',
            'cutmix': 'cutmix', 'drop': 'drop', 'drop_path': 'drop path', 'balance_power': 'balance'}),
        'loss': _loss(settings),
        'seed': settings.get('seed', 0),
        'best validation': f"{best['eval_top1']:.1f} (epoch {best['epoch']:.0f})" if best else '-',
        'validation curve': ' '.join(f'{value:.1f}' for value in chosen) or '-',
        'last train loss': f"{curve[-1]['train_loss']:.3f}" if curve else '-',
    }


def _named(settings: dict[str, Any], names: dict[str, str]) -> str:
    """Settings that are on, each with its short name."""
    parts = []
    for key, name in names.items():
        value = settings.get(key)
        if value and (key != 'model_ema_decay' or settings.get('model_ema')):
            text = '-'.join(f'{number:g}' for number in value) if isinstance(value, list) else value
            parts.append(f'{name} {text:g}' if isinstance(text, float) else f'{name} {text}')
    return ', '.join(map(str.strip, parts)) or '-'


def _loss(settings: dict[str, Any]) -> str:
    text = 'BCE' if settings.get('bce_loss') else 'CE'
    text += ' of drawn labels' if settings.get('label_votes') else ''
    for key, name in (('smoothing', 'smoothed'), ('logit_adjustment', 'adjusted')):
        text += f' {name} {settings[key]:g}' if settings.get(key) else ''
    if settings.get('cosine_harmony'):
        fixed = ', fixed centers' if settings.get('cosine_harmony_fixed_centers') else ''
        text += (f" + {settings['cosine_harmony']:g} CH ({settings.get('cosine_harmony_variant')}, alpha "
                 f"{settings.get('cosine_harmony_alpha', 0):g}{fixed})")
    losses = settings.get('feature_loss') or []
    for loss in [losses] if isinstance(losses, str) else losses:  # a YAML file may name one
        text += f' + {loss}'
    if settings.get('kd_model_name'):
        features = 'features of ' if settings.get('kd_distill_type') == 'feature' else ''
        text += f" + distilled from {features}{settings['kd_model_name']}"
    return text
