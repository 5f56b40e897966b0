"""The paper's tables and figures as experiments: train each row with timm's train script, measure it, tabulate.

Everything of an experiment lies below one folder, which several experiments may share:

    OUT/EXPERIMENT.json, .png         results; the only files to keep or commit
    OUT/runs/RUN/settings.json        what the run was started with
    OUT/runs/RUN/log.txt, train/      output and folder of train.py
    OUT/runs/RUN/trained.json         written when training is complete
    OUT/runs/RUN/packed-WHICH/        the chosen weights as a timm folder
    OUT/runs/RUN/SPLIT-WHICH/         report of `evaluate`; metrics.json is written last
    OUT/data/                         subsets and folds of the data, as links

A run's name holds what distinguishes the rows, so a row that two experiments have in common is trained once.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml

from ..checkpoints.pack import pack
from ..data.prepare import DESCRIPTION, checksum, read_description
from ..data.subsets import FOLD_METHOD, LabelledFile, choose_subset, list_images, write_folds, write_subset
from ..evaluate.figures import confusion_figure, loss_curves_figure
from ..evaluate.predictions import evaluate_folder
from ..losses.cosine_harmony import VARIANTS
from ..models.count import count_model
from ..recipes import recipe_names, recipe_path
from ..train.checkpoints import load_checkpoint
from ..train.history import read_curve
from ..train.launch import find_script
from ..util.files import replacing, write_json
from ..util.machine import git_commit
from ..version import __version__

EXPERIMENTS = {
    'table2': 'Table 2: networks',
    'table3': 'Table 3: cross entropy against cross entropy + Cosine-Harmony loss',
    'table4': 'Table 4: alpha of the Cosine-Harmony loss',
    'table5': 'Table 5: without and with Spatial Bias',
    'table9': 'Table 9: cross-validation',
    'figure5': 'Figure 5: loss curves',
    'figure6': 'Figure 6: confusion matrix',
}

PAPER: dict[str, dict[str, dict[str, Any]]] = {
    'table2': {'lfnsb': {'RAF-DB': 91.07, 'AffectNet-7': 66.57, 'AffectNet-8': 63.12, 'note': 'Tables 6-8, best fold'}},
    'table4': {'alpha 0.1': {'note': 'the best of the five'}},
    'table9': {
        'mean of the folds': {'RAF-DB': 90.45, 'AffectNet-7': 65.62, 'note': "mean of the paper's own folds"},
        'best fold': {'RAF-DB': 91.07, 'AffectNet-7': 66.57},
    },
}
"""Accuracies in percent that the paper (doi 10.3390/computation12100201) prints, by experiment, row and data set.

Only what could be read from it: the figures of Tables 3 to 5 were not at hand. The paper prints 90.34 and 65.72 as the
means of Table 9, which are not the means of its folds. Parameters and FLOPs are in `count.PAPER_TABLE_2`.
"""

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5)
METRICS = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
RESULTS_DIR = Path(__file__).parent.parent / 'results'
"""Committed results, which the README's tables are made from."""

# Options that an experiment sets itself.
_RESERVED = (
    '--config', '--data-dir', '--seed', '--experiment', '--output', '--resume', '--no-resume-opt', '--start-epoch',
    '--model', '--epochs', '--cosine-harmony', '--cosine-harmony-alpha', '--cosine-harmony-variant',
    '--cosine-harmony-fixed-centers', '--train-split', '--val-split', '--local_rank',
)


class ReproduceError(RuntimeError):
    """An experiment that cannot be run as asked; the message says what to do."""


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
        if self.weight and self.fixed_centers:
            flags.append('--cosine-harmony-fixed-centers')
        return flags

    @property
    def slug(self) -> str:
        """What distinguishes its runs, as part of a folder name."""
        parts = [self.model]
        if self.weight:
            parts += [self.variant, f'alpha{self.alpha:g}']
            parts += ['fixed'] if self.fixed_centers else []
            parts += [f'weight{self.weight:g}'] if self.weight != 1 else []
        else:
            parts.append('ce')
        if self.fold is not None:
            parts.append(f'fold{self.fold}')
        return '-'.join(parts)


