"""Turn checkpoints of the authors' released code into timm folders: config.json with label names, model.safetensors.

Nothing in a checkpoint is run, see `pickles`, and nothing of a network is left random.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import clean_state_dict

from ..data.readers import FERPLUS_COLUMNS, RAFDB_LABELS
from ..errors import UserError
from ..labels import EXPRESSIONS_7, EXPRESSIONS_8, canonical_name
from ..models.networks import default_cfgs
from ..models.released_keys import rename_keys
from ..util.files import file_sha256
from .pack import check_new, write_folder
from .pickles import StandIn, load, shown

LABEL_SETS: dict[str, tuple[str, ...]] = {
    'rafdb': tuple(RAFDB_LABELS.values()),
    'affectnet7': EXPRESSIONS_7,
    'affectnet8': EXPRESSIONS_8,
    'ferplus': FERPLUS_COLUMNS[:8],
}
"""Orders in which data sets number the expressions. LFNSB's authors keep each data set's own; DDAMFN's test scripts
name the outputs in AffectNet's order for every data set, RAF-DB and FER+ included."""

WRAPPERS = ('model_state_dict', 'state_dict', 'model', 'net', 'network', 'module')
"""Entries of a checkpoint that may hold the network, the first one that does wins."""

MAX_ENTRIES, MAX_KEY = 20_000, 1000  # modules and tensors, and characters of a key; a DDAMFN has 3,000 and 50


class Converted(NamedTuple):
    """What was written."""

    model: str
    label_names: tuple[str, ...]  # in the order of the outputs; empty where the network ends at the embedding
    kind: str  # what the file was: 'state dict' or 'whole module'
    unused: tuple[str, ...]  # keys of the authors' modules that their own forward never uses, left out
    dropped: tuple[str, ...]  # keys left out because the caller said so
    foreign: tuple[str, ...]  # names in the file's pickle of classes and functions that were neither built nor called
    warning: str  # a sentence about the labels, where they are likely wrong


def convert(
        source: Path, model: str, out_dir: Path, labels: str | Sequence[str] | None = None, drop: Sequence[str] = (),
) -> Converted:
    """Write a timm folder that `timm.create_model('local-dir:OUT_DIR', pretrained=True)` loads.

    A checkpoint without a classifier becomes a network that ends at its embedding (num_classes=0).

    Args:
        source: A file of torch.save or safetensors, with the authors' keys or this package's: a state dict, plain or
            wrapped, or a whole module.
        model: The network it is of: 'lfnsb', 'lfn_small', 'mfn', 'ddamfn' or 'mobilefacenet'.
        out_dir: Folder to write; must not hold anything yet.
        labels: Names of the outputs in their order, or one of `LABEL_SETS`; a checkpoint with a classifier needs them.
        drop: What to leave out, by the start of its keys: 'fc' leaves out fc.weight and fc.bias.

    Raises:
        UserError: When the file, the model and the labels do not fit; nothing is written then.
    """
    if model not in default_cfgs:
        raise UserError(f"there is no model {model} to convert to: choose one of {', '.join(default_cfgs)}.")
    check_new(out_dir)
    value, foreign = load(source)
    try:
        tensors, kind = find_tensors(value)
        tensors, dropped = leave_out(tensors, drop)
        check_tensors(tensors)
        weight = tensors.get('fc.weight')
        num_classes = len(weight) if weight is not None and weight.ndim == 2 and weight.numel() else 0
        taken, unused, problems = compare(tensors, model, num_classes)
        if problems:
            for other in default_cfgs:
                if not compare(tensors, other, num_classes)[2]:
                    raise UserError(f'is of the network {other}, not {model}: give --model {other}.')
            raise UserError(f"does not fit the network {model}: {'; '.join(problems)}.")
        label_names = resolve_labels(labels, num_classes)
        # Without numbers, so that none can be left at its random start.
        network: Any = timm.create_model(model, pretrained=False, num_classes=num_classes, device='meta')
        network.load_state_dict(read_tensors(tensors, taken, network), strict=True, assign=True)
    except UserError as error:
        raise UserError(f'{source} {error}') from None

    network.pretrained_cfg['num_classes'] = num_classes
    write_folder(network, out_dir, label_names, {}, converted_from=dict(file=source.name, sha256=file_sha256(source)))

    warning = ''
    if model == 'ddamfn' and labels in ('rafdb', 'ferplus'):
        warning = ("the test scripts of DDAMFN's authors name the outputs in AffectNet's order for RAF-DB and FER+ as "
                   f'well: if this checkpoint is theirs, the labels are --labels affectnet{num_classes}.')
    return Converted(model, label_names, kind, tuple(unused), tuple(dropped), foreign, warning)


