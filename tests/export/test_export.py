"""Exported files: the same outputs in every runtime, what they say about themselves, and what is refused."""
from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_lfnsb.bench import process
from timm_lfnsb.cli import main
from timm_lfnsb.data.images import sample_picture
from timm_lfnsb.errors import UserError
from timm_lfnsb.export import export
from timm_lfnsb.export.export import export_model
from timm_lfnsb.export.exported import ExportedModel, is_exported, openvino_core
from timm_lfnsb.export.lowering import RUNTIMES, lower_network
from timm_lfnsb.labels import EXPRESSIONS_8

onnx = pytest.importorskip('onnx', reason="pip install 'timm-lfnsb[export]' to test exports")
onnxruntime = pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]' to test exports")

SIZE = 48  # a final map of 3x3, odd as at 112 px


def create(name: str, img_size: int = SIZE, in_chans: int = 3) -> nn.Module:
    """A model whose norms and PReLUs hide nothing: random statistics, slopes that are negative and above one."""
    torch.manual_seed(1)
    model = timm.create_model(f'{name}.affectnet8', img_size=img_size, in_chans=in_chans).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(in_chans, img_size, img_size))
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.6, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.PReLU):
            nn.init.normal_(module.weight, 0.25, 0.2)
    nn.init.normal_(model.get_classifier().weight)
    return model


def outputs(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).numpy()


def close(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return got.shape == expected.shape and bool(np.abs(got - expected).max() < tolerance * np.abs(expected).max())


def run_onnx(file: Path, images: torch.Tensor) -> np.ndarray:
    """Without this package's own runtime code."""
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


def needs(suffix: str) -> None:
    """Skip where the runtime of a file is not installed."""
    package, extra = {'.xml': ('openvino', 'export'), '.pte': ('executorch.runtime', 'executorch')}.get(
        suffix, ('onnx', 'export'))
    pytest.importorskip(package, reason=f"pip install 'timm-lfnsb[{extra}]'", exc_type=ImportError)


@pytest.fixture
def tiny() -> nn.Module:
    """One of timm's own small models for tests, for what does not depend on ours: it is exported in no time."""
    model = timm.create_model('test_resnet', num_classes=8).eval()
    model.pretrained_cfg = dict(
        model.pretrained_cfg, input_size=(3, SIZE, SIZE), crop_pct=1, label_names=list(EXPRESSIONS_8))
    return model


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """From a network's name and a suffix to the network, its file for any batch, and the report; each made once."""
    @functools.cache
    def export_once(name: str, suffix: str):
        needs(suffix)
        model, file = create(name), tmp_path_factory.mktemp(name) / f'model{suffix}'
        return model, file, export_model(model, file, batch=None)

    return export_once


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('name, in_chans', [('lfnsb', 3), ('mfn', 1), ('ddamfn', 3), ('mobilefacenet', 3)])
def test_lowered_networks_compute_the_same(name, in_chans, runtime):
    model = create(name, in_chans=in_chans)
    images = torch.randn(2, in_chans, SIZE, SIZE)
    expected = outputs(model, images)
    lowered = lower_network(model, runtime)
    assert close(outputs(lowered, images), expected)
    assert np.array_equal(outputs(model, images), expected)  # the model itself is left alone
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in lowered.modules())
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -1, 3)
    lowered = lower_network(timm.utils.reparameterize_model(model), runtime)
    assert close(outputs(lowered, images), outputs(model, images))  # with steep slopes


