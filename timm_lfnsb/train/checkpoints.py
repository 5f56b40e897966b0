"""Checkpoints of timm's train script: written without loss, found, read, and what a run says of its labels."""
from __future__ import annotations

import argparse
import logging
import os
import pickle
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset
from timm.utils import CheckpointSaver, unwrap_model, update_summary

from ..errors import UserError
from ..labels import canonical_name, read_class_map
from .options import rank

_logger = logging.getLogger(__name__)


def find_checkpoint(run: Path) -> Path:
    """The checkpoint to pack: the file itself, or a run folder's best one.

    Raises:
        UserError: When there is none.
    """
    for path in (run, run / 'model_best.pth.tar', run / 'last.pth.tar'):
        if path.is_file():
            return path
    raise UserError(f'no model_best.pth.tar or last.pth.tar in {run}: give the folder of a run of train.py.')


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a train.py checkpoint without running any code it may contain.

    Raises:
        UserError: When it is damaged, holds more than tensors and settings, or was not written by train.py.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).split('\n')[0]
        raise UserError(f'{path} is damaged or no checkpoint of train.py ({reason}).') from None
    if not (isinstance(checkpoint, dict) and 'state_dict' in checkpoint and hasattr(checkpoint.get('args'), 'model')):
        raise UserError(f'{path} lacks the settings of its run: only checkpoints written by train.py can be packed.')
    return checkpoint


def run_label_names(args: argparse.Namespace) -> list[str] | None:
    """Label names in the order a run trained them: its class map's, else its data folders', None without them.

    Raises:
        UserError: When the class map is gone (the folders' order would be another one) or wrong, or its path is a
            relative one.
    """
    class_map, data_dir = (getattr(args, name, None) or '' for name in ('class_map', 'data_dir'))
    path = class_map or data_dir
    if path and not os.path.isabs(path):  # timm-lfnsb run keeps absolute ones
        raise UserError(
            f'the run names its {"class map" if class_map else "data"} by the relative path {path}, which may be '
            'another one by now: give the labels in the order of the run with --labels.')
    if class_map:
        try:
            return read_class_map(Path(class_map))
        except OSError:
            raise UserError(f"the run's class map {class_map} is not there any more: put it back, or give the labels "
                            'in its order with --labels.') from None
    if getattr(args, 'dataset', '') or not data_dir or not Path(data_dir).is_dir():
        return None
    try:
        reader = create_dataset('', root=data_dir, split=getattr(args, 'train_split', 'train')).reader
    except (RuntimeError, OSError):
        return None
    return sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)


def load_losses(task: Any, options: argparse.Namespace) -> None:
    """Let the losses of a `FeatureLossTask` go on if --initial-checkpoint is a run of ours with the same labels."""
    try:
        checkpoint = load_checkpoint(Path(options.initial_checkpoint or ''))
        old, new = run_label_names(checkpoint['args']), run_label_names(options)
    except UserError:  # other weights than a run's; train.py has read them already
        return
    state = checkpoint.get('task_state_ema') or checkpoint.get('task_state') or {}
    same = not old or not new or [*map(canonical_name, old)] == [*map(canonical_name, new)]
    own = task.get_task_state()
    for name, loss in [*own.items()]:
        if name not in state:
            continue
        shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in (loss, state[name])]
        if same and shapes[0] == shapes[1]:
            own[name] = state[name]
        else:
            _logger.warning(f'The centers of {name} in --initial-checkpoint are of other classes or features: they '
                            'start anew.')
    task.load_task_state(own)


def check_output(options: argparse.Namespace) -> None:
    """Refuse a checkpoint to resume from that is not there, and (OSError) an output folder that cannot be written."""
    if options.resume and not Path(options.resume).is_file():
        raise UserError(f'--resume {options.resume} is not a file: give a checkpoint of the run, such as last.pth.tar.')
    if rank() != 0:  # only the first process writes
        return
    folder = Path(options.output or 'output/train', options.experiment)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2 ** 20))


