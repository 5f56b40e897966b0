"""Run timm's own scripts with this zoo registered, and its train script with what this package adds to it."""
from __future__ import annotations

import argparse
import errno
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
from timm.task import TrainingTask

from ..errors import UserError
from ..losses.logit_adjustment import LogitAdjustment, prior_logits
from .checkpoints import SafeSaver, check_output, load_centers, run_label_names, summarize
from .data_check import check_class_folders, warn_of_other_labels
from .datasets import BalancedDataset, SeededDataset, folder_targets, seed_epoch
from .distillation import CosineHarmonyDistillationTask, load_teachers
from .options import add_options, check_options, distils, rank, resolve_epoch_seeds, resolve_paths, resolve_recipe, warn
from .photo_look import PhotoLook, prepend_transform
from .task import CosineHarmonyTask
from .votes import VotedDataset
from .watch import watch_loss


def find_script(script: str) -> Path:
    """Find a script by path, or by name in the folder that the environment variable TIMM_SCRIPTS names.

    Raises:
        UserError: When there is no such file.
    """
    folder = os.environ.get('TIMM_SCRIPTS')
    for path in (Path(script), Path(folder or '', script)):
        if path.is_file():
            return path
    where = f'neither here nor in TIMM_SCRIPTS ({folder})' if folder else 'not here, and TIMM_SCRIPTS is not set'
    raise UserError(
        f"{script} is {where}: timm's scripts are not part of its wheel, so clone "
        "https://github.com/huggingface/pytorch-image-models and set TIMM_SCRIPTS to that folder, or give the script's "
        'path.')


def run_script(script: str, args: Sequence[str]) -> None:
    """Run one of timm's scripts as if it were called with `args`.

    A script whose name contains 'train' gets the options of this package; every other script runs as it is.

    Raises:
        UserError: When the script is missing, cannot do what the options ask, or has to stop.
    """
    path = find_script(script)
    sys.argv = [str(path), *args]
    # At the end, where a clone's own timm folder cannot hide the installed package.
    sys.path.append(str(path.resolve().parent))
    if 'train' not in path.stem:
        runpy.run_path(str(path), run_name='__main__')
        return
    sys.argv[1:] = resolve_recipe(args)
    module = load_module(path)
    if hasattr(module, 'parser'):
        extend_train_script(module)
    try:
        module.main()
    except OSError as error:
        # Of a full or failing disk, as opposed to wrong paths.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
            raise
        raise UserError(
            f"{error.filename or 'a file of the run'} cannot be written ({error.strerror}): free some space and go on "
            'with --resume from the last checkpoint.') from None


def load_module(path: Path) -> ModuleType:
    """Import a script without starting it."""
    name = f'timm_script_{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, 'main'):
        raise UserError(f'{path} has no main(): it is not a train script of timm.')
    return module


