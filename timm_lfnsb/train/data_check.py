"""Check the labels of a training run: its folders against its class map, and those of the weights it starts from."""
from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import timm
import yaml
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map

from ..errors import UserError
from ..labels import canonical_name
from .checkpoints import run_label_names
from .options import rank

_logger = logging.getLogger(__name__)


def check_class_folders(options: argparse.Namespace) -> None:
    """Refuse folders whose images timm would drop or misnumber without a word, and a validation split that is missing.

    With a class map these are folders that it does not name; without one, timm numbers those of each split for itself.
    """
    data_dir = Path(getattr(options, 'data_dir', None) or '')
    if getattr(options, 'dataset', '') or data_dir == Path() or not data_dir.exists() or rank() != 0:
        return
    check_splits(options, data_dir)
    found = [split_folders(options, split) for name in ('train_split', 'val_split')
             if (split := getattr(options, name, ''))]
    if getattr(options, 'class_map', ''):
        for root, folders in found:
            check_class_map(options, root, folders)
        return
    if getattr(options, 'skip_folders', None):
        raise UserError('--skip-folders needs a --class-map, which says what the other folders are.')
    for root, names in found[1:]:
        first_root, first_names = found[0]
        if names != first_names[:len(names)]:
            raise UserError(
                'without --class-map timm numbers the folders of each split for itself, and they differ: '
                f"{first_root} has {', '.join(first_names)}, {root} has {', '.join(names)}: give a class map.")


def check_splits(options: argparse.Namespace, data_dir: Path) -> None:
    """Refuse a validation split that is not there: timm would take the whole folder, training images included."""
    split = getattr(options, 'val_split', None)
    if not split or not data_dir.is_dir():
        return
    folders = sorted(path.name for path in data_dir.iterdir() if path.is_dir())
    synonyms = {'val', 'valid', 'validation', 'eval', 'evaluation'}  # timm takes one for the other
    there = split in folders or (split in synonyms and synonyms.intersection(folders))
    if not there and getattr(options, 'train_split', 'train') in folders:
        raise UserError(
            f"{data_dir} has no split '{split}', only {', '.join(folders)}: name one with --val-split, or '' for none.")


def split_folders(options: argparse.Namespace, split: str) -> tuple[str, list[str]]:
    """The folder or tar file that timm reads a split from, and the names of the folders of images in it."""
    try:
        # timm's own reader without a class map, so that what it finds here is what it finds there.
        reader = create_dataset(
            '', root=options.data_dir, split=split, input_key=getattr(options, 'input_key', None)).reader
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(
            f"no images found for the split '{split}' in {options.data_dir}: timm reads folders of images and tar "
            'files, but no zip files; `timm-lfnsb prepare` makes such folders.') from None
    return reader.root, list(getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', {}))


def check_class_map(options: argparse.Namespace, root: str, folders: Sequence[str]) -> None:
    """Refuse folders of a split that the class map does not name, or numbers beyond --num-classes."""
    class_map = options.class_map
    try:
        classes: Mapping[str, int] = load_class_map(class_map, root)
    except (AssertionError, OSError, ValueError, pickle.PickleError) as error:
        raise UserError(f'--class-map {class_map} cannot be read ({error}).') from None
    skipped = getattr(options, 'skip_folders', None) or []
    skipped = [skipped] if isinstance(skipped, str) else skipped  # one name in YAML
    # Hidden folders and __MACOSX are what file managers leave behind: nobody misses their images.
    unknown = [name for name in folders
               if name not in classes and name not in skipped and not name.startswith(('.', '__'))]
    if unknown:
        synonyms = {canonical_name(name): f' (which the class map calls {name})' for name in classes}
        named = [(name or '(no folder)') + synonyms.get(canonical_name(name), '') for name in unknown]
        raise UserError(
            f"{root} has folders that the class map does not name, and timm would leave their images out: "
            f"{', '.join(named)} (folders: {', '.join(sorted(folders))}; class map {class_map}: "
            f"{', '.join(map(str, classes))}): make a folder with these names by `timm-lfnsb prepare folder "
            f"{options.data_dir} TARGET`, rename them, or name what is to be left out with --skip-folders.")
    high = max((classes[name] for name in folders if name in classes), default=0)
    if high >= (getattr(options, 'num_classes', None) or high + 1):
        raise UserError(f'{class_map} numbers the folders of {root} up to {high}, counted from 0, but --num-classes is '
                        f'{options.num_classes}.')


def start_label_names(options: argparse.Namespace) -> tuple[str, Sequence[str] | None, bool]:
    """Weights a run starts from: option and value, label names if known, whether train.py keeps their classifier."""
    checkpoint, path, model, classes = (getattr(options, name, None) or '' for name in (
        'initial_checkpoint', 'pretrained_path', 'model', 'num_classes'))
    if checkpoint:
        return f'--initial-checkpoint {checkpoint}', folder_label_names(Path(checkpoint).parent), True
    if path:  # train.py always gives these a new classifier
        return f'--pretrained-path {path}', folder_label_names(Path(path).parent), False
    names: Sequence[str] | None = None
    if getattr(options, 'pretrained', False) and model.startswith('local-dir:'):
        names = folder_label_names(Path(model.removeprefix('local-dir:')))
    elif getattr(options, 'pretrained', False) and ':' not in model:  # nothing is fetched from the Hub
        cfg = timm.models.get_pretrained_cfg(model)
        names = cfg.label_names if cfg else None
    return f'--model {model}', names, names is not None and classes in ('', len(names))


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

    Synonyms, such as happy for happiness, count as the same class.
    """
    if getattr(options, 'resume', None) or rank() != 0:
        return
    try:
        start, old, keeps_classifier = start_label_names(options)
        new = run_label_names(options) if old else None
    except (OSError, RuntimeError, ValueError, yaml.YAMLError):
        return  # what cannot be read here cannot be trained with either, and train.py says so
    if not old or not new:
        return
    old_keys, new_keys = [canonical_name(name) for name in old], [canonical_name(name) for name in new]
    if old_keys == new_keys:
        return
    remedy = 'Rename the classes if they only differ in spelling, or leave the weights out'
    if sorted(old_keys) == sorted(new_keys):
        ordered = [new[new_keys.index(key)] for key in old_keys]
        remedy = f"Give --class-map a file with the lines {', '.join(ordered)}"
    advice = (f'The classifier is kept by position, so classes start out as other ones. {remedy}, or start the '
              'classifier anew with --head-init-scale 0.')
    if not keeps_classifier:
        advice = 'train.py gives the model a new classifier, so nothing is mixed up, but that part starts untrained.'
    class_map = getattr(options, 'class_map', '') or 'folder names in alphabetical order'
    _logger.warning(
        'The weights this run starts from have other classes, or the same in another order.\n'
        f"  weights ({start}): {', '.join(old)}\n  this run ({class_map}): {', '.join(new)}\n  {advice}")
