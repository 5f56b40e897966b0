"""Benchmark of inference and training: the networks of this zoo beside other timm models, in several runtimes.

* What is compared runs in one process in turns (A B C A B C ...), so that a machine whose speed drifts slows all of
  them. A round gives the median of some calls behind an untimed one, and a ratio is taken round by round. Ratios can be
  compared between runs and commits on one machine, milliseconds cannot. All is float32 on the CPU.
* What is timed must give the outputs of the plain network in eager mode, or it is reported as failed.
* Cold start, from the start of the process, and peak memory are those of fresh processes (`process.py`).
"""
from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch import nn

from ..errors import UserError, one_sentence, reason
from ..export.export import export_model
from ..export.exported import ExportedModel
from ..models.names import check_model_name
from ..train.task import CosineHarmonyTask
from ..util.machine import available_cores, cpu_name, git_commit
from ..util.timing import interleave, quartiles
from ..version import __version__
from ..weights.names import embedded_weights, weights_info
from . import process

RUNTIMES = {
    'eager': 'PyTorch eager', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}
EXPORTED = {'onnxruntime': '.onnx', 'openvino': '.xml'}

TOLERANCE = 1e-3  # largest difference to the plain network's outputs, relative to their largest


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long."""
    models: Sequence[str] = ('lfnsb', 'lfn_small', 'mfn', 'mobilefacenet')  # NAME, NAME@SIZE, .onnx, .xml
    peers: Sequence[str] = ('resnet18@112',)  # ratios refer to the first
    runtimes: Sequence[str] | None = None  # of RUNTIMES; None for eager and the exported ones that are installed
    batches: Sequence[int] = (1, 8, 32)
    threads: int | None = None  # of every runtime; None for torch's choice
    train: bool = False  # training steps as well, eager and compiled
    train_batch: int = 32
    seconds: float = 2.  # of each network, runtime and batch
    rounds: int = 10
    cold_starts: int = 3  # fresh processes of each network and runtime; 0: no cold start, no memory


class Network:
    """A model, as it is and reparameterised, or an exported file; UserError where it cannot be had."""

    def __init__(self, label: str, folder: Path):
        self.label, self.folder = label, folder
        self.create: dict[str, Any] = {}
        self.info: dict[str, Any] = {'params': None, 'macs': None, 'accuracy': None}
        self.file = ExportedModel(label) if Path(label).suffix in EXPORTED.values() else None
        if self.file:
            self.info['input_size'] = self.file.value('input_size')
            return
        with one_sentence(f'cannot create the model {label}'):
            from ..models.count import count_model  # fvcore warns when it is imported, also of --show
            match = re.fullmatch(r'(.+)@(\d+)', self.label)
            name, size = (match[1], int(match[2])) if match else (self.label, None)
            check_model_name(name)
            located = name.startswith(('local-dir:', 'hf-hub:'))
            config = None if located else timm.models.get_pretrained_cfg(name)
            weights = f'{config.architecture}.{config.tag}' if config else name
            arguments: dict[str, Any] = {} if getattr(config, 'label_names', None) else {'num_classes': 8}
            if size is not None:
                arguments['pretrained_cfg_overlay'] = {'input_size': (3, size, size)}
                if config and config.fixed_input_size:
                    arguments['img_size'] = size
            elif located or weights in embedded_weights():
                arguments = {'pretrained': True}
            self.create = {'model_name': name, **arguments}
            self.plain = timm.create_model(**self.create).eval()
            input_size = timm.data.resolve_model_data_config(self.plain)['input_size']
            if 'pretrained' not in arguments:
                # Noise on plain colours: pictures are more than noise, which networks answer weakly.
                settle_norms(self.plain, torch.randn(4, *input_size) + torch.randn(4, input_size[0], 1, 1))
            elif not located:
                self.info['accuracy'] = weights_info(weights)['metrics']['test']['accuracy']
            self.reparameterised = reparameterize_model(self.plain)
            count = count_model(name, self.plain)
            self.info |= {'params': count.params, 'macs': count.macs, 'input_size': list(input_size)}

    def spec(self, runtime: str, batch: int) -> dict[str, Any]:
        """What a process must know to make predictions."""
        path, shape, dtype = None, [batch, *self.info['input_size']], 'float32'
        if self.file:
            path = self.file.path.resolve()
            if self.file.metadata.get('input') == 'uint8':
                shape, dtype = [shape[i] for i in (0, 2, 3, 1)], 'uint8'
        elif runtime in EXPORTED:
            path = self.folder / f'{self.label.replace("/", "-")}-{batch}{EXPORTED[runtime]}'
            if not path.is_file():
                export_model(self.plain, path, batch=batch)
        return {
            'runtime': runtime, 'file': path and str(path), 'create': self.create, 'shape': shape, 'dtype': dtype,
            'threads': torch.get_num_threads()}

    def prepare(self, task: str, runtime: str, batch: int) -> Callable[[], Any]:
        """What to time: a call that has run once and given the right outputs."""
        spec = self.spec(runtime, batch)
        images = torch.randn(spec['shape'], generator=torch.Generator().manual_seed(0))
        run: Callable[[], Any]
        if runtime == 'compiled':
            # All models share this limit of 8; those beyond it would run in eager mode, and nobody would know.
            torch._dynamo.config.cache_size_limit = 1000
        if task == 'train':
            run = training_step(copy.deepcopy(self.plain), images, compiled=runtime == 'compiled')
            run()
            return run
        if runtime in EXPORTED:
            array = images.numpy().astype(spec['dtype'])
            run = functools.partial(ExportedModel(spec['file'], spec['threads']), array)
        else:
            run = process.predictor(copy.deepcopy(self.reparameterised), images, compiled=runtime == 'compiled')
        output = np.asarray(run())
        if not self.file:  # which is what it is: quantised, of other weights
            expected = self.plain(images).detach().numpy()
            difference = float(np.abs(output - expected).max() / np.abs(expected).max())
            if not difference <= TOLERANCE:
                raise UserError(f"its outputs differ from the plain network's by {difference:.2g} of the largest.")
        return run


@torch.inference_mode()
def settle_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Let the batch norms of an untrained model bring their inputs to unit size, so that activations keep their scale.

    Without this a deep network may end in denormal numbers, which are slow. Variances become mean squares: few images,
    alike as random ones are, would have differences too small to divide by. Scales that timm starts at zero become one:
    a runtime could leave out what is multiplied by zero. Slopes of PReLU become different: exporters share equal
    tensors, and OpenVINO does not fuse a PReLU whose slopes are shared.
    """
    def settle(module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.2, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            dims = [0, *range(2, inputs[0].ndim)]
            module.running_var.copy_(inputs[0].square().mean(dims))  # type: ignore[union-attr]
            if module.affine:
                module.weight.masked_fill_(module.weight == 0, 1.)

    with nn.modules.module.register_module_forward_pre_hook(settle):
        model(images)


def training_step(model: nn.Module, images: torch.Tensor, compiled: bool) -> Callable[[], float]:
    """A step of `train.py --cosine-harmony 1 --opt adamw` on random labels, which returns the loss."""
    images = images.to(memory_format=torch.channels_last)
    model = model.train().to(memory_format=torch.channels_last)
    labels = torch.randint(model.num_classes, (len(images),))  # type: ignore[call-overload]
    task = CosineHarmonyTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-4)
    if compiled:
        task.compile()

    def step() -> float:
        loss = task(images, labels)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def summarise(times: dict[str, np.ndarray], batch: int, peer: str | None) -> dict[str, dict[str, Any]]:
    """Figures of each network: milliseconds of an image, and its time relative to the peer's."""
    figures: dict[str, dict[str, Any]] = {}
    for label, seconds in times.items():
        figures[label] = {'ms_per_image': quartiles(1000 * seconds / batch)}
        if peer in times:
            figures[label]['ratio'] = quartiles(seconds / times[peer])
    return figures


