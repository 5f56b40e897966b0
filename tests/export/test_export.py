"""Exported files: the same outputs in every runtime, what they say about themselves, and what is refused."""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.export import export
from timm_lfnsb.export.export import export_model
from timm_lfnsb.export.lowering import RUNTIMES, lower_network
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.exported import ExportedModel, is_exported, openvino_core

onnx = pytest.importorskip('onnx', reason="pip install 'timm-lfnsb[export]' to test exports")
onnxruntime = pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]' to test exports")

NAMES = ('lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet')
SIZE = 48  # a final map of 3x3, odd as at 112 px


def randomize(model: nn.Module) -> nn.Module:
    """Give norms statistics and PReLUs slopes that hide nothing: negative, and in places above one."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.6, 1.5)
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, nn.PReLU):
            nn.init.normal_(module.weight, 0.25, 0.2)
    nn.init.normal_(model.get_classifier().weight)
    return model.eval()


def create(name: str, img_size: int = SIZE, **kwargs) -> nn.Module:
    torch.manual_seed(1)
    model = timm.create_model(f'{name}.affectnet8', img_size=img_size, **kwargs)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(model.in_chans, img_size, img_size))
    return randomize(model)


def outputs(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(images).numpy()


def run_onnx(file: Path, images: torch.Tensor) -> np.ndarray:
    """Without this package's own runtime code."""
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


@pytest.fixture(scope='module')
def small():
    return create('lfnsb')


