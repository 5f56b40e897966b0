"""Stop a run whose loss is no number any more."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UserError


@contextmanager
def watch_loss(task: torch.nn.Module, loader: Any, epoch: int, options: argparse.Namespace) -> Iterator[None]:
    """Stop an epoch of a task of timm whose loss is not finite, and say at which batch.

    A loss is looked at when the next batch comes, or the epoch ends: by then timm's script has fetched it for its own
    log, so the device waits at no other point. `SafeSaver` does not write the weights of that one step.
    """
    losses: list[torch.Tensor] = []  # one flag a batch: is its loss finite?

    def check(*_: Any) -> None:
        if not losses or losses[-1]:
            return
        advice = ['a lower --lr']
        if not getattr(options, 'clip_grad', None):
            advice.append('--clip-grad 1')
        if getattr(options, 'amp', False) and getattr(options, 'amp_dtype', '') == 'float16':
            advice.append('--amp-dtype bfloat16')
        raise UserError(
            f'the loss is not finite in epoch {epoch}, batch {len(losses) - 1} of {len(loader)} (counted from 0): '
            "nothing of this epoch is saved, so go on with --resume from the run's last checkpoint, if it has one, and "
            f"try {', '.join(advice)}.")

    hooks = task.register_forward_pre_hook(check), task.register_forward_hook(
        lambda module, inputs, result: losses.append(result['loss'].detach().isfinite().all()))
    try:
        yield
        check()
    finally:
        for hook in hooks:
            hook.remove()