@dataclass(frozen=True)
class Plan:
    """An experiment with all its settings.

    Attributes:
        experiment: One of `EXPERIMENTS`.
        data_dir: Folder made by `prepare`: SPLIT/LABEL/FILE, with dataset.json if possible.
        out: Folder of the experiment.
        recipe: Name of a recipe of this package, or path of a YAML file for train.py.
        epochs: In place of the recipe's.
        seeds: Number of runs of each row, with the recipe's seed and those after it.
        subset: Number of training images, a fixed stratified subset, or None for all.
        folds: Number of folds of table9.
        split: Split to measure on; None for the one that the recipe validates on.
        checkpoint: 'best' for the epoch of the highest accuracy on the recipe's validation split, as `pack` takes it,
            'last' for the last one.
        script: Path of train.py, or its name in the folder of TIMM_SCRIPTS.
        extra: Further options of train.py, for all rows.
        jobs: Runs side by side.

    Raises:
        ReproduceError: When a setting is wrong or the data or the recipe is missing.
        FoldError: When the data lacks a split, or has too few images for the subset.
    """

    experiment: str
    data_dir: Path
    out: Path
    recipe: str | None = None
    epochs: int | None = None
    seeds: int = 1
    subset: int | None = None
    folds: int = 10
    split: str | None = None
    checkpoint: str = 'best'
    script: str = 'train.py'
    extra: Sequence[str] = ()
    jobs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, 'data_dir', Path(self.data_dir).resolve())
        object.__setattr__(self, 'out', Path(self.out).resolve())
        if self.experiment not in EXPERIMENTS:
            raise ReproduceError(f"there is no experiment '{self.experiment}', only {', '.join(EXPERIMENTS)}.")
        if self.checkpoint not in ('best', 'last'):
            raise ReproduceError(f"the checkpoint must be 'best' or 'last', not '{self.checkpoint}'.")
        if min(self.seeds, self.jobs, self.subset or 1, 1 if self.epochs is None else self.epochs) < 1:
            raise ReproduceError('epochs, seeds, jobs and subset must be 1 or more.')
        if not self.data_dir.is_dir():
            raise ReproduceError(f'there is no data folder {self.data_dir}: make it with timm-lfnsb prepare.')
        if self.is_folds and (self.folds < 2 or self.subset):
            raise ReproduceError('table9 takes two or more folds of all images, without --subset.')
        if self.is_folds and self.split:
            raise ReproduceError('table9 is measured on the folds that are held out: leave --split out.')
        if self.out == self.data_dir or self.data_dir in self.out.parents:
            raise ReproduceError(f'{self.out} lies inside the data folder: choose a folder outside.')
        for arg in self.extra:
            flag = arg.partition('=')[0]
            if flag == '-c' or (flag.startswith('--') and any(name.startswith(flag) for name in _RESERVED)):
                raise ReproduceError(
                    f'{flag} is set by the experiment: leave it out, or change the recipe (a copy of its YAML file).')
        if not self.options.num_classes:
            raise ReproduceError('the recipe must name num_classes (and, for labels in canonical order, class_map).')
        if not self.total_epochs:
            raise ReproduceError('the recipe names no epochs: give them with --epochs.')
        _ = self.image_counts, self.subset_images  # missing splits and impossible subsets show now

    @property
    def is_folds(self) -> bool:
        return self.experiment == 'table9'

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """Name and checksum of the data: dataset.json's, or computed where there is none."""
        if (self.data_dir / DESCRIPTION).is_file():
            content = read_description(self.data_dir)
            return {'name': content.get('name', self.data_dir.name), 'sha256': content['sha256']}
        digests = {
            image.path: hashlib.sha256((self.data_dir / image.path).read_bytes()).hexdigest()
            for image in list_images(self.data_dir)}
        return {'name': self.data_dir.name, 'sha256': checksum(digests)}

    @cached_property
    def recipe_file(self) -> Path:
        name = self.recipe or self.dataset['name']
        if Path(name).is_file():
            return Path(name).resolve()
        if name in recipe_names():
            return recipe_path(name)
        if self.recipe is None:
            raise ReproduceError(f'name the recipe with --recipe: one of {", ".join(recipe_names())}, or a YAML file.')
        raise ReproduceError(f'{name} is neither a YAML file nor a recipe of this zoo ({", ".join(recipe_names())}).')

    @cached_property
    def recipe_settings(self) -> dict[str, Any]:
        try:
            content = yaml.safe_load(self.recipe_file.read_text(encoding='utf-8'))
        except (yaml.YAMLError, ValueError):
            content = None
        if not isinstance(content, dict):
            raise ReproduceError(f'{self.recipe_file} is not a YAML file of options for train.py.')
        return content

    @cached_property
    def options(self) -> argparse.Namespace:
        """The settings of train.py that matter here, from the recipe and the further options."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument('--batch-size', '-b', type=int, default=128)
        parser.add_argument('--num-classes', type=int)
        parser.add_argument('--img-size', type=int)
        parser.add_argument('--input-size', type=int, nargs=3)
        parser.add_argument('--val-interval', type=int, default=1)
        parser.add_argument('--device', default='cuda')
        parser.add_argument('--amp-dtype', default='float16')
        parser.add_argument('--model-kwargs', nargs='*')
        for flag in ('--amp', '--channels-last', '--model-ema'):
            parser.add_argument(flag, action='store_true')
        known = vars(parser.parse_args([]))
        parser.set_defaults(**{key: value for key, value in self.recipe_settings.items() if key in known})
        try:
            return parser.parse_known_args(list(self.extra))[0]
        except (argparse.ArgumentError, SystemExit) as error:
            raise ReproduceError(f'cannot read the options for train.py: {error}.') from None

    @property
    def image_size(self) -> int | None:
        """Side of the images, None for the network's own."""
        return self.options.img_size or (self.options.input_size[-1] if self.options.input_size else None)

    @property
    def total_epochs(self) -> int:
        return int(self.epochs or self.recipe_settings.get('epochs') or 0)

    @property
    def train_split(self) -> str:
        return str(self.recipe_settings.get('train_split') or 'train')

    @property
    def val_split(self) -> str:
        """The split that train.py validates on."""
        return 'validation' if self.is_folds else str(self.recipe_settings.get('val_split', 'validation'))

    @property
    def measured_split(self) -> str:
        return self.split or self.val_split or 'validation'

    @property
    def name(self) -> str:
        """Of its result files: the experiment, and what differs from the usual measuring."""
        parts = [self.experiment]
        parts += [self.split] if self.split and self.split != (self.val_split or 'validation') else []
        parts += ['last'] if self.checkpoint == 'last' else []
        return '-'.join(parts)

    @cached_property
    def rows(self) -> list[Row]:
        recipe = self.recipe_settings
        usual: dict[str, Any] = {
            'model': str(recipe.get('model', 'lfnsb')),
            'weight': float(recipe.get('cosine_harmony') or 0) or 1.,
            'alpha': float(recipe.get('cosine_harmony_alpha', 0.1)),
            'variant': str(recipe.get('cosine_harmony_variant', VARIANTS[0])),
            'fixed_centers': bool(recipe.get('cosine_harmony_fixed_centers', False)),
        }

        def row(name: str, **changes: Any) -> Row:
            return Row(name, **{**usual, **changes})

        plain = row('cross entropy', weight=0., fixed_centers=False)
        if self.experiment == 'table2':
            return [row(model, model=model) for model in ('lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet')]
        if self.experiment == 'table3':
            if usual['fixed_centers']:
                raise ReproduceError(
                    'table3 compares learned with fixed centers: take a recipe without cosine_harmony_fixed_centers.')
            return [
                plain,
                *(row(f'+ {variant}', variant=variant) for variant in ('reference', 'paper', 'intended')),
                row('+ intended, fixed centers', variant='intended', fixed_centers=True),
            ]
        if self.experiment == 'table4':
            return [row(f'alpha {alpha:g}', alpha=alpha) for alpha in ALPHAS]
        if self.experiment == 'table5':
            return [row('lfn_small', model='lfn_small'), row('lfnsb', model='lfnsb')]
        if self.experiment == 'table9':
            return [row(f'fold {fold + 1}', fold=fold) for fold in range(self.folds)]
        if self.experiment == 'figure5':
            return [plain, row(f"+ {usual['variant']}")]
        return [row(usual['model'])]

    @cached_property
    def runs(self) -> list[Run]:
        first = int(self.recipe_settings.get('seed', 42))
        return [Run(self, row, first + i) for row in self.rows for i in range(self.seeds)]

    @cached_property
    def subset_images(self) -> list[LabelledFile] | None:
        if not self.subset:
            return None
        return choose_subset(list_images(self.data_dir, self.train_split), self.subset)

    def prepare_data(self) -> None:
        """Write the subset or the folds, where they are not there yet."""
        folder = self.out / 'data'
        if self.subset_images:
            write_subset(self.data_dir, self.train_split, self.subset_images, folder / f'subset-{self.subset}')
        if self.is_folds:
            write_folds(self.data_dir, self.folds, folder / f'folds-{self.folds}', self.dataset['sha256'])

    @cached_property
    def image_counts(self) -> tuple[int, int]:
        """Number of training images of a run, and of validation images; for folds on the average."""
        if self.is_folds:
            total = len(list_images(self.data_dir))
            return round(total * (self.folds - 1) / self.folds), round(total / self.folds)
        train = self.subset or len(list_images(self.data_dir, self.train_split))
        return train, len(list_images(self.data_dir, self.val_split)) if self.val_split else 0


