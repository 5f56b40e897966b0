"""Turn checkpoints of the authors' released code into timm folders: config.json with label names, model.safetensors.

Nothing in a checkpoint is run, see `unpickle`. Nothing of a network is left random either: the network is built without
numbers, and every one of them comes from the file.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import clean_state_dict

from ..data.prepare import FERPLUS_COLUMNS, RAFDB_LABELS
from ..labels import EXPRESSIONS_7, EXPRESSIONS_8, canonical_name
from ..models.networks import _ARCHS, _rename_authors_keys
from .pack import write_folder
from .pickles import CheckpointError, LazyTensor, StandIn, described, load, shown

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

# Depth of modules, number of modules and tensors, characters of a key; a DDAMFN has 7, about 1,900 and 50.
MAX_DEPTH, MAX_ENTRIES, MAX_KEY = 64, 20_000, 1000


class ConvertError(RuntimeError):
    """A checkpoint that cannot be converted; the message says why and what to do."""


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        model: timm name of the network.
        label_names: Class names in the order of the outputs; empty where the network ends at the embedding.
        kind: What the file was: 'state dict' or 'whole module'.
        unused: Keys of the authors' modules that their own forward never uses, left out.
        dropped: Keys left out because the caller said so.
        foreign: Names in the file's pickle of classes that were replaced and functions that were not called.
        warning: A sentence about the labels, where they are likely wrong.
    """

    model: str
    label_names: tuple[str, ...]
    kind: str
    unused: tuple[str, ...]
    dropped: tuple[str, ...]
    foreign: tuple[str, ...]
    warning: str


def convert(
        source: Path,
        model: str,
        out_dir: Path,
        labels: str | Sequence[str] | None = None,
        drop: Sequence[str] = (),
) -> Converted:
    """Write a timm folder that `timm.create_model('local-dir:OUT_DIR', pretrained=True)` loads.

    The number of classes is the checkpoint's own. One without a classifier becomes a network that ends at its
    embedding (num_classes=0).

    Args:
        source: A file of torch.save or safetensors, with the keys of the authors' code or of this package: a state
            dict, plain or wrapped, or a whole module.
        model: The network it is of: 'lfnsb', 'lfn_small', 'mfn', 'ddamfn' or 'mobilefacenet'.
        out_dir: Folder to write; must not hold anything yet.
        labels: Label names in the order of the outputs, or one of `LABEL_SETS`. Needed where there is a classifier: a
            checkpoint does not tell its classes, and the data sets' orders differ.
        drop: Parts of the checkpoint to leave out, by the start of their keys: 'fc' leaves out fc.weight and fc.bias.

    Raises:
        ConvertError: When the file, the model and the labels do not fit; nothing is written then.
        OSError: When a file cannot be read or written.
    """
    if model not in _ARCHS:
        raise ConvertError(f"there is no model {model} to convert to: choose one of {', '.join(_ARCHS)}.")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConvertError(f'{out_dir} is there already: name a new folder.')
    try:
        checkpoint = load(source)
        tensors, kind = find_tensors(checkpoint.value)
    except CheckpointError as error:
        raise ConvertError(str(error)) from None
    except ConvertError as error:
        raise ConvertError(f'{source} {error}') from None
    tensors, dropped = leave_out(tensors, drop, source)
    check_tensors(tensors, source)

    num_classes = count_classes(tensors)
    fit = compare(tensors, model, num_classes)
    if fit.problems:
        for other in _ARCHS:
            if other != model and not compare(tensors, other, num_classes).problems:
                raise ConvertError(f'{source} is of the network {other}, not {model}: give --model {other}.')
        raise ConvertError(f"{source} does not fit the network {model}: {'; '.join(fit.problems)}.")
    label_names = resolve_labels(labels, num_classes, source)

    network = create(model, num_classes)
    try:
        network.load_state_dict(read_tensors(tensors, fit.taken, network), strict=True, assign=True)
    except (CheckpointError, ConvertError) as error:
        raise ConvertError(f'{source} {error}.') from None
    for key in ('tag', 'license', 'label_names'):  # true of the zoo's own weights alone
        network.pretrained_cfg.pop(key, None)
    network.pretrained_cfg['num_classes'] = num_classes
    if label_names:
        network.pretrained_cfg['label_names'] = label_names
    write_folder(network, out_dir, label_names, dict(num_classes=num_classes), converted_from=dict(
        file=source.name, sha256=checkpoint.sha256))

    warning = ''
    if model == 'ddamfn' and labels in ('rafdb', 'ferplus'):
        right = f'affectnet{num_classes}'
        warning = (f"the test scripts of DDAMFN's authors name the outputs in AffectNet's order for RAF-DB and FER+ as "
                   f'well: if this checkpoint is theirs, the labels are --labels {right}.')
    return Converted(
        model, label_names, kind, tuple(fit.unused), tuple(dropped), checkpoint.foreign, warning)


