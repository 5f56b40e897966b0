"""The benchmark: what it computes from times, that it times the right thing, and what it does when something is wrong.

No test looks at how long anything took.
"""
from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner

from timm_lfnsb.bench import floor as bench_floor
from timm_lfnsb.bench import measure as bench
from timm_lfnsb.bench import report as bench_report
from timm_lfnsb.bench.measure import BenchError, Settings, Spec, Subject
from timm_lfnsb.cli import main
from timm_lfnsb.export.export import export_model
from timm_lfnsb.models.layers import CoordAttn

SMALL = 'mobilefacenet@32'
TINY = 'test_resnet@32'  # one of timm's own small models for tests
CHILD = Path(bench.__file__).with_name('bench_child.py')
needs_runtimes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime', 'openvino')),
    reason="needs the runtimes: pip install 'timm-lfnsb[export]'")


def short(**kwargs) -> Settings:
    return Settings(**{
        'models': [SMALL], 'peers': [TINY], 'runtimes': ['eager'], 'batches': [1], 'threads': 1, 'seconds': 0.01,
        'rounds': 2, 'cold_starts': 0, **kwargs})


def invoke(*arguments: str):
    return CliRunner().invoke(main, ['bench', *arguments])


def assert_refused(result, *parts: str) -> None:
    assert result.exit_code == 1 or (result.exit_code == 2 and 'Usage' in result.output), result.output
    assert 'Error: ' in result.output and 'Traceback' not in result.output
    assert isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.output, result.output


# --- what is computed from times ---

def subject(model: str, rounds: list[float], **row) -> Subject:
    row = {'model': model, 'form': 'plain', 'batch': 4, 'task': 'predict', 'best': False, **row}
    return Subject(lambda: None, row, rounds=rounds, fastest=min(rounds))


def test_summary_recomputed():
    # A machine that gets slower: the ratio round by round is 2, 2, 2, 4, 2, that of the medians 2.5.
    slow = subject('a', [0.2, 0.4, 0.6, 1.6, 1.0])
    fast = subject('b', [0.1, 0.2, 0.3, 0.4, 0.5])
    matmul = Subject(lambda: None, {'flops': 6e9}, rounds=[1., 2., 3., 4., 5.])
    bench.summarise([slow, fast], matmul, {'a': 50_000_000, 'b': 10}, 'b')
    assert slow.row['ratio']['median'] == pytest.approx(statistics.median([2, 2, 2, 4, 2]))
    assert slow.row['ratio']['rounds'] == pytest.approx([2, 2, 2, 4, 2])
    assert slow.row['ms_per_image']['median'] == pytest.approx(1000 * 0.6 / 4)
    assert slow.row['ms_per_image']['q1'] == pytest.approx(100) and slow.row['ms_per_image']['min'] == 1000 * 0.2 / 4
    assert slow.row['images_per_second'] == pytest.approx(4 / 0.6)
    assert slow.row['gflops'] == pytest.approx(2 * 0.05 * 4 / 0.6)
    assert slow.row['matmul_gflops'] == pytest.approx(6 / 3)
    assert slow.row['noisy'] and fast.row['ratio']['median'] == 1


def test_summary_takes_the_better_format_and_drops_a_broken_round():
    subjects = [
        subject('a', [0.3, 0.3], memory_format='contiguous'), subject('a', [0.2, 0.2], memory_format='channels_last'),
        subject('a', [0.9, 0.9], memory_format='contiguous', form='reparameterised'),
        subject('b', [0.1, 0.1, 99.], memory_format='contiguous'),
        subject('b', [0.4, 0.4, 99.], memory_format='channels_last'),
    ]
    bench.summarise(subjects, subject('m', [1., 1., 1.], flops=1e9), {'a': 1, 'b': 1}, 'b')
    assert [s.row['best'] for s in subjects] == [False, True, True, True, False]
    assert subjects[3].row['rounds'] == 2 and subjects[3].row['ms_per_image']['median'] == pytest.approx(25)
    assert subjects[1].row['ratio']['median'] == pytest.approx(2)  # to the peer's better format
    assert not subjects[1].row['noisy']


