"""What `timm-lfnsb run` adds to the options of timm's train script, and the checks of what goes together."""
from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg
from timm.utils import world_info_from_env

from ..errors import UserError
from ..losses.cosine_harmony import VARIANTS
from ..recipes import class_map_path, recipe_names, recipe_path

_logger = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our options to a train script's parser; what is there is found by YAML keys and in args.yaml, too."""
    group = parser.add_argument_group('Cosine-Harmony loss (timm_lfnsb)')
    group.add_argument('--cosine-harmony', type=float, default=0., metavar='WEIGHT',
                       help='weight of the Cosine-Harmony loss beside the classification loss, 0 = off (default: 0). '
                            'Works with --kd-model-name, too, which takes several teachers here, separated by commas: '
                            'their probabilities are averaged, each teacher sees its own input size, and its labels '
                            'are matched by name')
    group.add_argument('--cosine-harmony-alpha', type=float, default=0.1, metavar='ALPHA',
                       help='balance of its two terms, in [0, 1] (default: 0.1)')
    group.add_argument('--cosine-harmony-variant', default='reference', choices=VARIANTS,
                       help='its formula (default: reference)')
    group.add_argument('--cosine-harmony-fixed-centers', action='store_true', default=False,
                       help='keep the random class centers instead of learning them')
    group = parser.add_argument_group('Labels and rare classes (timm_lfnsb)')
    group.add_argument('--label-votes', default='', metavar='FILE',
                       help="CSV file of crowd votes (a column 'file', and one of counts for each label): each epoch "
                            "draws each image's label anew from its votes; an image without any keeps its folder's. "
                            'A bare name is also looked for in the data folder')
    group.add_argument('--balance-power', type=float, default=0., metavar='POWER',
                       help='draw the training images of an epoch with replacement, and a class of n images in '
                            'proportion to n ** (1 - POWER): 1 = all classes equally often, 0.5 = by the square root '
                            'of their size, 0 = off, each image once. Rare classes usually gain and with them balanced '
                            'accuracy; frequent ones, and plain accuracy on data as imbalanced as the training split, '
                            'may lose (default: 0)')
    group.add_argument('--logit-adjustment', type=float, default=0., metavar='TAU',
                       help='add TAU x log(share of the class in training) to the logits of the training loss, so that '
                            'rare classes are answered more often: 1 = as if all were equally frequent, 0 = off '
                            "(default: 0). Teachers' answers are adjusted alike")
    group = parser.add_argument_group('Augmentation (timm_lfnsb)')
    group.add_argument('--photo-look', type=float, nargs='?', const=0.3, default=0., metavar='P',
                       help="give training images the look of people's photographs before timm's own augmentation: "
                            'lower resolution, blur, JPEG, gamma, a small tilt and shift, each with probability P '
                            '(0.3 where none is given; default: 0, off)')
    group = parser.add_argument_group('Safe training (timm_lfnsb)')
    group.add_argument('--skip-folders', nargs='+', default=[], metavar='NAME',
                       help='folders of images whose class is left out on purpose; any other folder that the class map '
                            'does not name is refused, where timm would drop its images without a word')
    group.add_argument('--no-epoch-seeds', action='store_true', default=False,
                       help='draw the order of the images, augmentations and so on as timm does, from one seed at the '
                            'start of the run. Without this option they are drawn anew for each epoch from --seed and '
                            'its number, so that a run that was killed and resumed equals one that was not')


def resolve_recipe(args: Sequence[str]) -> list[str]:
    """Replace the name of a recipe behind --config or -c by the path of its file.

    Raises:
        UserError: When it is neither a recipe nor a file.
    """
    args = list(args)
    for i, arg in enumerate(args):
        flag, has_value, value = arg.partition('=')
        if flag not in ('-c', '--config'):
            continue
        if not has_value:
            value = args[i + 1] if i + 1 < len(args) else ''
        if Path(value).is_file():
            continue
        if value in recipe_names():
            args[i:i + (1 if has_value else 2)] = [flag, str(recipe_path(value))]
        elif value:
            raise UserError(
                f'--config {value} is neither a file nor a recipe of this zoo ({", ".join(recipe_names())}).')
    return args


def resolve_paths(options: argparse.Namespace) -> None:
    """Give the run absolute paths of class map, data and votes, which its checkpoints keep and `pack` reads.

    Raises:
        UserError: When the file of votes is missing.
    """
    class_map = getattr(options, 'class_map', None)
    if class_map and not Path(class_map).is_file():
        options.class_map = class_map = str(class_map_path(class_map) or class_map)
    if class_map and Path(class_map).is_file():
        options.class_map = str(Path(class_map).resolve())
    # train.py moves the old positional argument into data_dir later.
    data_dir = getattr(options, 'data_dir', None) or getattr(options, 'data', None)
    if data_dir and Path(data_dir).is_dir():
        options.data_dir = str(Path(data_dir).resolve())
    if options.label_votes:
        places = [Path(options.label_votes), Path(data_dir or '', options.label_votes)]
        found = next((path for path in places if path.is_file()), None)
        if found is None:
            raise UserError(
                f'--label-votes {options.label_votes} is not a file, nor is it in the data folder {data_dir}: '
                '`timm-lfnsb prepare ferplus` writes votes.csv; leave the option out to train with the folders alone.')
        options.label_votes = str(found.resolve())


def distils(options: argparse.Namespace) -> bool:
    """Whether teachers are ours to load: several, some whose labels are known, or some beside our losses.

    A single teacher of timm without label names, and nothing of ours beside it, is left to timm.
    """
    names = getattr(options, 'kd_model_name', None) or ''
    if not names:
        return False
    try:
        cfg = get_pretrained_cfg(names) if ':' not in names and ',' not in names else None
    except RuntimeError:  # a tag that is not there; loading it says so
        cfg = None
    return bool(cfg is None or cfg.label_names or options.cosine_harmony or options.logit_adjustment)


