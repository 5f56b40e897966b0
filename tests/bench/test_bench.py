"""The benchmark: what it computes from times, that it times the right thing, and what it does when something is wrong.

No test looks at how long anything took.
"""
from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support import ROOT

from timm_lfnsb.bench import measure, process
from timm_lfnsb.bench.measure import Network, Settings, run_benchmark
from timm_lfnsb.bench.report import benchmark_figure, format_report, load_report
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.export.export import export_model
from timm_lfnsb.util.files import write_json

SMALL = 'mobilefacenet@32'
TINY = 'test_resnet@32'  # one of timm's own small models for tests
CHEAP = ['--threads', '1', '--seconds', '0.01', '--rounds', '2', '--cold-starts', '0']
needs_runtimes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('onnx', 'onnxruntime', 'openvino')),
    reason="needs the runtimes: pip install 'timm-lfnsb[export]'")


def run(**changed) -> dict:
    settings = Settings(**{
        'models': [SMALL], 'peers': [TINY], 'runtimes': ['eager'], 'batches': [1], 'threads': 1, 'seconds': 0.01,
        'rounds': 2, 'cold_starts': 0, **changed})
    return run_benchmark(settings, lambda message: None)


def invoke(*arguments: str):
    return CliRunner().invoke(main, ['bench', *arguments])


def test_summary_recomputed():
    # A machine that gets slower: the ratio round by round is 2, 2, 2, 4, 2, that of the medians 2.5.
    slow, fast = np.array([0.2, 0.4, 0.6, 1.6, 1.0]), np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    figures = measure.summarise({'a': slow, 'b': fast}, 4, 'b')
    assert figures['a']['ratio']['median'] == pytest.approx(statistics.median([2, 2, 2, 4, 2]))
    assert figures['a']['ms_per_image'] == pytest.approx({'median': 1000 * 0.6 / 4, 'q1': 100, 'q3': 250})
    assert figures['b']['ratio']['median'] == 1 and 'ratio' not in measure.summarise({'a': slow}, 4, 'b')['a']