# The network inside a file; the messages go on from the file's name

def find_tensors(value: Any) -> tuple[dict[str, Any], str]:
    """The state dict in what a file holds, unwrapped, and whether it was a 'state dict' or a 'whole module'."""
    if isinstance(value, dict) and {'state_dict', 'arch', 'args'} <= value.keys():
        raise UserError('was written by train.py: use timm-lfnsb pack, which keeps its labels and settings.')
    for _ in range(4):  # wrappers in wrappers
        if isinstance(value, dict):
            inner = [value.get(name) for name in WRAPPERS]
            value = next((each for each in inner if isinstance(each, dict) or is_module(each)), value)
    if is_module(value):
        return clean_state_dict(flatten_module(value)), 'whole module'
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        raise UserError(f'holds no weights: it is {described(value)}.')
    if not any(isinstance(tensor, torch.Tensor) for tensor in value.values()):
        raise UserError(f'holds no weights, only {listing(value)}.')
    return clean_state_dict(value), 'state dict'


def is_module(value: Any) -> bool:
    return isinstance(value, StandIn) and '_modules' in value.state


def described(value: Any) -> str:
    return str(value) if isinstance(value, StandIn) else f'of the type {type(value).__name__}'


def flatten_module(module: StandIn) -> dict[str, Any]:
    """What `state_dict()` would give of a pickled module, from the tables that torch keeps in every module."""
    out: dict[str, Any] = {}
    pending = [('', module)]
    visited = 0
    while pending:
        prefix, module = pending.pop()
        visited += 1
        # A module may be in several places, so a few can pose as endlessly many.
        if visited + len(out) + len(pending) > MAX_ENTRIES or len(prefix) > MAX_KEY:
            raise UserError('has modules nested or repeated beyond all reason.')
        state = module.state if isinstance(module, StandIn) else {}
        tables: list[Any] = [state.get(name) for name in ('_parameters', '_buffers', '_modules')]
        if not all(isinstance(table, dict) and all(isinstance(key, str) for key in table) for table in tables):
            raise UserError(f"has something else where a module should be ({shown(prefix) or 'at the top'}).")
        parameters, buffers, modules = tables
        hidden = state.get('_non_persistent_buffers_set')
        out |= {prefix + name: tensor for name, tensor in {**parameters, **buffers}.items()
                if tensor is not None and not (isinstance(hidden, set) and name in hidden)}
        pending += [(f'{prefix}{name}.', child) for name, child in modules.items() if child is not None]
    return out


