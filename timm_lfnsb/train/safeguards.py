"""What keeps a training run from losing work: checks of the output folder, safe checkpoints, a watch on the loss."""
from __future__ import annotations

import argparse
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from timm.utils import CheckpointSaver, unwrap_model, update_summary, world_info_from_env

from ..errors import LaunchError
from .seeds import batch_files

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a full or failing disk, as opposed to those of wrong paths."""


def check_output(options: argparse.Namespace) -> None:
    """Refuse an output folder that cannot be made or written, and a checkpoint to resume from that is not there.

    Args:
        options: What train.py's parser returned; `output` and `experiment` name the folder.

    Raises:
        LaunchError: With the reason.
    """
    resume = getattr(options, 'resume', None)
    if resume and not Path(resume).is_file():
        raise LaunchError(f'--resume {resume} is not a file: give a checkpoint of the run, such as last.pth.tar.')
    if world_info_from_env()[1] != 0 or not hasattr(options, 'output'):  # only the first process writes
        return
    folder = Path(options.output or 'output/train', getattr(options, 'experiment', None) or '')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2 ** 20))
    except OSError as error:
        raise LaunchError(
            f'the output folder {folder} cannot be written ({error.strerror or error}): free some space or give '
            'another one with --output.') from None


def checkpoint_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: torch.nn.Module | None) -> int:
    """Size of one checkpoint, at most: weights, their moving average, and what the optimizer will keep.

    Optimizers make their state in the first step. The usual ones keep two numbers a parameter, SGD one or none.
    """
    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))

    copies = 1 if 'momentum' in optimizer.defaults and 'betas' not in optimizer.defaults else 2
    trained = (parameter for group in optimizer.param_groups for parameter in group['params'])
    weights = size(model.state_dict().values())
    return weights + (size(ema.state_dict().values()) if ema is not None else 0) + copies * size(trained)


def not_finite(module: torch.nn.Module) -> bool:
    tensors = [tensor for tensor in module.state_dict().values()
               if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()]
    # One answer from the device, not one for each tensor.
    return bool(tensors) and not bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


class SafeSaver(CheckpointSaver):
    """timm's checkpoint saver that loses nothing to a full disk, to weights that are NaN, or to a restart.

    * Where the folder has no room for the checkpoints of the run, it says so before the first epoch.
    * A checkpoint that cannot be written, or whose weights are not finite, ends the run; the former ones stay.
    * `last` and `model_best` are always whole: a new one takes the place of the old in one step.
    * A run that is resumed in its own folder goes on from its best epoch; without that, the first epoch after the
      restart would become `model_best`.

    Raises:
        LaunchError: When there is no room, or a checkpoint cannot be written.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folder = Path(self.checkpoint_dir)
        self.check_space()
        resume = getattr(self.args, 'resume', None)
        # Releases of timm before 1.0.31 keep no history.
        if resume and hasattr(self, 'load_state_dict_from_checkpoint') \
                and Path(resume).resolve().parent == self.folder.resolve():
            self.load_state_dict_from_checkpoint(resume)

    def _modules(self) -> list[torch.nn.Module]:
        task = getattr(self, 'task', None)
        ema = self.model_ema if task is None else task.get_trainable_module(ema=True)
        return [unwrap_model(module) for module in (self.model, ema) if module is not None]

    def check_space(self) -> None:
        epochs = getattr(self.args, 'epochs', None) or self.max_history
        # The best ones, the last one, and the next one while it is written; recovery checkpoints are two and the same.
        count = min(self.max_history, epochs) + 2 + (3 if getattr(self.args, 'recovery_interval', 0) else 0)
        model, *ema = self._modules()
        each = checkpoint_bytes(model, self.optimizer, ema[0] if ema else None)
        # Names of one file count once: timm makes hard links.
        held = {stat.st_ino: stat.st_size for stat in map(os.stat, self.folder.glob('*.pth.tar'))}
        free = shutil.disk_usage(self.folder).free
        if free + sum(held.values()) < count * each:
            raise LaunchError(
                f'the checkpoints of this run take up to {count * each / 1e6:,.0f} MB ({count} of {each / 1e6:,.0f} '
                f'MB), but {self.folder} has {free / 1e6:,.0f} MB free: free some, give another folder with --output, '
                'or keep fewer with --checkpoint-hist.')

    @contextmanager
    def _guard(self, epoch: int) -> Iterator[None]:
        if any(map(not_finite, self._modules())):
            raise LaunchError(
                f'the weights are not finite at the end of epoch {epoch}, so they are not saved; {self._advice()}, '
                'after a change such as a lower --lr or --clip-grad 1.')
        try:
            yield
        # torch's own writer of files reports a full disk as a RuntimeError.
        except (OSError, RuntimeError) as error:
            for name in ('tmp', 'recovery_tmp'):
                with suppress(OSError):
                    (self.folder / f'{name}{self.extension}').unlink(missing_ok=True)
            reason = (getattr(error, 'strerror', None) or str(error)).splitlines()[0]
            raise LaunchError(
                f'the checkpoint of epoch {epoch} cannot be written to {self.folder} ({reason}): free some space; '
                f'{self._advice()}.') from None

    def _advice(self) -> str:
        last = self.folder / f'last{self.extension}'
        return f'the one before is whole, go on with --resume {last}' if last.is_file() else 'there is none before'

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
        new = f'{dst}.tmp'
        try:
            super()._duplicate(src, new)
            os.replace(new, dst)
        finally:
            Path(new).unlink(missing_ok=True)  # there still if the copy failed, or if both were one file


