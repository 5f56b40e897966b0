"""Check the labels of a training run: its folders against its class map, and those of the weights it starts from."""
from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map
from timm.models import get_pretrained_cfg, is_model_pretrained

from ..errors import UserError, did_you_mean
from ..labels import LabelError, canonical_name, read_class_map
from ..recipes import class_map_names
from .checkpoints import load_checkpoint, run_label_names
from .options import rank

_logger = logging.getLogger(__name__)


def check_class_folders(options: argparse.Namespace) -> None:
    """Refuse folders whose images timm would drop or misnumber without a word, and a validation split that is missing.

    With a class map these are folders that it does not name; without one, timm numbers those of each split for itself.
    """
    if options.dataset or not options.data_dir or not Path(options.data_dir).exists() or rank() != 0:
        return
    if options.skip_folders and not options.class_map:
        raise UserError('--skip-folders needs a --class-map, which says what the other folders are.')
    found = [split_folders(options, split) for split in (options.train_split, options.val_split) if split]
    for root, folders in found[1:]:
        first_root, first_folders = found[0]
        if root == options.data_dir != first_root:  # timm would take the whole folder, training images included
            splits = sorted(path.name for path in Path(root).iterdir() if path.is_dir())
            raise UserError(f"{root} has no split '{options.val_split}', only {', '.join(splits)}: name one with "
                            "--val-split, or '' for none.")
        if not options.class_map and folders != first_folders[:len(folders)]:
            raise UserError(
                'without --class-map timm numbers the folders of each split for itself, and they differ: '
                f"{first_root} has {', '.join(first_folders)}, {root} has {', '.join(folders)}: give a class map.")
    for root, folders in found if options.class_map else ():
        check_class_map(options, root, folders)


def split_folders(options: argparse.Namespace, split: str) -> tuple[str, list[str]]:
    """The folder or tar file that timm reads a split from, and the names of the folders of images in it."""
    try:
        # timm's own reader without a class map, so that what it finds here is what it finds there.
        reader = create_dataset('', root=options.data_dir, split=split, input_key=options.input_key).reader
    except (RuntimeError, AssertionError, ValueError):
        raise UserError(
            f"no images found for the split '{split}' in {options.data_dir}: timm reads folders of images and tar "
            'files, but no zip files; `timm-lfnsb prepare` makes such folders.') from None
    return reader.root, list(getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', {}))


def class_numbers(class_map: str) -> str | dict[str, int]:
    """A class map as timm is to take it: of a text file the names with their numbers, as `read_class_map` has them."""
    path = Path(class_map)
    if path.suffix.lower() != '.txt' or not path.is_file():
        return class_map
    return {name: number for number, name in enumerate(read_class_map(path))}


def check_class_map(options: argparse.Namespace, root: str, folders: Sequence[str]) -> None:
    """Refuse folders of a split that the class map does not name, or numbers beyond --num-classes."""
    class_map = options.class_map
    try:
        classes = load_class_map(class_numbers(class_map), root)
    except LabelError:
        raise
    except (AssertionError, OSError, ValueError) as error:
        near = did_you_mean(class_map, class_map_names())
        raise UserError(f'--class-map {class_map}{near} cannot be read ({error}).') from None
    skipped = options.skip_folders if isinstance(options.skip_folders, list) else [options.skip_folders]  # from YAML
    # Hidden folders and __MACOSX are what file managers leave behind: nobody misses their images.
    unknown = [name for name in folders
               if name not in classes and name not in skipped and not name.startswith(('.', '__'))]
    if unknown:
        synonyms = {canonical_name(name): f' (which the class map calls {name})' for name in classes}
        named = [(name or '(no folder)') + (synonyms.get(canonical_name(name)) or did_you_mean(name, classes))
                 for name in unknown]
        raise UserError(
            f"{root} has folders that the class map {class_map} does not name, and timm would leave their images out: "
            f"{', '.join(named)}; it names {', '.join(map(str, classes))}: make a folder with these names by "
            f'`timm-lfnsb prepare folder {options.data_dir} TARGET`, rename them, or name what is to be left out with '
            '--skip-folders.')
    if options.num_classes and any(classes.get(name, 0) >= options.num_classes for name in folders):
        raise UserError(f'{class_map} has more classes than --num-classes {options.num_classes}.')
    if options.num_classes and len(classes) < options.num_classes:
        raise UserError(f'{class_map} has {len(classes)} names and --num-classes is {options.num_classes}: some '
                        'outputs would have neither images nor a name.')


def kept_classifier(options: argparse.Namespace) -> Sequence[str] | None:
    """Label names of the classifier that a run starts with, None where they are not known or it is a new one."""
    if options.initial_checkpoint:
        return run_label_names(load_checkpoint(Path(options.initial_checkpoint))['args'])
    names: Sequence[str] | None = None
    if options.pretrained and not options.pretrained_path:
        if options.model.startswith('local-dir:'):
            path = Path(options.model.removeprefix('local-dir:'), 'config.json')
            names = json.loads(path.read_text(encoding='utf-8')).get('label_names')
        elif is_model_pretrained(options.model) and (cfg := get_pretrained_cfg(options.model)):
            names = cfg.label_names
    return names if names and options.num_classes in (None, len(names)) else None


def warn_of_other_labels(options: argparse.Namespace) -> None:
    """Log a warning with both lists where a run goes on with a classifier of other classes, or in another order.

    Synonyms, such as happy for happiness, count as the same class.
    """
    if options.resume or rank() != 0:
        return
    try:
        old = kept_classifier(options)
        new = run_label_names(options) if old else None
    except (UserError, OSError, ValueError):
        return  # what cannot be read here cannot be trained with either, and train.py says so
    old_keys, new_keys = ([canonical_name(name) for name in names or ()] for names in (old, new))
    if not old or not new or old_keys == new_keys:
        return
    _logger.warning(
        'The weights this run starts from have other classes, or the same in another order.\n'
        f"  weights: {', '.join(old)}\n"
        f"  this run ({options.class_map or 'folder names in alphabetical order'}): {', '.join(new)}\n"
        '  The classifier is kept by position, so classes start out as other ones. Give --class-map a file with the '
        "run's names in the order of the weights, or start the classifier anew with --head-init-scale 0.")
