"""Files that mean harm, and damaged ones: refused in one sentence or read, and nothing that they hold is ever run."""
from __future__ import annotations

import functools
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from timm_lfnsb.checkpoints.convert import find_tensors
from timm_lfnsb.checkpoints.pickles import StandIn, load
from timm_lfnsb.errors import UserError


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write(path: Path, data_pickle: bytes, before: list[object] | None = None, data: bytes = bytes(24)) -> Path:
    """Put a pickle where torch.load would run it: in a zip file, or behind other pickles as before torch 1.6."""
    if before is not None:
        path.write_bytes(b''.join([*(pickle.dumps(each, 2) for each in before), data_pickle, pickle.dumps([], 2)]))
        return path
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in {'data.pkl': data_pickle, 'version': b'3\n', 'data/0': data}.items():
            archive.writestr(f'archive/{name}', content)
    return path


def refusal(path: Path) -> str:
    """What `convert` says of a file that holds no network."""
    with pytest.raises(UserError) as caught:
        find_tensors(load(path)[0])
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700
    return str(caught.value)


def harmful(marker: Path) -> dict[str, bytes]:
    """Pickles that would make a file, or lead to it: calls as a pickler writes them, and what no pickler writes."""
    code = f'open({str(marker)!r}, "w")'
    calls = {
        'system': Call(os.system, f'touch {marker}'), 'eval': Call(eval, code), 'exec': Call(exec, code),
        'open': Call(open, str(marker), 'w'), 'partial': Call(functools.partial(eval, code)),
        'chain': Call(functools.reduce, Call(getattr, Call(__import__, 'os'), 'getcwd'), [Call(eval, code)])}
    run, thing, rebuild = b'cbuiltins\neval\n', b'cnowhere\nThing\n)\x81}', b'ctorch._utils\n_rebuild_tensor_v2\n'
    by_hand = {
        'inst': [b'(', code, b'i' + run[1:]], 'obj': [b'(', run, code, b'o'], 'newobj': [run, code, b'\x85\x81'],
        'newobj_ex': [run, code, b'\x85}\x92'], 'stack global': ['builtins', 'eval', b'\x93', code, b'\x85R'],
        'name alone': [run], 'extension': [b'\x82\x01'], 'persistent id': [b'P' + run[1:]],
        'globals of a builder': [b'ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R'],
        'state of a builder': [rebuild, b'N}', '__defaults__', 'x', b's\x86b'], 'no arguments': [rebuild, b')R'],
        'state of a dictionary': [b'ccollections\nOrderedDict\n)R}', '__class__', run, b'sb'],
        'setstate': [thing, '__setstate__', run, b'sb', code, b'b'], 'reduce': [thing, '__reduce__', run, b'sb'],
        'class in slots': [thing, b'0N}', '__class__', run, b's\x86b'],
        'terminal codes': [b'c\x1b[31mx\nred\x07\n)R']}
    written = {name: b''.join(part if isinstance(part, bytes) else b'X' + struct.pack('<I', len(part)) + part.encode()
                              for part in [b'\x80\x02', *parts, b'.']) for name, parts in by_hand.items()}
    return written | {f'{name} {protocol}': pickle.dumps(call, protocol)
                      for name, call in calls.items() for protocol in (0, 2, 4, 5)}


@pytest.mark.parametrize('name', harmful(Path()))
def test_nothing_is_run(name, tmp_path, monkeypatch):
    marker, safe = tmp_path / 'marker', set(torch.serialization.get_safe_globals())  # torch lists a set
    (tmp_path / 'nowhere.py').write_text(f'open({str(marker)!r}, "w")')  # nor is anything imported
    monkeypatch.syspath_prepend(tmp_path)
    data = harmful(marker)[name]
    for first in None, [], [0x1950A86A20F9469CFC6C, 1001, dict(protocol_version=1001, little_endian=True)]:
        refusal(write(tmp_path / 'evil.pth', data, first))
    assert not marker.exists() and set(torch.serialization.get_safe_globals()) == safe
    assert not vars(torch._utils._rebuild_tensor_v2) and torch._utils._rebuild_tensor_v2.__defaults__ == (None,)
    if name[-1].isdigit():  # an ordinary unpickler does make the calls
        pickle.loads(data)
        assert marker.exists()


@pytest.mark.parametrize('place', ['weight', 'beside', 'key', 'storage'])
def test_calls_hidden_in_a_checkpoint(place, tmp_path):
    marker, weights = tmp_path / 'marker', {'w': torch.ones(3)}
    for evil in Call(os.system, f'touch {marker}'), Call(eval, f'open({str(marker)!r}, "w")'):
        tensor = Call(torch._utils._rebuild_tensor_v2, evil, 0, (7,), (1,), False, {})
        torch.save({'weight': weights | {'evil': evil}, 'beside': {'net': weights, 'history': [evil]},
                    'key': {'net': weights, evil: 1}, 'storage': weights | {'evil': tensor}}[place], tmp_path / 'a.pth')
        if evil.call[0] is os.system or place == 'storage':
            assert 'none was run' in refusal(tmp_path / 'a.pth')
            continue
        value, foreign = load(tmp_path / 'a.pth')
        tensors = find_tensors(value)
        assert foreign == 'builtins.eval' and torch.equal(tensors['w'], weights['w'])
        assert isinstance(tensors.get('evil', StandIn()), StandIn)
    assert not marker.exists()


