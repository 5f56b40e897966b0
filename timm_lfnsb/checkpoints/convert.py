"""Turn checkpoints of the authors' released code into timm folders: config.json with label names, model.safetensors.

Nothing in a checkpoint is run, see `pickles`, and nothing of a network is left random.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import timm
import torch
from timm.models import clean_state_dict

from ..data.readers import FERPLUS_COLUMNS, RAFDB_LABELS
from ..errors import UserError, did_you_mean
from ..labels import EXPRESSIONS_7, EXPRESSIONS_8
from ..models.checkpoint_keys import rename_keys
from ..models.networks import default_cfgs
from ..util.files import file_sha256
from .pack import check_new, write_folder
from .pickles import StandIn, load, shown

if TYPE_CHECKING:
    from ..evaluate.label_order import LabelOrder

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
    """What was written, and what the file held besides."""

    label_names: tuple[str, ...]  # in the order of the outputs; empty where the network ends at the embedding
    unused: int  # tensors of the authors' modules that their own forward never uses, left out
    foreign: str  # names in the file's pickle of classes and functions that were neither built nor called
    found: LabelOrder | None = None  # how the order of the outputs was found, where it was


def convert(
        source: Path, model: str, out_dir: Path, labels: str | Sequence[str] | None = None, drop: Sequence[str] = (),
        data_dir: Path | None = None,
) -> Converted:
    """Write a timm folder that `timm.create_model('local-dir:OUT_DIR', pretrained=True)` loads.

    A checkpoint without a classifier becomes a network that ends at its embedding (num_classes=0).

    Args:
        source: A file of torch.save or safetensors, with the authors' keys or this package's: a state dict, plain or
            wrapped, or a whole module.
        model: The network it is of: 'lfnsb', 'lfn_small', 'mfn', 'ddamfn' or 'mobilefacenet'.
        out_dir: Folder to write; must not hold anything yet.
        labels: Names of the outputs in their order, or one of `LABEL_SETS`, or 'auto' to find the order from the images
            in `data_dir` (`find_label_order`); a checkpoint with a classifier needs them.
        drop: What to leave out, by the start of its keys: 'fc' leaves out fc.weight and fc.bias.

    Raises:
        UserError: When the file, the model and the labels do not fit, or no order is found; nothing is written then.
    """
    if model not in default_cfgs:
        known = [*default_cfgs, 'dlib_face', 'hse_face']  # the last two by face_networks.py
        raise UserError(f'there is no model {model} to convert to{did_you_mean(model, known)}: choose one of '
                        f"{', '.join(known)}.")
    auto = labels == 'auto'
    if auto != (data_dir is not None):
        raise UserError('labels are found by --labels auto with --data-dir FOLDER: give both of them, or neither.')
    check_new(out_dir)
    value, foreign = load(source)
    try:
        tensors = leave_out(find_tensors(value), drop)
        check_tensors(tensors)
        weight = tensors.get('fc.weight')
        num_classes = len(weight) if weight is not None and weight.ndim == 2 and weight.numel() else 0
        network, found, problems = fit(tensors, model, num_classes)
        if problems:
            for other in default_cfgs:
                if not fit(tensors, other, num_classes)[2]:
                    raise UserError(f'is of the network {other}, not {model}: give --model {other}.')
            raise UserError(f"does not fit the network {model}: {'; '.join(problems)}.")
        if auto and not num_classes:
            raise UserError('has no classifier, so that no output needs a name: leave out --labels and --data-dir.')
        label_names = () if auto else resolve_labels(labels, num_classes)
        state = {}
        for key, like in network.state_dict().items():
            # Checkpoints from before torch 0.4.1 lack the counters, which serve nothing here.
            value = found.get(key, torch.zeros((), dtype=like.dtype)).detach()
            # A copy, as views of one block of numbers could not be saved.
            state[key] = value.to(like.dtype, memory_format=torch.contiguous_format, copy=True)
            if not state[key].isfinite().all():
                raise UserError(f'has numbers in {key} that are not finite.')
        network.load_state_dict(state, strict=True, assign=True)
    except UserError as error:
        raise UserError(f'{source} {error}') from None
    order = None
    if data_dir:
        from ..evaluate.label_order import find_label_order
        order = find_label_order(network, data_dir)
        label_names = order.label_names
    network.pretrained_cfg['num_classes'] = num_classes
    write_folder(network, out_dir, label_names, {}, converted_from=dict(file=source.name, sha256=file_sha256(source)))
    return Converted(label_names, len(tensors) - len(found), foreign, order)


# The network inside a file; the messages go on from the file's name

def find_tensors(value: Any) -> dict[str, Any]:
    """The state dict in what a file holds, unwrapped, or that of a whole module."""
    if isinstance(value, dict) and {'state_dict', 'arch', 'args'} <= value.keys():
        raise UserError('was written by train.py: use timm-lfnsb pack, which keeps its labels and settings.')
    for _ in range(4):  # wrappers in wrappers
        if isinstance(value, dict):
            inner = [value.get(name) for name in WRAPPERS]
            value = next((each for each in inner if isinstance(each, dict) or is_module(each)), value)
    if is_module(value):
        return clean_state_dict(flatten_module(value))
    if not isinstance(value, dict) or not value or not all(isinstance(key, str) for key in value):
        raise UserError(f'holds no weights: it is of the type {type(value).__name__}.')
    return clean_state_dict(value)


def is_module(value: Any) -> bool:
    return isinstance(value, StandIn) and '_modules' in value.state


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


def leave_out(tensors: dict[str, Any], drop: Sequence[str]) -> dict[str, Any]:
    """What is left without the keys that start with one of the names in `drop`."""
    for name in drop:
        kept = {key: value for key, value in tensors.items() if not f'{key}.'.startswith(name.rstrip('.') + '.')}
        if len(kept) == len(tensors):
            raise UserError(f'has nothing that --drop {name} could leave out: its keys start with '
                            f"{shown(', '.join(sorted({key.split('.')[0] for key in tensors})))}.")
        tensors = kept
    return tensors


def check_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse entries that are no tensors, or none with all their numbers in the file."""
    for key, value in tensors.items():
        if (not isinstance(value, torch.Tensor) or value.is_meta or value.is_quantized or value.layout != torch.strided
                or value.numel() * value.itemsize > value.untyped_storage().nbytes()):
            raise UserError(f'has no sound tensor in {shown(key)}, it is of the type {type(value).__name__}: --drop '
                            f'{shown(key)} leaves it out.')


