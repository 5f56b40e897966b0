"""Run timm's own scripts with this zoo registered, and its train script with the Cosine-Harmony loss and more."""
from __future__ import annotations

import argparse
import importlib.util
import inspect
import logging
import math
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torchvision.transforms import Compose

from ..errors import LaunchError
from ..losses.cosine_harmony import VARIANTS
from ..recipes import class_map_path, recipe_names, recipe_path

_logger = logging.getLogger(__name__)


def find_script(script: str) -> Path:
    """Find a script by path, or by name in the folder that the environment variable TIMM_SCRIPTS names.

    Raises:
        LaunchError: When there is no such file.
    """
    path = Path(script)
    if path.is_file():
        return path
    folder = os.environ.get('TIMM_SCRIPTS')
    if folder and (Path(folder) / script).is_file():
        return Path(folder) / script
    where = f'neither here nor in TIMM_SCRIPTS ({folder})' if folder else 'not here, and TIMM_SCRIPTS is not set'
    raise LaunchError(
        f"{script} is {where}: timm's scripts are not part of its wheel, so clone "
        "https://github.com/huggingface/pytorch-image-models and set TIMM_SCRIPTS to that folder, or give the script's "
        'path.')


def run_script(script: str, args: Sequence[str]) -> None:
    """Run one of timm's scripts as if it were called with `args`.

    A script whose name contains 'train' gets the --cosine-harmony options and --balance-power, warns where the weights
    it starts from have other classes than the run, is kept from losing work (see `epoch_seeds`, `safeguards`), and on a
    CPU keeps freed memory (see `memory`); every other script runs as it is.

    Raises:
        LaunchError: When the script is missing, cannot do what the options ask, or has to stop: a loss that is not
            finite, a full disk.
    """
    path = find_script(script)
    sys.argv = [str(path), *args]
    # At the end, where a clone's own timm folder cannot hide the installed package.
    sys.path.append(str(path.resolve().parent))
    if 'train' not in path.stem:
        runpy.run_path(str(path), run_name='__main__')
        return
    sys.argv[1:] = resolve_recipe(args)
    module = load_module(path)
    if hasattr(module, 'parser'):
        extend_train_script(module)
    from .safeguards import DISK_ERRORS
    try:
        module.main()
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise LaunchError(
            f"{error.filename or 'a file of the run'} cannot be written ({error.strerror}): free some space and go on "
            'with --resume from the last checkpoint.') from None


def resolve_recipe(args: Sequence[str]) -> list[str]:
    """Replace the name of a recipe behind --config or -c by the path of its file."""
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
            raise LaunchError(
                f'--config {value} is neither a file nor a recipe of this zoo ({", ".join(recipe_names())}).')
    return args


def load_module(path: Path) -> ModuleType:
    # Its own name, not '__main__': importing must not start it.
    name = f'timm_script_{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, 'main'):
        raise LaunchError(f'{path} has no main(): it is not a train script of timm.')
    return module


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add our options to a train script's parser; what is there is found by YAML keys and in args.yaml, too."""
    group = parser.add_argument_group('Cosine-Harmony loss (timm_lfnsb)')
    group.add_argument('--cosine-harmony', type=float, default=0., metavar='WEIGHT',
                       help='weight of the Cosine-Harmony loss beside the classification loss, 0 = off (default: 0)')
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
    group.add_argument('--logit-adjustment', type=float, default=0., metavar='TAU',
                       help="add TAU x log(share of the class in training) to the logits of the training loss, so that "
                            'rare classes are answered more often: 1 = as if all were equally frequent, 0 = off. With '
                            'distillation the teacher is compared with the adjusted logits (default: 0)')
    group.add_argument('--balance-power', type=float, default=0., metavar='POWER',
                       help='draw the training images of an epoch with replacement, and a class of n images in '
                            'proportion to n ** (1 - POWER): 1 = all classes equally often, 0.5 = by the square root '
                            'of their size, 0 = off, each image once. Rare classes usually gain and with them balanced '
                            'accuracy; frequent ones, and plain accuracy on data as imbalanced as the training split, '
                            'may lose (default: 0)')
    group = parser.add_argument_group('Augmentation (timm_lfnsb)')
    group.add_argument('--photo-look', type=float, nargs='?', const=0.3, default=0., metavar='P',
                       help="give training images the look of people's photographs before timm's own augmentation: lower "
                            'resolution, blur, JPEG, gamma, a small tilt and shift, each with probability P (0.3 where '
                            'none is given; default: 0, off)')
    group = parser.add_argument_group('Safe training (timm_lfnsb)')
    group.add_argument('--skip-folders', nargs='+', default=[], metavar='NAME',
                       help='folders of images whose class is left out on purpose; any other folder that the class map '
                            'does not name is refused, where timm would drop its images without a word')
    group.add_argument('--no-epoch-seeds', action='store_true', default=False,
                       help="draw the order of the images, augmentations and so on as timm does, from one seed at the "
                            'start of the run. Without this option they are drawn anew for each epoch from --seed and '
                            'its number, so that a run that was killed and resumed equals one that was not')