@pytest.mark.parametrize('name', ['lfnsb', 'ddamfn'])
def test_onnx_file(name, exported):
    """Parity and metadata, by onnx and ONNX Runtime alone; any batch; no leftovers."""
    model, file, report = exported(name, '.onnx')
    assert [path.name for path in file.parent.iterdir()] == ['model.onnx']
    assert report.path == file and report.count == 32 and report.agreement == 1 and report.relative_difference < 1e-5
    assert report.size == file.stat().st_size and 'labels agree on 32 of 32' in str(report)
    images = torch.randn(5, 3, SIZE, SIZE)
    expected = outputs(model, images)
    for batch in (1, 3, 5):
        assert close(run_onnx(file, images[:batch]), expected[:batch])
    metadata = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(metadata['label_names']) == list(EXPRESSIONS_8)
    assert json.loads(metadata['input_size']) == [3, SIZE, SIZE]
    config = resolve_model_data_config(model)
    assert all(json.loads(metadata[key]) == pytest.approx(config[key]) for key in ('mean', 'std'))
    assert (metadata['model'], metadata['input'], metadata['precision']) == (f'{name}.affectnet8', 'normalized', 'fp32')


@pytest.mark.parametrize('suffix, options', [
    ('.onnx', dict(batch=2, with_preprocess=True)),
    ('.onnx', dict(precision='fp16')),
    ('.xml', dict(batch=None, precision='fp16')),
    ('.pt2', dict(batch=None, with_preprocess=True, precision='fp16')),
    pytest.param('.pte', dict(batch=2), marks=pytest.mark.slow),
])
def test_round_trip(suffix, options, tiny, tmp_path):
    """The model's outputs for more images than the batch has; images of another size are refused, not answered."""
    needs(suffix)
    model, file, half = tiny, tmp_path / f'model{suffix}', options.get('precision') == 'fp16'
    report = export_model(model, file, **options)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == (['.bin', '.xml'] if suffix == '.xml' else [suffix])
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    if half:
        assert report.agreement >= 0.96 and 1e-5 < report.relative_difference < 0.05
        size = sum(4 * parameter.numel() for parameter in model.parameters())
        assert suffix != '.onnx' or file.stat().st_size < 0.6 * size
    runtime = ExportedModel(file)
    assert runtime.batch_size == options.get('batch', 1)
    assert runtime.value('label_names') == list(EXPRESSIONS_8) and runtime.value('input_size') == [3, SIZE, SIZE]
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = torch.stack([transform(Image.fromarray(image)) for image in pixels])
    given = pixels if options.get('with_preprocess') else images.numpy()
    assert close(runtime(given), outputs(model, images), 0.05 if half else 1e-4)
    for other in (np.concatenate([given, given], 1), np.concatenate([given, given], 2)):
        with pytest.raises(UserError, match='does not run'):
            runtime(other)


def test_openvino_comes_without_its_telemetry():
    pytest.importorskip('openvino', reason="pip install 'timm-lfnsb[export]' to test exports")
    code = ('import sys; from timm_lfnsb.export.exported import import_openvino; print(import_openvino().__name__, '
            '[name for name in sys.modules if "openvino_telemetry" in name])')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == 'openvino []'


