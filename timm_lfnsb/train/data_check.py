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
from timm.utils import world_info_from_env

from ..errors import UserError
from ..labels import canonical_name
from .checkpoints import run_label_names

_logger = logging.getLogger(__name__)


def split_folders(options: argparse.Namespace, split: str) -> tuple[str, list[str]]:
    """The folder or tar file that timm reads a split from, and the names of the folders of images in it.

    Raises:
        UserError: When there are no images.
    """
    try:
        # timm's own reader without a class map, so that what it finds here is what it finds there.
        reader = create_dataset(
            '', root=options.data_dir, split=split, input_key=getattr(options, 'input_key', None)).reader
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(
            f"no images found for the split '{split}' in {options.data_dir}: timm reads folders of images and tar "
            'files, but no zip files; `timm-lfnsb prepare` makes such folders.') from None
    names = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', {})
    return reader.root, list(names)


def check_class_folders(options: argparse.Namespace) -> None:
    """Refuse folders that the class map does not name: timm would drop their images without a word.

    Without a class map, folders are numbered by name in each split for itself: refuse splits whose numbers differ.

    Args:
        options: What train.py's parser returned; only folders and tar files are looked at (`data_dir`).

    Raises:
        UserError: With both lists.
    """
    data_dir = getattr(options, 'data_dir', None)
    if getattr(options, 'dataset', '') or not data_dir or not Path(data_dir).exists():
        return
    if world_info_from_env()[1] != 0:  # one process of a distributed run is enough
        return
    splits = [split for name in ('train_split', 'val_split') if (split := getattr(options, name, ''))]
    found = {split: split_folders(options, split) for split in splits}
    class_map = getattr(options, 'class_map', '')
    skipped = getattr(options, 'skip_folders', None) or []
    skipped = [skipped] if isinstance(skipped, str) else skipped  # one name in YAML
    if not class_map:
        if skipped:
            raise UserError('--skip-folders needs a --class-map, which says what the other folders are.')
        (root, names), *others = found.values()
        for other_root, other_names in others:
            if any(name not in names or names.index(name) != i for i, name in enumerate(other_names)):
                raise UserError(
                    'without --class-map timm numbers the folders of each split for itself, and they differ: '
                    f"{root} has {', '.join(names)}, {other_root} has {', '.join(other_names)}: give a class map.")
        return
    for root, folders in found.values():
        try:
            classes = load_class_map(class_map, root)
        except (AssertionError, OSError, ValueError, pickle.PickleError) as error:
            raise UserError(f'--class-map {class_map} cannot be read ({error}).') from None
        # Hidden folders and __MACOSX are what file managers leave behind: nobody misses their images.
        unknown = [name for name in folders
                   if name not in classes and name not in skipped and not name.startswith(('.', '__'))]
        if unknown:
            raise UserError(
                f"{root} has folders that the class map does not name, and timm would leave their images out: "
                f"{', '.join(_explain(name, classes) for name in unknown)} (folders: {', '.join(sorted(folders))}; "
                f"class map {class_map}: {', '.join(map(str, classes))}): make a folder with these names "
                f"by `timm-lfnsb prepare folder {data_dir} TARGET`, rename them, or name what is to be left out with "
                '--skip-folders.')
        num_classes = getattr(options, 'num_classes', None)
        high = max((classes[name] for name in folders if name in classes), default=0)
        if num_classes and high >= num_classes:
            raise UserError(
                f'{class_map} numbers the folders of {root} up to {high}, counted from 0, but --num-classes is '
                f'{num_classes}.')


def _explain(name: str, classes: Mapping[str, int]) -> str:
    same = [known for known in classes if canonical_name(known) == canonical_name(name)]
    return f"{name or '(no folder)'}" + (f' (which the class map calls {same[0]})' if same else '')


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
        new = run_label_names(options)
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
        f"  weights ({start}): {', '.join(old)}\n"
        f"  this run ({getattr(options, 'class_map', '') or 'folder names in alphabetical order'}): "
        f"{', '.join(new)}\n"
        f'  {advice}')