def test_networks_have_their_sizes_weights_and_scale(tmp_path):
    own = Network('lfnsb', tmp_path)
    assert own.create == {'model_name': 'lfnsb', 'pretrained': True} and 0.7 < own.info['accuracy'] < 1
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in own.reparameterised.modules())
    peer = Network('resnet18@64', tmp_path)  # takes any size
    assert peer.plain.num_classes == 8 and peer.info['input_size'] == [3, 64, 64] and 'img_size' not in peer.create
    norms = [module for module in peer.plain.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(norm.weight.min() > 0 and not norm._forward_pre_hooks for norm in norms)  # timm starts some at zero
    assert peer.info['macs'] == pytest.approx(1.8e9 * (64 / 224) ** 2, rel=0.03)
    network = Network('mobilefacenet@64', tmp_path)
    assert network.create['img_size'] == 64 and network.info['accuracy'] is None
    with torch.inference_mode():
        for scale in (0.1, 1.):
            assert 1e-4 < network.plain(scale * torch.rand(3, 3, 64, 64)).abs().max() < 100


def test_run(tmp_path):
    report = run(batches=[1, 2], train=True, train_batch=2)
    assert [(row['task'], row['batch'], row['model']) for row in report['results']] == [
        (*group, name) for group in (('predict', 1), ('predict', 2), ('train', 2)) for name in (SMALL, TINY)]
    assert all(row['ms_per_image']['median'] > 0 and row['ratio']['median'] > 0 for row in report['results'])
    assert all('error' not in row for row in report['results'])
    assert report['machine']['threads'] == 1 and report['machine']['cpu']
    assert report['versions']['torch'] == version('torch') and report['versions']['timm'] == version('timm')
    assert report['settings']['peer'] == TINY and list(report['models']) == [SMALL, TINY]
    write_json(tmp_path / 'bench.json', report)
    assert load_report(tmp_path / 'bench.json')['results'] == report['results']


@needs_runtimes
def test_exported_runtimes_and_files(tmp_path):
    file = str(tmp_path / 'pixels.onnx')
    export_model(Network(TINY, tmp_path).plain, Path(file), with_preprocess=True)
    report = run(runtimes=['eager', 'onnxruntime', 'openvino'], models=[TINY, file], peers=[])
    assert [(row['runtime'], row['model']) for row in report['results'] if 'ms_per_image' in row] == [
        ('eager', TINY), ('onnxruntime', TINY), ('onnxruntime', file), ('openvino', TINY)]


def test_what_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setattr(measure, 'reparameterize_model', lambda model: torch.nn.Sequential(model, torch.nn.Softplus()))
    report = run(models=[TINY], peers=[])
    assert ['ms_per_image' in row for row in report['results']] == [False]
    text = format_report(report)
    assert text.count('outputs differ') == 1 and f'{TINY} fails in PyTorch eager, batch 1' in text


@needs_runtimes
def test_a_fresh_process_has_its_own_memory_and_imports_no_torch(tmp_path):
    network = Network(TINY, tmp_path)
    spec = {**network.spec('onnxruntime', 2), 'started': 0.}
    code = (f'import runpy, sys; sys.path.insert(0, ""); runpy.run_path({process.__file__!r}, run_name="__main__"); '
            'print([name for name in ("torch", "timm", "timm_lfnsb.models.networks") if name in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code, json.dumps(spec)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, modules = done.stdout.splitlines()
    assert modules == '[]'
    # This process holds torch and more; what Linux calls the maximum of a child would be at least that.
    assert 10 < json.loads(result)['peak_mb'] < 0.8 * process.peak_memory()


@pytest.mark.slow
def test_cold_start_and_compiled():
    report = run(models=[TINY], peers=[], runtimes=['eager', 'compiled'], batches=[1, 2], cold_starts=1)
    assert [(row['runtime'], 'peak_mb' in row) for row in report['results']] == [
        (runtime, first) for runtime in ('eager', 'compiled') for first in (True, False)]
    assert all('error' not in row and row.get('cold_start_s', 1) > 0 for row in report['results'])


@pytest.mark.parametrize('model, message', [
    ('no_such_model', 'there is no model no_such_model'), ('none.onnx', 'none.onnx')])
def test_models_that_are_not_there(model, message):
    with pytest.raises(UserError, match=message):
        run(models=[model])


def test_a_missing_runtime(monkeypatch):
    monkeypatch.setitem(sys.modules, 'openvino', None)
    [row] = run(models=[TINY], peers=[], runtimes=['openvino'])['results']
    assert 'pip install "timm-lfnsb[export]"' in row['error']


def test_command_line(tmp_path, monkeypatch):
    file, plot = tmp_path / 'bench.json', tmp_path / 'bench.png'
    arguments = [SMALL, '--peer', TINY, '--runtime', 'eager', '--batch', '1', *CHEAP, '--json', str(file)]
    result = invoke(*arguments, '--plot', str(plot))
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b'\x89PNG') and sorted(os.listdir(tmp_path)) == ['bench.json', 'bench.png']
    assert invoke('--show', str(file)).output in result.output
    monkeypatch.setattr(Network, 'prepare', lambda *_: 1 / 0)
    result = invoke(*arguments)
    assert result.exit_code == 1 and 'division by zero' in result.output and 'measurements failed' in result.output


def stored_report() -> dict:
    return load_report(ROOT / 'timm_lfnsb' / 'results' / 'bench-cpu.json')


def test_stored_reports_are_shown():
    text = format_report(stored_report())
    row = next(line for line in text.split('batch 1**')[1].splitlines() if line.startswith('| lfnsb '))
    assert [cell.strip() for cell in row.split('|')[1:-1]] == ['lfnsb', '13.27', '13.03 - 13.91', '1.31', '2.84', '792']
    assert '**training step, PyTorch eager, batch 32**' in text and 'AMD EPYC, 2 threads on 2 cores' in text
    assert max(map(len, text.split('\n\n- ')[0].splitlines())) <= 100


def test_figure():
    report = stored_report()
    figure = benchmark_figure(report)
    assert [axes.get_title() for axes in figure.axes] == ['batch 1', 'batch 32']
    points = [container.lines[0].get_xydata()[0] for container in figure.axes[0].containers]
    assert len(points) == 9 and points[0] == pytest.approx((13.27, 2.676), abs=0.01)  # ms, millions of parameters
    report['models']['mfn']['accuracy'] = 0.7
    points = [container.lines[0].get_ydata()[0] for container in benchmark_figure(report).axes[0].containers]
    assert points[:2] == pytest.approx([81.46, 70], abs=0.01) and len(points) == 6