# The network inside a file

def find_tensors(value: Any) -> tuple[dict[str, Any], str]:
    """The state dict in what a file holds, unwrapped, and whether it was one or a whole module.

    Raises:
        ConvertError: When there is none; the message goes on from the file's name.
    """
    for _ in range(4):  # wrappers in wrappers
        if isinstance(value, StandIn) and '_modules' in value.state:
            return clean_state_dict(flatten_module(value)), 'whole module'
        entries = value.items if isinstance(value, StandIn) else value
        if not isinstance(entries, dict) or not entries:
            raise ConvertError(f'holds no weights: it is {described(value)}.')
        if 'state_dict' in entries and 'arch' in entries and 'args' in entries:
            raise ConvertError('was written by train.py: use timm-lfnsb pack, which keeps its labels and settings.')
        inner = next((entries[name] for name in WRAPPERS if _may_hold_weights(entries.get(name))), None)
        if inner is None:
            break
        value = inner
    if not any(isinstance(tensor, (LazyTensor, torch.Tensor)) for tensor in entries.values()):
        raise ConvertError(f'holds no weights, only {listing(map(str, entries))}.')
    if len(entries) > MAX_ENTRIES:
        raise ConvertError(f'has more than {MAX_ENTRIES} tensors, as none of these networks has.')
    for key in entries:
        if type(key) is not str or len(key) > MAX_KEY:
            raise ConvertError(f'has the key {shown(str(key))} among its weights, which is no name of any.')
    return clean_state_dict(entries), 'state dict'


def _may_hold_weights(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, StandIn) and ('_modules' in value.state or bool(value.items)))


def flatten_module(module: StandIn) -> dict[str, Any]:
    """What `state_dict()` would give of a pickled module, from the tables that torch keeps in every module.

    Raises:
        ConvertError: When the tables are not torch's, or modules are nested or shared beyond all reason.
    """
    out: dict[str, Any] = {}
    pending = [('', module, 0)]
    visited = 0
    while pending:
        prefix, module, depth = pending.pop()
        tables = {}
        for name in ('_parameters', '_buffers', '_modules'):
            table = module.state.get(name) if type(module) is StandIn else None
            if type(table) is not dict or not all(type(key) is str and len(key) <= MAX_KEY for key in table):
                raise ConvertError(f"has no sound {name} where a module should be ({shown(prefix) or 'at the top'}).")
            tables[name] = table
        hidden = module.state.get('_non_persistent_buffers_set')
        entries = {**tables['_parameters'], **tables['_buffers']}
        for name, tensor in entries.items():
            if tensor is not None and not (type(hidden) is set and name in hidden):
                out[prefix + name] = tensor
        visited += 1 + len(entries)
        for name, child in tables['_modules'].items():
            if child is not None:
                pending.append((f'{prefix}{name}.', child, depth + 1))
        # A module may be in several places, so a few can pose as endlessly many.
        if depth > MAX_DEPTH or len(prefix) > MAX_KEY:
            raise ConvertError(f'has modules nested more than {MAX_DEPTH} deep, as no network has.')
        if visited + len(pending) > MAX_ENTRIES:
            raise ConvertError(f'has more than {MAX_ENTRIES} modules and tensors, as none of these networks has.')
    return out


def leave_out(tensors: dict[str, Any], drop: Sequence[str], source: Path) -> tuple[dict[str, Any], list[str]]:
    """Split the keys that start with one of the names in `drop` from the others."""
    dropped: list[str] = []
    for name in drop:
        keys = [key for key in tensors if key == name or key.startswith(name.rstrip('.') + '.')]
        if not keys:
            raise ConvertError(f'{source} has nothing that --drop {name} could leave out: its keys start with '
                               f"{listing(sorted({key.split('.')[0] for key in tensors}))}.")
        dropped += keys
        gone = set(keys)
        tensors = {key: value for key, value in tensors.items() if key not in gone}
    return tensors, dropped


def check_tensors(tensors: Mapping[str, Any], source: Path) -> None:
    """Refuse entries that are not tensors."""
    for key, value in tensors.items():
        if not isinstance(value, (LazyTensor, torch.Tensor)):
            raise ConvertError(
                f'{source}: {shown(key)} is {described(value)} and not a tensor; --drop {shown(key)} leaves it out.')


def count_classes(tensors: Mapping[str, Any]) -> int:
    """Number of outputs of the classifier `fc`, 0 where there is none."""
    weight = tensors.get('fc.weight')
    return weight.shape[0] if weight is not None and len(weight.shape) == 2 and math.prod(weight.shape) else 0


# Fitting it to a network of this package

