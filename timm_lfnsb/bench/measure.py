"""Benchmark of inference and training: the networks of this zoo beside other timm models, in several runtimes.

* What is compared runs in one process in turns (A B C A B C ...), so that a machine whose speed drifts slows all of
  them. A round gives the median of some calls behind an untimed one, and a ratio is taken round by round. Ratios can be
  compared between runs and commits on one machine, milliseconds cannot.
* What is timed must give the outputs of the plain network in eager mode, or it is reported as failed.
* Weights do not matter for speed, as long as activations have their usual size: see `settle_norms`.
* Cold start, from the start of the process, and peak memory are those of fresh processes (`process.py`).
"""
from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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

from ..errors import UserError, reason
from ..export.export import export_model
from ..predict.exported import ExportedModel
from ..train.task import CosineHarmonyTask
from ..util.machine import available_cores, cpu_name, git_commit
from ..version import __version__
from ..weights.names import embedded_weights, weights_info
from . import process

RUNTIMES = {
    'eager': 'PyTorch eager', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO'}
EXPORTED = {'onnxruntime': '.onnx', 'openvino': '.xml'}

NOISY = 0.1
"""Distance of the quartiles, relative to the median, from which more rounds are taken."""

TOLERANCE, LOW_TOLERANCE = 1e-3, 0.1
"""Largest difference to the plain network's outputs, relative to their largest: in float32 on the CPU; else."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and how long."""

    models: Sequence[str] = ('lfnsb', 'lfn_small', 'mfn', 'mobilefacenet')  # NAME, NAME@SIZE, .onnx, .xml
    peers: Sequence[str] = ('resnet18@112',)  # ratios refer to the first
    runtimes: Sequence[str] = ()  # of RUNTIMES; empty for eager and the exported ones that are installed
    batches: Sequence[int] = (1, 8, 32)
    threads: int | None = None  # of every runtime; None for torch's choice
    train: bool = False  # training steps as well, eager and compiled
    train_batch: int = 32
    seconds: float = 2.  # of each network, runtime and batch
    rounds: int = 10  # at least
    cold_starts: int = 3  # fresh processes of each network and runtime; 0: no cold start, import and memory
    device: str = 'cpu'  # or 'cuda'
    amp: bool = False  # bfloat16 autocast, for eager and compiled


@dataclass
class Subject:
    """One thing that takes part in the rounds: a call, its entry in the report, its median seconds round by round."""

    run: Callable[[], Any]
    row: dict[str, Any]
    calls: int = 1
    rounds: list[float] = field(default_factory=list)


class Network:
    """A model, as it is and reparameterised, or an exported file; UserError where it cannot be had."""

    def __init__(self, label: str, settings: Settings, folder: Path):
        self.label, self.settings, self.folder, self.form = label, settings, folder, 'reparameterised'
        self.create: dict[str, Any] = {}
        self.info: dict[str, Any] = {'params': None, 'macs': None, 'accuracy': None}
        self.file = ExportedModel(label) if Path(label).suffix in EXPORTED.values() else None
        if self.file:
            self.info['input_size'] = self.file.value('input_size')
            self.form = self.file.metadata.get('precision', 'exported')
            return
        try:
            self._create()
        except Exception as error:  # registry, Hub, file formats and networks each raise types of their own
            raise UserError(f'cannot create the model {label}: {reason(error)}') from error

    def _create(self) -> None:
        from ..models.count import count_model  # fvcore warns when it is imported, also of --show
        match = re.fullmatch(r'(.+)@(\d+)', self.label)
        name, size = (match[1], int(match[2])) if match else (self.label, None)
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
            'threads': torch.get_num_threads(), 'device': self.settings.device, 'amp': self.settings.amp}

    def prepare(self, task: str, runtime: str, batch: int) -> Callable[[], Any]:
        """What to time: a call that has run once and given the right outputs."""
        spec = self.spec(runtime, batch)
        images = torch.randn(spec['shape'], generator=torch.Generator().manual_seed(0))
        run: Callable[[], Any]
        if runtime == 'compiled':
            # All models share this limit of 8; those beyond it would run in eager mode, and nobody would know.
            torch._dynamo.config.cache_size_limit = 1000
        if task == 'train':
            run = training_step(*process.place(copy.deepcopy(self.plain), images, spec), spec)
            if not math.isfinite(run()):
                raise UserError('the loss is not finite.')
            return run
        if runtime in EXPORTED:
            exported, array = ExportedModel(spec['file'], spec['threads']), images.numpy().astype(spec['dtype'])
            output, run = exported(array), lambda: exported(array)
        else:
            run = process.predictor(copy.deepcopy(self.reparameterised), images, spec)
            output = run().numpy()
        if not self.file:  # which is what it is: quantised, of other weights
            with torch.inference_mode():
                expected = self.plain(images).numpy()
            difference = float(np.abs(output - expected).max() / np.abs(expected).max())
            if not difference <= (LOW_TOLERANCE if spec['amp'] or spec['device'] != 'cpu' else TOLERANCE):
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
    def settle(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        norm.running_var.copy_(inputs[0].square().mean([dim for dim in range(inputs[0].ndim) if dim != 1]))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.2, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(settle))
            if module.affine:
                module.weight.masked_fill_(module.weight == 0, 1.)
    model(images)
    for hook in hooks:
        hook.remove()