@dataclass(frozen=True)
class Run:
    """One row with one seed."""

    plan: Plan
    row: Row
    seed: int

    @property
    def title(self) -> str:
        return f'{self.row.name}, seed {self.seed}'

    @property
    def folder(self) -> Path:
        of = f'of{self.plan.folds}' if self.plan.is_folds else ''
        return self.plan.out / 'runs' / f'{self.row.slug}{of}-seed{self.seed}'

    @property
    def data_dir(self) -> Path:
        """What train.py reads."""
        if self.row.fold is not None:
            return self.plan.out / 'data' / f'folds-{self.plan.folds}' / f'run-{self.row.fold}'
        return self.plan.out / 'data' / f'subset-{self.plan.subset}' if self.plan.subset else self.plan.data_dir

    @property
    def report(self) -> Path:
        return self.folder / f'{self.plan.measured_split}-{self.plan.checkpoint}'

    @property
    def is_trained(self) -> bool:
        return (self.folder / 'trained.json').is_file()

    @property
    def is_finished(self) -> bool:
        return self.is_trained and (self.report / 'metrics.json').is_file()

    @property
    def flags(self) -> list[str]:
        """The row's options of train.py, and the image size for a network that is built for one size only."""
        options, flags = self.plan.options, self.row.flags
        fixed = getattr(timm.get_pretrained_cfg(self.row.model), 'fixed_input_size', False)
        if fixed and self.plan.image_size and not options.model_kwargs:
            flags += ['--model-kwargs', f'img_size={self.plan.image_size}']  # timm does not pass on its --img-size
        return flags

    @property
    def settings(self) -> dict[str, Any]:
        """All that the trained weights depend on; two runs in one folder must agree in it."""
        plan = self.plan
        return {
            'recipe': plan.recipe_settings,
            'options': self.flags,
            'epochs': plan.total_epochs,
            'extra': list(plan.extra),
            'seed': self.seed,
            'data': plan.dataset['sha256'],
            'subset': plan.subset,
            'fold': None if self.row.fold is None else {
                'held_out': self.row.fold, 'of': plan.folds, 'method': FOLD_METHOD},
        }

    def check_settings(self) -> None:
        """Refuse a folder that was trained with other settings; one that holds no trained epoch starts anew anyway.

        Raises:
            ReproduceError: With what differs.
        """
        path = self.folder / 'settings.json'
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise ReproduceError(
                    f'{self.folder} holds something else than a run: remove it or choose another --out.')
            return
        if not self.is_trained and not self.last.is_file():
            return
        stored, own = _flat(_read_json(path)), _flat(json.loads(json.dumps(self.settings)))
        differences = [
            f'{key}: {stored.get(key)!r} there, {own.get(key)!r} asked for'
            for key in sorted({*stored, *own}) if stored.get(key) != own.get(key)]
        if differences:
            raise ReproduceError(
                f'{self.folder} was trained with other settings ({"; ".join(differences[:5])}): choose another --out, '
                'or remove that folder.')

    def command(self, resume: bool = False) -> list[str]:
        """Arguments of the Python interpreter that train it."""
        plan = self.plan
        config = plan.recipe_file.stem if plan.recipe_file.parent == recipe_path('ferplus').parent else plan.recipe_file
        command = [
            '-m', 'timm_lfnsb', 'run', plan.script, '--config', str(config), '--data-dir', str(self.data_dir),
            *self.flags, '--epochs', str(plan.total_epochs), '--seed', str(self.seed)]
        if plan.is_folds:
            command += ['--train-split', 'train', '--val-split', 'validation']
        command += ['--output', str(self.folder), '--experiment', 'train', *plan.extra]
        return [*command, '--resume', str(self.last)] if resume else command

    @property
    def last(self) -> Path:
        return self.folder / 'train' / 'last.pth.tar'

    def epochs_done(self) -> int:
        """Epochs that are trained, and after which training can go on."""
        if self.is_trained:
            return self.plan.total_epochs
        return int(load_checkpoint(self.last)['epoch']) + 1 if self.last.is_file() else 0

    def chosen_checkpoint(self) -> Path:
        """The checkpoint to measure.

        Not simply model_best: older train scripts forget, when they resume, which epoch was the best before.
        """
        if self.plan.checkpoint == 'last' or not self.plan.val_split:
            return self.last
        paths = [path for path in self.last.parent.glob('checkpoint-*.pth.tar')]
        ranked = []
        for path in [*paths, self.last]:
            checkpoint = load_checkpoint(path)
            if checkpoint.get('metric') is None:
                continue
            falling = 'loss' in str(getattr(checkpoint['args'], 'eval_metric', 'top1'))
            metric = float(checkpoint['metric'])
            ranked.append((-metric if falling else metric, -int(checkpoint['epoch']), path))
        return max(ranked, key=lambda entry: entry[:2])[2] if ranked else self.last


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content, dict):
            raise ValueError
        return content
    except ValueError:
        raise ReproduceError(f'{path} is damaged: remove the folder it lies in to run that part again.') from None


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in settings.items() if key != 'recipe'}
    return flat | {f'recipe {key}': value for key, value in settings.get('recipe', {}).items()}