def extend_train_script(module: Any) -> None:
    """Give a train script our options, and let it build our task and dataset where they ask for it.

    The script's contract: a module-level `parser`, which `main()` asks for the arguments, and `ClassificationTask`,
    `create_dataset`, `create_loader`, `train_one_epoch` and timm's `utils`, which `main()` looks up in the module's
    globals.
    """
    parser = module.parser
    add_options(parser)
    options = argparse.Namespace()
    parse_known_args = parser.parse_known_args
    plain_task: Any = getattr(module, 'ClassificationTask', None)
    plain_dataset: Any = getattr(module, 'create_dataset', None)
    plain_loader: Any = getattr(module, 'create_loader', None)
    plain_epoch: Any = getattr(module, 'train_one_epoch', None)
    epoch_signature = inspect.signature(plain_epoch) if plain_epoch is not None else None
    can_watch = epoch_signature is not None and {'epoch', 'loader', 'task'} <= set(epoch_signature.parameters)

    def parse_and_check(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        nonlocal options
        options, unknown = parse_known_args(*args, **kwargs)
        resolve_paths(options)
        check_options(options, has_task=plain_task is not None)
        check_balance(options, has_dataset=plain_dataset is not None)
        check_splits(options)
        from .data_check import check_class_folders, warn_of_other_labels
        check_class_folders(options)
        if options.cosine_harmony:
            module.ClassificationTask = configured_task(options)
        warn_of_other_labels(options)
        resolve_epoch_seeds(options, possible=can_watch and plain_dataset is not None)
        if not can_watch:
            warn('this train script has no train_one_epoch of the usual form: a loss that is not finite goes unnoticed '
                 'until the epoch ends.')
        from .safeguards import check_output
        check_output(options)
        if str(getattr(options, 'device', '')).startswith('cpu'):
            from ..models.memory import keep_freed_memory
            keep_freed_memory()
        return options, unknown

    parser.parse_known_args = parse_and_check  # parse_args asks it, too

    def create_dataset(*args: Any, **kwargs: Any) -> Any:
        dataset = plain_dataset(*args, **kwargs)
        if not kwargs.get('is_training'):
            return dataset
        if options.label_votes:
            dataset = voted_dataset(dataset, options)
        if options.balance_power:
            from .balance import BalancedDataset
            try:
                dataset = BalancedDataset(dataset, options.balance_power, seed=getattr(options, 'seed', 0))
            except ValueError as error:
                raise LaunchError(f'--balance-power: {error}') from None
        if not options.no_epoch_seeds:
            from .seeds import SeededDataset
            dataset = SeededDataset(dataset, getattr(options, 'seed', 0), rank())
        return dataset

    def create_loader(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get('is_training') and getattr(options, 'mixup_off_epoch', 0):
            # Workers that live on have a copy of timm's mixup, and would never hear that it is off.
            kwargs['persistent_workers'] = False
        loader = plain_loader(*args, **kwargs)
        if kwargs.get('is_training') and options.photo_look:
            from .photo_look import PhotoLook
            prepend_transform(loader.dataset, PhotoLook(options.photo_look))
        return loader

    def train_one_epoch(*args: Any, **kwargs: Any) -> Any:
        assert epoch_signature is not None
        given = epoch_signature.bind(*args, **kwargs).arguments
        epoch, loader = given['epoch'], given['loader']
        if not options.no_epoch_seeds:
            from .seeds import seed_epoch
            seed_epoch(loader, getattr(options, 'seed', 0), epoch, rank())
        from .safeguards import watch_loss
        with watch_loss(given['task'], loader, epoch, options):
            return plain_epoch(*args, **kwargs)

    if plain_dataset is not None:
        module.create_dataset = create_dataset
    if plain_loader is not None:
        module.create_loader = create_loader
    if can_watch:
        module.train_one_epoch = train_one_epoch
    from .safeguards import SafeSaver, summarize
    ours = {'CheckpointSaver': SafeSaver, 'update_summary': summarize}
    if hasattr(getattr(module, 'utils', None), 'CheckpointSaver'):
        module.utils = SimpleNamespace(**{**vars(module.utils), **ours})  # timm's own stays as it is
    for name in ours.keys() & vars(module).keys():
        setattr(module, name, ours[name])


def voted_dataset(dataset: Any, options: argparse.Namespace) -> Any:
    """The training set with labels drawn from the votes of --label-votes.

    Raises:
        LaunchError: When the file does not fit the dataset.
    """
    from .checkpoints import PackError, run_label_names
    from .votes import VotedDataset
    try:
        names = run_label_names(options)
        if names is None:
            raise ValueError('votes need a folder of images as --data-dir, not --dataset.')
        return VotedDataset(dataset, Path(options.label_votes), names, getattr(options, 'seed', 0))
    except (PackError, ValueError) as error:
        raise LaunchError(f'--label-votes {options.label_votes}: {error}') from None


def prepend_transform(dataset: Any, first: Any) -> None:
    """Put a transform of PIL images before those that timm's loader gave a dataset."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    # With --train-img-sizes timm's own come later, outside of the dataset.
    dataset.transform = first if dataset.transform is None else Compose([first, dataset.transform])


def rank() -> int:
    """Number of this process in a distributed run, 0 without one."""
    from timm.utils import world_info_from_env
    return world_info_from_env()[1]


def warn(text: str) -> None:
    """Log a warning, once in a distributed run."""
    if rank() == 0:
        _logger.warning(text)


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


def configured_task(options: argparse.Namespace) -> type:
    """Our task with the settings of the options, to take the place of the script's ClassificationTask.

    From here on no other task of timm can be made: a script that goes past its own global would train without the loss
    and not say so.
    """
    from timm.task import TrainingTask

    from .task import CosineHarmonyTask

    class ConfiguredTask(CosineHarmonyTask):
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.update(
                weight=options.cosine_harmony,
                alpha=options.cosine_harmony_alpha,
                variant=options.cosine_harmony_variant,
                learn_centers=not options.cosine_harmony_fixed_centers,
            )
            try:
                super().__init__(*args, **kwargs)
            except ValueError as error:
                raise LaunchError(f'--cosine-harmony: {error}') from None

    ConfiguredTask.__name__ = CosineHarmonyTask.__name__
    plain_init: Any = TrainingTask.__init__

    def guarded_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, CosineHarmonyTask):
            raise LaunchError(
                f'--cosine-harmony is on, but this script builds a {type(self).__name__}: leave the option out, or '
                "take timm's own train.py.")
        plain_init(self, *args, **kwargs)

    TrainingTask.__init__ = guarded_init  # type: ignore[method-assign]
    return ConfiguredTask


def resolve_paths(options: argparse.Namespace) -> None:
    """Give the run absolute paths to class map and data, which its checkpoints keep and `pack` reads names from."""
    class_map = getattr(options, 'class_map', None)
    if class_map and not Path(class_map).is_file():
        options.class_map = class_map = str(class_map_path(class_map) or class_map)
    if class_map and Path(class_map).is_file():
        options.class_map = str(Path(class_map).resolve())
    data_dir = getattr(options, 'data_dir', None)
    if data_dir and Path(data_dir).is_dir():
        options.data_dir = str(Path(data_dir).resolve())
    votes = getattr(options, 'label_votes', None)
    if votes:
        found = next((path for path in (Path(votes), Path(data_dir or '', votes)) if path.is_file()), None)
        if found is None:
            raise LaunchError(f'--label-votes {votes} is not a file, nor is it in the data folder {data_dir}.')
        options.label_votes = str(found.resolve())


def check_splits(options: argparse.Namespace) -> None:
    """Refuse a validation split that is not there: timm would take the whole folder, training images included.

    Raises:
        LaunchError: With the splits there are.
    """
    split, data_dir = getattr(options, 'val_split', None), getattr(options, 'data_dir', None)
    if not split or not data_dir or getattr(options, 'dataset', None) or not Path(data_dir).is_dir():
        return
    folders = sorted(path.name for path in Path(data_dir).iterdir() if path.is_dir())
    synonyms = {'val', 'valid', 'validation', 'eval', 'evaluation'}  # timm takes one for the other
    if split in folders or (split in synonyms and synonyms.intersection(folders)):
        return
    if getattr(options, 'train_split', 'train') in folders:
        raise LaunchError(
            f"{data_dir} has no split '{split}', only {', '.join(folders)}: name one with --val-split, or '' for none.")


def check_options(options: argparse.Namespace, has_task: bool) -> None:
    """Refuse what cannot work together with the loss; scripts of other releases lack some of the options.

    Raises:
        LaunchError: With the option to change.
    """
    if not options.cosine_harmony:
        return
    if not has_task:
        raise LaunchError(
            'this train script is too old for --cosine-harmony (it has no ClassificationTask): take the train.py of '
            'timm 1.0.27 or newer.')

    def value(name: str) -> Any:
        return getattr(options, name, None)

    conflicts = {
        'knowledge distillation (--kd-model-name)': value('kd_model_name'),
        'multi-label training': value('multilabel') or value('multi_label') or (
            value('task') not in (None, '', 'classification') and value('task')),
        '--torchscript (use --torchcompile)': value('torchscript'),
        'the NaFlex loader (--naflex-loader)': value('naflex_loader'),
        'augmentation splits (--aug-splits, --jsd-loss)': value('aug_splits') or value('jsd_loss'),
    }
    for name, used in conflicts.items():
        if used:
            raise LaunchError(f'--cosine-harmony cannot be combined with {name}: leave one of the two out.')
    if not 0 < options.cosine_harmony < math.inf or not 0 <= options.cosine_harmony_alpha <= 1:
        raise LaunchError('--cosine-harmony must not be negative, and --cosine-harmony-alpha must lie in [0, 1].')
    if options.cosine_harmony_variant not in VARIANTS:  # argparse does not check what comes from YAML
        raise LaunchError(f"--cosine-harmony-variant must be one of {', '.join(VARIANTS)}.")


def check_balance(options: argparse.Namespace, has_dataset: bool) -> None:
    """Refuse what cannot work together with class balance.

    Raises:
        LaunchError: With the option to change.
    """
    if not options.balance_power:
        return
    if not 0 <= options.balance_power <= 1:
        raise LaunchError('--balance-power must lie in [0, 1].')
    if not has_dataset:
        raise LaunchError('--balance-power needs a train script that makes its data with create_dataset: take timm\'s.')
    conflicts = {
        'the NaFlex loader (--naflex-loader)': 'naflex_loader',
        'augmentation splits (--aug-splits)': 'aug_splits',
        '--use-multi-epochs-loader (it reads ahead of the draw)': 'use_multi_epochs_loader',
    }
    for name, option in conflicts.items():
        if getattr(options, option, None):
            raise LaunchError(f'--balance-power cannot be combined with {name}: leave one of the two out.')