@dataclass(frozen=True)
class Fit:
    """How a checkpoint fits a network.

    Attributes:
        taken: Our key -> the checkpoint's key.
        unused: The checkpoint's keys that the authors' own forward never uses.
        problems: Half sentences about missing and unexpected keys and shapes; none when it fits.
    """

    taken: dict[str, str]
    unused: list[str]
    problems: list[str]


def create(model: str, num_classes: int) -> Any:
    """The network without numbers, so that none can be left at its random start."""
    return timm.create_model(model, pretrained=False, num_classes=num_classes, device='meta')


def compare(tensors: Mapping[str, Any], model: str, num_classes: int) -> Fit:
    """Compare a checkpoint's keys and shapes with those of a network."""
    network = create(model, num_classes)
    wanted = network.state_dict()
    authors = any('.mixed_depthwise_conv.' in key for key in tensors)
    taken: dict[str, str] = {}
    unused, unexpected, twice, shapes = [], [], [], []
    for key, value in tensors.items():
        ours = next(iter(_rename_authors_keys({key: value}, network)), None) if authors else key
        if ours is None:
            unused.append(key)
        elif ours not in wanted:
            unexpected.append(key)
        elif ours in taken:
            twice.append(f'{taken[ours]} and {key}')
        else:
            taken[ours] = key
            if tuple(value.shape) != tuple(wanted[ours].shape):
                shapes.append(f'{key} {tuple(value.shape)} instead of {tuple(wanted[ours].shape)}')
    # Checkpoints from before torch 0.4.1 lack the counters, which serve nothing here.
    missing = [key for key in wanted if key not in taken and not key.endswith('.num_batches_tracked')]
    problems = []
    if missing:
        problems.append(f"missing keys, in this package's names: {listing(missing)}")
    if unexpected:
        problems.append(f'unexpected keys: {listing(unexpected)} (--drop NAME leaves out what starts with it)')
    if twice:
        problems.append(f'keys that mean the same: {listing(twice)}')
    if shapes:
        problems.append(f'other shapes: {listing(shapes)}')
    return Fit(taken, unused, problems)


def read_tensors(tensors: Mapping[str, Any], taken: Mapping[str, str], network: Any) -> dict[str, torch.Tensor]:
    """Load the numbers under this package's keys, in the types of the network (float32).

    Raises:
        ConvertError: When a number is not finite, or weights are not floating point; goes on from the file's name.
        CheckpointError: When the file is damaged.
    """
    out = {}
    for ours, like in network.state_dict().items():
        if ours not in taken:  # a counter, see compare()
            out[ours] = torch.zeros((), dtype=like.dtype)
            continue
        value = tensors[taken[ours]]
        value = value.read() if isinstance(value, LazyTensor) else value
        if like.is_floating_point() and not value.is_floating_point():
            raise ConvertError(f'has {value.dtype} in {taken[ours]}, which should be floating point')
        value = value.to(like.dtype)
        if not value.isfinite().all():
            raise ConvertError(f'has numbers in {taken[ours]} that are not finite')
        out[ours] = value.contiguous()
    return out


def resolve_labels(labels: str | Sequence[str] | None, num_classes: int, source: Path) -> tuple[str, ...]:
    """Label names for the classifier of a checkpoint.

    Raises:
        ConvertError: When they are needed and missing, or do not fit.
    """
    if not labels:
        if not num_classes:
            return ()
        sets = [f"{name} ({', '.join(names)})" for name, names in LABEL_SETS.items() if len(names) == num_classes]
        raise ConvertError(
            f'{source} has a classifier of {num_classes} classes and nothing in it says which: give --labels with '
            f"{' or '.join(sets) + ', or ' if sets else ''}all names in the order of its outputs; or leave the "
            'classifier out with --drop fc.')
    if not num_classes:
        raise ConvertError(f'{source} has no classifier, so there is nothing for --labels to name: leave it out.')
    if isinstance(labels, str):
        names = LABEL_SETS.get(labels) or tuple(name.strip() for name in labels.split(','))
        if len(names) == 1:
            raise ConvertError(f"--labels {labels} is no list of names, nor one of {', '.join(LABEL_SETS)}.")
    else:
        names = tuple(labels)
    if len(names) != num_classes:
        raise ConvertError(
            f"{source} has {num_classes} classes, but --labels gives {len(names)} names [{', '.join(names)}].")
    if not all(names) or len({canonical_name(name) for name in names}) != len(names):
        raise ConvertError(f"--labels [{', '.join(names)}] has an empty name, or two that mean the same.")
    return names


def listing(names: Iterable[str], limit: int = 20) -> str:
    """Names with commas between them; of many the first ones and their number."""
    names = [shown(name) for name in names]
    return ', '.join(names) if len(names) <= limit else f"{', '.join(names[:limit])} and {len(names) - limit} more"