def check_options(options: argparse.Namespace, script: dict[str, Any]) -> None:
    """Refuse what cannot work together; scripts of other releases lack some of the options.

    Args:
        options: What the script's parser returned.
        script: The script's globals.

    Raises:
        UserError: With the option to change.
    """
    def value(name: str) -> Any:
        return getattr(options, name, None)

    def refuse(option: str, conflicts: dict[str, Any]) -> None:
        for name, used in conflicts.items():
            if used:
                raise UserError(f'{option} cannot be combined with {name}: leave one of the two out.')

    whole_images = {
        'the NaFlex loader (--naflex-loader)': value('naflex_loader'),
        'augmentation splits (--aug-splits, --jsd-loss)': value('aug_splits') or value('jsd_loss'),
    }
    multi_label = value('multilabel') or value('multi_label') or value('task') not in (None, '', 'classification')
    losses = (('--cosine-harmony', options.cosine_harmony), ('--logit-adjustment', options.logit_adjustment))
    for option, used in losses:
        if used and 'ClassificationTask' not in script:
            raise UserError(f'this train script is too old for {option} (it has no ClassificationTask): take the '
                            'train.py of timm 1.0.27 or newer.')
        if used:
            refuse(option, {
                'multi-label training': multi_label, '--torchscript (use --torchcompile)': value('torchscript'),
                **whole_images})
    if not 0 <= options.cosine_harmony < math.inf or not 0 <= options.cosine_harmony_alpha <= 1:
        raise UserError('--cosine-harmony must not be negative, and --cosine-harmony-alpha must lie in [0, 1].')
    if options.cosine_harmony_variant not in VARIANTS:  # argparse does not check what comes from YAML
        raise UserError(f"--cosine-harmony-variant must be one of {', '.join(VARIANTS)}.")
    if not 0 <= options.logit_adjustment < math.inf:
        raise UserError('--logit-adjustment must not be negative.')
    if options.logit_adjustment:
        refuse('--logit-adjustment', {'--bce-loss (it has no softmax to adjust)': value('bce_loss')})
    if not 0 <= options.balance_power <= 1:
        raise UserError('--balance-power must lie in [0, 1].')
    if not 0 <= options.photo_look <= 1:
        raise UserError('--photo-look is a probability and must lie in [0, 1].')
    for option, used in (('--balance-power', options.balance_power), ('--label-votes', options.label_votes),
                         ('--logit-adjustment', options.logit_adjustment)):
        if used and 'create_dataset' not in script:
            raise UserError(f"{option} needs a train script that makes its data with create_dataset: take timm's.")
        if used:
            refuse(option, {
                **whole_images,
                '--use-multi-epochs-loader (it reads ahead of the draw)': value('use_multi_epochs_loader')})
    if options.photo_look:
        refuse('--photo-look', whole_images)
    check_distillation(options, script)
    check_splits(options)


def check_distillation(options: argparse.Namespace, script: dict[str, Any]) -> None:
    """Refuse teachers that this script, or the other options, cannot take."""
    kind = getattr(options, 'kd_distill_type', 'logit')
    names = getattr(options, 'kd_model_name', None) or ''
    if not names or (kind == 'logit' and 'LogitDistillationTask' in script):
        return
    for option, used in (('--cosine-harmony', options.cosine_harmony), ('--logit-adjustment', options.logit_adjustment),
                         ('several teachers', ',' in names)):
        if used:
            raise UserError(f'{option} and --kd-model-name go together with --kd-distill-type logit alone, and with a '
                            'train script that has LogitDistillationTask: change one of the two.')


def check_splits(options: argparse.Namespace) -> None:
    """Refuse a validation split that is not there: timm would take the whole folder, training images included."""
    split, data_dir = getattr(options, 'val_split', None), getattr(options, 'data_dir', None)
    if not split or not data_dir or getattr(options, 'dataset', None) or not Path(data_dir).is_dir():
        return
    folders = sorted(path.name for path in Path(data_dir).iterdir() if path.is_dir())
    synonyms = {'val', 'valid', 'validation', 'eval', 'evaluation'}  # timm takes one for the other
    if split in folders or (split in synonyms and synonyms.intersection(folders)):
        return
    if getattr(options, 'train_split', 'train') in folders:
        raise UserError(
            f"{data_dir} has no split '{split}', only {', '.join(folders)}: name one with --val-split, or '' for none.")


def resolve_epoch_seeds(options: argparse.Namespace, possible: bool) -> None:
    """Turn the seeds of epochs off, with a warning, where data are read in a way that does not go by epochs."""
    if options.no_epoch_seeds:
        return
    dataset = getattr(options, 'dataset', '') or ''
    obstacles = {
        'this train script has no create_dataset or train_one_epoch of the usual form': not possible,
        '--use-multi-epochs-loader reads ahead into the next epoch': getattr(options, 'use_multi_epochs_loader', None),
        'the NaFlex loader has an order of its own': getattr(options, 'naflex_loader', None),
        f'{dataset} is a stream': dataset.lower().partition('/')[0] in ('hfids', 'tfds', 'wds'),
    }
    for reason, applies in obstacles.items():
        if applies:
            options.no_epoch_seeds = True
            warn(f'{reason}: a run that is resumed will not repeat what it would have done uninterrupted.')
            return


def rank() -> int:
    """Number of this process in a distributed run, 0 without one."""
    return world_info_from_env()[1]


def warn(text: str) -> None:
    """Log a warning, once in a distributed run."""
    if rank() == 0:
        _logger.warning(text)