def fit(tensors: dict[str, Any], model: str, num_classes: int) -> tuple[Any, dict[str, Any], list[str]]:
    """The network, without numbers, so that none can be left at its random start; the tensors that the authors' own
    forward uses, under this package's keys; what does not fit, in words."""
    network: Any = timm.create_model(model, pretrained=False, num_classes=num_classes, device='meta')
    wanted = network.state_dict()
    found = rename_keys(tensors, network)
    problems = {
        "missing keys, in this package's names": [
            key for key in wanted if key not in found and not key.endswith('.num_batches_tracked')],
        'other shapes': [
            f'{key} {tuple(value.shape)} instead of {tuple(wanted[key].shape)}' for key, value in found.items()
            if key in wanted and value.shape != wanted[key].shape],
        'unexpected keys (--drop NAME leaves out what starts with it)': [key for key in found if key not in wanted]}
    return network, found, [f"{what}: {shown(', '.join(keys), 600)}" for what, keys in problems.items() if keys]


def resolve_labels(labels: str | Sequence[str] | None, num_classes: int) -> tuple[str, ...]:
    """Label names for the classifier of a checkpoint, which are needed where it has one."""
    if num_classes and not labels:
        sets = [f"{name} ({', '.join(names)})" for name, names in LABEL_SETS.items() if len(names) == num_classes]
        raise UserError(
            f'has a classifier of {num_classes} classes and nothing in it says which: give --labels with '
            f"{', '.join([*sets, 'all names in the order of its outputs', 'auto'])}; or leave it out with --drop fc.")
    if isinstance(labels, str):
        if num_classes > 1 and ',' not in labels and labels not in LABEL_SETS:
            raise UserError(f"has a classifier of {num_classes} classes, and there is no label set {labels}"
                            f"{did_you_mean(labels, LABEL_SETS)}; there are {', '.join(LABEL_SETS)} and auto.")
        labels = LABEL_SETS.get(labels) or labels.split(',')
    return tuple(name.strip() for name in labels or ())