# Running


def reproduce(plan: Plan, report: Callable[[str], None] = print) -> tuple[dict[str, Any], list[str]]:
    """Run what is missing of an experiment and write its results.

    Args:
        plan: The experiment.
        report: Called with a line for each step.

    Returns:
        The results (also in OUT/NAME.json), and a message for each run that failed; the others keep their results.

    Raises:
        ReproduceError: When the output folder holds runs with other settings, or is in use.
    """
    find_script(plan.script)
    for run in plan.runs:
        run.check_settings()
    plan.out.mkdir(parents=True, exist_ok=True)
    failures: dict[str, str] = {}
    with _locked(plan.out) as lock:
        plan.prepare_data()
        processes = _Processes(lock)
        waiting = [run for run in plan.runs if not run.is_finished]
        report(f'{plan.name}: {len(plan.runs)} runs, {len(plan.runs) - len(waiting)} finished before')
        try:
            # The pool's threads only wait for train scripts: loading checkpoints is not for several threads at once.
            with ThreadPoolExecutor(plan.jobs) as pool:
                try:
                    futures = {pool.submit(processes.train, run, run.epochs_done(), report): run for run in waiting}
                    for future in as_completed(futures):
                        run = futures[future]
                        try:
                            _finish(run, *future.result())
                            metrics = _measure(run)
                            report(f"{run.title}: accuracy {100 * metrics['accuracy']:.1f} on {plan.measured_split}")
                        except Exception as error:
                            failures[run.title] = f'{run.title}: {error}'
                            report(f'{run.title}: failed')
                finally:
                    processes.stop()  # where all is well, none is left
        finally:
            results = collect(plan)
            write_json(plan.out / f'{plan.name}.json', results)
    draw(plan.out / f'{plan.name}.png', results)
    return results, [failures[run.title] for run in plan.runs if run.title in failures]


