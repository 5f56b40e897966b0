"""Read other people's checkpoints without running anything in them: zip files of torch.save, and safetensors.

A pickle may name any function and have it called. `torch.load(weights_only=True)` calls only what makes tensors and
plain containers, and refuses a file that names anything else. A pickled module names its classes, which are not here
anyway. So each such name is given a class without behaviour first: nothing is looked up, imported or called under it.
The modules os, posix, nt and sys stay refused, and so does every name in the format before torch 1.6.

A file made to do harm can still take much time and memory, or end the process. Torch before 2.10 is not safe even so:
https://github.com/pytorch/pytorch/security/advisories/GHSA-63cw-57p8-fm3p.
"""
from __future__ import annotations

import warnings
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import serialization

from ..errors import UserError


class StandIn:
    """In the place of an object of a class that is not built, or of a function's result: data, no behaviour."""

    state: dict[Any, Any]  # what would have become its attributes

    def __new__(cls, *_: Any) -> StandIn:
        new = super().__new__(cls)
        new.state = {}
        return new

    def __setstate__(self, state: Any) -> None:
        if type(state) is dict:
            self.state = state


def load(path: Path) -> tuple[Any, str]:
    """Read a checkpoint file; the format is told by its first bytes, not by its name.

    Returns:
        Tensors, containers, numbers, strings and `StandIn`s; full names of the classes and functions stood in for.

    Raises:
        UserError: When it is no checkpoint, damaged, or needs more than tensors and stand-ins.
    """
    with path.open('rb') as file:
        head = file.read(9)
    is_safetensors = head[8:] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size
    if not is_safetensors and tuple(map(int, torch.__version__.split('.')[:2])) < (2, 10):
        raise UserError(
            f"{path} is a pickle, which torch {torch.__version__} may run code from: update torch to 2.10 or newer.")
    foreign: list[str] = []
    try:
        if is_safetensors:
            value: Any = safetensors.torch.load_file(path)
        else:
            if head.startswith(b'PK'):
                check_zip(path)
                foreign = sorted(serialization.get_unsafe_globals_in_checkpoint(path))
            stand_ins = serialization.safe_globals([stand_in(name) for name in foreign])
            with path.open('rb') as file, stand_ins, warnings.catch_warnings():
                warnings.simplefilter('ignore')  # of other formats, which are refused anyway
                value = torch.load(file, map_location='cpu', weights_only=True, mmap=False)
    except Exception as error:  # what a file holds can make readers raise nearly anything
        cause = error.__context__ or error  # not torch's advice to trust the file, but what it met
        text = '' if isinstance(cause, KeyError) else str(cause)  # a key alone says nothing
        reason = shown(text.split('\n')[0].split('. ')[0].rstrip('.')) or type(cause).__name__
        raise UserError(
            f'{path} is no checkpoint, or damaged, or needs code to be read, and none was run ({reason}): take a state '
            'dict saved by torch 1.6 or newer, or safetensors.') from None
    return value, shown(', '.join(foreign), 2000)


def check_zip(path: Path) -> None:
    """Raise ValueError where a zip file is not as torch.save writes it; torch looks at no checksum and at no size."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(record.compress_type for record in records) or sum(r.file_size for r in records) > path.stat().st_size:
            raise ValueError('records are compressed or on top of each other, as in TorchScript or a zip bomb')
        if broken := archive.testzip():
            raise ValueError(f'the checksum of {broken} is wrong')


def stand_in(name: str) -> Any:
    """What `torch.load` takes for the class or function of that name."""
    if name == 'collections.defaultdict':  # torch fills nothing but dictionaries, and optimizers are made of these
        return (lambda *_: {}), name
    return type(shown(name), (StandIn,), {}), name


def shown(text: str, limit: int = 200) -> str:
    """Text from a file, fit for a message: one line, no control characters, not endless."""
    return ''.join(c if c.isprintable() else '?' for c in text[:limit]) + '...' * (len(text) > limit)
