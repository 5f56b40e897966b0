"""The paper's tables and figures as runs of timm's train script: which runs, with which settings and commands.

Experiments may share a folder; a row that two of them have in common is trained once.

    OUT/EXPERIMENT.json, .png       results; the only files to keep or commit
    OUT/runs/RUN/log.txt, train/    output and folder of train.py
    OUT/runs/RUN/trained.json       written when training is complete
    OUT/runs/RUN/packed/            the chosen weights as a timm folder
    OUT/runs/RUN/report-SPLIT/      report of `evaluate`; metrics.json is written last
"""
from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import yaml

from ..data.prepare import read_description
from ..data.subsets import choose_subset, list_images
from ..errors import UserError
from ..losses.cosine_harmony import VARIANTS
from ..recipes import recipe_path
from ..train.checkpoints import load_checkpoint
from ..util.files import read_json

EXPERIMENTS = {
    'table2': 'Table 2: networks (their sizes: timm-lfnsb count)',
    'table3': 'Table 3: cross entropy against cross entropy + Cosine-Harmony loss',
    'table4': 'Table 4: alpha of the Cosine-Harmony loss',
    'table5': 'Table 5: without and with Spatial Bias',
    'table9': 'Table 9: cross-validation',
    'figure5': 'Figure 5: loss curves',
    'figure6': 'Figure 6: confusion matrix',
}

LAUNCHER = ('python', '-m', 'timm_lfnsb', 'run')

# Options that an experiment sets itself or reads in the recipe; an abbreviation of one counts, too.
_RESERVED = (
    '--config', '--data-dir', '--train-split', '--val-split', '--seed', '--experiment', '--output', '--resume',
    '--model', '--model-kwargs', '--num-classes', '--img-size', '--input-size', '--epochs', '--cosine-harmony',
    '--cosine-harmony-alpha', '--cosine-harmony-variant', '--cosine-harmony-fixed-centers')


@dataclass(frozen=True)
class Row:
    """One line of a table: a network, a loss, and the fold that is held out, if any."""

    name: str
    model: str
    weight: float
    alpha: float
    variant: str
    fixed_centers: bool
    fold: int | None = None

    @property
    def flags(self) -> list[str]:
        """Its options of train.py."""
        flags = ['--model', self.model, '--cosine-harmony', f'{self.weight:g}']
        if self.weight:
            flags += ['--cosine-harmony-alpha', f'{self.alpha:g}', '--cosine-harmony-variant', self.variant]
            flags += ['--cosine-harmony-fixed-centers'] if self.fixed_centers else []
        return flags


class Plan:
    """One of `EXPERIMENTS` with all its settings, which are the options of `timm-lfnsb reproduce`; paths are absolute.

    Raises:
        UserError: When a setting is wrong, data or recipe are missing, or the subset cannot be drawn.
    """

    def __init__(
            self, experiment: str, data_dir: Path, out: Path, recipe: str | None = None, epochs: int | None = None,
            seeds: int = 1, subset: int | None = None, folds: int = 10, split: str | None = None,
            script: str = 'train.py', extra: Sequence[str] = (), jobs: int = 1,
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

        self.rows = _rows(experiment, self.recipe, folds)
        first = self.recipe.get('seed', 42)
        self.runs = [Run(self, row, first + i) for row in self.rows for i in range(seeds)]


class Run:
    """One row with one seed: its folders and its command."""

    def __init__(self, plan: Plan, row: Row, seed: int) -> None:
        self.plan, self.row, self.seed = plan, row, seed
        self.title = f'{row.name}, seed {seed}'
        loss = f'{row.variant}-alpha{row.alpha:g}' + '-fixed' * row.fixed_centers if row.weight else 'ce'
        fold = f'-fold{row.fold}of{plan.folds}' if plan.folds else ''
        self.folder = plan.out / 'runs' / f'{row.model}-{loss}{fold}-seed{seed}'
        self.last, self.trained = self.folder / 'train' / 'last.pth.tar', self.folder / 'trained.json'
        self.report = self.folder / f'report-{plan.split}'
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
        return self.trained.is_file() and (self.report / 'metrics.json').is_file()

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


def _rows(experiment: str, recipe: dict[str, Any], folds: int) -> list[Row]:
    """The lines of an experiment's table: the recipe, with what the table is about changed."""
    usual = Row(
        name='', model=recipe.get('model', 'lfnsb'), weight=recipe.get('cosine_harmony') or 1.,
        alpha=recipe.get('cosine_harmony_alpha', 0.1), variant=recipe.get('cosine_harmony_variant', VARIANTS[0]),
        fixed_centers=recipe.get('cosine_harmony_fixed_centers', False))
    plain = replace(usual, name='cross entropy', weight=0., fixed_centers=False)
    losses = [replace(usual, name=f'+ {name}', variant=name, fixed_centers=False)
              for name in ('reference', 'paper', 'intended')]
    networks = [replace(usual, name=name, model=name)
                for name in ('lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet')]
    return {
        'table2': networks,
        'table3': [plain, *losses, replace(losses[-1], name='+ intended, fixed centers', fixed_centers=True)],
        'table4': [replace(usual, name=f'alpha {alpha}', alpha=alpha) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)],
        'table5': [networks[1], networks[0]],
        'table9': [replace(usual, name=f'fold {fold + 1}', fold=fold) for fold in range(folds)],
        'figure5': [plain, replace(usual, name=f'+ {usual.variant}')],
        'figure6': [replace(usual, name=usual.model)],
    }[experiment]


def dry_run(plan: Plan) -> str:
    """The commands of an experiment and what is done already; trains nothing and writes nothing."""
    lines = [f'# {plan.name}, measured on {plan.measured} after training']
    for run in plan.runs:
        run.check_settings()
        state = 'finished' if run.is_finished else f'{run.epochs_done()} of {plan.epochs} epochs trained'
        lines.append(f'# {run.title}: {state}')
        if not run.trained.is_file():
            lines.append(shlex.join(run.command))
    return '\n'.join(lines)