@contextmanager
def _locked(out: Path) -> Iterator[int | None]:
    """Hold a lock on the folder; the train scripts inherit it, so one that outlives us keeps others out, too."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield None
        return
    with open(out / '.lock', 'w', encoding='utf-8') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ReproduceError(
                f'another reproduce, or a training that it started, is at work in {out}: wait for it, or choose '
                'another --out.') from None
        yield file.fileno()


@dataclass
class _Processes:
    """The train scripts that run now, to be ended with us."""

    lock: int | None
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def train(self, run: Run, done: int, report: Callable[[str], None]) -> tuple[int, int, float]:
        """Run train.py for the epochs after `done`; returns `done`, the exit status, and the seconds it took.

        timm goes on after the epoch that a recovery checkpoint was made in, and would leave out the rest of it: those
        checkpoints are not used, and what an interruption costs is the epochs since the last validated one.
        """
        total, log = run.plan.total_epochs, run.folder / 'log.txt'
        if done >= total:
            return done, 0, 0.
        with self._guard:
            if self.stopped:
                return done, 1, 0.
            how = f'goes on after epoch {done} of {total}' if done else 'starts'
            report(f'{run.title}: {how}, log in {log}')
            if not done:
                shutil.rmtree(run.folder / 'train', ignore_errors=True)
                write_json(run.folder / 'settings.json', run.settings)
            with open(log, 'ab') as file:
                process = subprocess.Popen(
                    [sys.executable, *run.command(resume=done > 0)], stdin=subprocess.DEVNULL, stdout=file,
                    stderr=subprocess.STDOUT, pass_fds=() if self.lock is None else (self.lock,))
            self.running.add(process)
        started = time.monotonic()
        try:
            return done, process.wait(), round(time.monotonic() - started, 1)
        finally:
            self.running.discard(process)

    def stop(self) -> None:
        with self._guard:
            self.stopped = True
            for process in list(self.running):
                process.terminate()


def _finish(run: Run, done: int, code: int, seconds: float) -> None:
    """Note that a run is trained to its end.

    Raises:
        ReproduceError: When it is not; with the last lines of its log.
    """
    if run.is_trained:
        return
    total, log = run.plan.total_epochs, run.folder / 'log.txt'
    if code:
        raise ReproduceError(f'train.py ended with {code}, see {log}; {_tail(log)}')
    if (reached := run.epochs_done()) < total:  # timm's script ends with 0 after an interrupt
        raise ReproduceError(f'train.py ended after epoch {reached} of {total}, see {log}; {_tail(log)}')
    write_json(run.folder / 'trained.json', {
        'epochs': total,
        'resumed_after_epoch': done or None,
        'seconds': seconds,  # since it was resumed
        'device': _device_name(str(getattr(load_checkpoint(run.last)['args'], 'device', ''))),
        'versions': {'timm_lfnsb': __version__, 'timm': version('timm'), 'torch': str(torch.__version__)},
        'commit': git_commit(),
    })


def _tail(log: Path, lines: int = 5) -> str:
    content = log.read_text(encoding='utf-8', errors='replace').splitlines() if log.is_file() else []
    last = [line.strip() for line in content if line.strip()][-lines:]
    return 'its last lines:' + ''.join(f'\n    {line[:300]}' for line in last) if last else 'it printed nothing.'


def _device_name(device: str) -> str:
    if device.startswith('cuda') and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').is_file():
        for line in Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines():
            if line.startswith('model name'):
                name = line.partition(':')[2].strip()
                break
    return f'{name}, {os.cpu_count()} CPUs'


def _measure(run: Run) -> dict[str, Any]:
    """Pack the chosen checkpoint and evaluate it, at the image size and with the preprocessing of its training."""
    if run.is_finished:
        return _read_json(run.report / 'metrics.json')
    packed = run.folder / f'packed-{run.plan.checkpoint}'
    shutil.rmtree(packed, ignore_errors=True)
    info = pack(run.chosen_checkpoint(), packed)
    write_json(run.report / 'checkpoint.json', {'epoch': int(info['epoch']) + 1, 'ema': info['ema']})
    data_dir = run.data_dir if run.row.fold is not None else run.plan.data_dir
    metrics, _ = evaluate_folder(
        f'local-dir:{packed}', data_dir, run.report, split=run.plan.measured_split, workers=0, progress=False)
    return metrics


# Results


def collect(plan: Plan) -> dict[str, Any]:
    """Gather the results of the finished runs of an experiment."""
    rows, trained, measured = [], [], set()
    label_names: list[str] = []
    for row in plan.rows:
        seeds = []
        for run in plan.runs:
            if run.row != row or not run.is_finished:
                continue
            metrics = _read_json(run.report / 'metrics.json')
            trained.append(_read_json(run.folder / 'trained.json'))
            measured.add(metrics['count'])
            label_names = metrics['label_names']
            seeds.append({
                'seed': run.seed,
                **{key: metrics[key] for key in METRICS},
                'accuracy_interval': metrics['accuracy_interval'],
                **_read_json(run.report / 'checkpoint.json'),
                'seconds': trained[-1]['seconds'],
                'resumed_after_epoch': trained[-1]['resumed_after_epoch'],
                **({'curve': read_curve(run.last.parent)} if plan.experiment == 'figure5' else {}),
                **({'confusion': metrics['confusion']} if plan.experiment == 'figure6' else {}),
            })
        rows.append({
            'name': row.name,
            'options': row.flags,
            **_mean_and_std(seeds),
            'paper': PAPER.get(plan.experiment, {}).get(row.name),
            **(_size(row.model, plan) if plan.experiment == 'table2' else {}),
            'seeds': seeds,
        })
    results = {
        'experiment': plan.experiment,
        'title': EXPERIMENTS[plan.experiment],
        'complete': all(len(row['seeds']) == plan.seeds for row in rows),
        'recipe': {'name': plan.recipe_file.stem, 'settings': plan.recipe_settings},
        'epochs': plan.total_epochs,
        'seeds': plan.seeds,
        'extra': list(plan.extra),
        'data': {
            **plan.dataset, 'subset': plan.subset, 'folds': plan.folds if plan.is_folds else None,
            'train_images': plan.image_counts[0],
        },
        'measured': {
            'split': 'the fold held out' if plan.is_folds else plan.measured_split,
            'images': sorted(measured),
            'checkpoint': plan.checkpoint if plan.val_split else 'last',
            'checkpoint_split': 'the fold held out' if plan.is_folds else plan.val_split,
        },
        'device': _distinct(run['device'] for run in trained),
        'versions': _distinct(run['versions'] for run in trained),
        'commit': _distinct(run['commit'] for run in trained),
        'label_names': label_names,
        'rows': rows,
    }
    if plan.is_folds:
        results['summary'] = _fold_summary(rows, plan.folds)
        stored = plan.out / 'data' / f'folds-{plan.folds}' / 'folds.json'
        results['data']['fold_images'] = _read_json(stored) if stored.is_file() else None
    return results


def _mean_and_std(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of each metric, and the sample standard deviation from two values on."""
    return {
        'mean': {key: statistics.fmean(value[key] for value in values) for key in METRICS} if values else None,
        'std': {key: statistics.stdev(value[key] for value in values) for key in METRICS} if len(values) > 1 else None,
    }