def run_benchmark(settings: Settings, progress: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything that the settings name.

    Args:
        settings: What to measure.
        progress: Gets a line for each part.

    Returns:
        The report. A network that failed somewhere has an `error` in that row.

    Raises:
        UserError: When a model cannot be had.
    """
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    # torch writes exported files with onnx, which no runtime brings along.
    runtimes = settings.runtimes or ['eager', *(
        name for name in EXPORTED if importlib.util.find_spec(name) and importlib.util.find_spec('onnx'))]
    report: dict[str, Any] = {
        'format': 2, 'date': datetime.now(timezone.utc).isoformat(timespec='seconds'), 'commit': git_commit(),
        'machine': {
            'cpu': cpu_name(), 'vectors': torch.backends.cpu.get_cpu_capability(), 'cores': available_cores(),
            'threads': torch.get_num_threads()},
        'versions': {'python': platform.python_version(), 'timm_lfnsb': __version__, **{
            name: version(name) for name in ('timm', 'torch', *EXPORTED) if importlib.util.find_spec(name)}},
        'settings': {**asdict(settings), 'runtimes': runtimes, 'peer': next(iter(settings.peers), None)},
        'models': {}, 'results': [],
    }
    groups = [('predict', runtime, batch) for runtime in runtimes for batch in settings.batches]
    if settings.train:
        groups += [('train', runtime, settings.train_batch) for runtime in runtimes if runtime not in EXPORTED]
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-bench') as folder:
        progress('create the networks')
        networks = {label: Network(label, Path(folder)) for label in (*settings.models, *settings.peers)}
        report['models'] = {label: network.info for label, network in networks.items()}
        for group in groups:
            progress(group_name(*group))
            _measure_group(networks, group, report)
        if settings.cold_starts:
            progress('fresh processes')
            _measure_processes(networks, report)
    return report


def group_name(task: str, runtime: str, batch: int) -> str:
    """What a table of the report is called."""
    return f'{"training step, " if task == "train" else ""}{RUNTIMES[runtime]}, batch {batch}'


def _measure_group(networks: dict[str, Network], group: tuple[str, str, int], report: dict[str, Any]) -> None:
    """Time networks in one runtime at one batch size."""
    (task, runtime, batch), settings = group, report['settings']
    runs: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    for label, network in networks.items():
        if network.file and EXPORTED.get(runtime) != network.file.path.suffix:
            continue
        rows.append({'task': task, 'runtime': runtime, 'batch': batch, 'model': label})
        try:
            runs[label] = network.prepare(*group)
        except Exception as error:  # exporters, compilers and runtimes raise types of their own
            rows[-1]['error'] = reason(error)
    times = interleave(list(runs.values()), settings['seconds'], settings['rounds'])
    figures = summarise(dict(zip(runs, times, strict=True)), batch, settings['peer'])
    report['results'] += [row | figures.get(row['model'], {}) for row in rows]


def _measure_processes(networks: dict[str, Network], report: dict[str, Any]) -> None:
    """Cold start and peak memory at the first batch size, medians of fresh processes in turns."""
    settings, script = report['settings'], str(Path(__file__).with_name('process.py'))
    rows: list[tuple[dict[str, Any], list[Any]]] = [
        (row, []) for row in report['results'] if row['task'] == 'predict' and row['batch'] == settings['batches'][0]]
    for _ in range(settings['cold_starts']):
        for row, starts in rows:
            if 'error' in row or (starts and row['runtime'] == 'compiled'):
                continue
            spec = networks[row['model']].spec(row['runtime'], row['batch'])
            done = subprocess.run(
                [sys.executable, script, json.dumps({**spec, 'started': time.monotonic()})], capture_output=True,
                text=True, env={**os.environ, 'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'})
            if done.returncode:
                row['error'] = f'a fresh process ended with {done.returncode}: {done.stderr[-300:]}'
                continue
            starts.append(json.loads(done.stdout.splitlines()[-1]))
            row |= {key: float(np.median([start[key] for start in starts])) for key in starts[0]}