def test_summary_without_rounds_or_peer():
    first, second = subject('a', [0.1]), subject('b', [0.1])
    second.rounds.clear()
    bench.summarise([first, second], subject('m', [1.], flops=1e9), {'a': 1, 'b': 1}, 'b')
    assert 'ms_per_image' not in first.row
    bench.summarise([first], subject('m', [1.], flops=1e9), {'a': 1}, None)
    assert 'ms_per_image' in first.row and 'ratio' not in first.row


def test_rounds_are_taken_in_turns(monkeypatch):
    calls: list[str] = []
    subjects = [Subject(lambda name=name: calls.append(name), {}) for name in 'ABC']

    def seconds_of(run, device):
        run()
        return 0.05

    monkeypatch.setattr(bench, 'seconds_of', seconds_of)
    bench.interleave(subjects, seconds=0.4, rounds=4)
    assert [s.rounds for s in subjects] == [[0.05] * 4] * 3  # steady: no more rounds than asked for
    assert [s.calls for s in subjects] == [2, 2, 2]
    assert ''.join(calls).endswith('C' + 'AAABBBCCC' * 4)  # in each turn one untimed call and two timed ones


def test_long_calls_have_an_untimed_one_as_well(monkeypatch):
    untimed, timed = [], []

    def seconds_of(run, device):
        timed.append(run)
        return 3.

    monkeypatch.setattr(bench, 'seconds_of', seconds_of)
    bench.interleave([Subject(lambda: untimed.append(0), {})], seconds=0.1, rounds=5)
    assert len(untimed) == 5 and len(timed) >= 3 + 5


def test_rounds_go_on_while_they_differ(monkeypatch):
    times = itertools.cycle([0.1, 0.2])

    def seconds_of(run, device):
        run()
        return next(times)

    noisy = Subject(lambda: None, {})
    monkeypatch.setattr(bench, 'seconds_of', seconds_of)
    bench.interleave([noisy], seconds=0.1, rounds=4)
    assert len(noisy.rounds) == 12


# --- what is timed ---

def test_untrained_norms_keep_the_scale():
    model = timm.create_model('resnet18', num_classes=3).eval()
    images = torch.randn(4, 3, 32, 32) * 3 + 1
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert any((norm.weight == 0).all() for norm in norms)
    bench.settle_norms(model, images)
    assert torch.allclose(model.bn1.running_var, model.conv1(images).square().mean((0, 2, 3)), rtol=1e-4)
    assert torch.allclose(model.bn1(model.conv1(images)).square().mean((0, 2, 3)), torch.ones(64), rtol=1e-2)
    assert all((norm.running_mean == 0).all() and norm.weight.min() > 0 for norm in norms)
    assert not model.training and not any(norm._forward_pre_hooks for norm in norms)


def test_untrained_networks_are_well_conditioned():
    network = bench.create_network(Spec('mfn', 64))
    with torch.inference_mode():
        for scale in (0.1, 1.):
            logits = network.plain(scale * torch.rand(3, 3, 64, 64))
            assert 1e-4 < logits.abs().max() < 100


def test_networks_have_their_forms_and_counts():
    network = bench.create_network(Spec('mobilefacenet', 32), plain_too=True)
    assert list(network.forms) == ['reparameterised', 'plain']
    assert network.input_size == (3, 32, 32) and network.info['num_classes'] == 7
    assert network.create['img_size'] == 32 and not network.create['pretrained']
    peer = bench.create_network(Spec('resnet18', 64, peer=True), plain_too=True)
    assert list(peer.forms) == ['plain'] and 'img_size' not in peer.create  # nothing to reparameterise, any size
    assert peer.info['num_classes'] == 8 and peer.input_size == (3, 64, 64)
    assert peer.info['macs'] == pytest.approx(1.8e9 * (64 / 224) ** 2, rel=0.03)
    own = bench.create_network(Spec('lfnsb'))
    assert own.info['weights'] == 'lfnsb.ferplus' and 0.7 < own.info['accuracy'] < 1
    assert own.create == {'pretrained': True}


