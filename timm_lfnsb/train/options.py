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
                       help='weight of the Cosine-Harmony loss, 0 = off (default: 0). Works with --kd-model-name, '
                            'which takes several teachers here, separated by commas, and averages their probabilities')
    group.add_argument('--cosine-harmony-alpha', type=float, default=0.1, metavar='ALPHA',
                       help='balance of its two terms, in [0, 1] (default: 0.1)')
    group.add_argument('--cosine-harmony-variant', default='reference', choices=VARIANTS,
                       help='its formula (default: reference)')
    group.add_argument('--cosine-harmony-fixed-centers', action='store_true', default=False,
                       help='keep the random class centers instead of learning them')
    group = parser.add_argument_group('Labels and rare classes (timm_lfnsb)')
    group.add_argument('--label-votes', default='', metavar='FILE',
                       help="CSV file of crowd votes (a column 'file', and one for each label), in the data folder or "
                            "elsewhere: each epoch draws each image's label anew from its votes, if it has any")
    group.add_argument('--balance-power', type=float, default=0., metavar='POWER',
                       help='draw the images of an epoch with replacement, and a class of n images in proportion to '
                            'n ** (1 - POWER): 1 = all classes equally often, 0 = off (default: 0)')
    group.add_argument('--logit-adjustment', type=float, default=0., metavar='TAU',
                       help='add TAU x log(share of the class) to the logits of the training loss, so that rare '
                            'classes are answered more often: 1 = as if all were as frequent, 0 = off (default: 0)')
    group = parser.add_argument_group('Augmentation (timm_lfnsb)')
    group.add_argument('--photo-look', type=float, nargs='?', const=0.3, default=0., metavar='P',
                       help="give training images the look of people's photographs before timm's own augmentation: low "
                            'resolution, blur, JPEG, gamma, tilt and shift, each with probability P (default: 0; 0.3 '
                            'where P is left out)')
    group = parser.add_argument_group('Safe training (timm_lfnsb)')
    group.add_argument('--skip-folders', nargs='+', default=[], metavar='NAME',
                       help='folders of images whose class is left out on purpose; any other folder that the class map '
                            'does not name is refused')
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
            f'--config {name} is neither a file nor a recipe of this zoo ({", ".join(recipe_names())}).')
    return ['--config', str(recipe_path(name)), *others]


def resolve_paths(options: argparse.Namespace) -> None:
    """Give the run absolute paths of class map, data and votes, which its checkpoints keep and `pack` reads."""
    class_map = getattr(options, 'class_map', None)
    if class_map:
        path = Path(class_map) if Path(class_map).is_file() else class_map_path(class_map)
        options.class_map = str(path.resolve()) if path else class_map
    # train.py moves the old positional argument into data_dir later.
    data_dir = getattr(options, 'data_dir', None) or getattr(options, 'data', None)
    if data_dir and Path(data_dir).is_dir():
        options.data_dir = str(Path(data_dir).resolve())
    if options.label_votes:
        places = [Path(options.label_votes), Path(data_dir or '', options.label_votes)]
        found = [str(path.resolve()) for path in places if path.is_file()]
        if not found:
            raise UserError(
                f'--label-votes {options.label_votes} is not a file, nor is it in the data folder {data_dir}: '
                '`timm-lfnsb prepare ferplus` writes votes.csv; leave the option out to train with the folders alone.')
        options.label_votes = found[0]


def distils(options: argparse.Namespace) -> bool:
    """Whether teachers are ours to load: not so a single one without label names, beside nothing of ours."""
    names = getattr(options, 'kd_model_name', None) or ''
    if not names or options.cosine_harmony or options.logit_adjustment or ':' in names or ',' in names:
        return bool(names)
    try:
        cfg = get_pretrained_cfg(names)
    except RuntimeError:  # a tag that is not there; loading it says so
        cfg = None
    return cfg is None or bool(cfg.label_names)