def training_step(model: nn.Module, images: torch.Tensor, spec: dict[str, Any]) -> Callable[[], float]:
    """A step of `train.py --cosine-harmony 1 --opt adamw` on random labels, which returns the loss."""
    labels = torch.randint(model.num_classes, (len(images),), device=images.device)  # type: ignore[call-overload]
    task = CosineHarmonyTask(model.train(), nn.CrossEntropyLoss(), device=images.device, verbose=False)
    optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-4)
    if spec['runtime'] == 'compiled':
        task.compile()

    def step() -> float:
        with torch.autocast(spec['device'], torch.bfloat16, enabled=spec['amp']):
            loss = task(images, labels)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()  # waits for a GPU

    return step


# --- timing -----------------------------------------------------------------------------------------------------------

def seconds_of(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleave(subjects: Sequence[Subject], seconds: float, rounds: int) -> None:
    """Time the subjects in turns, into their `rounds`: `seconds` each, three times that where rounds differ by much."""
    for subject in subjects:
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < seconds / 4:
            last = seconds_of(subject.run)
            calls += 1
        subject.calls = max(1, math.ceil(seconds / rounds / last))
    done = 0
    while done < rounds or (done < 3 * rounds and any(is_noisy(quartiles(subject.rounds)) for subject in subjects)):
        for subject in subjects:
            subject.run()  # caches, memory, and threads that others left spinning
            subject.rounds.append(float(np.median([seconds_of(subject.run) for _ in range(subject.calls)])))
        done += 1


def quartiles(values: Any) -> dict[str, float]:
    """Median and quartiles, with five digits."""
    low, median, high = (float(f'{value:.5g}') for value in np.percentile(values, (25, 50, 75)))
    return {'median': median, 'q1': low, 'q3': high}


def is_noisy(values: dict[str, float]) -> bool:
    """Whether quartiles lie far apart."""
    return values['q3'] - values['q1'] > NOISY * values['median']


def summarise(subjects: Sequence[Subject], peer: str | None) -> list[dict[str, Any]]:
    """The rows of a group with its figures, an interrupted round left out."""
    if not (count := min((len(subject.rounds) for subject in subjects), default=0)):
        return []
    times = {subject.row['model']: np.asarray(subject.rounds[:count]) for subject in subjects}
    return [{
        **subject.row, 'rounds': count,
        'ms_per_image': quartiles(1000 * times[subject.row['model']] / subject.row['batch']),
        **({'ratio': quartiles(times[subject.row['model']] / times[peer])} if peer in times else {}),
    } for subject in subjects]


def measure_imports() -> dict[str, float]:
    """CPU time of imports: what they differ by is little beside what else happens on a machine and its disk."""
    code = 'import time, {}; print(time.process_time())'
    times = np.array([
        [fresh_process('-c', code.format(module)) for module in ('timm', 'timm_lfnsb')]
        for _ in range(4)])[1:]  # the first ones may have compiled modules to byte code
    timm_s, own_s = np.median(times, axis=0).tolist()
    return {'timm': timm_s, 'timm_lfnsb': own_s, 'ratio': float(np.median(times[:, 1] / times[:, 0]))}


def fresh_process(*arguments: str) -> Any:
    """Run Python on its own, and read the JSON it prints last."""
    environment = {**os.environ, 'TORCHINDUCTOR_FORCE_DISABLE_CACHES': '1'}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, errors='replace')
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ['no output']
    if done.returncode:
        raise UserError(f'a fresh process ended with {done.returncode}: {lines[-1]}')
    return json.loads(lines[-1])


# --- the whole run ----------------------------------------------------------------------------------------------------

def check_settings(settings: Settings) -> list[str]:
    """The runtimes to measure.

    Raises:
        UserError: When settings are unknown, do not fit together, or need what is not there.
    """
    def possible(name: str) -> bool:  # torch writes exported files with the package onnx, which no runtime brings along
        return name not in EXPORTED or (settings.device == 'cpu' and not settings.amp and all(
            importlib.util.find_spec(package) for package in (name, 'onnx')))

    if unknown := [name for name in settings.runtimes if name not in RUNTIMES]:
        raise UserError(f"there is no runtime '{unknown[0]}': there are {', '.join(RUNTIMES)}.")
    if min(settings.batches, default=0) < 1 or not (*settings.models, *settings.peers):
        raise UserError('name at least one model, and batch sizes of 1 or more.')
    if settings.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('torch finds no CUDA device here: leave out --device cuda.')
    if missing := [name for name in settings.runtimes if not possible(name)]:
        raise UserError(f"{missing[0]} needs pip install 'timm-lfnsb[export]', and neither --device cuda nor --amp.")
    return list(dict.fromkeys(settings.runtimes)) or ['eager', *filter(possible, EXPORTED)]


