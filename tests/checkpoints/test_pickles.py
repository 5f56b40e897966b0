"""Files that mean harm, and damaged ones: refused in one sentence or read, and nothing that they hold is ever run."""
from __future__ import annotations

import collections
import functools
import io
import operator
import os
import pickle
import random
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from timm_lfnsb.checkpoints.convert import find_tensors
from timm_lfnsb.checkpoints.pickles import StandIn, load
from timm_lfnsb.errors import UserError

CONTAINERS = ['raw pickle', 'before torch 1.6', 'zip']


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write(path: Path, data_pickle: bytes, container: str = 'zip', data: bytes = bytes(24)) -> Path:
    """Put a pickle where torch.load would run it."""
    if container == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            for name, content in {'data.pkl': data_pickle, 'version': b'3\n', 'data/0': data}.items():
                archive.writestr(f'archive/{name}', content)
    else:
        head = [0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True, type_sizes={})]
        before = b''.join(pickle.dumps(value, 2) for value in head) if container != 'raw pickle' else b''
        path.write_bytes(before + data_pickle + pickle.dumps([], 2))
    return path


def refusal(path: Path) -> str:
    """What `convert` says of a file that holds no network."""
    with pytest.raises(UserError) as caught:
        find_tensors(load(path)[0])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


def payloads(marker: Path) -> dict[str, Call]:
    """Calls that would make a file, or lead to such a call."""
    code = f'open({str(marker)!r}, "w")'
    return {
        'os.system': Call(os.system, f'touch {marker}'), 'eval': Call(eval, code), 'exec': Call(exec, code),
        'open': Call(open, str(marker), 'w'), 'partial': Call(functools.partial(eval, code)),
        'getattr': Call(getattr, Call(__import__, 'os'), 'system'),
        'chain': Call(functools.reduce, Call(operator.methodcaller, '__call__'), [Call(eval, code)]),
    }


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', payloads(Path()))
def test_calls_are_not_made(name, container, tmp_path):
    marker = tmp_path / 'marker'
    for protocol in (0, 2, 4, 5):
        data = pickle.dumps(payloads(marker)[name], protocol)
        assert 'was run' in refusal(write(tmp_path / 'evil.pth', data, container)) and not marker.exists()
    if name not in ('getattr', 'chain'):  # an ordinary unpickler does make them
        pickle.loads(data)
        assert marker.exists()


@pytest.mark.parametrize('place', ['weight', 'beside', 'key', 'storage'])
def test_calls_hidden_in_a_checkpoint(place, tmp_path):
    marker, weights = tmp_path / 'marker', {'w': torch.ones(3)}
    for evil in (Call(os.system, f'touch {marker}'), Call(eval, f'open({str(marker)!r}, "w")')):
        torch.save({
            'weight': {**weights, 'evil': evil}, 'beside': {'net': weights, 'history': [evil]},
            'key': {'net': weights, evil: 1}, 'storage': {**weights, 'evil': Call(
                torch._utils._rebuild_tensor_v2, evil, 0, (7,), (1,), False, {})}}[place], tmp_path / 'a.pth')
        if evil.call[0] is os.system or place == 'storage':
            assert 'none was run' in refusal(tmp_path / 'a.pth')
        else:
            value, foreign = load(tmp_path / 'a.pth')
            tensors, _ = find_tensors(value)
            assert foreign == ('builtins.eval',) and torch.equal(tensors['w'], weights['w'])
            assert isinstance(tensors.get('evil', StandIn()), StandIn)
    assert not marker.exists()