@pytest.fixture(scope='module')
def small_file(small, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp('export') / 'small.onnx'
    export_model(small, file)
    return file


@pytest.mark.parametrize('runtime', RUNTIMES)
@pytest.mark.parametrize('name', NAMES)
def test_lowered_networks_compute_the_same(name, runtime):
    model = create(name)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = outputs(model, images)
    lowered = lower_network(model, runtime)
    assert np.abs(outputs(lowered, images) - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(outputs(model, images), expected)  # the model itself is left alone
    assert not any(isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) for module in lowered.modules())


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_lowered_networks_of_grey_images(runtime):
    model = create('mfn', in_chans=1)
    images = torch.randn(2, 1, SIZE, SIZE)
    expected = outputs(model, images)
    assert np.abs(outputs(lower_network(model, runtime), images) - expected).max() < 1e-5 * np.abs(expected).max()


def test_exported_programs_hold_weights_as_their_convolutions_take_them(small):
    """Delegates such as XNNPACK's want a convolution's weight as it is, not a view of something."""
    program = torch.export.export(lower_network(small, 'torch'), (torch.zeros(1, 3, SIZE, SIZE),))
    convolutions = [node for node in program.graph.nodes if 'conv2d' in str(node.target)]
    assert len(convolutions) > 100 and all(node.args[1].op == 'placeholder' for node in convolutions)


@pytest.mark.parametrize('runtime', RUNTIMES)
def test_lowered_from_reparameterised_with_steep_slopes_and_without_classifier(runtime):
    model = create('lfnsb')
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -1, 3)
            with torch.no_grad():
                module.weight[0] = 1
    model.reset_classifier(0)
    images = torch.randn(2, 3, SIZE, SIZE)
    expected = outputs(model, images)
    assert expected.shape == (2, 256)
    lowered = lower_network(timm.utils.reparameterize_model(model), runtime)
    assert np.abs(outputs(lowered, images) - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('name', NAMES)
def test_onnx_file(name, tmp_path):
    """Parity and metadata, by onnx and ONNX Runtime alone; any batch; no leftovers."""
    model = create(name)
    file = tmp_path / 'model.onnx'
    report = export_model(model, file, batch=None)
    assert [path.name for path in tmp_path.iterdir()] == ['model.onnx']
    assert report.path == file and report.count == 32 and report.agreement == 1 and report.relative_difference < 1e-5
    assert report.size == file.stat().st_size and 'labels agree on 32 of 32' in str(report)
    images = torch.randn(5, 3, SIZE, SIZE)
    expected = outputs(model, images)
    for batch in (1, 3, 5):
        got = run_onnx(file, images[:batch])
        assert np.abs(got - expected[:batch]).max() < 1e-5 * np.abs(expected).max()

    network = onnx.load(file)
    metadata = {entry.key: entry.value for entry in network.metadata_props}
    assert json.loads(metadata['label_names']) == list(EXPRESSIONS_8)
    assert json.loads(metadata['input_size']) == [3, SIZE, SIZE]
    config = resolve_model_data_config(model)
    assert json.loads(metadata['mean']) == pytest.approx(config['mean'])
    assert json.loads(metadata['std']) == pytest.approx(config['std'])
    assert (metadata['model'], metadata['input'], metadata['precision']) == (f'{name}.affectnet8', 'normalized', 'fp32')

    kinds = {node.op_type for node in network.graph.node}
    unwanted = {'Transpose', 'Concat', 'Split', 'Slice', 'Gather', 'PRelu', 'ReduceMean', 'BatchNormalization'}
    assert not kinds & unwanted
    if name != 'mobilefacenet':
        assert {'AveragePool', 'HardSwish'} <= kinds


@pytest.mark.parametrize('batch', [1, None])
def test_onnx_runtime_keeps_its_layout(batch, tmp_path):
    """In the blocked layout from the first convolution to the classifier, also where the batch has no number."""
    file, optimized = tmp_path / 'model.onnx', tmp_path / 'optimized.onnx'
    export_model(create('lfnsb'), file, batch=batch)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3  # it says that such a file is for this machine alone
    onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    nodes = onnx.load(optimized).graph.node
    if not any('nchwc' in node.domain for node in nodes):
        pytest.skip('this build of ONNX Runtime has no blocked layout (it needs x86-64 or a newer release)')
    assert [node.op_type for node in nodes if node.op_type.startswith('Reorder')] == ['ReorderOutput']
    assert sum(node.op_type == 'Conv' for node in nodes) == sum('nchwc' in node.domain and node.op_type == 'Conv'
                                                                for node in nodes)
    # Activations and sums are part of a convolution: alone they would run on one thread at batch 1.
    assert not {'Relu', 'HardSwish', 'Sigmoid', 'Add', 'Sum'} & {node.op_type for node in nodes}
    # Each map is multiplied once, with the product of its enlarged gates.
    enlarged = {output for node in nodes if node.op_type == 'Upsample' for output in node.output}
    assert sorted(len(enlarged & set(node.input)) for node in nodes if node.op_type == 'Mul') == [0] * 34 + [2] * 34


def test_preprocessing_inside_is_timms(small, tmp_path):
    file = tmp_path / 'model.onnx'
    export_model(small, file, batch=2, with_preprocess=True)
    crop = Image.fromarray(skimage.data.astronaut()[60:180, 160:280]).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    transform = create_transform(**resolve_model_data_config(small), is_training=False)
    expected = outputs(small, transform(crop)[None])
    runtime = ExportedModel(file)
    assert runtime.metadata['input'] == 'uint8' and runtime.batch_size == 2
    got = runtime(np.asarray(crop)[None])
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(UserError, match='does not run'):
        runtime(np.zeros((2, SIZE, SIZE, 3), np.float32))


def test_half_precision_halves_the_file(small, small_file, tmp_path):
    file = tmp_path / 'half.onnx'
    report = export_model(small, file, precision='fp16')
    assert report.precision == 'fp16' and report.agreement >= 0.96
    assert file.stat().st_size < 0.6 * small_file.stat().st_size
    images = torch.randn(1, 3, SIZE, SIZE)
    difference = np.abs(run_onnx(file, images) - run_onnx(small_file, images)).max()
    assert 0 < difference < 0.05 * np.abs(outputs(small, images)).max()
    huge = create('lfnsb')
    nn.init.constant_(huge.get_classifier().weight, 1e6)
    with pytest.raises(UserError, match='beyond half precision'):
        export_model(huge, tmp_path / 'huge.onnx', precision='fp16')


@pytest.fixture(scope='module')
def crops(tmp_path_factory) -> Path:
    """Crops of the portrait, in a data set whose test split must not be calibrated on."""
    root = tmp_path_factory.mktemp('crops')
    (root / 'train' / 'happiness').mkdir(parents=True)
    (root / 'test').mkdir()
    (root / 'test' / 'broken.png').write_bytes(b'not an image')
    rng = np.random.default_rng(0)
    for i in range(42):
        side = int(rng.integers(70, 130))
        x, y = (int(value) for value in rng.integers(150, 180, 2))
        crop = skimage.data.astronaut()[max(0, y - 110):y - 110 + side, x:x + side]
        Image.fromarray(crop).save(root / 'train' / 'happiness' / f'{i}.png')
    return root


@pytest.mark.parametrize('suffix', ['.onnx', pytest.param('.xml', marks=pytest.mark.slow)])
def test_int8(suffix, crops, tmp_path):
    if suffix == '.xml':
        pytest.importorskip('openvino', reason="pip install 'timm-lfnsb[export]'")
    model = timm.create_model('lfnsb', pretrained=True)  # random weights do not tell labels apart
    file = tmp_path / f'model{suffix}'
    report = export_model(model, file, precision='int8', calibrate=crops)
    assert report.agreement is not None and report.agreement >= 0.85 and report.max_difference > 0
    runtime = ExportedModel(file)
    assert runtime.metadata['precision'] == 'int8' and len(runtime.value('label_names')) == 8
    assert report.size < 7e6
    if suffix == '.onnx':
        weights = onnx.load(file).graph.initializer
        assert sum(weight.data_type == onnx.TensorProto.INT8 and len(weight.dims) == 4 for weight in weights) > 60


def test_openvino_round_trip(tmp_path):
    pytest.importorskip('openvino', reason="pip install 'timm-lfnsb[export]'")
    model = create('mfn')
    file = tmp_path / 'model.xml'
    report = export_model(model, file, batch=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.bin', 'model.xml']
    assert report.size == sum(path.stat().st_size for path in tmp_path.iterdir())
    network = openvino_core().read_model(file)
    assert json.loads(network.get_rt_info(['timm_lfnsb', 'label_names']).astype(str)) == list(EXPRESSIONS_8)
    images = torch.randn(3, 3, SIZE, SIZE)
    expected = outputs(model, images)
    runtime = ExportedModel(file)
    assert runtime.batch_size is None and runtime.value('input_size') == [3, SIZE, SIZE]
    assert np.abs(runtime(images.numpy()) - expected).max() < 1e-4 * np.abs(expected).max()
    kinds = {operation.get_type_name() for operation in network.get_ops()}
    assert {'PRelu', 'AvgPool', 'HSwish'} <= kinds and not kinds & {'Transpose', 'Concat', 'Split', 'ReduceMean'}


def test_openvino_model_may_be_dropped_in_another_thread(tmp_path):
    """OpenVINO's plugin would free the signal stack of the main thread then; see `openvino_core`."""
    pytest.importorskip('openvino', reason="pip install 'timm-lfnsb[export]'")
    file = tmp_path / 'model.xml'
    export_model(create('mobilefacenet'), file)
    code = '''if True:
        import faulthandler, signal, subprocess, sys, threading
        from timm_lfnsb.predict.exported import ExportedModel
        faulthandler.enable()
        signal.signal(signal.SIGCHLD, lambda *_: None)  # as torch's DataLoader does
        models = [ExportedModel(sys.argv[1])]
        thread = threading.Thread(target=models.clear)
        thread.start()
        thread.join()
        subprocess.run([sys.executable, '-c', ''], check=True)
        print('alive')
    '''
    result = subprocess.run([sys.executable, '-c', code, str(file)], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == 'alive\n', result.stderr


@pytest.mark.parametrize('precision', ['fp32', pytest.param('fp16', marks=pytest.mark.slow)])
def test_torch_export_round_trip(precision, tmp_path):
    model = create('mobilefacenet')
    file = tmp_path / 'model.pt2'
    export_model(model, file, batch=None, precision=precision, with_preprocess=precision == 'fp32')
    runtime = ExportedModel(file)
    assert runtime.batch_size is None and runtime.value('label_names') == list(EXPRESSIONS_8)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
    config = resolve_model_data_config(model)
    images = ((pixels / 255 - config['mean']) / config['std']).astype(np.float32).transpose(0, 3, 1, 2)
    expected = outputs(model, torch.from_numpy(images))
    got = runtime(pixels if precision == 'fp32' else np.ascontiguousarray(images))
    assert np.abs(got - expected).max() < (1e-4 if precision == 'fp32' else 0.05) * np.abs(expected).max()


def test_executorch_round_trip(tmp_path):
    try:
        from executorch.runtime import Runtime  # noqa: F401
    except Exception as error:
        pytest.skip(f'pip install executorch, of a release that fits the installed torch, to test it ({error})')
    model = create('lfnsb')
    file = tmp_path / 'model.pte'
    export_model(model, file, batch=2)
    runtime = ExportedModel(file)
    assert runtime.batch_size == 2 and runtime.value('label_names') == list(EXPRESSIONS_8)
    images = torch.randn(3, 3, SIZE, SIZE)
    expected = outputs(model, images)
    assert np.abs(runtime(images.numpy()) - expected).max() < 1e-4 * np.abs(expected).max()


def test_other_timm_models_and_channels(tmp_path):
    """A model of timm itself, of one channel and without label names."""
    torch.manual_seed(0)
    model = timm.create_model('resnet10t', in_chans=1, num_classes=5).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(1, 64, 64), label_names=None)
    report = export_model(model, tmp_path / 'r.onnx')
    assert report.agreement == 1
    runtime = ExportedModel(tmp_path / 'r.onnx')
    assert 'label_names' not in runtime.metadata and runtime.value('input_size') == [1, 64, 64]
    assert len(runtime.value('mean')) == 1
    embedding = create('lfn_small')
    embedding.reset_classifier(0)
    embedding.pretrained_cfg = dict(embedding.pretrained_cfg, label_names=None)
    assert export_model(embedding, tmp_path / 'e.onnx').agreement is None


@pytest.mark.parametrize(
    'suffix', ['.onnx', *(pytest.param(suffix, marks=pytest.mark.slow) for suffix in ('.xml', '.pt2'))])
def test_disagreement_leaves_no_file(small, suffix, tmp_path, monkeypatch):
    if suffix == '.xml':
        pytest.importorskip('openvino', reason="pip install 'timm-lfnsb[export]'")

    def wrong(model, *_, **__):
        model = timm.utils.reparameterize_model(model).eval()
        model.fc.weight.data[0] += 0.5
        return model

    monkeypatch.setattr(export, 'lower_network', wrong)
    model = create('mobilefacenet') if suffix == '.pt2' else small
    old = tmp_path / f'old{suffix}'
    old.write_text('old')
    for file in (tmp_path / f'new{suffix}', old):
        with pytest.raises(UserError, match='disagrees with the model, so it was not kept'):
            export_model(model, file)
    assert [path.name for path in tmp_path.iterdir()] == [old.name] and old.read_text() == 'old'


def test_label_agreement_counts(small, tmp_path, monkeypatch):
    """Outputs within the tolerance whose labels differ are refused as well."""
    tied = create('lfnsb')
    nn.init.constant_(tied.fc.weight, 0.)
    tied.fc.bias.data = torch.tensor([1., 1.] + [0.] * 6)
    assert export_model(tied, tmp_path / 'tied.onnx').agreement == 1  # a tie is no disagreement

    def swapped(model, *_, **__):
        model = timm.utils.reparameterize_model(model).eval()
        model.fc.bias.data[1] += 0.03
        return model

    tied.fc.bias.data[0] += 0.02
    monkeypatch.setattr(export, 'lower_network', swapped)
    with pytest.raises(UserError, match='labels agree on 0 of 32'):
        export_model(tied, tmp_path / 'swapped.onnx', precision='fp16')
    assert not (tmp_path / 'swapped.onnx').exists()


def test_a_failing_exporter_is_one_sentence(small, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError('no\nsuch operator')

    monkeypatch.setattr(torch.onnx, 'export', fail)
    with pytest.raises(UserError, match=r'cannot be exported as onnx: no such operator$'):
        export_model(small, tmp_path / 'm.onnx')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('arguments, message', [
    (dict(out='m.bin'), 'm.bin: end it in one of'),
    (dict(out='m'), 'format is not clear'),
    (dict(out='m.onnx', format='openvino'), 'of the format onnx, not openvino'),
    (dict(out='m.onnx', format='tflite'), 'not tflite'),
    (dict(out='m.onnx', batch=0), 'batch must be 1 or more'),
    (dict(out='m.onnx', precision='fp8'), "no precision 'fp8'"),
    (dict(out='m.pte', batch=None), 'fixed batch'),
    (dict(out='m.pte', precision='fp16'), 'fp32'),
    (dict(out='m.pt2', precision='int8', calibrate='x'), 'not for torch-export'),
    (dict(out='m.onnx', precision='int8'), '--calibrate'),
    (dict(out='m.onnx', calibrate='x'), '--calibrate'),
    (dict(out='m.onnx', precision='int8', calibrate='nowhere'), 'no folder nowhere'),
    (dict(out='m.onnx', precision='int8', calibrate='empty'), 'empty has no images'),
    (dict(out='m.onnx', precision='int8', calibrate='few'), 'few has 1 images'),
    (dict(out='no/m.onnx'), 'make it first'),
    (dict(out='folder.onnx'), 'is a folder'),
])
def test_refused(small, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('empty', 'few', 'folder.onnx'):
        (tmp_path / folder).mkdir()
    Image.new('L', (9, 9)).save('few/face.png')
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(UserError, match=message):
        export_model(small, **arguments)
    assert sorted(tmp_path.rglob('*')) == before


def test_missing_packages(small, small_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(UserError, match=r"needs onnx: pip install 'timm-lfnsb\[export\]'"):
        export_model(small, tmp_path / 'm.onnx')
    monkeypatch.setitem(sys.modules, 'openvino', None)
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'timm-lfnsb\[export\]'"):
        ExportedModel(small_file)
    if importlib.util.find_spec('executorch') is None:
        with pytest.raises(UserError, match='needs executorch: pip install executorch'):
            export_model(create('mobilefacenet'), tmp_path / 'm.pte')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2', '.pte'])
def test_damaged_files(suffix, tmp_path):
    file = tmp_path / f'm{suffix}'
    with pytest.raises(UserError, match='there is no file'):
        ExportedModel(file)
    file.write_bytes(b'damaged')
    with pytest.raises(UserError, match=r'cannot be opened|needs'):
        ExportedModel(file)
    with pytest.raises(UserError, match='no exported model'):
        ExportedModel(tmp_path / 'model.safetensors')


def test_what_is_an_exported_file():
    assert is_exported('model.onnx') and is_exported(Path('a/b.xml'))
    assert not any(map(is_exported, ('lfnsb', 'lfnsb.ferplus', 'hf-hub:a/b.onnx', 'local-dir:x.onnx')))


# The command

def run(*args: object):
    result = CliRunner().invoke(main, ['export', *map(str, args)])
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result


def test_command(tmp_path):
    file = tmp_path / 'lfnsb.onnx'
    result = run('lfnsb', file, '--batch', 'dynamic')
    assert result.exit_code == 0, result.output
    assert 'largest difference' in result.output.replace('\n', ' ') and 'labels agree on 32 of 32' in result.output
    assert ExportedModel(file).metadata['model'] == 'lfnsb.ferplus'


@pytest.mark.parametrize('args, message', [
    (['nonsense', 'm.onnx'], 'cannot load the model nonsense'),
    (['lfnsb.rafdb', 'm.onnx'], 'lfnsb.rafdb has no trained weights'),
    (['local-dir:nowhere', 'm.onnx'], 'cannot load the model local-dir:nowhere'),
    (['lfnsb', 'm.onnx', '--batch', '0'], '--batch is a number'),
    (['lfnsb', 'm.onnx', '--batch', 'many'], '--batch is a number'),
    (['lfnsb', 'm.txt'], 'format is not clear'),
    (['lfnsb', 'm.onnx', '--precision', 'int8'], '--calibrate'),
])
def test_command_errors_are_one_sentence(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code != 0 and message in result.output and 'Traceback' not in result.output
    assert result.output.splitlines()[-1].startswith('Error: ') and not list(tmp_path.iterdir())


@pytest.mark.parametrize('options', [pytest.param([], marks=pytest.mark.slow), ['--reparam']])
def test_timms_own_script(timm_scripts, options, tmp_path):
    """It compares the two itself, with --check-forward."""
    file = tmp_path / 'lfnsb.onnx'
    result = subprocess.run(
        [sys.executable, '-m', 'timm_lfnsb', 'run', 'onnx_export.py', file, '--model', 'lfnsb', '--check-forward',
         *options], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    model = timm.create_model('lfnsb', pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112)
    assert np.abs(run_onnx(file, images) - outputs(model, images)).max() < 1e-3