def _fold_summary(rows: Sequence[Mapping[str, Any]], folds: int) -> list[dict[str, Any]]:
    means = [row['mean'] for row in rows if row['mean']]
    if len(means) < folds:
        return []
    best = max(means, key=lambda mean: mean['accuracy'])
    return [
        {'name': name, **figures, 'paper': PAPER['table9'][name]}
        for name, figures in (('mean of the folds', _mean_and_std(means)), ('best fold', {'mean': best, 'std': None}))]


def _size(model: str, plan: Plan) -> dict[str, Any]:
    counted = count_model(model, num_classes=plan.options.num_classes)
    return {'params': counted.params, 'macs': counted.macs, 'input_size': list(counted.input_size),
            'paper_size': counted.paper}


def _distinct(values: Iterator[Any]) -> Any:
    """The value that all share, or the list of different ones."""
    different: list[Any] = []
    for value in values:
        if value not in different:
            different.append(value)
    return different[0] if len(different) == 1 else different


def draw(path: Path, results: Mapping[str, Any]) -> bool:
    """Draw an experiment that is a figure; returns whether there was something to draw."""
    rows = [row for row in results['rows'] if row['seeds']]
    if not rows or results['experiment'] not in ('figure5', 'figure6'):
        return False
    if results['experiment'] == 'figure5':
        figure = loss_curves_figure({row['name']: [seed['curve'] for seed in row['seeds']] for row in rows})
    else:
        figure = confusion_figure(rows[0]['seeds'][0]['confusion'], results['label_names'])
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
    return True


