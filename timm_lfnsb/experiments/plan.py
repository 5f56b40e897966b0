"""The paper's tables and figures as runs of timm's train script: which runs, with which settings and commands.

Experiments may share a folder; a row that two of them have in common is trained once.

    OUT/EXPERIMENT.json, .png         results; the only files to keep or commit
    OUT/runs/RUN/settings.json        what the run was started with
    OUT/runs/RUN/log.txt, train/      output and folder of train.py
    OUT/runs/RUN/trained.json         written when training is complete
    OUT/runs/RUN/packed-WHICH/        the chosen weights as a timm folder
    OUT/runs/RUN/SPLIT-WHICH/         report of `evaluate`; metrics.json is written last
    OUT/data/                         subsets and folds of the data, as links
"""
from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import yaml

from ..data.prepare import DESCRIPTION, checksum, read_description
from ..data.subsets import FOLD_METHOD, choose_subset, list_images, write_folds, write_subset
from ..errors import UserError
from ..losses.cosine_harmony import VARIANTS
from ..recipes import recipe_names, recipe_path
from ..train.checkpoints import load_checkpoint
from ..util.files import file_sha256

EXPERIMENTS = {
    'table2': 'Table 2: networks',
    'table3': 'Table 3: cross entropy against cross entropy + Cosine-Harmony loss',
    'table4': 'Table 4: alpha of the Cosine-Harmony loss',
    'table5': 'Table 5: without and with Spatial Bias',
    'table9': 'Table 9: cross-validation',
    'figure5': 'Figure 5: loss curves',
    'figure6': 'Figure 6: confusion matrix',
}

# Options that an experiment sets itself; an abbreviation of one counts, too.
_RESERVED = (
    '--config', '--data-dir', '--seed', '--experiment', '--output', '--resume', '--no-resume-opt', '--start-epoch',
    '--model', '--epochs', '--cosine-harmony', '--cosine-harmony-alpha', '--cosine-harmony-variant',
    '--cosine-harmony-fixed-centers', '--train-split', '--val-split', '--local_rank')


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

    @property
    def slug(self) -> str:
        """What distinguishes its runs, as part of a folder name."""
        loss = f'{self.variant}-alpha{self.alpha:g}' + '-fixed' * self.fixed_centers if self.weight else 'ce'
        weight = '' if self.weight in (0, 1) else f'-weight{self.weight:g}'
        return f'{self.model}-{loss}{weight}' + ('' if self.fold is None else f'-fold{self.fold}')


class Plan:
    """One of `EXPERIMENTS` with all its settings, which are the options of `timm-lfnsb reproduce`; paths are absolute.

    Raises:
        UserError: When a setting is wrong, data or recipe are missing, or the subset cannot be drawn.
    """

    def __init__(
            self, experiment: str, data_dir: Path, out: Path, recipe: str | None = None, epochs: int | None = None,
            seeds: int = 1, subset: int | None = None, folds: int = 10, split: str | None = None,
            checkpoint: str = 'best', script: str = 'train.py', extra: Sequence[str] = (), jobs: int = 1,
    ) -> None:
        if out == data_dir or data_dir in out.parents:
            raise UserError(f'{out} lies inside the data folder: choose a folder outside.')
        self.experiment, self.data_dir, self.out, self.script, self.jobs = experiment, data_dir, out, script, jobs
        self.seeds, self.subset, self.checkpoint, self.extra = seeds, subset, checkpoint, list(extra)
        self.folds = folds if experiment == 'table9' else None
        self.dataset = _dataset(data_dir)
        self.recipe_file, self.recipe = _read_recipe(recipe or self.dataset['name'])
        self.options = _options(self.recipe, self.extra)
        self.epochs = int(epochs or self.options.get('epochs') or 0)
        if not self.epochs or not self.options['num_classes']:
            raise UserError('the recipe must name epochs and num_classes (and, for the canonical order, class_map).')

        # What is trained on, and measured; splits that are missing and impossible subsets show now.
        self.train_split = self.options.get('train_split') or 'train'
        self.val_split = self.options.get('val_split', 'validation')  # empty where train.py does not validate
        if self.folds:
            self.train_split, self.val_split = 'train', 'validation'
        usual = self.val_split or 'validation'
        self.split = split or usual
        self.name = experiment + (f'-{split}' if self.split != usual else '') + '-last' * (checkpoint == 'last')
        self.images = list_images(data_dir, None if self.folds else self.train_split)
        self.images = choose_subset(self.images, subset) if subset else self.images
        for name in () if self.folds else {self.val_split, self.split} - {''}:
            list_images(data_dir, name)
        self.parts_dir = out / 'data' / (f'folds-{folds}' if self.folds else f'subset-{subset}')

        self.rows = _rows(experiment, self.recipe, folds)
        first = self.recipe.get('seed', 42)
        self.runs = [Run(self, row, first + i) for row in self.rows for i in range(seeds)]

    def prepare_data(self) -> None:
        """Write the subset or the folds, where they are not there yet."""
        if self.folds:
            write_folds(self.data_dir, self.folds, self.parts_dir, self.dataset['sha256'])
        elif self.subset:
            write_subset(self.data_dir, self.train_split, self.images, self.parts_dir)