def leave_out(tensors: dict[str, Any], drop: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split the keys that start with one of the names in `drop` from the others."""
    dropped: list[str] = []
    for name in drop:
        keys = [key for key in tensors if f'{key}.'.startswith(name.rstrip('.') + '.')]
        if not keys:
            raise UserError(f'has nothing that --drop {name} could leave out: its keys start with '
                            f"{listing(sorted({key.split('.')[0] for key in tensors}))}.")
        dropped += keys
        tensors = {key: value for key, value in tensors.items() if key not in keys}
    return tensors, dropped


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse entries that are no tensors, or none with all their numbers in the file."""
    for key, value in tensors.items():
        if (not isinstance(value, torch.Tensor) or value.is_meta or value.is_quantized or value.layout != torch.strided
                or value.numel() * value.itemsize > value.untyped_storage().nbytes()):
            raise UserError(
                f'has no sound tensor in {shown(key)}, it is {described(value)}: --drop {shown(key)} leaves it out.')


# Fitting it to a network of this package

def compare(tensors: Mapping[str, Any], model: str, num_classes: int) -> tuple[dict[str, str], list[str], list[str]]:
    """Our key -> the checkpoint's; its keys that the authors' own forward never uses; what does not fit, in words."""
    network = timm.create_model(model, pretrained=False, num_classes=num_classes, device='meta')
    wanted = network.state_dict()
    authors = any('.mixed_depthwise_conv.' in key for key in tensors)
    taken: dict[str, str] = {}
    unused, unexpected, twice, shapes = [], [], [], []
    for key, value in tensors.items():
        ours = next(iter(rename_keys({key: value}, network)), None) if authors else key
        if ours is None:
            unused.append(key)
        elif ours not in wanted:
            unexpected.append(key)
        elif ours in taken:
            twice.append(f'{taken[ours]} and {key}')
        else:
            taken[ours] = key
            if value.shape != wanted[ours].shape:
                shapes.append(f'{key} {tuple(value.shape)} instead of {tuple(wanted[ours].shape)}')
    # Checkpoints from before torch 0.4.1 lack the counters, which serve nothing here.
    missing = [key for key in wanted if key not in taken and not key.endswith('.num_batches_tracked')]
    problems = {
        "missing keys, in this package's names": missing, 'keys that mean the same': twice, 'other shapes': shapes,
        'unexpected keys (--drop NAME leaves out what starts with it)': unexpected}
    return taken, unused, [f'{what}: {listing(keys)}' for what, keys in problems.items() if keys]


def read_tensors(tensors: Mapping[str, Any], taken: Mapping[str, str], network: Any) -> dict[str, torch.Tensor]:
    """The tensors under this package's keys, in the types of the network (float32)."""
    out = {}
    for ours, like in network.state_dict().items():
        if ours not in taken:  # a counter, see compare()
            out[ours] = torch.zeros((), dtype=like.dtype)
            continue
        value = tensors[taken[ours]].detach()
        if like.is_floating_point() and not value.is_floating_point():
            raise UserError(f'has {value.dtype} in {taken[ours]}, which should be floating point.')
        # A copy, as views of one block of numbers could not be saved.
        out[ours] = value.to(like.dtype, memory_format=torch.contiguous_format, copy=True)
        if not out[ours].isfinite().all():
            raise UserError(f'has numbers in {taken[ours]} that are not finite.')
    return out


def resolve_labels(labels: str | Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Label names for the classifier of a checkpoint, which are needed where it has one."""
    if not labels:
        if not num_classes:
            return ()
        sets = [f"{name} ({', '.join(names)})" for name, names in LABEL_SETS.items() if len(names) == num_classes]
        raise UserError(
            f'has a classifier of {num_classes} classes and nothing in it says which: give --labels with '
            f"{', '.join([*sets, 'all names in the order of its outputs'])}; or leave it out with --drop fc.")
    if not num_classes:
        raise UserError('has no classifier, so there is nothing for --labels to name: leave it out.')
    if isinstance(labels, str):
        labels = LABEL_SETS.get(labels) or labels.split(',')
    names = tuple(name.strip() for name in labels)
    if len(names) != num_classes:
        raise UserError(f"has {num_classes} classes, but --labels gives {len(names)} names [{', '.join(names)}]: give "
                        f"all of them in the order of its outputs, or one of {', '.join(LABEL_SETS)}.")
    if not all(names) or len({canonical_name(name) for name in names}) != len(names):
        raise UserError(f"cannot have the --labels [{', '.join(names)}]: one is empty, or two mean the same.")
    return names


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names with commas between them; of many the first ones and their number."""
    names = [shown(name) for name in names]
    return ', '.join(names) if len(names) <= limit else f"{', '.join(names[:limit])} and {len(names) - limit} more"