def check_options(options: argparse.Namespace, script: dict[str, Any]) -> None:
    """Refuse what cannot work in a script with these globals, or not together; some releases lack some options."""
    def value(name: str) -> Any:
        return getattr(options, name, None)

    for name, high in (('cosine_harmony', math.inf), ('cosine_harmony_alpha', 1), ('logit_adjustment', math.inf),
                       ('balance_power', 1), ('photo_look', 1)):
        if not (0 <= value(name) <= high and math.isfinite(value(name))):
            limits = 'lie in [0, 1]' if high == 1 else 'be a number that is not negative'
            raise UserError(f"--{name.replace('_', '-')} must {limits}.")
    if options.cosine_harmony_variant not in VARIANTS:  # argparse does not check what comes from YAML
        raise UserError(f"--cosine-harmony-variant must be one of {', '.join(VARIANTS)}.")

    if value('pretrained_path') and not value('pretrained'):
        raise UserError('--pretrained-path has no effect without --pretrained, and training would begin at random: add '
                        '--pretrained.')

    whole_images = {
        'the NaFlex loader (--naflex-loader)': value('naflex_loader'),
        'augmentation splits (--aug-splits, --jsd-loss)': value('aug_splits') or value('jsd_loss'),
    }
    drawn = {**whole_images,
             '--use-multi-epochs-loader (it reads ahead of the draw)': value('use_multi_epochs_loader')}
    multi_label = value('multilabel') or value('multi_label') or value('task') not in (None, '', 'classification')
    one_label = {'multi-label training': multi_label, '--torchscript (use --torchcompile)': value('torchscript')}
    bce = {'--bce-loss (it has no softmax to adjust)': value('bce_loss')}
    for name, needs, conflicts in (
            ('cosine_harmony', {'ClassificationTask'}, {**one_label, **whole_images}),
            ('logit_adjustment', {'ClassificationTask', 'create_dataset'}, {**one_label, **bce, **drawn}),
            ('balance_power', {'create_dataset'}, drawn),
            ('label_votes', {'create_dataset'}, drawn),
            ('photo_look', set(), whole_images)):
        option = f"--{name.replace('_', '-')}"
        if value(name) and not needs <= script.keys():
            raise UserError(f"this train script is too old for {option} (it lacks {', '.join(needs - script.keys())}): "
                            'take the train.py of timm 1.0.27 or newer.')
        for other, used in conflicts.items():
            if value(name) and used:
                raise UserError(f'{option} cannot be combined with {other}: leave one of the two out.')

    teachers = value('kd_model_name') or ''
    timms_task = getattr(options, 'kd_distill_type', 'logit') == 'logit' and 'LogitDistillationTask' in script
    if teachers and not timms_task and (',' in teachers or options.cosine_harmony or options.logit_adjustment):
        raise UserError('--kd-model-name with several teachers, --cosine-harmony or --logit-adjustment needs '
                        '--kd-distill-type logit, and a train script that has LogitDistillationTask: change one.')


def resolve_epoch_seeds(options: argparse.Namespace, possible: bool) -> None:
    """Turn the seeds of epochs off, with a warning, where data are read in a way that does not go by epochs."""
    dataset = getattr(options, 'dataset', '') or ''
    obstacles = {
        'this train script has no create_dataset or train_one_epoch of the usual form': not possible,
        '--use-multi-epochs-loader reads ahead into the next epoch': getattr(options, 'use_multi_epochs_loader', None),
        'the NaFlex loader has an order of its own': getattr(options, 'naflex_loader', None),
        f'{dataset} is a stream': dataset.lower().partition('/')[0] in ('hfids', 'tfds', 'wds'),
    }
    for reason, applies in obstacles.items():
        if applies and not options.no_epoch_seeds:
            options.no_epoch_seeds = True
            warn(f'{reason}: a run that is resumed will not repeat what it would have done uninterrupted.')


def rank() -> int:
    """Number of this process in a distributed run, 0 without one."""
    return world_info_from_env()[1]


def warn(text: str) -> None:
    """Log a warning, once in a distributed run."""
    if rank() == 0:
        _logger.warning(text)