class Run:
    """One row with one seed: its folders and its command."""

    def __init__(self, plan: Plan, row: Row, seed: int) -> None:
        self.plan, self.row, self.seed = plan, row, seed
        self.title = f'{row.name}, seed {seed}'
        self.folder = plan.out / 'runs' / (row.slug + (f'of{plan.folds}' if plan.folds else '') + f'-seed{seed}')
        self.last = self.folder / 'train' / 'last.pth.tar'
        self.report = self.folder / f'{plan.split}-{plan.checkpoint}'

        flags, size = row.flags, plan.options['img_size'] or (plan.options['input_size'] or [None])[-1]
        fixed = getattr(timm.get_pretrained_cfg(row.model), 'fixed_input_size', False)
        if fixed and size and not plan.options['model_kwargs']:
            flags += ['--model-kwargs', f'img_size={size}']  # timm does not pass on its --img-size
        # All that the trained weights depend on; two runs in one folder must agree in it.
        self.settings = {
            'recipe': plan.recipe, 'options': flags, 'epochs': plan.epochs, 'extra': plan.extra, 'seed': seed,
            'data': plan.dataset['sha256'], 'subset': plan.subset,
            'fold': {'held_out': row.fold, 'of': plan.folds, 'method': FOLD_METHOD} if plan.folds else None,
        }
        data_dir = self.measured_dir = plan.parts_dir / f'run-{row.fold}' if plan.folds else plan.data_dir
        if plan.subset:
            data_dir = plan.parts_dir
        self.command = [
            'python', '-m', 'timm_lfnsb', 'run', plan.script, '--config', str(plan.recipe_file),
            '--data-dir', str(data_dir), *flags,
            '--epochs', str(plan.epochs), '--seed', str(seed),
            *(['--train-split', 'train', '--val-split', 'validation'] if plan.folds else []),
            '--output', str(self.folder), '--experiment', 'train', *plan.extra]

    @property
    def is_trained(self) -> bool:
        return (self.folder / 'trained.json').is_file()

    @property
    def is_finished(self) -> bool:
        return self.is_trained and (self.report / 'metrics.json').is_file()

    def epochs_done(self) -> int:
        """Epochs that are trained, and after which training can go on."""
        if self.is_trained:
            return self.plan.epochs
        return int(load_checkpoint(self.last)['epoch']) + 1 if self.last.is_file() else 0

    def check_settings(self) -> None:
        """UserError for a folder trained with other settings; one without a trained epoch starts anew anyway."""
        path = self.folder / 'settings.json'
        if not path.is_file() and self.folder.is_dir() and any(self.folder.iterdir()):
            raise UserError(f'{self.folder} holds something else than a run: remove it or choose another --out.')
        if not self.is_trained and not self.last.is_file():
            return
        there, asked = read_json(path), json.loads(json.dumps(self.settings))
        for settings in (there, asked):
            settings.update({f'recipe {key}': value for key, value in settings.pop('recipe').items()})
        differences = [
            f'{key}: {there.get(key)!r} there, {asked.get(key)!r} asked for'
            for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
        if differences:
            raise UserError(
                f'{self.folder} was trained with other settings ({"; ".join(differences[:5])}): choose another --out, '
                'or remove that folder.')


def _dataset(data_dir: Path) -> dict[str, str]:
    """Name and checksum of the data: dataset.json's, or computed where there is none."""
    if (data_dir / DESCRIPTION).is_file():
        content = read_description(data_dir)
    else:
        content = {'sha256': checksum({path: file_sha256(data_dir / path) for path in list_images(data_dir)})}
    return {'name': content.get('name', data_dir.name), 'sha256': content['sha256']}


def _read_recipe(name: str) -> tuple[Path, dict[str, Any]]:
    if not Path(name).is_file() and name not in recipe_names():
        raise UserError(f'{name} is no recipe: give --recipe a YAML file, or one of {", ".join(recipe_names())}.')
    path = Path(name).resolve() if Path(name).is_file() else recipe_path(name)
    try:
        return path, dict(yaml.safe_load(path.read_text(encoding='utf-8')))
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(f'{path} is not a YAML file of options for train.py.') from None


def _options(recipe: dict[str, Any], extra: Sequence[str]) -> dict[str, Any]:
    """The recipe's options, with those of the further ones that matter here."""
    for flag in (arg.partition('=')[0] for arg in extra):
        if flag == '-c' or (flag.startswith('--') and any(name.startswith(flag) for name in _RESERVED)):
            raise UserError(
                f'{flag} is set by the experiment: leave it out, or change the recipe (a copy of its YAML file).')
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--img-size', type=int)
    parser.add_argument('--input-size', type=int, nargs=3)
    parser.add_argument('--model-kwargs', nargs='*')
    parser.set_defaults(**recipe)
    try:
        return vars(parser.parse_known_args(list(extra))[0])
    except (argparse.ArgumentError, SystemExit) as error:
        raise UserError(f'cannot read the options for train.py: {error}.') from None


def _rows(experiment: str, recipe: dict[str, Any], folds: int) -> list[Row]:
    """The lines of an experiment's table: the recipe, with what the table is about changed."""
    usual = Row(
        name='', model=recipe.get('model', 'lfnsb'), weight=recipe.get('cosine_harmony') or 1.,
        alpha=recipe.get('cosine_harmony_alpha', 0.1), variant=recipe.get('cosine_harmony_variant', VARIANTS[0]),
        fixed_centers=recipe.get('cosine_harmony_fixed_centers', False))
    if experiment == 'table3' and usual.fixed_centers:
        raise UserError(
            'table3 compares learned with fixed centers: take a recipe without cosine_harmony_fixed_centers.')
    row = partial(replace, usual)
    plain = row(name='cross entropy', weight=0., fixed_centers=False)
    return {
        'table2': [row(name=name, model=name) for name in ('lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet')],
        'table3': [plain, *(row(name=f'+ {name}', variant=name) for name in ('reference', 'paper', 'intended')),
                   row(name='+ intended, fixed centers', variant='intended', fixed_centers=True)],
        'table4': [row(name=f'alpha {alpha}', alpha=alpha) for alpha in (0.1, 0.2, 0.3, 0.4, 0.5)],
        'table5': [row(name=name, model=name) for name in ('lfn_small', 'lfnsb')],
        'table9': [row(name=f'fold {fold + 1}', fold=fold) for fold in range(folds)],
        'figure5': [plain, row(name=f'+ {usual.variant}')],
        'figure6': [row(name=usual.model)],
    }[experiment]


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that a run has written, or say that the file is not there or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except FileNotFoundError:
        raise UserError(f'there is no file {path}.') from None
    except (ValueError, TypeError):
        raise UserError(f'{path} is damaged: remove the folder it lies in to run that part again.') from None


def dry_run(plan: Plan) -> str:
    """The commands of an experiment and what is done already; trains nothing and writes nothing."""
    finished = sum(run.is_finished for run in plan.runs)
    lines = [f'# {plan.name}: {len(plan.runs)} runs, {finished} finished; each is measured on '
             f"{'the fold held out' if plan.folds else plan.split} after training"]
    for run in plan.runs:
        run.check_settings()
        done = run.epochs_done()
        state = 'finished' if run.is_finished else 'trained, to be measured' if run.is_trained else (
            f'goes on after epoch {done} of {plan.epochs}' if done else 'to do')
        lines.append(f'# {run.title}: {state}')
        if not run.is_trained:
            lines.append(shlex.join([*run.command, *(['--resume', str(run.last)] if done else [])]))
    return '\n'.join(lines)