def by_hand(marker: Path) -> dict[str, list[bytes | str]]:
    """Pickles that no pickler writes: bytes as they are, text as strings."""
    code = f'open({str(marker)!r}, "w")'
    run, thing, rebuild = b'cbuiltins\neval\n', b'cnowhere\nThing\n)\x81}', b'ctorch._utils\n_rebuild_tensor_v2\n'
    return {
        'global': [run, code, b'\x85R'], 'blocked': [b'cposix\nsystem\n', f'touch {marker}', b'\x85R'],
        'inst': [b'(', code, b'i' + run[1:]], 'obj': [b'(', run, code, b'o'], 'newobj': [run, code, b'\x85\x81'],
        'newobj_ex': [run, code, b'\x85}\x92'], 'stack global': ['builtins', 'eval', b'\x93', code, b'\x85R'],
        'name alone': [run], 'extension': [b'\x82\x01'], 'persistent id': [b'P' + run[1:]],
        'dotted name': [b'ccollections\nOrderedDict.fromkeys\n)R'],
        'globals of a builder': [b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R'],
        'call of a result': [run, code, b'\x85R)R'], 'call of a string': ['text', b')R'],
        'state of a builder': [rebuild, b'N}', '__defaults__', 'x', b's\x86b'], 'no arguments': [rebuild, b')R'],
        'state of a dictionary': [b'ccollections\nOrderedDict\n)R}', '__class__', run, b'sb'],
        'setstate': [thing, '__setstate__', run, b'sb', code, b'b'], 'reduce': [thing, '__reduce__', run, b'sb'],
        'class in slots': [thing, b'0N}', '__class__', run, b's\x86b'], 'memo empty': [b'h\x07'],
        'entries of a number': [b'K\x01', 'a', 'b', b's'], 'terminal codes': [b'c\x1b[31mx\nred\x07\n)R'],
    }


@pytest.mark.parametrize('name', by_hand(Path()))
def test_pickles_by_hand(name, tmp_path):
    def surroundings():
        rebuild = torch._utils._rebuild_tensor_v2
        return dict(vars(rebuild)), rebuild.__defaults__, eval, torch.serialization.get_safe_globals()
    before = surroundings()
    parts = [part if isinstance(part, bytes) else b'X' + struct.pack('<I', len(part)) + part.encode()
             for part in by_hand(tmp_path / 'marker')[name]]
    for container in CONTAINERS:
        refusal(write(tmp_path / 'evil.pth', b''.join([b'\x80\x02', *parts, b'.']), container))
    assert not (tmp_path / 'marker').exists() and surroundings() == before


def test_a_name_is_never_imported(tmp_path, monkeypatch):
    (tmp_path / 'trap_module.py').write_text(f'open({str(tmp_path / "marker")!r}, "w")')
    monkeypatch.syspath_prepend(tmp_path)
    assert 'trap_module.Thing' in refusal(write(tmp_path / 'evil.pth', b'\x80\x02ctrap_module\nThing\n)\x81.'))
    assert not (tmp_path / 'marker').exists() and 'trap_module' not in sys.modules


def tensor_pickle(key='0', kind='FloatStorage', count=6, offset=0, shape=(2, 3), stride=(3, 1)) -> bytes:
    """{'w': tensor} as torch.save writes it, with whatever numbers."""
    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ('storage', getattr(torch, kind, None), key, 'cpu', count) if obj is marker else None
    marker = Call(int)
    stream = io.BytesIO()
    Pickler(stream, 2).dump(
        {'w': Call(torch._utils._rebuild_tensor_v2, marker, offset, shape, stride, False, collections.OrderedDict())})
    return stream.getvalue()


@pytest.mark.parametrize('numbers', [
    dict(shape=(2, 4), stride=(4, 1)), dict(stride=(1000, 1)), dict(offset=1), dict(offset=2**62), dict(offset=2**64),
    dict(offset=-1), dict(shape=(-1, 3)), dict(stride=(-3, 1)), dict(stride=(3,)), dict(shape=(2**62, 4), stride=(0, 0)),
    dict(shape=(2., 3)), dict(shape='23', stride='31'), dict(count=10**15), dict(count=7), dict(count=-6),
    dict(count='6'), dict(kind='DoubleStorage'), dict(kind='Tensor'), dict(kind='nothing'),
    dict(key='../../../../etc/passwd'), dict(key='../data.pkl'), dict(key=1)], ids=str)
def test_tensors_that_lie_about_their_data(numbers, tmp_path):
    assert 'damaged' in refusal(write(tmp_path / 'a.pth', tensor_pickle(**numbers)))
    write(tmp_path / 'a.pth', tensor_pickle(), data=struct.pack('<6f', *range(6)))  # the honest one reads
    assert torch.equal(load(tmp_path / 'a.pth')[0]['w'], torch.arange(6.).reshape(2, 3))


@pytest.mark.parametrize('compression, copies', [(zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, 1000)])
def test_zip_bombs(compression, copies, tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', compression) as archive:
        archive.writestr('archive/data.pkl', tensor_pickle(count=250_000))
        archive.writestr('archive/data/0', bytes(1_000_000))
        archive.filelist += copies * [archive.getinfo('archive/data/0')]
    assert 'zip bomb' in refusal(tmp_path / 'bomb.pth')


@pytest.mark.parametrize('reason, data', [
    ('it is of the type list', b']' * 20_000 + b'a' * 19_999),
    ('it is of the type tuple', b')' + b'\x85' * 20_000),
    ('it is what nowhere.Thing would have made', b'cnowhere\nThing\nq\0' + b'h\0' * 20_000 + b')R' + b'\x85R' * 19_999),
    ('nested', b'cnowhere\nThing\nq\0' + (
        b'h\0)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules}X\x01\0\0\0m' * 5_000
        + b'N' + b'sub' * 5_000)),
], ids=['lists', 'tuples', 'calls', 'modules'])
def test_deep_nesting(reason, data, tmp_path):
    assert reason in refusal(write(tmp_path / 'deep.pth', b'\x80\x02' + data + b'.'))


def test_a_few_modules_that_pose_as_endlessly_many():
    """Each has the next one twice: 2 ** 60 places, and a circle in the end."""
    modules = [StandIn() for _ in range(60)]
    for module, following in zip(modules, modules[1:] + modules[:1], strict=True):
        module.__setstate__(dict(_parameters={}, _buffers={}, _modules={'a': following, 'b': following}))
    with pytest.raises(UserError, match='beyond all reason'):
        find_tensors(modules[0])
    modules[9].__setstate__({'_modules': None})
    with pytest.raises(UserError, match='where a module should be'):
        find_tensors(modules[0])


@pytest.mark.parametrize('save', [
    torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), save_file])
def test_truncated_and_altered_files(save, tmp_path):
    save({'w': torch.ones(1000), 'v': torch.zeros(1000)}, tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    for size in (0, 1, 3, 9, 40, 600, len(content) // 2, len(content) - 1):
        (tmp_path / 'a.pth').write_bytes(content[:size])
        assert 'damaged' in refusal(tmp_path / 'a.pth')
    if save is torch.save:
        (tmp_path / 'a.pth').write_bytes(content.replace(struct.pack('<2f', 1, 1), struct.pack('<2f', 1, 2), 1))
        assert 'checksum of a/data/0 is wrong' in refusal(tmp_path / 'a.pth')


def test_any_altered_byte_is_survived(tmp_path):
    """Damaged variants of a whole module, with the right checksums: read or refused; never another exception."""
    torch.save(torch.nn.Conv2d(1, 1, 2), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        sound = archive.read('a/data.pkl')
    rng, outcomes = random.Random(0), collections.Counter()
    for _ in range(300):
        damaged = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            find_tensors(load(write(tmp_path / 'b.pth', bytes(damaged), data=bytes(16)))[0])
        except UserError:
            outcomes['refused'] += 1
        else:
            outcomes['read'] += 1
    assert outcomes['refused'] > 50


def test_no_checkpoints_at_all(tmp_path):
    (tmp_path / 'a.pth').write_text('<!DOCTYPE html><title>Quota exceeded</title>')
    assert 'is no checkpoint' in refusal(tmp_path / 'a.pth')
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'a.pth')
    assert 'TorchScript' in refusal(tmp_path / 'a.pth')
    assert 'does not exist' in refusal(tmp_path / 'nothing.pth') and 'is no file' in refusal(tmp_path)


def test_torch_whose_reader_is_not_safe(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, '__version__', '2.9.1')
    assert 'torch to 2.10 or newer' in refusal(write(tmp_path / 'a.pth', tensor_pickle()))
    save_file({'w': torch.ones(1)}, tmp_path / 'a.pth')
    assert load(tmp_path / 'a.pth')[0]['w'] == 1
