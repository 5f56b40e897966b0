"""Run timm's own scripts with this zoo registered, and its train script with what this package adds to it."""
from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn as nn

from ..errors import UserError, did_you_mean, reason
from ..losses.logit_adjustment import LogitAdjustment, prior_logits
from .checkpoints import SafeSaver, check_output, load_losses, run_label_names, summarize, watch_loss
from .data_check import check_class_folders, class_numbers, warn_of_other_labels
from .datasets import BalancedDataset, SeededDataset, folder_targets, seed_epoch
from .distillation import (
    CosineHarmonyDistillationTask,
    FeatureLossDistillationTask,
    load_feature_teacher,
    load_teachers,
)
from .feature_losses import feature_losses
from .options import add_options, by_features, check_options, distils, rank, resolve_paths, resolve_recipe, warn
from .photo_look import PhotoLook, prepend_transform
from .task import CosineHarmonyTask, FeatureLossTask
from .votes import VotedDataset

# What a train script must have in its globals, and look up there, for our options to work.
NEEDED = {'parser', 'utils', 'create_dataset', 'create_loader', 'train_one_epoch', 'ClassificationTask',
          'LogitDistillationTask'}


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
    near = did_you_mean(script, (path.name for path in Path(folder).glob('*.py'))) if folder else ''
    raise UserError(
        f"{script}{near} is {where}: timm's scripts are not part of its wheel, so clone "
        'https://github.com/huggingface/pytorch-image-models and set TIMM_SCRIPTS to that folder, or give the path.')