def test_openvino_graph_and_its_end_in_another_thread(exported):
    """OpenVINO's plugin would free the signal stack of the main thread then; see `openvino_core`."""
    model, file, _ = exported('mfn', '.xml')
    images = torch.randn(3, 3, SIZE, SIZE)
    assert close(ExportedModel(file)(images.numpy()), outputs(model, images), 1e-4)
    network = openvino_core().read_model(file)
    assert json.loads(network.get_rt_info(['timm_lfnsb', 'label_names']).astype(str)) == list(EXPRESSIONS_8)
    kinds = {operation.get_type_name() for operation in network.get_ops()}
    assert {'PRelu', 'AvgPool', 'HSwish'} <= kinds and not kinds & {'Transpose', 'Concat', 'Split', 'ReduceMean'}
    code = '''if True:
        import faulthandler, runpy, signal, subprocess, sys, threading
        ExportedModel = runpy.run_path(sys.argv[2])['import_exported']().ExportedModel  # without torch: quick
        faulthandler.enable()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's DataLoader does
        models = [ExportedModel(sys.argv[1])]
        thread = threading.Thread(target=models.clear)
        thread.start()
        thread.join()
        subprocess.run([sys.executable, '-c', ''], check=True)
        print('alive')
    '''
    result = subprocess.run([sys.executable, '-c', code, str(file), process.__file__], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == 'alive\n', result.stderr


@pytest.fixture(scope='module')
def crops(tmp_path_factory) -> Path:
    """Crops of the portrait, in a data set whose test split must not be calibrated on."""
    root = tmp_path_factory.mktemp('crops')
    (root / 'train' / 'happiness').mkdir(parents=True)
    (root / 'test').mkdir()
    (root / 'test' / 'broken.png').write_bytes(b'not an image')
    portrait, rng = Image.open(sample_picture()), np.random.default_rng(0)
    for i in range(42):
        side, x, y = rng.integers(70, 130), rng.integers(150, 180), rng.integers(40, 70)
        portrait.crop((x, y, x + side, y + side)).save(root / 'train' / 'happiness' / f'{i}.png')
    return root


@pytest.mark.parametrize('suffix', ['.onnx', pytest.param('.xml', marks=pytest.mark.slow)])
def test_int8(suffix, crops, tmp_path):
    needs(suffix)
    model = timm.create_model('lfnsb', pretrained=True)  # random weights do not tell labels apart
    file = tmp_path / f'model{suffix}'
    report = export_model(model, file, precision='int8', calibrate=crops)
    assert report.agreement is not None and report.agreement >= 0.85
    assert ExportedModel(file).metadata['precision'] == 'int8' and report.size < 7e6
    if suffix == '.onnx':
        weights = onnx.load(file).graph.initializer
        assert sum(weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4 for weight in weights) > 60


def test_other_models_and_channels(tiny, tmp_path, monkeypatch):
    """One channel and no label names, without scikit-image's sample picture; no classifier; values beyond half."""
    monkeypatch.setitem(sys.modules, 'skimage', None)
    grey = timm.create_model('test_resnet', in_chans=1, num_classes=5).eval()
    grey.pretrained_cfg = dict(grey.pretrained_cfg, input_size=(1, 64, 64), label_names=None)
    assert export_model(grey, tmp_path / 'r.onnx').agreement == 1
    runtime = ExportedModel(tmp_path / 'r.onnx')
    assert 'label_names' not in runtime.metadata and runtime.value('input_size') == [1, 64, 64]
    assert len(runtime.value('mean')) == 1
    nn.init.constant_(tiny.fc.weight, 1e6)
    with pytest.raises(UserError, match='disagrees with the model'):
        export_model(tiny, tmp_path / 'huge.onnx', precision='fp16')
    tiny.reset_classifier(0)
    tiny.pretrained_cfg['label_names'] = None
    assert export_model(tiny, tmp_path / 'e.onnx').agreement is None


@pytest.mark.parametrize('change, precision, message', [
    (0.5, 'fp32', 'disagrees with the model, so it was not kept'),
    (0.03, 'fp16', 'labels agree on 0 of 32'),  # within the tolerance, but enough for the second label
])
def test_disagreement_leaves_no_file(change, precision, message, tiny, tmp_path, monkeypatch):
    nn.init.constant_(tiny.fc.weight, 0.)
    tiny.fc.bias.data = torch.tensor([1., 1.] + [0.] * 6)
    old = tmp_path / 'old.onnx'
    assert export_model(tiny, old).agreement == 1  # a tie is no disagreement
    content = old.read_bytes()

    def wrong(model, *_):
        model = timm.utils.reparameterize_model(model).eval()
        model.fc.bias.data[1] += change
        return model

    tiny.fc.bias.data[0] += 0.02
    monkeypatch.setattr(export, 'lower_network', wrong)
    for file in (tmp_path / 'new.onnx', old):
        with pytest.raises(UserError, match=message):
            export_model(tiny, file, precision=precision)
    assert [path.name for path in tmp_path.iterdir()] == [old.name] and old.read_bytes() == content


@pytest.mark.parametrize('arguments, message', [
    (dict(out='m.bin'), 'm.bin: end the name in one of'),
    (dict(out='m.pte', batch=None), 'fixed batch'),
    (dict(out='m.pt2', precision='int8', calibrate='x'), 'not for torch-export'),
    (dict(out='m.onnx', precision='int8'), '--calibrate'),
    (dict(out='m.onnx', calibrate='x'), '--calibrate'),
    (dict(out='m.onnx', precision='int8', calibrate='nowhere'), 'no folder nowhere'),
    (dict(out='m.onnx', precision='int8', calibrate='empty'), 'empty has no images'),
    (dict(out='m.onnx', precision='int8', calibrate='few'), 'few has 1 images'),
    (dict(out='no/m.onnx'), 'make it first'),
])
def test_refused(tiny, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('empty', 'few'):
        (tmp_path / folder).mkdir()
    Image.new('L', (9, 9)).save('few/face.png')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=message):
        export_model(tiny, **arguments)
    assert sorted(tmp_path.rglob('*')) == before


def test_what_fails_is_one_sentence(tiny, tmp_path, monkeypatch):
    """A failing exporter, and packages that are missing when a file is written or opened."""
    def fail(*_, **__):
        raise ValueError('no\nsuch operator')

    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(UserError, match=r'cannot be exported as onnx: no such operator'):
        export_model(tiny, tmp_path / 'm.onnx')
    for package in ('onnx', 'onnxruntime', 'executorch', 'executorch.runtime'):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'exported as onnx: it needs onnx: pip install "timm-lfnsb\[export\]"'):
        export_model(tiny, tmp_path / 'm.onnx')
    assert not list(tmp_path.iterdir())
    for suffix, package, extra in (('.onnx', 'onnxruntime', 'export'), ('.pte', 'executorch', 'executorch')):
        (tmp_path / f'm{suffix}').touch()
        with pytest.raises(UserError, match=rf'needs {package}: pip install "timm-lfnsb\[{extra}\]"'):
            ExportedModel(tmp_path / f'm{suffix}')


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2', '.pte'])
def test_damaged_files(suffix, tmp_path):
    file = tmp_path / f'm{suffix}'
    with pytest.raises(UserError, match='there is no file'):
        ExportedModel(file)
    file.write_bytes(b'damaged')
    with pytest.raises(UserError, match=r'cannot be opened|needs'):
        ExportedModel(file)
    assert is_exported(file) and is_exported(str(file))
    assert not any(map(is_exported, ('lfnsb.ferplus', f'hf-hub:a/b{suffix}', f'local-dir:x{suffix}', 'm.safetensors')))