def _table(results: Mapping[str, Any]) -> list[list[str]]:
    sizes = results['experiment'] == 'table2'
    table = [['', *(['parameters', 'MACs', "paper's parameters / FLOPs"] if sizes else []), 'accuracy',
              'balanced accuracy', 'macro F1', "the paper's accuracy"]]
    for row in [*results['rows'], *results.get('summary', [])]:
        cells = [row['name']]
        if sizes:
            paper = row['paper_size']
            cells += [f"{row['params'] / 1e6:.3f} M", f"{row['macs'] / 1e6:.1f} M",
                      f'{paper[0]:.3f} M / {paper[1]:.2f} M' if paper else '-']
        for key in METRICS[:3]:
            cell = '-'
            if row['mean']:
                cell = f"{100 * row['mean'][key]:.2f}" + (f" ± {100 * row['std'][key]:.2f}" if row['std'] else '')
            cells.append(cell)
        if 'seeds' in row and len(row['seeds']) < results['seeds']:
            cells[-3] += f" ({len(row['seeds'])} of {results['seeds']} runs)"
        table.append([*cells, _paper_cell(row['paper'])])
    return table


def _paper_cell(paper: Mapping[str, Any] | None) -> str:
    if not paper:
        return '-'
    figures = ', '.join(f'{data} {value:.2f}' for data, value in paper.items() if data != 'note')
    note = paper.get('note')
    return f'{figures} ({note})' if figures and note else figures or str(note)


def _caption(results: Mapping[str, Any]) -> str:
    data, measured = results['data'], results['measured']
    seeds = f"{results['seeds']} seeds, mean ± standard deviation" if results['seeds'] > 1 else 'one seed'
    images = f"{data['train_images']:,} training images"
    if data['subset']:
        images += ' (a fixed stratified subset)'
    if data['folds']:
        images += f" in each of {data['folds']} folds of all splits, near-identical images in one fold"
    count = ' to '.join(f'{n:,}' for n in sorted({*measured['images'][:1], *measured['images'][-1:]}))
    text = (
        f"Recipe {results['recipe']['name']}"
        + (f" with {' '.join(results['extra'])}" if results['extra'] else '')
        + f", {results['epochs']} epoch{'s' * (results['epochs'] > 1)}, {seeds}; {data['name']}, {images}; "
        + f"percent on {measured['split']}"
        + (f' ({count} images)' if count else '')
        + (', last epoch' if measured['checkpoint'] == 'last'
           else f", best epoch by accuracy on {measured['checkpoint_split']}")
        + f"; {_listed(results['device'])}; timm {_listed(results['versions'], 'timm')}, "
        f"torch {_listed(results['versions'], 'torch')}. ")
    if measured['checkpoint'] == 'best' and measured['split'] == measured['checkpoint_split']:
        text += 'The split that chose the epoch also measures it, which flatters all rows a little. '
    if not results['complete']:
        text += 'Not complete. '
    if data['subset']:
        text += 'A trial of the commands on few images: no conclusion can be drawn from it. '
    elif results['seeds'] == 1 and len(results['rows']) > 1 and not data['folds']:
        text += 'One seed: differences between the rows may be chance. '
    return text + "The paper's figures are for its own data sets."


def _listed(value: Any, key: str | None = None) -> str:
    values = value if isinstance(value, list) else [value]
    texts = dict.fromkeys(str(entry[key] if key else entry) for entry in values)
    return ' and '.join(texts) or 'unknown device'


def format_results(results: Mapping[str, Any]) -> str:
    """The results as a table for a terminal."""
    table = _table(results)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return '\n'.join([results['title'], '', *lines, '', _caption(results)])