def run_script(script: str, args: Sequence[str]) -> None:
    """Run one of timm's scripts as if it were called with `args`.

    A script whose name contains 'train' gets the options of this package; every other script runs as it is.

    Raises:
        UserError: When the script is missing, or cannot do what the options ask, or has to stop.
    """
    path = find_script(script)
    sys.argv = [str(path), *args]
    # At the end, where a clone's own timm folder cannot hide the installed package.
    sys.path.append(str(path.resolve().parent))
    try:
        if 'train' not in path.stem:
            runpy.run_path(str(path), run_name='__main__')
            return
        sys.argv[1:] = resolve_recipe(args)
        module = load_module(path)
        extend_train_script(module)
        try:
            module.main()
        except ValueError as error:
            if 'loaded state dict' not in str(error):  # of an optimizer, see torch.optim.Optimizer
                raise
            raise UserError('--resume is of a run that trained other parameters: give the options of that run, such '
                            'as --opt, --kd-distill-type and --feature-loss.') from None
    except ModuleNotFoundError as error:  # timm's scripts need more than timm
        raise UserError(f'{script} cannot run: {reason(error)}.') from error


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
    """Give a train script our options, and let it build our tasks, datasets and checkpoints where they ask for it."""
    if missing := NEEDED - vars(module).keys():
        warn(f"{module.__name__} runs without the options and safety of this package, which need the train.py of timm "
             f"1.0.27 or newer: it lacks {', '.join(sorted(missing))}.")
        return
    add_options(module.parser)
    parse_known_args = module.parser.parse_known_args
    script = SimpleNamespace(**vars(module))

    def parse(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        options, unknown = parse_known_args(*args, **kwargs)
        resolve_paths(options)
        check_options(options)
        check_class_folders(options)
        warn_of_other_labels(options)
        check_output(options)
        vars(module).update(Hooks(script, options).replacements())
        return options, unknown

    module.parser.parse_known_args = parse  # parse_args asks it, too


class Hooks:
    """What takes the place of the functions and classes in a script's globals, in a run with these options."""

    def __init__(self, script: Any, options: argparse.Namespace):
        self.script = script
        self.options = options
        self.losses = feature_losses(options)
        self.adds_loss = self.losses or options.logit_adjustment
        self.prior: torch.Tensor | None = None

    def replacements(self) -> dict[str, Any]:
        """What to put into the script's globals."""
        utils = {**vars(self.script.utils), 'CheckpointSaver': SafeSaver, 'update_summary': summarize}
        ours = {'utils': SimpleNamespace(**utils), 'create_dataset': self.create_dataset,
                'create_loader': self.create_loader, 'train_one_epoch': self.train_one_epoch}
        bases = self.script.ClassificationTask, self.script.LogitDistillationTask
        if self.losses:
            bases = FeatureLossTask, FeatureLossDistillationTask
            if not self.options.feature_loss:
                bases = CosineHarmonyTask, CosineHarmonyDistillationTask
        if self.adds_loss:
            ours['ClassificationTask'] = self.task_class(bases[0])
        if distils(self.options):
            ours['LogitDistillationTask'] = self.task_class(bases[1])
            for name in ('FeatureDistillationTask', 'TokenDistillationTask'):  # not in all releases of timm
                if hasattr(self.script, name):
                    ours[name] = self.task_class(getattr(self.script, name))
        return ours

    def create_dataset(self, *args: Any, **kwargs: Any) -> Any:
        """The script's dataset; the training set with votes, balance and seeds."""
        if isinstance(kwargs.get('class_map'), str):
            kwargs['class_map'] = class_numbers(kwargs['class_map'])
        dataset, options = self.script.create_dataset(*args, **kwargs), self.options
        if not kwargs.get('is_training'):
            return dataset
        if options.label_votes:
            dataset = VotedDataset(dataset, Path(options.label_votes), run_label_names(options), options.seed)
        if options.logit_adjustment:
            if options.label_votes:
                counts = torch.from_numpy(dataset.probabilities.sum(axis=0))
            else:
                counts = folder_targets(dataset).bincount(minlength=options.num_classes or 0)
            self.prior = prior_logits(counts, options.logit_adjustment * (1 - options.balance_power))
        if options.balance_power:
            dataset = BalancedDataset(dataset, options.balance_power, options.seed)
        return dataset if options.no_epoch_seeds else SeededDataset(dataset, options.seed, rank())

    def create_loader(self, *args: Any, **kwargs: Any) -> Any:
        """The script's loader; the training images with the look of photographs."""
        is_training = kwargs.get('is_training')
        if is_training and self.options.mixup_off_epoch:
            # Workers that live on have a copy of timm's mixup, and would never hear that it is off.
            kwargs['persistent_workers'] = False
        loader = self.script.create_loader(*args, **kwargs)
        if is_training and self.options.photo_look:
            prepend_transform(loader.dataset, PhotoLook(self.options.photo_look))
        return loader

    def train_one_epoch(self, epoch: int, model: Any, loader: Any, *args: Any, task: Any, **kwargs: Any) -> Any:
        """The script's epoch, seeded by its number, with a watch on the loss."""
        if self.adds_loss and not hasattr(task, 'is_configured'):
            raise UserError('--feature-loss, --cosine-harmony or --logit-adjustment is on, but this script builds a '
                            f"{type(task).__name__}: leave the option out, or take timm's own train.py.")
        if not self.options.no_epoch_seeds:
            seed_epoch(loader, self.options.seed, epoch, rank())
        with watch_loss(task, loader, epoch):
            return self.script.train_one_epoch(epoch, model, loader, *args, task=task, **kwargs)

    def task_class(self, base: Any) -> Any:
        """A task class of this package or of timm's, which makes itself with the settings of this run."""
        hooks, options = self, self.options

        class ConfiguredTask(base):
            is_configured = True

            def __init__(self, *args: Any, criterion: nn.Module | None = None, **kwargs: Any):
                device = kwargs.get('device')
                if 'teacher_model' in kwargs:
                    names, in_chans = kwargs['teacher_model'], kwargs['student_model'].in_chans
                    place = device, kwargs.get('dtype')
                    if by_features(options):
                        kwargs['teacher_model'] = load_feature_teacher(names, in_chans, *place)
                    else:
                        kwargs['teacher_model'] = load_teachers(
                            names, in_chans, run_label_names(options), hooks.prior, *place)
                if hooks.losses:
                    kwargs.update(dict(losses=hooks.losses) if options.feature_loss else hooks.losses['cosine-harmony'])
                if hooks.prior is not None:
                    criterion = LogitAdjustment(criterion or nn.CrossEntropyLoss(), hooks.prior).to(device)
                try:
                    super().__init__(*args, criterion=criterion, **kwargs)
                except ValueError as error:
                    if not hooks.losses:
                        kind = getattr(options, 'kd_distill_type', 'logit')  # not in all releases of timm
                        raise UserError(f'--kd-distill-type {kind}: {error}') from None
                    option = '--feature-loss' if options.feature_loss else '--cosine-harmony'
                    raise UserError(f'{option}: {error}') from None
                if hooks.losses:
                    load_losses(self, options)

            def prepare_distributed(self, device_ids: Any = None, **ddp_kwargs: Any) -> Any:
                # timm's script names the device even on the CPU, which DDP refuses.
                return super().prepare_distributed(None if self.device.type == 'cpu' else device_ids, **ddp_kwargs)

        ConfiguredTask.__name__ = base.__name__
        return ConfiguredTask