def test_command(tmp_path):
    file = tmp_path / 'm.onnx'
    result = CliRunner().invoke(main, ['export', 'lfnsb', str(file)])
    assert result.exit_code == 0 and 'labels agree on 32 of 32' in result.output
    assert ExportedModel(file).metadata['model'] == 'lfnsb.ferplus'


@pytest.mark.parametrize('reparameterize', [True, False])
def test_torchs_exporter_with_a_dynamic_size(reparameterize, tmp_path):
    """The graph holds sizes as numbers, so it must refuse other ones, also where their maps would fit."""
    model, file = create('lfnsb', 64), tmp_path / 'm.onnx'
    images = torch.randn(2, 3, 64, 64)
    expected = outputs(model, images)
    if reparameterize:
        model = timm.utils.reparameterize_model(model)
    axes = {'x': {0: 'batch', 2: 'height', 3: 'width'}}
    torch.onnx.export(model, (images[:1],), file, dynamo=False, input_names=['x'], dynamic_axes=axes)
    assert close(run_onnx(file, images), expected)
    for height, width in ((80, 64), (64, 80), (128, 128), (32, 128), (128, 32)):  # the last with as many pixels
        with pytest.raises(Exception, match='Non-zero status code'):
            run_onnx(file, torch.randn(1, 3, height, width))
