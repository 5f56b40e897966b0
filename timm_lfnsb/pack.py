"""Turn a checkpoint of timm's train script into a timm folder: config.json with label names, model.safetensors."""
from __future__ import annotations

import argparse
import os
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, resolve_data_config
from timm.models import clean_state_dict, save_for_hf


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


def resolve_labels(args: argparse.Namespace, labels: Sequence[str] | None, num_classes: int) -> list[str]:
    """The run's label names, checked against `--labels` and the size of the classifier.

    Raises:
        PackError: When nothing names the classes, when two sources disagree, or when the count does not fit.
    """
    try:
        found = run_label_names(args)
    except PackError:
        if not labels:
            raise
        found = None
    if found and labels and list(labels) != found:
        raise PackError(f"--labels [{', '.join(labels)}] are not the run's own [{', '.join(found)}]: leave them out.")
    names = found or list(labels or [])
    if not names:
        raise PackError(
            'neither a class map nor the data folders of the run are there: give the label names with --labels, in the '
            'order the run trained them.')
    if len(names) != num_classes:
        raise PackError(f'the checkpoint has {num_classes} classes, but there are {len(names)} labels '
                        f"[{', '.join(names)}]: give all of them with --labels.")
    if len(set(names)) != len(names) or not all(names):
        raise PackError(f"the labels [{', '.join(names)}] have an empty name, or one twice.")
    return names


def half_precision(model: torch.nn.Module) -> torch.nn.Module:
    """Store matrices and kernels as float16; vectors (norms, biases) stay, they are small and need the range."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
            if not parameter.isfinite().all():
                raise PackError(f'{name} has values that float16 cannot hold: pack without --half.')
    return model


def run_model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `timm.create_model` a run of train.py built its model with."""
    kwargs = dict(getattr(args, 'model_kwargs', None) or {})
    kwargs['num_classes'] = args.num_classes
    input_size = getattr(args, 'input_size', None)
    in_chans = getattr(args, 'in_chans', None) or (input_size[0] if input_size else None)
    if in_chans is not None:
        kwargs.setdefault('in_chans', in_chans)
    cfg = timm.models.get_pretrained_cfg(args.model) if ':' not in args.model else None
    img_size = getattr(args, 'img_size', None) or (tuple(input_size[1:]) if input_size else None)
    if img_size is not None and cfg is not None and cfg.fixed_input_size:
        kwargs.setdefault('img_size', img_size)
    if getattr(args, 'gp', None) is not None:
        kwargs['global_pool'] = args.gp
    return kwargs


def write_folder(
        model: Any,
        out_dir: Path,
        label_names: Sequence[str],
        model_args: dict[str, Any],
        **config: Any,
) -> None:
    """Write a timm folder beside its place and move it there whole.

    Args:
        model: The network, its `pretrained_cfg` as it is to be stored.
        out_dir: Folder to write, absent or empty.
        label_names: Names of the outputs in their order; none for a network without a classifier.
        model_args: Arguments of `timm.create_model` that build the network.
        config: Further entries of config.json.
    """
    # config.json holds the number of classes beside these; transformers passes both, and fails at the second.
    model_args = {key: value for key, value in model_args.items() if key != 'num_classes'}
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f'.{out_dir.name}.') as temporary:
        folder = Path(temporary) / out_dir.name
        save_for_hf(
            model, str(folder), model_config=dict(label_names=list(label_names), **config), model_args=model_args,
            safe_serialization=True)
        os.chmod(folder / 'model.safetensors', 0o644)  # safetensors writes it for the owner alone
        if out_dir.is_dir():
            out_dir.rmdir()
        os.rename(folder, out_dir)


def pack(
        run: Path,
        out_dir: Path,
        labels: Sequence[str] | None = None,
        ema: bool = True,
        half: bool = False,
) -> dict[str, Any]:
    """Write a timm folder that `timm.create_model('local-dir:OUT_DIR', pretrained=True)` loads.

    Args:
        run: Folder of a run of train.py, or one of its checkpoints.
        out_dir: Folder to write; must not hold anything yet.
        labels: Label names in the order of training, only where the run itself does not tell them.
        ema: Take the moving average of the weights where the run kept one.
        half: Store kernels and matrices as float16.

    Returns:
        What was packed: `checkpoint`, `model`, `epoch`, `metric`, `ema`, `label_names`, `args` (the run's settings).

    Raises:
        PackError: When the checkpoint or the labels do not fit; nothing is written then.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise PackError(f'{out_dir} is there already: name a new folder.')
    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path)
    args: argparse.Namespace = checkpoint['args']
    use_ema = ema and checkpoint.get('state_dict_ema') is not None
    state_dict = clean_state_dict(checkpoint['state_dict_ema' if use_ema else 'state_dict'])

    model_kwargs = run_model_kwargs(args)
    try:
        model: Any = timm.create_model(args.model, pretrained=False, **model_kwargs)
        model.load_state_dict(state_dict)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise PackError(f'{path} does not fit the model {args.model} its run names: {reason[:500]}') from None

    label_names = resolve_labels(args, labels, model.num_classes)
    data_config = resolve_data_config(vars(args), model=model)
    if data_config['input_size'] != tuple(model.pretrained_cfg['input_size']):
        model.pretrained_cfg['pool_size'] = None
    model.pretrained_cfg.update(data_config)
    model.pretrained_cfg.update(num_classes=model.num_classes, label_names=tuple(label_names))
    for key in ('tag', 'license'):  # true of the zoo's own weights alone
        model.pretrained_cfg.pop(key, None)
    if half:
        half_precision(model)

    write_folder(model, out_dir, label_names, model_kwargs)
    return dict(
        checkpoint=path.name, model=args.model, epoch=checkpoint.get('epoch'), metric=checkpoint.get('metric'),
        ema=use_ema, label_names=label_names, args=vars(args))
