"""The paper's tables and figures as runs of timm's train script: which runs, with which settings and commands.

Experiments may share a folder; a row that two of them have in common is trained once.

    OUT/EXPERIMENT.json, .md, .png  results; the only files to keep or commit
    OUT/runs/RUN/log.txt, train/    output and folder of train.py
    OUT/runs/RUN/trained.json       written when training is complete
    OUT/runs/RUN/packed/            the chosen weights as a timm folder
    OUT/runs/RUN/report-SPLIT/      report of `evaluate`; metrics.json is written last
                                    with features.npz, those of the measured images, where losses are compared
"""
from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import yaml

from ..data.prepare import read_description
from ..data.subsets import choose_subset, list_images
from ..errors import UserError
from ..recipes import recipe_path
from ..train.checkpoints import load_checkpoint
from ..util.files import read_json
from .rows import ALL_LOSSES, Loss, Row, loss_rows, table_rows, weight_rows

EXPERIMENTS = {
    'table2': 'Table 2: networks (their sizes: timm-lfnsb count)',
    'table3': 'Table 3: cross entropy against cross entropy + Cosine-Harmony loss',
    'table4': 'Table 4: alpha of the Cosine-Harmony loss',
    'table5': 'Table 5: without and with Spatial Bias',
    'table9': 'Table 9: cross-validation',
    'figure5': 'Figure 5: loss curves',
    'figure6': 'Figure 6: confusion matrix',
    'losses': 'Losses: cross entropy alone and with each of the field',
    'loss-weights': 'Losses: three weights of each, which is the first part of losses',
}

LAUNCHER = ('python', '-m', 'timm_lfnsb', 'run')

# Options that an experiment sets itself or reads in the recipe; an abbreviation of one counts, too.
_RESERVED = (
    '--config', '--data-dir', '--train-split', '--val-split', '--seed', '--experiment', '--output', '--resume',
    '--model', '--model-kwargs', '--num-classes', '--img-size', '--input-size', '--epochs', '--feature-loss',
    '--cosine-harmony', '--cosine-harmony-alpha', '--cosine-harmony-variant', '--cosine-harmony-fixed-centers')
WEIGHTS = ('both', 'chosen', 'paper')


class Plan:
    """One of `EXPERIMENTS` with all its settings, which are the options of `timm-lfnsb reproduce`; paths are absolute.

    Raises:
        UserError: When a setting is wrong, data or recipe are missing, or the subset cannot be drawn.
    """

    def __init__(
            self, experiment: str, data_dir: Path, out: Path, recipe: str | None = None, epochs: int | None = None,
            seeds: int = 1, subset: int | None = None, folds: int = 10, split: str | None = None,
            script: str = 'train.py', extra: Sequence[str] = (), jobs: int = 1, losses: Sequence[str] = (),
            weights: str = 'both',
    ) -> None:
        if out == data_dir or data_dir in out.parents:
            raise UserError(f'{out} lies inside the data folder: choose a folder outside.')
        for flag in (arg.partition('=')[0] for arg in extra):
            if flag == '-c' or (flag.startswith('--') and any(name.startswith(flag) for name in _RESERVED)):
                raise UserError(
                    f'{flag} is set by the experiment: leave it out, or change the recipe (a copy of its YAML file).')
        self.experiment, self.data_dir, self.out, self.script, self.jobs = experiment, data_dir, out, script, jobs
        self.seeds, self.subset, self.extra = seeds, subset, list(extra)
        self.folds = folds if experiment == 'table9' else None
        self.dataset = read_description(data_dir)
        self.recipe_file, self.recipe = _read_recipe(recipe or self.dataset['name'])
        self.epochs = int(epochs or self.recipe.get('epochs') or 0)
        if not self.epochs or not self.recipe.get('num_classes'):
            raise UserError('the recipe must name epochs and num_classes (and, for the canonical order, class_map).')

        # What is trained on, and measured; splits that are missing and impossible subsets show now.
        self.name = experiment + (f'-{split}' if split else '')
        if self.folds:
            self.val_split = self.split = 'validation'
            self.images = list_images(data_dir)
            self.parts_dir = out / 'data' / f'folds-{folds}'
        else:
            self.train_split = self.recipe.get('train_split') or 'train'
            self.val_split = self.recipe.get('val_split', 'validation')  # empty where train.py does not validate
            self.split = split or self.val_split or 'validation'
            for name in {self.val_split, self.split} - {''}:
                list_images(data_dir, name)
            self.images = list_images(data_dir, self.train_split)
            self.images = choose_subset(self.images, subset) if subset else self.images
            self.parts_dir = out / 'data' / f'subset-{subset}'

        self.measured = 'the fold held out' if self.folds else self.split

        if self.recipe.get('feature_loss'):
            raise UserError('the recipe names a feature_loss, which would stand in rows without one, too: take it out.')
        compares = experiment in ('losses', 'loss-weights')
        self.losses = [*map(Loss.parse, dict.fromkeys(losses or ALL_LOSSES))] if compares else []
        self.weights = weights
        self.trials: Plan | None = None  # which choose weights
        if experiment == 'losses' and weights != 'paper':
            self.trials = Plan(
                'loss-weights', data_dir, out, recipe, (self.epochs + 1) // 2, 1, subset, script=script, extra=extra,
                jobs=jobs, losses=losses)
        self.lay_out()

    def lay_out(self) -> None:
        """Set the rows and runs, with the weights chosen from the trials once these are finished."""
        model = self.recipe.get('model', 'lfnsb')
        if self.experiment == 'loss-weights':
            self.rows = weight_rows(model, self.losses)
        elif self.experiment == 'losses':
            self.rows = loss_rows(model, self._weighted_losses())
        else:
            self.rows = table_rows(self.experiment, self.recipe, self.folds or 0)
        first = self.recipe.get('seed', 42)
        self.runs = [Run(self, row, first + i) for row in self.rows for i in range(self.seeds)]

    def _weighted_losses(self) -> list[Loss]:
        """Each loss with its paper's weight, with that of its best finished trial, or with both."""
        finished = [run for run in self.trials.runs if run.is_finished] if self.trials else []
        losses = []
        for loss in self.losses:
            trials = {run.row.loss: run.accuracy for run in finished if run.row.loss and run.row.loss.kind == loss.kind}
            best = max(trials, key=lambda weighted: trials[weighted], default=loss)
            losses += [best] if self.weights == 'chosen' else [loss, best]
        return losses