def run_benchmark(
        settings: Settings, progress: Callable[[str], None], save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure everything that the settings name.

    Args:
        settings: What to measure.
        progress: Gets a line for each part.
        save: Gets the report after each part.

    Returns:
        The report; after a keyboard interrupt what was measured until then, with `complete` False. A network that
        failed somewhere has an `error` in that row.

    Raises:
        UserError: When the settings cannot be met.
    """
    runtimes, threads = check_settings(settings), torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    report: dict[str, Any] = {
        'format': 2, 'complete': False, 'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'commit': git_commit(),
        'machine': {
            'cpu': cpu_name(), 'vectors': torch.backends.cpu.get_cpu_capability(), 'cores': available_cores(),
            'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name() if settings.device == 'cuda' else None},
        'versions': {'python': platform.python_version(), 'timm_lfnsb': __version__, **{
            name: version(name) for name in ('timm', 'torch', *EXPORTED) if importlib.util.find_spec(name)}},
        'settings': {**asdict(settings), 'runtimes': runtimes, 'peer': next(iter(settings.peers), None)},
        'models': {}, 'results': [], 'import': None,
    }
    groups = [('predict', runtime, batch) for runtime in runtimes for batch in settings.batches]
    if settings.train:
        groups += [('train', runtime, settings.train_batch) for runtime in runtimes if runtime not in EXPORTED]
    try:
        with tempfile.TemporaryDirectory(prefix='timm-lfnsb-bench') as folder:
            labels = list(dict.fromkeys([*settings.models, *settings.peers]))
            progress(f'create: {", ".join(labels)}')
            networks = {label: Network(label, settings, Path(folder)) for label in labels}
            report['models'] = {label: network.info for label, network in networks.items()}
            for group in groups:
                save(report)
                progress(group_name(*group))
                _measure_group(networks, group, report)
            if settings.cold_starts:
                save(report)
                progress('fresh processes')
                report['import'] = measure_imports()
                _measure_processes(networks, report)
        report['complete'] = True
    except KeyboardInterrupt:
        progress('interrupted: what follows is what was measured until now')
    finally:
        torch.set_num_threads(threads)
    save(report)
    return report


def group_name(task: str, runtime: str, batch: int) -> str:
    """What a table of the report is called."""
    return f'{"training step, " if task == "train" else ""}{RUNTIMES[runtime]}, batch {batch}'


def _measure_group(networks: dict[str, Network], group: tuple[str, str, int], report: dict[str, Any]) -> None:
    """Time networks in one runtime at one batch size, into the report."""
    (task, runtime, batch), settings = group, report['settings']
    subjects: list[Subject] = []
    failed = []
    try:
        for label, network in networks.items():
            if network.file and EXPORTED.get(runtime) != network.file.path.suffix:
                continue
            form = 'plain' if task == 'train' else network.form  # what is reparameterised does not train
            row = {'task': task, 'runtime': runtime, 'batch': batch, 'model': label, 'form': form}
            try:
                subjects.append(Subject(network.prepare(*group), row))
            except Exception as error:  # exporters, compilers and runtimes raise types of their own
                failed.append({**row, 'error': reason(error)})
        if subjects:
            interleave(subjects, settings['seconds'], settings['rounds'])
    finally:
        report['results'] += [*summarise(subjects, settings['peer']), *failed]


def _measure_processes(networks: dict[str, Network], report: dict[str, Any]) -> None:
    """Cold start and peak memory at the first batch size, medians of fresh processes in turns."""
    settings, script = report['settings'], str(Path(__file__).with_name('process.py'))
    rows: list[tuple[dict[str, Any], list[Any]]] = [
        (row, []) for row in report['results'] if row['task'] == 'predict' and row['batch'] == settings['batches'][0]]
    for number in range(settings['cold_starts']):
        for row, starts in rows:
            if 'error' in row or (number and row['runtime'] == 'compiled'):
                continue
            try:
                spec = networks[row['model']].spec(row['runtime'], row['batch'])
                starts.append(fresh_process(script, json.dumps({**spec, 'started': time.monotonic()})))
                row |= {key: float(np.median([start[key] for start in starts])) for key in starts[0]}
            except UserError as error:
                row['error'] = str(error)