@pytest.mark.parametrize('name', ['lfnsb', 'ddamfn'])
def test_unoptimised_form_computes_the_same(name):
    network = bench.create_network(Spec(name, 64), unoptimised_too=True)
    assert list(network.forms) == ['reparameterised', 'unoptimised']
    slow = network.forms['unoptimised']
    kinds = {type(module).__module__ + '.' + type(module).__name__ for module in slow.modules()}
    assert 'torch.nn.modules.activation.PReLU' in kinds and 'timm.layers.coord_attn.CoordAttn' in kinds
    assert not kinds & {f'timm_lfnsb.layers.{kind}' for kind in ('PReLU', 'CoordAttn', 'StemConv')}
    assert list(slow.state_dict()) == list(network.plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(slow(images), network.plain(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['lfnsb', 'mfn', 'mobilefacenet'])
def test_floors_are_the_network_without_attention_and_prelu(name):
    network = bench.create_network(Spec(name, 64), floor_too=True)
    assert list(network.forms) == ['reparameterised', 'convolutions']
    images = torch.randn(2, 3, 64, 64)
    # The plain network, with hooks that undo what attention and PReLU do.
    expected = copy.deepcopy(network.plain)
    for module in expected.modules():
        if isinstance(module, torch.nn.PReLU | CoordAttn):
            module.register_forward_hook(lambda module, inputs, output: inputs[0])
    floors = [
        network.forms['convolutions'], bench_floor.bare_graph(network.plain),
        bench_floor.bare_training(network.plain).eval()]
    with torch.inference_mode():
        logits = expected(images)
        for floor in floors:
            kinds = {type(module).__name__ for module in floor.modules()}
            assert not kinds & {'PReLU', 'ConvPReLU', 'LoweredGates'}
            assert (floor(images) - logits).abs().max() < 1e-4 * logits.abs().max()
    assert np.isfinite(bench.training_step(floors[2], images)().item())


@pytest.mark.slow
@needs_runtimes
def test_floor_and_profile_in_the_report():
    report = bench.run_benchmark(short(
        models=['lfnsb@48'], peers=[], runtimes=['eager', 'onnxruntime', 'openvino'], train=True, train_batch=2,
        floor=True, profile=True))
    rows = {(row['task'], row['runtime'], row['form']): row for row in report['results'] if row['best']}
    assert [key[2] for key in rows] == 3 * ['reparameterised', 'convolutions'] + ['plain', 'convolutions']
    for (task, runtime, form), row in rows.items():
        assert 'error' not in row
        if form == 'convolutions':
            assert 'difference' not in row and 'profile' not in row
            continue
        assert sum(entry['share'] for entry in row['profile']) == pytest.approx(1)
        calls = {entry['operator']: entry['calls'] for entry in row['profile']}
        # 34 blocks: two pools of each attention, and that of Spatial Bias
        if (task, runtime) == ('predict', 'onnxruntime'):
            assert calls['Conv'] > 100 and calls['AveragePool'] == 2 * 34 + 1
        elif (task, runtime) == ('predict', 'openvino'):
            assert calls['AvgPool'] == 2 * 34 + 1 and 'PRelu' not in calls  # fused
            assert calls['HSwish'] == 2 * 34  # also where they take no whole microsecond
        elif task == 'train':
            assert calls['aten::convolution_backward'] == 220
    text = bench_report.format_report(report)
    assert text.count('where the time goes: lfnsb@48') == 4
    assert 'which is another function' in ' '.join(text.split())
    assert max(map(len, text.splitlines())) <= 100
    markdown = bench_report.format_markdown(report)
    assert '| `lfnsb@48`, convolutions |' in markdown and '| where the time goes |' in markdown
    assert 'which is another function' in markdown


def test_a_training_step_trains_network_and_centers():
    model = timm.create_model('mobilefacenet', img_size=32)
    before = copy.deepcopy(model.state_dict())
    step = bench.training_step(model, torch.randn(4, 3, 32, 32))
    losses = [step().item() for _ in range(3)]
    assert all(np.isfinite(losses)) and model.training
    after = model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in ('stem.0.conv.weight', 'fc.weight'))
    centers = [cell.cell_contents for cell in step.__closure__ if hasattr(cell.cell_contents, 'trainable_module')]
    assert centers[0].trainable_module.loss.centers.grad.abs().sum() > 0


def test_run(tmp_path):
    saved = []
    threads, cache = torch.get_num_threads(), os.environ.get('TORCHINDUCTOR_CACHE_DIR')
    report = bench.run_benchmark(
        short(batches=[1, 2], plain=True, unoptimised=True, train=True, train_batch=2),
        save=lambda report: saved.append(report['complete']))
    assert report['complete'] and saved == [False, False, False, True]
    assert torch.get_num_threads() == threads and os.environ.get('TORCHINDUCTOR_CACHE_DIR') == cache
    rows = report['results']
    predictions = [row for row in rows if row['task'] == 'predict']
    # two batches, two memory formats: mobilefacenet in two forms, and the peer; textbook parts in torch's own format
    assert len(predictions) == 2 * (2 * 3 + 1) and len(rows) - len(predictions) == 2 * 2 + 1
    assert all(row['ms_per_image']['median'] > 0 and row['rounds'] >= 2 and 'error' not in row for row in rows)
    assert all(row['difference'] < 1e-4 for row in predictions)
    assert sum(row['best'] for row in rows) == 2 * 4 + 3
    assert {row['memory_format'] for row in rows if row['form'] == 'unoptimised'} == {'contiguous'}
    assert set(report['sharing_us']) == {bench.group_name(row['task'], 'eager', row['batch']) for row in rows}
    assert not any(report['sharing_us'].values())  # on one thread
    assert report['machine']['threads'] == 1 and report['machine']['cpu']
    assert f'({report["machine"]["vectors"]}), 1 thread on' in bench_report.format_markdown(report)
    assert report['versions']['torch'] == version('torch') and report['versions']['timm'] == version('timm')
    assert report['settings']['peer'] == TINY and list(report['models']) == [SMALL, TINY]
    bench_report.save_report(report, tmp_path / 'bench.json')
    assert bench_report.load_report(tmp_path / 'bench.json') == report
    text = bench_report.format_report(report)
    assert max(map(len, text.splitlines())) <= 100 and 'training step, PyTorch eager, batch 2' in text


@needs_runtimes
def test_exported_runtimes():
    report = bench.run_benchmark(short(runtimes=['onnxruntime', 'openvino'], plain=True, models=[SMALL], peers=[]))
    rows = {(row['runtime'], row['model'], row['form']): row for row in report['results']}
    assert set(rows) == {
        (runtime, SMALL, form) for runtime in ('onnxruntime', 'openvino') for form in ('reparameterised', 'plain')}
    for row in rows.values():
        assert 'error' not in row, row.get('error')
        assert row['best'] and row['memory_format'] is None and row['difference'] < 1e-4


def test_what_computes_something_else_is_not_timed(monkeypatch):
    class Wrong(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 1.01 * self.model(x)

    monkeypatch.setattr(timm.utils, 'reparameterize_model', Wrong)
    report = bench.run_benchmark(short(plain=True, memory_formats=['contiguous']))
    wrong = [row for row in report['results'] if row['form'] == 'reparameterised']
    right = [row for row in report['results'] if row['form'] == 'plain']
    assert len(wrong) == 2 and len(right) == 2
    assert all('outputs differ' in row['error'] and 'ms_per_image' not in row for row in wrong)
    assert all('ms_per_image' in row for row in right)
    text = bench_report.format_report(report)
    assert text.count('outputs differ') == 2 and 'failed (1)' in text


@needs_runtimes
def test_a_file_of_pixels_has_a_profile(tmp_path, monkeypatch):
    model = bench.create_network(Spec('mobilefacenet', 32)).plain
    file = tmp_path / 'pixels.onnx'
    export_model(model, file, with_preprocess=True)
    settings = short(models=[str(file)], peers=[], runtimes=['onnxruntime'], profile=True)
    [row] = bench.run_benchmark(settings)['results']
    assert 'Conv' in [entry['operator'] for entry in row['profile']]

    def broken(*_):
        raise RuntimeError('no profiler here')

    monkeypatch.setattr(bench.bench_profile, 'profile_onnxruntime', broken)
    said = []
    [row] = bench.run_benchmark(settings, progress=said.append)['results']
    assert 'ms_per_image' in row and 'profile' not in row
    assert 'no profile of pixels.onnx: no profiler here' in said[-1]


@needs_runtimes
def test_exported_files_are_measured_beside_their_model(tmp_path):
    file = tmp_path / 'small.onnx'
    network = bench.create_network(bench.parse_spec(SMALL))
    bench.export_network(network, 'reparameterised', 'onnxruntime', torch.zeros(1, 3, 32, 32), file)
    spec = bench.parse_spec(str(file))
    assert (spec.label, spec.size, spec.precision) == ('small.onnx', 32, 'fp32')
    report = bench.run_benchmark(short(models=[str(file)], runtimes=['onnxruntime'], batches=[1, 2]))
    rows = [row for row in report['results'] if row['model'] == 'small.onnx']
    assert [(row['batch'], row['form']) for row in rows] == [(1, 'fp32')]  # it takes one image at a time
    assert rows[0]['ms_per_image']['median'] > 0 and rows[0]['ratio']['median'] > 0


@needs_runtimes
def test_a_fresh_process_has_its_own_memory_and_imports_no_torch(tmp_path):
    file = tmp_path / 'small.onnx'
    network = bench.create_network(bench.parse_spec(SMALL))
    bench.export_network(network, 'reparameterised', 'onnxruntime', torch.zeros(2, 3, 32, 32), file)
    spec = {
        'runtime': 'onnxruntime', 'file': str(file), 'batch': 2, 'input_size': [3, 32, 32], 'threads': 1,
        'device': 'cpu', 'amp': False, 'started': 0.}
    code = (f'import runpy, sys; sys.path.insert(0, ""); runpy.run_path({str(CHILD)!r}, run_name="__main__"); '
            'print([name for name in ("torch", "timm", "timm_lfnsb") if name in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code, json.dumps(spec)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, modules = done.stdout.splitlines()
    assert modules == '[]'
    result = json.loads(result)
    assert result['create'] > 0 and result['first'] > 0
    # This process holds torch and more; what Linux calls the maximum of a child would be at least that.
    from timm_lfnsb.bench.process import peak_memory
    assert 10e6 < result['peak_bytes'] < 0.8 * peak_memory()


def test_nothing_optional_is_imported_with_the_package():
    code = '''
import sys, timm
before = set(sys.modules)
import timm_lfnsb
optional = {'onnx', 'onnxruntime', 'openvino', 'nncf', 'matplotlib', 'sklearn', 'scipy', 'cv2', 'skimage', 'fvcore'}
assert timm_lfnsb.models.networks
print(sorted(optional & (set(sys.modules) - before)))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == '[]\n', done.stdout + done.stderr


def test_many_networks_are_all_compiled():
    import torch._dynamo

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    compiled: list[object] = []
    before = torch._dynamo.config.cache_size_limit
    with bench._torch_state(1, compiled=True), torch.inference_mode():
        for i in range(12):
            model = torch.nn.Linear(i + 2, 3)
            model.compile(backend=backend, dynamic=False)
            model(torch.randn(1, i + 2))
    torch.compiler.reset()
    assert len(compiled) == 12 and torch._dynamo.config.cache_size_limit == before


@pytest.mark.slow
def test_cold_start_and_compiled():
    report = bench.run_benchmark(short(
        peers=[], runtimes=['eager', 'compiled'], memory_formats=['contiguous'], cold_starts=1))
    assert [row['form'] for row in report['results']] == 2 * ['reparameterised']
    for row in report['results']:
        start = row['cold_start']
        assert 'error' not in row and row['peak_mb'] > 100
        assert start['total'] == pytest.approx(start['import'] + start['create'] + start['first'])
        assert ('compile_seconds' in row) == (row['runtime'] == 'compiled')
    assert report['import']['ratio'] > 0
    assert 'compiled in: ' in bench_report.format_report(report)


# --- what can go wrong ---

def test_settings_are_checked():
    for changed, part in (
            (dict(runtimes=['tensorrt']), 'there are eager, compiled, onnxruntime, openvino'),
            (dict(memory_formats=['nhwc']), 'there are contiguous, channels_last'),
            (dict(batches=[0]), 'must be positive'), (dict(batches=[]), 'at least one'),
            (dict(device='tpu'), 'cpu or cuda'), (dict(amp=True, runtimes=['openvino']), 'float32 only'),
            (dict(models=['mobilefacenet@4']), 'at least 8'), (dict(models=[], peers=[]), 'name a model'),
            (dict(models=['no_such_model']), 'cannot create the model no_such_model: Unknown model'),
    ):
        with pytest.raises(BenchError, match=re.escape(part)):
            bench.run_benchmark(short(**changed))
    assert bench.check_settings(short(amp=True, runtimes=[])) == ['eager']


def test_a_missing_runtime(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'openvino' else find_spec(name))
    assert_refused(invoke('--runtime', 'eager,openvino'), "pip install 'timm-lfnsb[export]'", 'openvino')
    assert 'openvino' not in bench.check_settings(short(runtimes=[]))  # left out where nobody asked for it


def test_command_line_errors(tmp_path):
    assert_refused(invoke('no_such_model', '--runtime', 'eager'), 'no_such_model')
    assert_refused(invoke(SMALL, '--runtime', 'gpu'), "there is no runtime 'gpu'")
    assert_refused(invoke(SMALL, '--batch', '1,many'), 'whole numbers')
    assert_refused(invoke(SMALL, '--json', str(tmp_path / 'none' / 'bench.json')), 'there is no folder')
    assert_refused(invoke(SMALL, '--plot', str(tmp_path / 'bench.xyz')), '.png')
    assert_refused(invoke('--show', str(tmp_path / 'none.json')), 'cannot read')
    (tmp_path / 'other.json').write_text('[1]')
    assert_refused(invoke('--show', str(tmp_path / 'other.json')), 'is not a report')
    (tmp_path / 'bad.onnx').write_bytes(b'nothing')
    assert_refused(invoke(str(tmp_path / 'bad.onnx')), 'bad.onnx')
    assert sorted(os.listdir(tmp_path)) == ['bad.onnx', 'other.json']


def test_command_line(tmp_path):
    file, plot = tmp_path / 'bench.json', tmp_path / 'bench.png'
    arguments = [SMALL, '--peer', TINY, '--runtime', 'eager', '--batch', '1', '--threads', '1', '--seconds', '0.01',
                 '--rounds', '2', '--cold-starts', '0', '--json', str(file), '--plot', str(plot)]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert 'PyTorch eager, batch 1' in result.output and SMALL in result.output
    assert plot.read_bytes().startswith(b'\x89PNG') and sorted(os.listdir(tmp_path)) == ['bench.json', 'bench.png']
    shown = invoke('--show', str(file))
    row = next(row for row in json.loads(file.read_text())['results'] if row['best'] and row['model'] == SMALL)
    cell = f'ms ({row["ratio"]["median"]:.2f}) |'
    assert shown.exit_code == 0 and f'| `{SMALL}` | ' in shown.output and cell in shown.output


def test_an_interrupt_keeps_what_was_measured(monkeypatch, tmp_path):
    interleave, groups = bench.interleave, []

    def interrupted(subjects, *args):
        interleave(subjects, *args)
        groups.append(subjects)
        if len(groups) == 2:
            subjects[-2].rounds.pop()  # in the midst of a round
            raise KeyboardInterrupt

    monkeypatch.setattr(bench, 'interleave', interrupted)
    file = tmp_path / 'bench.json'
    result = invoke(SMALL, '--peer', TINY, '--runtime', 'eager', '--batch', '1,2,3', '--threads', '1', '--seconds',
                    '0.01', '--rounds', '3', '--cold-starts', '0', '--json', str(file))
    assert result.exit_code == 130 and 'Incomplete' in result.output
    report = bench_report.load_report(file)
    assert not report['complete']
    assert {row['batch']: 'ms_per_image' in row for row in report['results']} == {1: True, 2: True}
    assert {row['rounds'] for row in report['results'] if row['batch'] == 2} == {len(groups[1][-2].rounds)}
    assert 'Incomplete' in invoke('--show', str(file)).output


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / 'bench.json'
    bench_report.save_report({'format': 1, 'results': []}, file)
    before = file.read_text()
    with pytest.raises(ValueError, match='JSON'):
        bench_report.save_report({'format': 1, 'results': [float('nan')]}, file)
    assert file.read_text() == before and os.listdir(tmp_path) == ['bench.json']


def test_commit_is_only_that_of_the_packages_own_checkout(monkeypatch, tmp_path):
    (tmp_path / 'pkg').mkdir()
    monkeypatch.setattr(bench, '__file__', str(tmp_path / 'pkg' / 'bench.py'))
    assert bench.source_commit() is None
    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    (tmp_path / 'pkg' / '__init__.py').touch()
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false']
    subprocess.run([*git, 'commit', '-q', '--allow-empty', '-m', 'other'], check=True)
    assert bench.source_commit() is None  # in a checkout, but not of it, as in a virtual environment
    subprocess.run([*git, 'add', '.'], check=True)
    subprocess.run([*git, 'commit', '-q', '-m', 'package'], check=True)
    commit = bench.source_commit()
    assert len(commit) == 40
    (tmp_path / 'pkg' / '__init__.py').write_text('changed')
    assert bench.source_commit() == commit + '+'


# --- output ---

def made_up_report(**accuracies: float) -> dict:
    report = bench.describe_run(short(), ['eager'], 2, TINY)
    report.update(complete=True, commit='0123456789abcdef+')
    for i, name in enumerate(('lfnsb', 'a_model_with_quite_a_long_name.and_a_tag', TINY)):
        report['models'][name] = dict(
            params=10 ** (5 + i), macs=3e8, input_size=[3, 112, 112], accuracy=accuracies.get(name), peer=name == TINY)
        for task, batch in (('predict', 1), ('predict', 32), ('train', 32)):
            for memory_format in ('contiguous', 'channels_last'):
                row = subject(name, [0.0123456 * (i + 1) * batch] * 2, task=task, batch=batch, runtime='eager',
                              memory_format=memory_format).row
                median = 12.3456 * (i + 1)
                row.update(
                    best=memory_format == 'channels_last', ms_per_image=dict(
                        median=median, q1=median * 0.9, q3=median * 1.2, min=median * 0.8),
                    images_per_second=1000 / median, ratio=dict(median=(i + 1) / 3, q1=0.1, q3=0.5), gflops=1234.5,
                    matmul_gflops=1000., noisy=i == 1, peak_mb=12345.6)
                report['results'].append(row)
    report['results'][2]['error'] = 'a ' * 99 + 'fault'
    return report


def test_tables_show_the_better_rows():
    text = bench_report.format_report(made_up_report())
    assert max(map(len, text.splitlines())) <= 100
    assert 'NCHW' not in text and text.count('NHWC') == 9 and '12.3' in text and '24.7~' in text
    assert '123%' in text and '12346' in text and 'fault' in text and 'commit 0123456789+' in text
    table = bench_report.format_markdown(made_up_report()).splitlines()
    assert table[0] == '| model | PyTorch eager, batch 1 | PyTorch eager, batch 32 |'
    assert table[2] == '| `lfnsb` | 12.3 ms (0.33) | 12.3 ms (0.33) |'
    assert '| `lfnsb` | 12.3 ms (0.33) |' in table  # training steps, in a table of their own


def test_two_threads_are_watched_and_training_keeps_memory(monkeypatch):
    kept = []
    monkeypatch.setattr(bench, 'keep_freed_memory', lambda: kept.append(1))
    report = bench.run_benchmark(short(threads=2, cold_starts=0))
    assert kept == []
    times, = report['sharing_us'].values()
    assert len(times) == report['results'][0]['rounds'] and all(0 < time < 1e5 for time in times)
    bench.run_benchmark(short(train=True, train_batch=2, cold_starts=0))
    assert kept == [1]


def test_ratios_while_threads_share_quickly_and_slowly():
    report = made_up_report()
    assert bench_report.ratios_by_sharing(report) == []  # of a report before there were such times
    for row in report['results']:
        if row['task'] == 'predict' and row['batch'] == 1:
            row['ratio']['rounds'] = [1., 3., 1.2, 3.2, 1.4]
            row['ms_per_image']['min'] = 8. if row['model'] == report['settings']['peer'] else 10.
    report['sharing_us'] = {'PyTorch eager, batch 1': [5., 9., 5.1, 8., 5.9], 'PyTorch eager, batch 32': [5.]}
    first, *others = bench_report.ratios_by_sharing(report)
    assert first[0]['model'] == 'lfnsb' and first[1:] == ([1., 1.2, 1.4], [3., 3.2])
    assert TINY not in [row['model'] for row, _, _ in others]
    text = bench_report.format_report(report)
    assert 'up to 6.0 us' in text and '1.20 (3 rounds)  3.10 (2 rounds)     1.25' in text
    assert max(map(len, text.splitlines())) <= 100
    table = bench_report.format_markdown(report)
    assert '| `lfnsb`, plain, PyTorch eager, batch 1 | 1.20 (3 rounds) | 3.10 (2 rounds) | 1.25 |' in table
    report['sharing_us'] = {'PyTorch eager, batch 1': [5., 5.1, 5.2, 5.1, 5.9]}  # one kind only: nothing to tell apart
    assert bench_report.ratios_by_sharing(report) == []


@pytest.mark.parametrize('value, text', [
    (0.01234, '0.0123'), (0.5, '0.500'), (9.876, '9.88'), (12.34, '12.3'), (123.4, '123'), (12345.6, '12346')])
def test_numbers_have_three_digits(value, text):
    assert bench_report._number(value).strip() == text


def test_figure(tmp_path):
    figure = bench_report.benchmark_figure(made_up_report())
    assert [axes.get_title() for axes in figure.axes] == ['batch 1', 'batch 32']
    points = [tuple(line.get_xydata()[0]) for line in figure.axes[0].containers[0].lines[:1]]
    assert points == [pytest.approx((12.3456, 0.1))]  # milliseconds, millions of parameters
    assert len(figure.axes[0].containers) == 3 and 'parameters' in figure.axes[0].get_ylabel()
    accuracies = {'lfnsb': 0.8, TINY: 0.7}
    figure = bench_report.benchmark_figure(made_up_report(**accuracies))
    assert [c.lines[0].get_ydata()[0] for c in figure.axes[0].containers] == pytest.approx([80, 70])
    empty = made_up_report()
    empty['results'] = []
    with pytest.raises(BenchError, match='no predictions'):
        bench_report.save_figure(empty, tmp_path / 'bench.png')
    assert os.listdir(tmp_path) == []