class Run:
    """One row with one seed: its folders and its command."""

    def __init__(self, plan: Plan, row: Row, seed: int) -> None:
        self.plan, self.row, self.seed = plan, row, seed
        self.title = f'{row.name}, seed {seed}'
        loss = re.sub(r'[^\w.]+', '-', str(row.loss or 'ce'))
        part = f'-fold{row.fold}of{plan.folds}' if plan.folds else ''
        part += f'-{plan.epochs}epochs' if plan.experiment == 'loss-weights' else ''  # which are fewer than in losses
        self.folder = plan.out / 'runs' / f'{row.model}-{loss}{part}-seed{seed}'
        self.last, self.trained = self.folder / 'train' / 'last.pth.tar', self.folder / 'trained.json'
        self.report = self.folder / f'report-{plan.split}'
        self.features, self.keeps_features = self.report / 'features.npz', plan.experiment == 'losses'
        self.measured_dir = plan.parts_dir / f'run-{row.fold}' if plan.folds else plan.data_dir

        self.flags, size = row.flags, plan.recipe.get('img_size')
        fixed = getattr(timm.get_pretrained_cfg(row.model), 'fixed_input_size', False)
        if fixed and size and not plan.recipe.get('model_kwargs'):
            self.flags += ['--model-kwargs', f'img_size={size}']  # timm does not pass on its --img-size
        # All that the trained weights depend on; two runs in one folder must agree in it.
        self.settings = {
            'recipe': plan.recipe, 'options': self.flags, 'epochs': plan.epochs, 'extra': plan.extra, 'seed': seed,
            'data': plan.dataset['sha256'], 'subset': plan.subset, 'fold': row.fold, 'folds': plan.folds,
        }

    @property
    def command(self) -> list[str]:
        """The call of train.py that trains what is missing."""
        plan = self.plan
        return [
            *LAUNCHER, plan.script, '--config', str(plan.recipe_file),
            '--data-dir', str(plan.parts_dir if plan.subset else self.measured_dir), *self.flags,
            '--epochs', str(plan.epochs), '--seed', str(self.seed),
            *(['--train-split', 'train', '--val-split', 'validation'] if plan.folds else []),
            '--output', str(self.folder), '--experiment', 'train', *plan.extra,
            *(['--resume', str(self.last)] if self.last.is_file() else [])]

    @property
    def is_finished(self) -> bool:
        needed = [self.trained, self.report / 'metrics.json', *([self.features] if self.keeps_features else [])]
        return all(path.is_file() for path in needed)

    @property
    def accuracy(self) -> float:
        """Of a finished run, in [0, 1]."""
        return float(read_json(self.report / 'metrics.json')['accuracy'])

    def epochs_done(self) -> int:
        """Epochs that are trained, and after which training can go on."""
        return int(load_checkpoint(self.last)['epoch']) + 1 if self.last.is_file() else 0

    def check_settings(self) -> None:
        """UserError for a folder trained with other settings; one without a trained epoch starts anew anyway."""
        if not self.trained.is_file() and not self.last.is_file():
            return
        there = read_json(self.folder / 'settings.json')
        other = [key for key, value in self.settings.items() if there.get(key) != value]
        if other:
            raise UserError(
                f'{self.folder} was trained with other settings ({", ".join(other)}; see settings.json there): choose '
                'another --out, or remove that folder.')


def _read_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    path = Path(name).resolve() if Path(name).is_file() else recipe_path(name)
    try:
        return path, dict(yaml.safe_load(path.read_text(encoding='utf-8')))
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(f'{path} is not a YAML file of options for train.py.') from None


def dry_run(plan: Plan) -> str:
    """The commands of an experiment and what is done already; trains nothing and writes nothing."""
    lines = [dry_run(plan.trials), ''] if plan.trials else []
    lines.append(f'# {plan.name}, measured on {plan.measured} after training')
    if plan.trials and not all(run.is_finished for run in plan.trials.runs):
        lines.append('# with the weights that stand best now, or the papers\', until the runs above are finished')
    for run in plan.runs:
        run.check_settings()
        state = 'finished' if run.is_finished else f'{run.epochs_done()} of {plan.epochs} epochs trained'
        lines.append(f'# {run.title}: {state}')
        if not run.trained.is_file():
            lines.append(shlex.join(run.command))
    return '\n'.join(lines)
