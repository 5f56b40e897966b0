"""Checkpoints of timm's train script: found, read, and what the run says of its labels."""
from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset


class PackError(RuntimeError):
    """A checkpoint that cannot be packed; the message says what to do."""


def find_checkpoint(run: Path) -> Path:
    """The checkpoint to pack: the file itself, or a run folder's best one.

    Raises:
        PackError: When there is none.
    """
    if run.is_file():
        return run
    for name in ('model_best.pth.tar', 'last.pth.tar'):
        if (run / name).is_file():
            return run / name
    what = 'has neither model_best.pth.tar nor last.pth.tar' if run.is_dir() else 'does not exist'
    raise PackError(f'{run} {what}: give the folder of a run of train.py, or one of its checkpoints.')


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a train.py checkpoint without running any code it may contain.

    Raises:
        PackError: When it is damaged, holds more than tensors and settings, or was not written by train.py.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        reason = str(error).split('\n')[0]
        raise PackError(f'{path} is damaged or no checkpoint of train.py ({reason}).') from None
    if (not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint
            or not hasattr(checkpoint.get('args'), 'model')):
        raise PackError(f'{path} lacks the settings of its run: only checkpoints written by train.py can be packed.')
    return checkpoint


def run_label_names(args: argparse.Namespace) -> list[str] | None:
    """Label names in the order a run trained them: its class map's, else its data folders' as train.py indexed them.

    Returns:
        The names, or None where neither is there any more.

    Raises:
        PackError: When the class map is gone (the folders' order would be another one), or its path is a relative one.
    """
    data_dir = getattr(args, 'data_dir', None)
    class_map = getattr(args, 'class_map', '') or ''
    for path in (class_map, '' if class_map else data_dir):
        if path and not os.path.isabs(path):  # timm-lfnsb run keeps absolute ones
            raise PackError(
                f'the run names its {"class map" if class_map else "data"} by the relative path {path}, which may be '
                'another one by now: give the labels in the order of the run with --labels.')
    if class_map:
        if not Path(class_map).is_file():
            raise PackError(
                f"the run's class map {args.class_map} is not there any more: put it back, or give the labels in its "
                'order with --labels.')
        try:
            lines = Path(class_map).read_text(encoding='utf-8').splitlines()
        except ValueError:
            raise PackError(f'the class map {class_map} is not text: give the labels with --labels.') from None
        return [line.strip() for line in lines]
    if data_dir and Path(data_dir).is_dir() and not getattr(args, 'dataset', ''):
        try:
            reader = create_dataset(
                '', root=data_dir, split=getattr(args, 'train_split', 'train'), is_training=False).reader
        except (RuntimeError, OSError):
            return None
        return sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    return None
