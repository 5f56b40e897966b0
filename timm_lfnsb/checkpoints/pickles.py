"""Read checkpoint files without running anything in them: torch.save's, zip and legacy, and safetensors.

A pickle is a program for a small stack machine, and three of its instructions make it dangerous: one imports a name,
one calls what was imported, one hands an object a state to restore itself from. `torch.load(weights_only=True)` refuses
files that use them beyond its list, so a file that pickles a whole module, with classes that do not exist here, cannot
be read with it. An allow-list in a `pickle.Unpickler` subclass would read them, but that class still calls what it is
handed, hashes what the file wants for a key, and allocates what the file says.

So the machine here is its own, on top of `pickletools.genops`, which only splits a pickle into instructions: a global
is its name and nothing else, calling one makes a `StandIn` with that name, a state is stored. A handful of names
(tensors, OrderedDict, torch.Size, set) have builders below. No instruction imports, calls or looks up anything else.
"""
from __future__ import annotations

import hashlib
import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError

MAX_FILE = 1 << 30  # bytes; the largest of these networks has 17 MB, and an optimizer's state a few times that
MAX_INSTRUCTIONS = 1_000_000  # of one pickle; a whole DDAMFN module takes 112,000
MAX_NAME = 200  # characters
MAX_DIMS = 8
MAX_INT = 1 << 63

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001


class CheckpointError(RuntimeError):
    """A file that cannot be read as a checkpoint; the message says why in one sentence."""


@dataclass(frozen=True, eq=False)
class Foreign:
    """The name of a class or function in a pickle. It is never looked up."""

    name: str


