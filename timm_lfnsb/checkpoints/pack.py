"""Turn a checkpoint of timm's train script into a timm folder: config.json with label names, model.safetensors."""
from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import clean_state_dict, save_for_hf

from ..errors import UserError
from ..labels import model_label_names
from ..models.temperature import TEMPERATURE_KEY
from ..train.checkpoints import find_checkpoint, load_checkpoint, run_label_names


def pack(
        run: Path, out_dir: Path, labels: Sequence[str] | None = None, ema: bool = True, half: bool = False,
        calibrate: Path | None = None,
) -> dict[str, Any]:
    """Write a timm folder that `timm.create_model('local-dir:OUT_DIR', pretrained=True)` loads.

    Args:
        run: Folder of a run of train.py, or one of its checkpoints.
        out_dir: Folder to write; must not hold anything yet.
        labels: Label names in the order of training, only where the run itself does not tell them.
        ema: Take the moving average of the weights where the run kept one.
        half: Store kernels and matrices as float16.
        calibrate: Data folder on whose validation split a temperature is fitted, for config.json.

    Returns:
        What was packed: `checkpoint`, `model`, `epoch`, `ema`, `label_names`, `input_size`, `temperature` (or None).

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
        reason = shorten(str(error), 500, placeholder=' ...')
        raise UserError(f'{path} does not fit the model {args.model} its run names: {reason}') from None

    label_names = resolve_labels(args, labels)
    data_config = resolve_data_config(vars(args), model=model)
    if data_config['input_size'] != tuple(model.pretrained_cfg['input_size']):
        model.pretrained_cfg['pool_size'] = None
    model.pretrained_cfg.update(data_config, num_classes=model.num_classes)
    if half:
        half_precision(model)
    temperature = _fit_temperature(model, label_names, calibrate) if calibrate else None
    write_folder(
        model, out_dir, label_names, model_kwargs, **({TEMPERATURE_KEY: temperature} if temperature else {}))
    return dict(
        checkpoint=path.name, model=args.model, epoch=checkpoint.get('epoch'), ema=use_ema, label_names=label_names,
        input_size=data_config['input_size'], temperature=temperature)


def run_model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `timm.create_model` a run of train.py built its model with."""
    options = vars(args)
    kwargs = {**(options.get('model_kwargs') or {}), 'num_classes': args.num_classes}
    channels, *size = options.get('input_size') or [None]
    in_chans, img_size = options.get('in_chans') or channels, options.get('img_size') or size
    if in_chans:
        kwargs.setdefault('in_chans', in_chans)
    cfg = timm.models.get_pretrained_cfg(args.model) if ':' not in args.model else None
    if img_size and cfg is not None and cfg.fixed_input_size:
        kwargs.setdefault('img_size', img_size)
    if options.get('gp'):
        kwargs['global_pool'] = args.gp
    return kwargs


def resolve_labels(args: argparse.Namespace, labels: Sequence[str] | None) -> list[str]:
    """The run's label names, which `--labels` may only repeat, or those where the run has none."""
    found = None
    with suppress(UserError) if labels else nullcontext():
        found = run_label_names(args)
    if found and labels and list(labels) != found:
        raise UserError(f"--labels [{', '.join(labels)}] are not the run's own [{', '.join(found)}]: leave them out.")
    if not (found or labels):
        raise UserError('neither class map nor data folders of the run are there any more: give its --labels in order.')
    return found or list(labels or [])


def _fit_temperature(model: Any, label_names: Sequence[str], data_dir: Path) -> float:
    from ..evaluate.calibration import fit_temperature
    from ..evaluate.predictions import predict_folder
    model = copy.deepcopy(model).float()  # half precision rounds the numbers, but readers calculate in full
    model.pretrained_cfg['label_names'] = tuple(label_names)
    return fit_temperature(predict_folder(model, data_dir, 'validation'))


def half_precision(model: torch.nn.Module) -> None:
    """Store matrices and kernels as float16; vectors (norms, biases) stay, they are small and need the range."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
            if not parameter.isfinite().all():
                raise UserError(f'{name} has values that float16 cannot hold: pack without --half.')


def check_new(out_dir: Path) -> None:
    """Refuse a folder to write that is there and not empty."""
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f'{out_dir} is there already: name a new folder.')


def write_folder(
        model: Any, out_dir: Path, label_names: Sequence[str], model_args: dict[str, Any], **config: Any) -> None:
    """Write a timm folder beside its place and move it there whole.

    Args:
        label_names: Names of the outputs in their order; none for a network without a classifier.
        model_args: Arguments of `timm.create_model` that build the network.
        config: Further entries of config.json.

    Raises:
        UserError: When the folder is there and not empty, or there is not one name for each output.
    """
    check_new(out_dir)
    for key in ('tag', 'license', 'label_names'):  # true of the zoo's own weights alone
        model.pretrained_cfg.pop(key, None)
    if label_names:
        model.pretrained_cfg['label_names'] = tuple(label_names)
        model_label_names(model)
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
        os.replace(folder, out_dir)