def extend_train_script(module: Any) -> None:
    """Give a train script our options, and let it build our tasks, datasets and checkpoints where they ask for it.

    Its `main()` must ask a module-level `parser` for the arguments, and look up in its globals what `Hooks` replaces.
    """
    add_options(module.parser)
    parse_known_args = module.parser.parse_known_args
    script = dict(vars(module))

    def parse(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        options, unknown = parse_known_args(*args, **kwargs)
        resolve_paths(options)
        check_options(options, script)
        check_class_folders(options)
        warn_of_other_labels(options)
        check_output(options)
        for name, value in Hooks(script, options).replacements().items():
            if name in script:
                setattr(module, name, value)
        return options, unknown

    module.parser.parse_known_args = parse  # parse_args asks it, too


class Hooks:
    """What takes the place of the functions and classes in a script's globals, in a run with these options."""

    def __init__(self, script: dict[str, Any], options: argparse.Namespace):
        self.script = script
        self.options = options
        self.prior: torch.Tensor | None = None
        self.epoch_signature = inspect.signature(script.get('train_one_epoch', lambda: None))

    def replacements(self) -> dict[str, Any]:
        """What to put into the script's globals, where it has the name."""
        saving = {'CheckpointSaver': SafeSaver, 'update_summary': summarize}
        ours = {**saving, 'create_dataset': self.create_dataset, 'create_loader': self.create_loader}
        if hasattr(self.script.get('utils'), 'CheckpointSaver'):  # timm's own stays as it is
            ours['utils'] = SimpleNamespace(**{**vars(self.script['utils']), **saving})
        sees_epochs = {'epoch', 'loader', 'task'} <= set(self.epoch_signature.parameters)
        resolve_epoch_seeds(self.options, possible=sees_epochs and 'create_dataset' in self.script)
        if sees_epochs:
            ours['train_one_epoch'] = self.train_one_epoch
        else:
            warn('this train script has no train_one_epoch of the usual form: a loss that is not finite goes unnoticed '
                 'until the epoch ends.')
        tasks = {name: self.script.get(name) for name in ('ClassificationTask', 'LogitDistillationTask')}
        if self.options.cosine_harmony:
            tasks = {'ClassificationTask': CosineHarmonyTask, 'LogitDistillationTask': CosineHarmonyDistillationTask}
        if self.options.cosine_harmony or self.options.logit_adjustment:
            ours['ClassificationTask'] = self.task_class(tasks['ClassificationTask'])
            self.guard_tasks()
        if distils(self.options) and tasks['LogitDistillationTask']:
            ours['LogitDistillationTask'] = self.task_class(tasks['LogitDistillationTask'])
        return ours

    def create_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The script's dataset; the training set with votes, balance and seeds."""
        dataset = self.script['create_dataset'](*args, **kwargs)
        if not kwargs.get('is_training'):
            return dataset
        options, seed, option = self.options, getattr(self.options, 'seed', 0), ''
        try:
            if options.label_votes:
                option = f'--label-votes {options.label_votes}'
                dataset = VotedDataset(dataset, Path(options.label_votes), run_label_names(options), seed)
            if options.logit_adjustment:
                option = '--logit-adjustment'
                if isinstance(dataset, VotedDataset):
                    counts = torch.from_numpy(dataset.probabilities.sum(axis=0))
                else:
                    counts = folder_targets(dataset).bincount(minlength=getattr(options, 'num_classes', None) or 0)
                shares = counts.double().clamp(min=1) ** (1 - options.balance_power)
                self.prior = prior_logits(shares, options.logit_adjustment)
            if options.balance_power:
                option = '--balance-power'
                dataset = BalancedDataset(dataset, options.balance_power, seed)
        except ValueError as error:
            raise UserError(f'{option}: {error}') from None
        return dataset if options.no_epoch_seeds else SeededDataset(dataset, seed, rank())

    def create_loader(self, *args: Any, **kwargs: Any) -> Any:
        """The script's loader; the training images with the look of photographs."""
        is_training = kwargs.get('is_training')
        if is_training and getattr(self.options, 'mixup_off_epoch', 0):
            # Workers that live on have a copy of timm's mixup, and would never hear that it is off.
            kwargs['persistent_workers'] = False
        loader = self.script['create_loader'](*args, **kwargs)
        if is_training and self.options.photo_look:
            prepend_transform(loader.dataset, PhotoLook(self.options.photo_look))
        return loader

    def train_one_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """The script's epoch, seeded by its number, with a watch on the loss."""
        given = self.epoch_signature.bind(*args, **kwargs).arguments
        if not self.options.no_epoch_seeds:
            seed_epoch(given['loader'], getattr(self.options, 'seed', 0), given['epoch'], rank())
        with watch_loss(given['task'], given['loader'], given['epoch'], self.options):
            return self.script['train_one_epoch'](*args, **kwargs)

    def task_class(self, base: Any) -> Any:
        """A task class of this package or of timm's, which makes itself with the settings of this run."""
        hooks, options = self, self.options

        class ConfiguredTask(base):
            is_configured = True

            def __init__(self, *args: Any, criterion: nn.Module | None = None, **kwargs: Any):
                if 'teacher_model' in kwargs:
                    kwargs['teacher_model'] = load_teachers(
                        kwargs['teacher_model'], kwargs['student_model'].in_chans, run_label_names(options),
                        hooks.prior, kwargs.get('device'), kwargs.get('dtype'))
                if options.cosine_harmony:
                    kwargs.update(
                        weight=options.cosine_harmony, alpha=options.cosine_harmony_alpha,
                        variant=options.cosine_harmony_variant, learn_centers=not options.cosine_harmony_fixed_centers)
                if hooks.prior is not None:
                    criterion = LogitAdjustment(criterion or nn.CrossEntropyLoss(), hooks.prior)
                    criterion.to(getattr(options, 'device', 'cpu'))
                try:
                    super().__init__(*args, criterion=criterion, **kwargs)
                except ValueError as error:
                    raise UserError(f'--cosine-harmony: {error}') from None
                if options.cosine_harmony:
                    load_centers(self, options)

            def prepare_distributed(self, device_ids: Any = None, **ddp_kwargs: Any) -> Any:
                # timm's script names the device even on the CPU, which DDP refuses.
                return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

        ConfiguredTask.__name__ = base.__name__
        return ConfiguredTask


    def guard_tasks(self) -> None:
        """Refuse every task of timm that is made in another way: it would train without the loss and not say so."""
        plain_init: Any = TrainingTask.__init__

        def guarded_init(task: Any, *args: Any, **kwargs: Any) -> None:
            if not hasattr(task, 'is_configured'):
                option = '--cosine-harmony' if self.options.cosine_harmony else '--logit-adjustment'
                raise UserError(f'{option} is on, but this script builds a {type(task).__name__}: leave the option '
                                "out, or take timm's own train.py.")
            plain_init(task, *args, **kwargs)

        TrainingTask.__init__ = guarded_init  # type: ignore[method-assign, assignment]