def summarize(epoch: int, train_metrics: Any, eval_metrics: Any, filename: str, **kwargs: Any) -> None:
    """timm's `update_summary`, but a resumed run writes no second header into summary.csv."""
    if os.path.exists(filename) and os.path.getsize(filename):
        kwargs['write_header'] = False
    update_summary(epoch, train_metrics, eval_metrics, filename, **kwargs)


@contextmanager
def watch_loss(task: torch.nn.Module, loader: Any, epoch: int, options: argparse.Namespace) -> Iterator[None]:
    """Stop an epoch whose loss is not finite, and say at which batch.

    A loss is looked at when the next batch comes, or the epoch ends. By then timm's script has fetched it from the
    device for its own log, so that this makes the device wait at no other point. The weights of that one step are not
    finite either, and `SafeSaver` does not write them.

    Args:
        task: A task of timm, called once a batch.
        loader: The training loader.
        epoch: Its epoch.
        options: The run's settings.

    Raises:
        LaunchError: With epoch, batch, images, and what to try.
    """
    batch, pending = -1, None

    def record(module: Any, inputs: Any, result: dict[str, torch.Tensor]) -> None:
        nonlocal batch, pending
        batch += 1
        pending = (result['loss'].detach().isfinite().all(), inputs[0], result.get('output'))

    def check(*_: Any) -> None:
        nonlocal pending
        last, pending = pending, None
        if last is not None and not last[0]:
            raise LaunchError(describe_batch(loader, epoch, batch, *last[1:], options))

    hooks = task.register_forward_pre_hook(check), task.register_forward_hook(record)
    try:
        yield
        check()
    finally:
        for hook in hooks:
            hook.remove()


def describe_batch(
        loader: Any,
        epoch: int,
        batch: int,
        images: Any,
        logits: Any,
        options: argparse.Namespace,
) -> str:
    def damaged(tensor: Any) -> list[int] | None:
        if not isinstance(tensor, torch.Tensor):
            return None
        return (~tensor.detach().isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()

    bad_images, bad_logits = damaged(images), damaged(logits)
    text = f'the loss is not finite in epoch {epoch}, batch {batch} of {len(loader)} (counted from 0'
    rank = world_info_from_env()[1]
    text += f', process {rank})' if rank else ')'
    if bad_images is not None and bad_logits is not None:
        text += f', nor are {len(bad_images)} of its {len(images)} images and the logits of {len(bad_logits)}'
    names = batch_files(loader, batch)
    # Once the weights are NaN all images look alike; else the damaged ones are what to look at.
    chosen = [names[i] for i in (bad_images or bad_logits or range(len(names))) if i < len(names)]
    if chosen:
        text += f" ({', '.join(chosen[:3])}{', ...' if len(chosen) > 3 else ''})"
    advice = ['a lower --lr']
    if not getattr(options, 'clip_grad', None):
        advice.append('--clip-grad 1')
    if getattr(options, 'amp', False) and getattr(options, 'amp_dtype', '') == 'float16':
        advice.append('--amp-dtype bfloat16')
    return (f"{text}: nothing of this epoch is saved, so go on with --resume from the run's last checkpoint, if it has "
            f"one, and try {', '.join(advice)}.")
