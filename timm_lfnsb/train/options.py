"""What `timm-lfnsb run` adds to the options of timm's train script, and the checks of what goes together."""
from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

from timm.models import get_pretrained_cfg, is_model_pretrained
from timm.utils import world_info_from_env

from ..errors import UserError, did_you_mean
from ..losses import LOSSES
from ..losses.cosine_harmony import VARIANTS
from ..models.names import check_model_name
from ..recipes import class_map_path, recipe_names, recipe_path
from .feature_losses import add_loss_option, feature_losses

_logger = logging.getLogger(__name__)

# Settings that exclude others: splits and patches of images have no one look or label, one loader reads ahead of the
# draw, and --bce-loss has no softmax to adjust.
_IMAGES = ('naflex_loader', 'aug_splits', 'jsd_loss')
_DRAWN = (*_IMAGES, 'use_multi_epochs_loader')
CONFLICTS: dict[str, tuple[str, ...]] = {
    'cosine_harmony': ('torchscript', *_IMAGES), 'feature_loss': ('torchscript', *_IMAGES),
    'logit_adjustment': ('torchscript', 'bce_loss', *_DRAWN),
    'balance_power': _DRAWN, 'label_votes': _DRAWN, 'photo_look': _IMAGES,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our options to a train script's parser; what is there is found by YAML keys and in args.yaml, too."""
    group = parser.add_argument_group('Losses on features (timm_lfnsb)')
    group.add_argument('--cosine-harmony', type=float, default=0., metavar='WEIGHT',
                       help='weight of the Cosine-Harmony loss (default: 0). Works with --kd-model-name, which takes '
                            'several teachers here, separated by commas, and averages their probabilities')
    group.add_argument('--cosine-harmony-alpha', type=float, default=0.1, metavar='ALPHA',
                       help='balance of its two terms, in [0, 1] (default: 0.1)')
    group.add_argument('--cosine-harmony-variant', default='reference', choices=VARIANTS,
                       help='its formula (default: reference)')
    group.add_argument('--cosine-harmony-fixed-centers', action='store_true', default=False,
                       help='keep the random class centers instead of learning them')
    add_loss_option(group)
    group = parser.add_argument_group('Labels and rare classes (timm_lfnsb)')
    group.add_argument('--label-votes', default='', metavar='FILE',
                       help="CSV file of crowd votes (a column 'file', and one for each label), in the data folder or "
                            "elsewhere: each epoch draws each image's label anew from its votes, if it has any")
    group.add_argument('--balance-power', type=float, default=0., metavar='POWER',
                       help='draw the images of an epoch with replacement, a class of n images in proportion to '
                            'n ** (1 - POWER): 1 = all classes equally often (default: 0)')
    group.add_argument('--logit-adjustment', type=float, default=0., metavar='TAU',
                       help='add TAU x log(share of the class) to the logits of the training loss, so that rare '
                            'classes are answered more often: 1 = as if all were as frequent (default: 0)')
    group = parser.add_argument_group('Augmentation (timm_lfnsb)')
    group.add_argument('--photo-look', type=float, nargs='?', const=0.3, default=0., metavar='P',
                       help="low resolution, blur, JPEG, gamma, tilt and shift before timm's own augmentation, each "
                            'with probability P (default: 0; 0.3 where P is left out)')
    group = parser.add_argument_group('Safe training (timm_lfnsb)')
    group.add_argument('--skip-folders', nargs='+', default=[], metavar='NAME',
                       help='folders left out on purpose; any other that the class map does not name is refused')
    group.add_argument('--no-epoch-seeds', action='store_true', default=False,
                       help='draw order, augmentation and so on from one seed at the start, as timm does, and not for '
                            'each epoch from --seed and its number, by which a resumed run equals an uninterrupted one')


def resolve_recipe(args: Sequence[str]) -> list[str]:
    """Replace the name of a recipe behind --config or -c by the path of its file; refuse what is neither."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-c', '--config', default='')
    options, others = parser.parse_known_args(args)
    name = options.config
    if not name or Path(name).is_file():
        return list(args)
    if name not in recipe_names():
        raise UserError(
            f'--config {name}{did_you_mean(name, recipe_names())} is neither a file nor a recipe of this zoo '
            f'({", ".join(recipe_names())}).')
    return ['--config', str(recipe_path(name)), *others]


def resolve_paths(options: argparse.Namespace) -> None:
    """Give the run absolute paths of class map, data and votes, which its checkpoints keep and `pack` reads."""
    # train.py moves the old positional argument into data_dir later.
    data_dir = options.data_dir or getattr(options, 'data', None)
    if options.class_map:
        maps = (Path(options.class_map), class_map_path(options.class_map), Path(data_dir or '', options.class_map))
        options.class_map = next((str(path.resolve()) for path in maps if path and path.is_file()), options.class_map)
    if data_dir and Path(data_dir).is_dir():
        options.data_dir = str(Path(data_dir).resolve())
    if options.label_votes:
        places = [Path(options.label_votes), Path(data_dir or '', options.label_votes)]
        found = [str(path.resolve()) for path in places if path.is_file()]
        if not found:
            raise UserError(f'--label-votes {options.label_votes} is not a file, nor is it in the data folder '
                            f'{data_dir}: `timm-lfnsb prepare ferplus` writes votes.csv.')
        options.label_votes = found[0]


def distils(options: argparse.Namespace) -> bool:
    """Whether teachers are ours to load: not so a single one without label names whose answers count."""
    names = options.kd_model_name or ''
    ours = options.cosine_harmony or options.feature_loss or options.logit_adjustment or by_features(options)
    if not names or ours or ':' in names or ',' in names:
        return bool(names)
    cfg = get_pretrained_cfg(names) if is_model_pretrained(names) else None
    return cfg is None or bool(cfg.label_names)


def by_features(options: argparse.Namespace) -> bool:
    """Whether the features of a teacher count, not its answers."""
    return getattr(options, 'kd_distill_type', None) == 'feature'


def check_options(options: argparse.Namespace) -> None:
    """Refuse values out of range, what cannot work together, and what timm ignores without a word.

    Turn the seeds of epochs off, with a warning, where data are read in a way that does not go by epochs.
    """
    value = vars(options).get  # no release of timm has all options
    for name, high in (('cosine_harmony', math.inf), ('logit_adjustment', math.inf), ('balance_power', 1),
                       ('photo_look', 1)):
        if not 0 <= getattr(options, name) <= high:
            raise UserError(f'{flag(name)} must lie in [0, {high}], not {value(name)}.')
    for name, others in CONFLICTS.items():
        for other in others:
            if value(name) and value(other):
                raise UserError(f'{flag(name)} cannot be combined with {flag(other)}: leave one of the two out.')
    losses = feature_losses(options)
    teachers = value('kd_model_name') or ''
    for name in (value('model'), *teachers.split(',')):
        if name:
            check_model_name(name.strip())
    ours = ',' in teachers or losses or value('logit_adjustment')
    if teachers and ours and value('kd_distill_type', 'logit') != 'logit':
        raise UserError('--kd-model-name with several teachers, --cosine-harmony, --feature-loss or --logit-adjustment '
                        'needs --kd-distill-type logit.')
    if value('mixup') or value('cutmix') or value('cutmix_minmax'):
        for name in losses:
            if not LOSSES[name].loss.takes_soft_targets:
                raise UserError(f'--feature-loss {name} takes no mixed labels: leave --mixup and --cutmix out.')
    if value('pretrained_path') and not value('pretrained'):
        raise UserError('--pretrained-path has no effect without --pretrained, and training would begin at random: add '
                        '--pretrained.')
    streams = (value('dataset') or '').lower().partition('/')[0] in ('hfids', 'tfds', 'wds')
    if (streams or value('use_multi_epochs_loader') or value('naflex_loader')) and not options.no_epoch_seeds:
        options.no_epoch_seeds = True
        warn('Streamed data, --naflex-loader and --use-multi-epochs-loader do not go by epochs: a run that is resumed '
             'will not repeat what it would have done uninterrupted.')


def flag(name: str) -> str:
    """The option of a setting."""
    return f"--{name.replace('_', '-')}"


def rank() -> int:
    """Number of this process in a distributed run, 0 without one."""
    return world_info_from_env()[1]


def warn(text: str) -> None:
    """Log a warning, once in a distributed run."""
    if rank() == 0:
        _logger.warning(text)
