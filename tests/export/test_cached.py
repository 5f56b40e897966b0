"""Models exported once for ONNX Runtime: what is made again, what is timed, and what happens where it cannot be."""
from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from torch import nn

from timm_lfnsb.errors import UserError
from timm_lfnsb.export import cached
from timm_lfnsb.export.cached import cache_folder, in_faster_runtime, in_onnxruntime
from timm_lfnsb.export.exported import ExportedModel

for name in ('onnx', 'onnxruntime'):
    pytest.importorskip(name, reason="pip install 'timm-lfnsb[export]' to test exports")

IMAGES = np.random.default_rng(3).standard_normal((5, 3, 48, 48), np.float32)


def tiny(seed: int = 0, size: int = 48) -> nn.Module:
    """One of timm's own small models for tests, which is exported in no time."""
    torch.manual_seed(seed)
    model = timm.create_model('test_resnet', num_classes=8).eval()
    nn.init.normal_(model.get_classifier().weight)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, size, size))
    return model


def right(network: ExportedModel, model: nn.Module) -> bool:
    with torch.no_grad():
        expected = model(torch.from_numpy(IMAGES)).numpy()
    return np.abs(network(IMAGES) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv('TIMM_LFNSB_CACHE', str(tmp_path / 'a' / 'cache'))
    return tmp_path / 'a' / 'cache'


@pytest.fixture
def exports(monkeypatch):
    """A list that grows by the file of each export."""
    files, export = [], cached.export_model
    monkeypatch.setattr(cached, 'export_model', lambda model, file, **options: (
        files.append(file), export(model, file, **options)))
    return files


def test_a_model_is_exported_once(folder, exports):
    model = tiny()
    networks = [in_onnxruntime(model), in_onnxruntime(tiny())]
    assert all(right(network, model) for network in networks)
    assert exports == [networks[0].path] == [networks[1].path] == list(folder.glob('*.onnx'))
    others = [in_onnxruntime(other) for other in (tiny(seed=1), tiny(size=40))]
    assert len(exports) == 3 and right(others[0], tiny(seed=1)) and not right(others[0], model)


def test_those_who_come_at_once_export_once(exports):
    model = tiny()
    with ThreadPoolExecutor(4) as pool:
        assert all(right(network, model) for network in pool.map(in_onnxruntime, [model] * 4))
    assert len(exports) == 1


@pytest.mark.parametrize('damage', ['cut short', 'empty', 'other weights', 'other outputs'])
def test_a_damaged_file_is_made_again(exports, damage):
    model, other = tiny(), tiny(seed=1)
    file = in_onnxruntime(model).path
    if damage.startswith('other'):
        if damage == 'other outputs':
            other.reset_classifier(1)
        shutil.copy(in_onnxruntime(other).path, file)
    else:
        file.write_bytes(file.read_bytes()[:5000 if damage == 'cut short' else 0])
    exports.clear()
    assert right(in_onnxruntime(model), model) and exports == [file]
    assert right(in_onnxruntime(model), model) and exports == [file]


@pytest.mark.parametrize('torch_wins', [False, True])
def test_the_faster_one_is_taken_and_timed_once(folder, monkeypatch, torch_wins):
    model, timed = tiny(), []

    def measure(given, network, batch_size):
        assert given is model and right(network, model)
        timed.append(batch_size)
        return {'torch': 1. if torch_wins else 3., 'onnxruntime': 2.}

    monkeypatch.setattr(cached, 'measure', measure)
    for batch_size in (4, 4, 1, 4):
        network = in_faster_runtime(model, batch_size)
        assert network is model if torch_wins else right(network, model)
    assert timed == [4, 1]
    for file in folder.glob('*.json'):
        file.write_text('{')
    in_faster_runtime(model, 4)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 7)
    in_faster_runtime(model, 4)
    assert timed == [4, 1, 4, 4]


def test_a_slow_model_is_timed_a_few_times():
    model, batches = tiny(), []
    in_onnxruntime(model)

    def slow(_, args):
        batches.append(len(args[0]))
        time.sleep(0.3)

    model.register_forward_pre_hook(slow)
    assert isinstance(in_faster_runtime(model, 6), ExportedModel)
    assert 1 <= batches.count(6) <= 2


def test_without_onnxruntime(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    model = tiny()
    assert in_faster_runtime(model, 1) is model
    with pytest.raises(UserError, match=r'it needs onnxruntime: pip install "timm-lfnsb\[export\]"'):
        in_onnxruntime(model)
    assert not folder.exists()


def test_what_cannot_be_exported_or_written(folder):
    model, odd = tiny(), tiny()
    odd.forward = lambda images: torch.linalg.pinv(model(images))  # no operator of ONNX
    assert in_faster_runtime(odd, 1) is odd
    with pytest.raises(UserError, match='cannot be exported as onnx'):
        in_onnxruntime(odd)
    assert not list(folder.glob('*.onnx'))
    shutil.rmtree(folder)
    folder.write_text('in the way')
    assert in_faster_runtime(model, 1) is model
    with pytest.raises(UserError, match=r'cache folder .*cache: .*exists'):
        in_onnxruntime(model)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TIMM_LFNSB_CACHE', 'here')
    assert cache_folder() == tmp_path / 'here'
    monkeypatch.delenv('TIMM_LFNSB_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'caches'))
    assert cache_folder() == tmp_path / 'caches' / 'timm_lfnsb'
    monkeypatch.delenv('XDG_CACHE_HOME')
    monkeypatch.setenv('HOME', str(tmp_path))
    assert cache_folder() == tmp_path / '.cache' / 'timm_lfnsb'
