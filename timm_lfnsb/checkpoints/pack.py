"""Turn a checkpoint of timm's train script into a timm folder: config.json with label names, model.safetensors."""
from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, save_for_hf

from ..errors import UserError
from ..train.checkpoints import find_checkpoint, load_checkpoint, run_label_names


def pack(
        run: Path, out_dir: Path, labels: Sequence[str] | None = None, ema: bool = True, half: bool = False,
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
        UserError: When the checkpoint or the labels do not fit; nothing is written then.
    """
    check_new(out_dir)
    path = find_checkpoint(run)
    checkpoint = load_checkpoint(path)
    args: argparse.Namespace = checkpoint['args']
    use_ema = ema and checkpoint.get('state_dict_ema') is not None
    model_kwargs = run_model_kwargs(args)
    try:
        model: Any = timm.create_model(args.model, pretrained=False, **model_kwargs)
        model.load_state_dict(clean_state_dict(checkpoint['state_dict_ema' if use_ema else 'state_dict']))
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'{path} does not fit the model {args.model} its run names: {reason[:500]}') from None

    label_names = resolve_labels(args, labels, model.num_classes)
    data_config = resolve_data_config(vars(args), model=model)
    if data_config['input_size'] != tuple(model.pretrained_cfg['input_size']):
        model.pretrained_cfg['pool_size'] = None
    model.pretrained_cfg.update(data_config, num_classes=model.num_classes)
    if half:
        half_precision(model)
    write_folder(model, out_dir, label_names, model_kwargs)
    return dict(
        checkpoint=path.name, model=args.model, epoch=checkpoint.get('epoch'), metric=checkpoint.get('metric'),
        ema=use_ema, label_names=label_names, args=vars(args))


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


def resolve_labels(args: argparse.Namespace, labels: Sequence[str] | None, num_classes: int) -> list[str]:
    """The run's label names, checked against `--labels` and the size of the classifier."""
    try:
        found = run_label_names(args)
    except UserError:
        if not labels:
            raise
        found = None
    if found and labels and list(labels) != found:
        raise UserError(f"--labels [{', '.join(labels)}] are not the run's own [{', '.join(found)}]: leave them out.")
    names = found or list(labels or [])
    if not names:
        raise UserError(
            'neither a class map nor the data folders of the run are there: give the label names with --labels, in the '
            'order the run trained them.')
    if len(names) != num_classes:
        raise UserError(f'the checkpoint has {num_classes} classes, but there are {len(names)} labels '
                        f"[{', '.join(names)}]: give all of them with --labels.")
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"the labels [{', '.join(names)}] have an empty name, or one twice.")
    return names


def half_precision(model: torch.nn.Module) -> None:
    """Store matrices and kernels as float16; vectors (norms, biases) stay, they are small and need the range."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
            if not parameter.isfinite().all():
                raise UserError(f'{name} has values that float16 cannot hold: pack without --half.')


def check_new(out_dir: Path) -> None:
    """Raise UserError where a folder to write is there already, and not empty."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f'{out_dir} is there already: name a new folder.')


def write_folder(
        model: Any, out_dir: Path, label_names: Sequence[str], model_args: dict[str, Any], **config: Any) -> None:
    """Write a timm folder beside its place and move it there whole.

    Args:
        label_names: Names of the outputs in their order; none for a network without a classifier.
        model_args: Arguments of `timm.create_model` that build the network.
        config: Further entries of config.json.
    """
    for key in ('tag', 'license', 'label_names'):  # true of the zoo's own weights alone
        model.pretrained_cfg.pop(key, None)
    if label_names:
        model.pretrained_cfg['label_names'] = tuple(label_names)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f'.{out_dir.name}.') as temporary:
        folder = Path(temporary) / out_dir.name
        save_for_hf(
            model, str(folder), model_config=dict(label_names=list(label_names), **config), model_args=model_args,
            safe_serialization=True)
        written = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        # config.json has it beside these as well; transformers passes both, and fails at the second.
        written.get('model_args', {}).pop('num_classes', None)
        (folder / 'config.json').write_text(json.dumps(written, indent=2), encoding='utf-8')
        os.chmod(folder / 'model.safetensors', 0o644)  # safetensors writes it for the owner alone
        if out_dir.is_dir():
            out_dir.rmdir()
        os.rename(folder, out_dir)