def tensor_pickle(key='0', kind='FloatStorage', count=6, offset=0, shape=(2, 3), stride=(3, 1)) -> bytes:
    """{'w': tensor} as torch.save writes it, with whatever numbers."""
    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ('storage', getattr(torch, kind), key, 'cpu', count) if obj is marker else None
    marker, stream = Call(int), io.BytesIO()
    Pickler(stream, 2).dump({'w': Call(torch._utils._rebuild_tensor_v2, marker, offset, shape, stride, False, {})})
    return stream.getvalue()


@pytest.mark.parametrize('numbers', [
    dict(shape=(2, 4), stride=(4, 1)), dict(offset=-1), dict(shape=(2**62, 4), stride=(0, 0)), dict(count=10**15),
    dict(kind='DoubleStorage'), dict(key='../../../../etc/passwd')], ids=str)
def test_tensors_that_lie_about_their_data(numbers, tmp_path):
    assert 'damaged' in refusal(write(tmp_path / 'a.pth', tensor_pickle(**numbers)))
    write(tmp_path / 'a.pth', tensor_pickle(), data=struct.pack('<6f', *range(6)))  # the honest one reads
    assert torch.equal(load(tmp_path / 'a.pth')[0]['w'], torch.arange(6.).reshape(2, 3))


def test_zip_bombs(tmp_path):
    for compression, copies in (zipfile.ZIP_DEFLATED, 0), (zipfile.ZIP_STORED, 1000):
        with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', compression) as archive:
            archive.writestr('archive/data.pkl', tensor_pickle(count=250_000))
            archive.writestr('archive/data/0', bytes(1_000_000))
            archive.filelist += copies * [archive.getinfo('archive/data/0')]
        assert 'zip bomb' in refusal(tmp_path / 'bomb.pth')


MODULE = b'h\0)\x81}(X\x0b\0\0\0_parameters}X\x08\0\0\0_buffers}X\x08\0\0\0_modules}X\x01\0\0\0m'


@pytest.mark.parametrize('data, reason', [
    (b']' * 20_000 + b'a' * 19_999, 'of the type list'),
    (b'cnowhere\nThing\nq\0' + MODULE * 5000 + b'N' + b'sub' * 5000, 'beyond all reason'),
    (b'cnowhere\nThing\nq\0' + MODULE + b'h\0sub', 'where a module should be'),
    (b'cnowhere\nThing\nq\0' + MODULE.replace(b'\x81}', b'\x81q\1}') + b'h\1sX\1\0\0\0nh\1sub', 'beyond all reason'),
], ids=['lists', 'modules', 'no module', 'module in itself, twice'])
def test_nesting(data, reason, tmp_path):
    assert reason in refusal(write(tmp_path / 'deep.pth', b'\x80\x02' + data + b'.'))


@pytest.mark.parametrize('save', [
    torch.save, functools.partial(torch.save, _use_new_zipfile_serialization=False), save_file])
def test_truncated_and_altered_files(save, tmp_path):
    save({'w': torch.ones(1000), 'v': torch.zeros(1000)}, tmp_path / 'a.pth')
    content = (tmp_path / 'a.pth').read_bytes()
    for size in (0, 9, 600, len(content) - 1):
        (tmp_path / 'a.pth').write_bytes(content[:size])
        assert 'damaged' in refusal(tmp_path / 'a.pth')
    if save is torch.save:
        (tmp_path / 'a.pth').write_bytes(content.replace(struct.pack('<2f', 1, 1), struct.pack('<2f', 1, 2), 1))
        assert 'checksum of a/data/0 is wrong' in refusal(tmp_path / 'a.pth')


def test_no_checkpoints_at_all(tmp_path, monkeypatch):
    (tmp_path / 'a.pth').write_text('<!DOCTYPE html><title>Quota exceeded</title>')
    assert 'is no checkpoint' in refusal(tmp_path / 'a.pth')
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'a.pth')
    assert 'TorchScript' in refusal(tmp_path / 'a.pth')
    monkeypatch.setattr(torch, '__version__', '2.9.1')  # whose reader of pickles is not safe
    assert 'torch to 2.10 or newer' in refusal(write(tmp_path / 'a.pth', tensor_pickle()))
    save_file({'w': torch.ones(1)}, tmp_path / 'a.pth')
    assert load(tmp_path / 'a.pth')[0]['w'] == 1