def committed_results() -> list[Path]:
    """Files in `RESULTS_DIR` that hold an experiment, not a benchmark."""
    return sorted(path for path in RESULTS_DIR.glob('*.json') if path.name.startswith(tuple(EXPERIMENTS)))


def results_markdown(results: Mapping[str, Any] | Path | str) -> str:
    """The results as a Markdown section: heading, table, and what it was made with.

    Args:
        results: What `reproduce` returns, or the path of its JSON file.

    Raises:
        ReproduceError: When the file is missing or holds no results.
    """
    if isinstance(results, (str, Path)):
        path = Path(results)
        if not path.is_file():
            raise ReproduceError(f'there is no file {path}.')
        results = _read_json(path)
        if not {'experiment', 'rows', 'measured', 'data'} <= set(results):
            raise ReproduceError(f'{path} does not hold results of timm-lfnsb reproduce.')
    head, *rows = _table(results)
    lines = [f'| {" | ".join(cells)} |' for cells in (head, ['---'] * len(head), *rows)]
    return '\n'.join([f"### {results['title']}", '', *lines, '', _caption(results)])


# Dry run


def dry_run(plan: Plan, estimate: bool = True) -> str:
    """The commands of an experiment and what is done already; trains nothing and writes nothing.

    Args:
        plan: The experiment.
        estimate: Measure some training steps for an estimate of the time.
    """
    lines, remaining = [], []
    for run in plan.runs:
        run.check_settings()
        done = run.epochs_done()
        state = 'finished' if run.is_finished else 'trained, to be measured' if run.is_trained else (
            f'goes on after epoch {done} of {plan.total_epochs}' if done else 'to do')
        remaining.append((run.row.model, plan.total_epochs - done))
        lines.append(f'# {run.title}: {state}')
        if not run.is_trained:
            lines.append(shlex.join(['python', *run.command(resume=done > 0)]))
    finished = sum(run.is_finished for run in plan.runs)
    lines.insert(0, f'# {plan.name}: {len(plan.runs)} runs, {finished} finished; each is measured on '
                    f"{'the fold held out' if plan.is_folds else plan.measured_split} after training")
    if estimate:
        lines.append(estimate_time(plan, remaining))
    return '\n'.join(lines)


def estimate_time(plan: Plan, remaining: Sequence[tuple[str, int]]) -> str:
    """A line with the estimated time of the remaining epochs of runs, from some steps measured now.

    Args:
        plan: The experiment.
        remaining: Model and number of epochs of each run.
    """
    models = dict.fromkeys(model for model, epochs in remaining if epochs)
    if not models:
        return '# estimated time: none, all is trained'
    train_images, val_images = plan.image_counts
    options, total, measured = plan.options, 0., []
    device = options.device if options.device == 'cpu' or torch.cuda.is_available() else 'cpu'
    for model in models:
        step, forward = _step_seconds(model, plan, device)
        measured.append(f'{model} {step:.2g} s')
        for name, epochs in remaining:
            if name != model:
                continue
            validations = math.ceil(epochs / max(1, options.val_interval)) * (2 if options.model_ema else 1)
            total += epochs * max(1, train_images // options.batch_size) * step
            total += (validations + 1) * val_images / options.batch_size * forward
    note = '' if device == options.device else f'; the recipe asks for {options.device}, which is not here'
    return (
        f'# ESTIMATED time: {_duration(total)} one after another on {_device_name(device)}, from a few steps of '
        f"{options.batch_size} images measured now ({', '.join(measured)}){note}; without reading images, compilation "
        'and start-up')


def _step_seconds(name: str, plan: Plan, device: str) -> tuple[float, float]:
    """Time of a training step and of a forward pass of a batch of noise: the faster of two after one to warm up."""
    options = plan.options
    size = plan.image_size
    kwargs: dict[str, Any] = {'img_size': size} if size else {}
    try:
        model: Any = timm.create_model(name, num_classes=options.num_classes, **kwargs)
    except TypeError:  # a model without img_size
        model = timm.create_model(name, num_classes=options.num_classes)
    size = size or model.pretrained_cfg['input_size'][-1]
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    images = torch.randn(options.batch_size, 3, size, size, device=device).to(memory_format=layout)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    amp = torch.autocast(device.partition(':')[0], getattr(torch, options.amp_dtype), enabled=options.amp)

    def train_step() -> None:
        with amp:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def forward_step() -> None:
        with torch.inference_mode(), amp:
            model(images)

    def seconds(step: Callable[[], None]) -> float:
        times = []
        for _ in range(3):
            started = time.perf_counter()
            step()
            if device != 'cpu':
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    train = seconds(train_step)
    model.eval()
    return train, seconds(forward_step)


def _duration(seconds: float) -> str:
    if seconds < 5400:
        return f'about {max(1, round(seconds / 60))} min'
    return f'about {seconds / 3600:.1f} h'