@contextmanager
def watch_loss(task: torch.nn.Module, loader: Any, epoch: int) -> Iterator[None]:
    """Stop an epoch of a task of timm whose loss is not finite, and say at which batch.

    A loss is looked at when the next batch comes, or the epoch ends: by then timm's script has fetched it for its log.
    """
    losses: list[torch.Tensor] = []  # one flag a batch: is its loss finite?

    def check(*_: Any) -> None:
        if losses and not losses[-1]:
            raise UserError(
                f'the loss is not finite in epoch {epoch}, batch {len(losses) - 1} of {len(loader)} (counted from 0): '
                "nothing of this epoch is saved, so go on with --resume from the run's last checkpoint, if it has one, "
                'and try a lower --lr, --clip-grad 1 or, with --amp, --amp-dtype bfloat16.')

    hooks = task.register_forward_pre_hook(check), task.register_forward_hook(
        lambda module, inputs, result: losses.append(result['loss'].detach().isfinite().all()))
    try:
        yield
        check()
    finally:
        for hook in hooks:
            hook.remove()


def is_finite(module: torch.nn.Module) -> bool:
    """Whether all floating-point weights and buffers are; one answer from the device, not one for each tensor."""
    tensors = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class SafeSaver(CheckpointSaver):
    """timm's checkpoint saver that loses nothing to a full disk, to weights that are NaN, or to a restart.

    * A checkpoint that cannot be written, or whose weights are not finite, ends the run; the former ones stay.
    * `last` and `model_best` are always whole: a new one takes the place of the old in one step.
    * A run that is resumed in its own folder goes on from its best epoch.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = Path(self.checkpoint_dir)
        resume = getattr(self.args, 'resume', None)
        if resume and Path(resume).resolve().parent == self.folder.resolve():
            if hasattr(self, 'load_state_dict_from_checkpoint'):  # not in releases of timm before 1.0.31
                self.load_state_dict_from_checkpoint(resume)

    @contextmanager
    def _guard(self, epoch: int) -> Iterator[None]:
        last = self.folder / f'last{self.extension}'
        advice = f'go on with --resume {last}' if last.is_file() else 'there is none before'
        task = getattr(self, 'task', None)
        ema = self.model_ema if task is None else task.get_trainable_module(ema=True)
        if not all(is_finite(unwrap_model(module)) for module in (self.model, ema) if module is not None):
            raise UserError(f'the weights are not finite at the end of epoch {epoch}, so they are not saved: try a '
                            f'lower --lr or --clip-grad 1; {advice}.')
        try:
            yield
        # torch's own writer of files reports a full disk as a RuntimeError.
        except (OSError, RuntimeError) as error:
            for path in (*self.folder.glob('*tmp.pth.tar'), *self.folder.glob('*.tmp')):
                path.unlink()
            reason = (getattr(error, 'strerror', None) or str(error)).splitlines()[0]
            raise UserError(f'the checkpoint of epoch {epoch} cannot be written to {self.folder} ({reason}): free some '
                            f'space; {advice}.') from None

    def save_checkpoint(self, epoch: int, metric: float | None = None) -> Any:
        with self._guard(epoch):
            return super().save_checkpoint(epoch, metric)

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        with self._guard(epoch):
            super().save_recovery(epoch, batch_idx)

    # timm removes the old file first, so one kill in between, or one failed copy, would lose it.
    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        super()._duplicate(src, f'{dst}.tmp')
        os.replace(f'{dst}.tmp', dst)
        Path(f'{dst}.tmp').unlink(missing_ok=True)  # there still if both were one file


def summarize(epoch: int, train_metrics: Any, eval_metrics: Any, filename: str, **kwargs: Any) -> None:
    """timm's `update_summary`, but a resumed run writes no second header into summary.csv."""
    if os.path.exists(filename) and os.path.getsize(filename):
        kwargs['write_header'] = False
    update_summary(epoch, train_metrics, eval_metrics, filename, **kwargs)