@dataclass(eq=False)
class StandIn:
    """In the place of an object of a class that is not built here, or of a function's result: data, no behaviour.

    Attributes:
        name: Full name of the class or function.
        state: What would have become its attributes.
        items: What would have become its entries, where the class is a dictionary of sorts.
    """

    name: str
    state: dict[Any, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Storage:
    """A block of numbers in the file, read when it is asked for.

    Attributes:
        dtype: Type of its numbers.
        nbytes: Its size, checked against the file.
        fetch: Returns the bytes.
    """

    dtype: torch.dtype
    nbytes: int
    fetch: Callable[[], bytes]

    @cached_property
    def data(self) -> bytearray:
        data = bytearray(self.fetch())
        if len(data) != self.nbytes:
            raise CheckpointError('is damaged: data is missing')
        return data


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in the file: a view of a storage, known to lie within it, not read yet."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def read(self) -> torch.Tensor:
        """Load the numbers into a tensor of its own.

        Raises:
            CheckpointError: When the file turns out to be damaged there.
        """
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        count = self.storage.nbytes // self.dtype.itemsize
        flat = torch.frombuffer(self.storage.data, dtype=self.dtype, count=count)
        return flat.as_strided(self.shape, self.stride, self.offset).clone()


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        value: Dictionaries, lists, numbers, strings, `StandIn`s, and tensors (`LazyTensor`, or `torch.Tensor` from
            safetensors).
        foreign: Full names of the classes and functions a pickle wanted to build from or call, and that were not.
        sha256: Checksum of the file.
    """

    value: Any
    foreign: tuple[str, ...]
    sha256: str


def load(path: Path) -> Checkpoint:
    """Read a checkpoint file; the format is told by its first bytes, not by its name.

    Args:
        path: A file of torch.save (zip, or the legacy format before torch 1.6) or of safetensors, up to 1 GiB.

    Raises:
        CheckpointError: When it is none of these, damaged, or built to do harm.
        OSError: When it cannot be opened.
    """
    if not path.is_file():
        raise CheckpointError(f'{path} is no file.' if path.exists() else f'{path} does not exist.')
    if path.stat().st_size > MAX_FILE:
        raise CheckpointError(f'{path} is larger than {MAX_FILE >> 20} MiB, which no checkpoint of these networks is.')
    content = path.read_bytes()
    foreign: set[str] = set()
    try:
        value = _load(content, foreign)
    except CheckpointError as error:
        raise CheckpointError(f'{path} {error}.') from None
    return Checkpoint(value, tuple(sorted(foreign)), hashlib.sha256(content).hexdigest())


def _load(content: bytes, foreign: set[str]) -> Any:
    if content.startswith(b'PK\x03\x04'):
        return _load_zip(content, foreign)
    if content[8:9] == b'{' and int.from_bytes(content[:8], 'little') <= len(content) - 8:
        try:
            return safetensors.torch.load(content)
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(f'is a damaged safetensors file ({shown(str(error))})') from None
    return _load_legacy(content, foreign)


def shown(text: str) -> str:
    """Text from a file, fit for a message: one line, no control characters, not endless."""
    text = ''.join(c if c.isprintable() else '?' for c in text[:MAX_NAME + 1])
    return text if len(text) <= MAX_NAME else text[:MAX_NAME] + '...'


def described(value: Any) -> str:
    """What kind of thing a loaded value is, for a message."""
    if isinstance(value, StandIn):
        return f'what {value.name} would have made (nothing of it was run)'
    if isinstance(value, Foreign):
        return f'the name {value.name}'
    if isinstance(value, (LazyTensor, torch.Tensor)):
        return 'a tensor'
    return 'nothing' if value is None else f'of the type {type(value).__name__}'


# Containers

_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, RuntimeError, ValueError, struct.error)


def _load_zip(content: bytes, foreign: set[str]) -> Any:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
    except _ZIP_ERRORS as error:
        raise CheckpointError(f'is a damaged or truncated zip file ({shown(str(error))})') from None
    records = {record.filename: record for record in archive.infolist()}
    if any(name.endswith('/constants.pkl') for name in records):
        raise CheckpointError("is a TorchScript program, which is code: save its network's state_dict() instead")
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise CheckpointError(
                f'has a compressed record ({shown(record.filename)}, {record.compress_size} bytes for '
                f'{record.file_size}), which torch.save never writes: it may be a zip bomb')
        if record.flag_bits & 1:
            raise CheckpointError('is encrypted')
    # Records that lie on each other are how an uncompressed zip file becomes a bomb.
    if len(records) != len(archive.infolist()) or sum(r.file_size for r in records.values()) > len(content):
        raise CheckpointError('has records twice, or on top of each other, which torch.save never writes')
    pickles = [name for name in records if name.count('/') == 1 and name.endswith('/data.pkl')]
    if len(pickles) != 1:
        raise CheckpointError('is a zip file, but not one of torch.save: it has no data.pkl')
    prefix = pickles[0].removesuffix('data.pkl')

    def read(name: str) -> bytes:
        try:
            return archive.read(records[name])
        except _ZIP_ERRORS as error:
            raise CheckpointError(f'is damaged ({shown(str(error))})') from None

    _refuse_big_endian(f'{prefix}byteorder' in records and read(f'{prefix}byteorder') != b'little')
    storages: dict[tuple[str, torch.dtype], Storage] = {}

    def persistent_load(reference: Any) -> Storage:
        dtype, key, nbytes = _storage_reference(reference, length=5)
        name = f'{prefix}data/{key}'
        if name not in records or records[name].file_size != nbytes:
            raise CheckpointError(f'is damaged: {shown(key)} should be {nbytes} bytes of data')
        return storages.setdefault((key, dtype), Storage(dtype, nbytes, lambda: read(name)))

    return _run(io.BytesIO(read(pickles[0])), persistent_load, foreign)


def _load_legacy(content: bytes, foreign: set[str]) -> Any:
    """Magic number, version, system, the object, the keys of its storages, and then their data, one after the other."""
    def nothing_outside(reference: Any) -> Any:
        raise CheckpointError('is a pickle that refers to data outside of it')

    stream = io.BytesIO(content)
    try:
        magic = _run(stream, nothing_outside, foreign)
    except CheckpointError as error:
        raise CheckpointError(
            f'is no checkpoint: neither a file of torch.save nor of safetensors (it {error})') from None
    if type(magic) is not int or magic != LEGACY_MAGIC:
        raise CheckpointError(f'is no checkpoint but a pickle of something else: it is {described(magic)}')
    version, system = (_run(stream, nothing_outside, foreign) for _ in range(2))
    if type(version) is not int or version != LEGACY_VERSION:
        raise CheckpointError('is of an unknown version of torch.save: save it again with torch 1.6 or newer')
    _refuse_big_endian(isinstance(system, dict) and system.get('little_endian') is False)

    storages: dict[str, Storage] = {}

    def persistent_load(reference: Any) -> Any:
        # A class of a module, with its source code behind it, which is of no use here.
        if type(reference) is tuple and len(reference) == 4 and reference[0] == 'module':
            return reference[1]
        dtype, key, nbytes = _storage_reference(reference, length=6)
        if reference[5] is not None:
            raise CheckpointError('has views of storages, from a very old torch: save it again with torch 1.6 or newer')
        if nbytes > len(content):
            raise CheckpointError(f'is damaged or truncated: {shown(key)} should be {nbytes} bytes of data')
        storage = storages.setdefault(key, Storage(dtype, nbytes, _no_data))
        if (storage.dtype, storage.nbytes) != (dtype, nbytes):
            raise CheckpointError(f'is damaged: two descriptions of the data {shown(key)}')
        return storage

    value = _run(stream, persistent_load, foreign)
    keys = _run(stream, nothing_outside, foreign)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise CheckpointError('is damaged: the list of its data does not fit what its tensors refer to')
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(stream.read(8), 'little', signed=True)
        start = stream.tell()
        if count * storage.dtype.itemsize != storage.nbytes or start + storage.nbytes > len(content):
            raise CheckpointError(f'is damaged or truncated: {shown(key)} should be {storage.nbytes} bytes of data')
        storage.fetch = lambda start=start, stop=start + storage.nbytes: content[start:stop]  # type: ignore[misc]
        stream.seek(start + storage.nbytes)
    return value


def _no_data() -> bytes:
    raise CheckpointError('is truncated: data is missing')


def _refuse_big_endian(other: bool) -> None:
    if other or sys.byteorder != 'little':
        raise CheckpointError('was written or is read on a big-endian machine: save it again on an ordinary one')


_STORAGE_DTYPES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8, 'BoolStorage': torch.bool,
    'UntypedStorage': torch.uint8,
}
_DTYPES = {str(dtype): dtype for dtype in _STORAGE_DTYPES.values()}


def _storage_reference(reference: Any, length: int) -> tuple[torch.dtype, str, int]:
    """Type, key and size in bytes out of ('storage', type, key, device, number of elements, ...)."""
    if type(reference) is not tuple or len(reference) != length or reference[0] != 'storage':
        raise CheckpointError('is damaged: a reference to something else than data')
    kind, key, count = reference[1], reference[2], reference[4]
    if type(kind) is not Foreign or type(key) is not str or not _is_size(count):
        raise CheckpointError('is damaged: a reference to data that is none')
    module, _, name = kind.name.rpartition('.')
    if module not in ('torch', 'torch.cuda', 'torch.storage') or name not in _STORAGE_DTYPES:
        raise CheckpointError(f'has data of the type {kind.name}, which is not read here')
    dtype = _STORAGE_DTYPES[name]
    return dtype, key, count * dtype.itemsize


# What some names build

def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_INT


def _tensor_view(storage: Any, dtype: Any, offset: Any, shape: Any, stride: Any) -> LazyTensor:
    if type(storage) is not Storage or type(dtype) is not torch.dtype:
        raise CheckpointError('is damaged: a tensor without data')
    if (type(shape) is not tuple or type(stride) is not tuple or len(shape) != len(stride) or len(shape) > MAX_DIMS
            or not all(_is_size(number) for number in (offset, *shape, *stride))):
        raise CheckpointError('is damaged: a tensor with an impossible shape')
    available = storage.nbytes // dtype.itemsize
    count = math.prod(shape)
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    # The count as well, or strides of zero would make terabytes of a few numbers.
    if count and (last >= available or count > available):
        raise CheckpointError(
            f'is damaged: a tensor of shape {shape}, stride {stride} and offset {offset} reaches beyond its '
            f'{available} numbers')
    return LazyTensor(storage, dtype, shape, stride, offset)


def _build_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
    return _tensor_view(storage, storage.dtype if type(storage) is Storage else None, offset, shape, stride)


def _build_tensor_v3(
        storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any, dtype: Any, *_: Any,
) -> LazyTensor:
    if type(dtype) is not Foreign or dtype.name not in _DTYPES:
        raise CheckpointError('is damaged: a tensor of an unknown type')
    return _tensor_view(storage, _DTYPES[dtype.name], offset, shape, stride)


def _build_parameter(data: Any, *_: Any) -> Any:
    return data


def _build_dict(pairs: Any = ()) -> dict[Any, Any]:
    if type(pairs) not in (list, tuple) or not all(type(p) in (list, tuple) and len(p) == 2 for p in pairs):
        raise CheckpointError('is damaged: an OrderedDict of something else than pairs')
    return _set_items({}, (value for pair in pairs for value in pair))


def _build_size(sizes: Any = ()) -> tuple[Any, ...]:
    return _sequence(sizes)


def _build_set(values: Any = ()) -> set[Any]:
    return {value for value in _sequence(values) if _is_key(value)}


def _sequence(values: Any) -> tuple[Any, ...]:
    if type(values) not in (list, tuple):
        raise CheckpointError('is damaged: a size or set of something else than values')
    return tuple(values)


_BUILDERS: dict[str, Callable[..., Any]] = {
    'torch._utils._rebuild_tensor': _build_tensor,
    'torch._utils._rebuild_tensor_v2': _build_tensor,
    'torch._utils._rebuild_tensor_v3': _build_tensor_v3,
    'torch._utils._rebuild_parameter': _build_parameter,
    'torch._utils._rebuild_parameter_with_state': _build_parameter,
    'collections.OrderedDict': _build_dict,
    'torch.Size': _build_size,
    'builtins.set': _build_set,
    '__builtin__.set': _build_set,
    'builtins.frozenset': _build_set,
    '__builtin__.frozenset': _build_set,
}


# The machine

def _is_key(value: Any) -> bool:
    """Whether a value may be a dictionary's key: hashing nested tuples or huge numbers can take forever, or crash."""
    kind = type(value)
    return value is None or kind in (str, bytes, float, bool) or (kind is int and -MAX_INT <= value < MAX_INT)


def _set_items(target: dict[Any, Any], values: Iterable[Any]) -> dict[Any, Any]:
    """Enter keys and values in turns. Entries with keys that weights never have are left out."""
    values = iter(values)
    for key, value in zip(values, values, strict=True):
        if _is_key(key):
            target[key] = value
    return target


def _call(function: Any, args: Any, foreign: set[str]) -> Any:
    if type(args) is not tuple or type(function) not in (Foreign, StandIn):
        raise CheckpointError('is damaged: a call of something that is neither a class nor a function')
    if type(function) is Foreign and function.name in _BUILDERS:
        return _BUILDERS[function.name](*args)
    foreign.add(function.name)
    return StandIn(function.name)


def _build(target: Any, state: Any) -> None:
    """Store the state of a stand-in; builders' results need none (OrderedDict's is the metadata of a state dict)."""
    if type(target) is not StandIn:
        return
    # An object with slots has two states.
    for part in state if type(state) is tuple and len(state) == 2 else (state,):
        if type(part) is dict:
            target.state.update(part)


def _foreign(module: Any, name: Any) -> Foreign:
    if type(module) is not str or type(name) is not str:
        raise CheckpointError('is damaged: a name that is no text')
    return Foreign(shown(f'{module[:MAX_NAME]}.{name[:MAX_NAME]}'))


_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_EMPTY: dict[str, Callable[[], Any]] = {'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple, 'EMPTY_SET': set}
_LITERALS = {
    'INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT', 'STRING', 'BINSTRING',
    'SHORT_BINSTRING', 'UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8', 'SHORT_BINBYTES', 'BINBYTES',
    'BINBYTES8', 'BYTEARRAY8',
}


def _run(stream: BinaryIO, persistent_load: Callable[[Any], Any], foreign: set[str]) -> Any:
    """Build the one object of a pickle that starts where the stream stands; the stream is left behind its end.

    Raises:
        CheckpointError: When it is no pickle, cut off, or uses instructions that no checkpoint needs.
    """
    try:
        return _interpret(stream, persistent_load, foreign)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f'is damaged or no pickle ({shown(str(error)) or type(error).__name__})') from None


def _interpret(stream: BinaryIO, persistent_load: Callable[[Any], Any], foreign: set[str]) -> Any:
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each open mark
    memo: dict[int, Any] = {}
    arg: Any

    def pop_mark() -> list[Any]:
        nonlocal stack
        above, stack = stack, marked.pop()
        return above

    for number, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        op = opcode.name
        if number >= MAX_INSTRUCTIONS:
            raise CheckpointError(f'has a pickle of more than {MAX_INSTRUCTIONS} instructions')
        if op in _LITERALS:
            stack.append(arg)
        elif op in ('BINPUT', 'LONG_BINPUT', 'PUT'):
            memo[arg] = stack[-1]
        elif op == 'MEMOIZE':
            memo[len(memo)] = stack[-1]
        elif op in ('BINGET', 'LONG_BINGET', 'GET'):
            stack.append(memo[arg])
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op == 'MARK':
            marked.append(stack)
            stack = []
        elif op in ('TUPLE', 'LIST', 'DICT', 'FROZENSET'):
            values = pop_mark()
            stack.append(
                tuple(values) if op == 'TUPLE' else values if op == 'LIST'
                else _set_items({}, values) if op == 'DICT' else _build_set(values))
        elif op in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
            size = int(op[-1])
            if len(stack) < size:
                raise IndexError('stack underflow')
            stack[-size:] = [tuple(stack[-size:])]
        elif op in ('SETITEM', 'SETITEMS', 'APPEND', 'APPENDS', 'ADDITEMS'):
            if op in ('SETITEM', 'APPEND'):
                size = 2 if op == 'SETITEM' else 1
                values = stack[-size:]
                del stack[-size:]
            else:
                values = pop_mark()
            _extend(stack[-1], op, values)
        elif op == 'GLOBAL':
            stack.append(_foreign(*arg.split(' ', 1)))
        elif op == 'STACK_GLOBAL':
            name, module = stack.pop(), stack.pop()
            stack.append(_foreign(module, name))
        elif op in ('REDUCE', 'NEWOBJ'):
            args, function = stack.pop(), stack.pop()
            stack.append(_call(function, args, foreign))
        elif op == 'NEWOBJ_EX':
            _, args, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_call(function, args, foreign))
        elif op == 'OBJ':
            function, *values = pop_mark()
            stack.append(_call(function, tuple(values), foreign))
        elif op == 'INST':
            values = pop_mark()
            stack.append(_call(_foreign(*arg.split(' ', 1)), tuple(values), foreign))
        elif op == 'BUILD':
            state = stack.pop()
            _build(stack[-1], state)
        elif op == 'BINPERSID':
            stack.append(persistent_load(stack.pop()))
        elif op == 'POP':
            if stack:
                stack.pop()
            else:  # as in pickle, the mark is taken away
                pop_mark()
        elif op == 'POP_MARK':
            pop_mark()
        elif op == 'DUP':
            stack.append(stack[-1])
        elif op == 'STOP':
            return stack.pop()
        elif op not in ('PROTO', 'FRAME'):
            raise CheckpointError(f'has the pickle instruction {op}, which no checkpoint needs')
    raise CheckpointError('is truncated')


def _extend(target: Any, op: str, values: list[Any]) -> None:
    kind = type(target)
    if kind is dict and op.startswith('SETITEM'):
        _set_items(target, values)
    elif kind is list and op.startswith('APPEND'):
        target.extend(values)
    elif kind is set and op == 'ADDITEMS':
        target.update(value for value in values if _is_key(value))
    elif kind is StandIn:
        if op.startswith('SETITEM'):
            _set_items(target.items, values)
    else:
        raise CheckpointError('is damaged: entries for something that takes none')
