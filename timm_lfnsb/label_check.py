"""Warn where a training run starts from weights whose classes are not the run's own, in the run's order."""
from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

import timm
import yaml
from timm.utils import world_info_from_env

from .labels import canonical_name
from .pack import run_label_names

_logger = logging.getLogger(__name__)


def start_label_names(options: argparse.Namespace) -> tuple[str, Sequence[str] | None, bool]:
    """What the weights that a run of train.py starts from know about their classes, without loading them.

    Returns:
        The option and value that name the weights ('' for a run from scratch, or one that is resumed), their label
        names (None where nothing tells them, also for the Hub: nothing is fetched), and whether train.py keeps their
        classifier.
    """
    def value(name: str) -> str:
        return getattr(options, name, None) or ''

    checkpoint, path, model = value('initial_checkpoint'), value('pretrained_path'), value('model')
    if value('resume'):
        return '', None, False
    if checkpoint:
        return f'--initial-checkpoint {checkpoint}', folder_label_names(Path(checkpoint).parent), True
    if path:  # train.py always gives these a new classifier
        return f'--pretrained-path {path}', folder_label_names(Path(path).parent), False
    if not value('pretrained'):
        return '', None, False
    source, is_prefixed, name = model.partition(':')
    names: Sequence[str] | None = None
    if not is_prefixed:
        cfg = timm.models.get_pretrained_cfg(model)
        names = cfg.label_names if cfg else None
    elif source == 'local-dir':
        names = folder_label_names(Path(name))
    return f'--model {model}', names, names is not None and value('num_classes') in ('', len(names))


def folder_label_names(folder: Path) -> Sequence[str] | None:
    """Label names from a timm folder's config.json, or from the settings that train.py left beside a checkpoint."""
    if (folder / 'config.json').is_file():
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        return config.get('label_names') or config.get('pretrained_cfg', {}).get('label_names')
    if (folder / 'args.yaml').is_file():
        return run_label_names(argparse.Namespace(**yaml.safe_load((folder / 'args.yaml').read_text('utf-8'))))
    return None


def warn_of_other_labels(options: argparse.Namespace) -> None:
    """Log a warning with both lists where the weights a run starts from have other classes, or another order.

    Args:
        options: What train.py's parser returned. Synonyms, such as happy for happiness, count as the same class.
    """
    if world_info_from_env()[1] != 0:  # one process of a distributed run is enough
        return
    try:
        start, old, keeps_classifier = start_label_names(options)
        if not old:
            return
        data_dir = getattr(options, 'data_dir', None) or getattr(options, 'data', None)
        new = run_label_names(argparse.Namespace(**{**vars(options), 'data_dir': data_dir}))
    except (OSError, RuntimeError, ValueError, yaml.YAMLError):
        return  # what cannot be read here cannot be trained with either, and train.py says so
    if not new:
        return
    old_keys, new_keys = [canonical_name(name) for name in old], [canonical_name(name) for name in new]
    if old_keys == new_keys:
        return
    if not keeps_classifier:
        advice = 'train.py gives the model a new classifier, so nothing is mixed up, but that part starts untrained.'
    else:
        advice = 'The classifier is kept by position, so classes start out as other ones. '
        if sorted(old_keys) == sorted(new_keys):
            ordered = [new[new_keys.index(key)] for key in old_keys]
            advice += f"Give --class-map a file with the lines {', '.join(ordered)}, "
        else:
            advice += 'Rename the classes if they only differ in spelling, or leave the weights out, '
        advice += 'or start the classifier anew with --head-init-scale 0.'
    _logger.warning(
        'The weights this run starts from have other classes, or the same in another order.\n'
        f'  weights ({start}): {_listing(old)}\n'
        f"  this run ({getattr(options, 'class_map', '') or 'folder names in alphabetical order'}): {_listing(new)}\n"
        f'  {advice}')


def _listing(names: Sequence[str]) -> str:
    return ', '.join(names) if len(names) <= 20 else f"{', '.join(names[:20])}, ... ({len(names)})"
