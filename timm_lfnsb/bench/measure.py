"""Benchmark of inference and training: the networks of this zoo beside other timm models, in several runtimes.

How it measures, since all of this changes the figures:

* What is compared runs in one process in turns (A B C A B C ...), so that a machine whose speed drifts slows all of
  them. A round gives the median of some calls behind an untimed one; the figures are median and quartiles over rounds,
  and a ratio is taken round by round. Ratios to a peer can be compared between runs and commits on one machine,
  milliseconds cannot.
* Rounds go on until each network had its time, and up to three times as long where the rounds differ by much.
* A matrix product runs in the same rounds: the arithmetic the machine can do in that moment. GFLOP/s of a network
  count two operations for each multiply-accumulate of its plain form, whatever form is measured.
* A small operator runs in the same rounds, too, shared between threads. On a virtual machine its time can have steps,
  probably as the host moves cores between parts of the processor that share a cache and parts that do not; networks of
  many small operators feel that more than others. The report tells the rounds of either kind apart, and a group that
  sees both takes more rounds.
* Everything that is timed must give the outputs of the plain network in eager mode, or it is reported as failed. The
  floors of `timm_lfnsb.bench.floor` compute something else by design.
* Training steps on a CPU come last, and freed memory is kept for them as in `timm-lfnsb run train.py`
  (`timm_lfnsb.models.memory`): all networks alike.
* Weights do not matter for speed, as long as activations have their usual size: networks without weights get batch
  norm statistics that see to it. Peers have 8 classes.
* Cold start and peak memory are those of fresh processes, the cold start from the start of the process. For an exported
  file such a process imports the runtime and numpy only.
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
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from ..models.memory import keep_freed_memory
from ..models.networks import MixedFeatureNet
from ..predict.exported import ExportedModel, RuntimeFileError
from ..util.machine import available_cores, cpu_name, git_commit
from ..version import __version__
from ..weights.names import embedded_weights, weights_info
from . import profile as bench_profile

RUNTIMES = {
    'eager': 'PyTorch eager', 'compiled': 'torch.compile', 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO',
}
EXPORTED = {'onnxruntime': '.onnx', 'openvino': '.xml'}
"""Runtimes of exported files, and the suffix of those files."""

MEMORY_FORMATS = {'contiguous': 'contiguous_format', 'channels_last': 'channels_last'}
DEFAULT_MODELS = ('lfnsb', 'lfn_small', 'mfn', 'mobilefacenet')
DEFAULT_PEERS = ('resnet18@112',)
NUM_CLASSES = 8
"""Classes of the peers: FER+'s, whatever their own weights have."""

IMPORTS = 5
"""Least number of processes that time an import."""

NOISY = 0.1
"""Distance of the quartiles, relative to the median, from which a figure is marked as uncertain."""

TOLERANCE = 1e-3
"""Largest difference to the plain network's outputs, relative to their largest, in float32 on the CPU."""

LOW_TOLERANCE = 0.1
"""The same under autocast, and on a GPU, whose convolutions may use TF32."""


class BenchError(ValueError):
    """A benchmark that cannot be run; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Spec:
    """A model to measure.

    Attributes:
        name: Its name for `timm.create_model`.
        size: Image size where it is not the model's own.
        peer: A model to compare with.
        file: An exported file of this model, which is measured in its place.
        precision: The precision of that file.
    """

    name: str
    size: int | None = None
    peer: bool = False
    file: Path | None = None
    precision: str = ''

    @property
    def label(self) -> str:
        if self.file:
            return self.file.name
        return self.name if self.size is None else f'{self.name}@{self.size}'


def parse_spec(text: str, peer: bool = False) -> Spec:
    """Read NAME, NAME@SIZE or the path of a file that `timm-lfnsb export` wrote.

    Raises:
        BenchError: When the size is too small to be one, or the file does not say which model it is of.
    """
    if Path(text).suffix in EXPORTED.values():
        try:
            exported = ExportedModel(text)
            name, size = str(exported.value('model')), int(exported.value('input_size')[-1])
        except (RuntimeFileError, TypeError, ValueError) as error:
            raise BenchError(f'cannot measure {text}: {one_line(error)}') from error
        config = timm.models.get_pretrained_cfg(name)
        own_size = config is not None and config.input_size[-1] == size
        precision = exported.metadata.get('precision', 'exported')
        return Spec(name, None if own_size else size, peer, Path(text), precision)
    match = re.fullmatch(r'(.+)@(\d+)', text)
    if not match:
        return Spec(text, peer=peer)
    if int(match[2]) < 8:
        raise BenchError(f'{text}: the image size must be at least 8.')
    return Spec(match[1], int(match[2]), peer)


@dataclass
class Network:
    """A created model: its plain form, its counts, and what a fresh process needs to create it again."""

    spec: Spec
    plain: nn.Module
    create: dict[str, Any]
    input_size: tuple[int, int, int]
    info: dict[str, Any]
    forms: dict[str, nn.Module] = field(default_factory=dict)


@dataclass
class Subject:
    """One thing that takes part in the rounds.

    Attributes:
        run: One call.
        row: Its entry in the report.
        feed: What an exported file is given.
        calls: Timed calls of a round.
        rounds: Median seconds of a call, round by round.
        fastest: Seconds of the fastest call.
    """

    run: Callable[[], Any]
    row: dict[str, Any]
    calls: int = 1
    rounds: list[float] = field(default_factory=list)
    fastest: float = math.inf
    feed: np.ndarray | None = None


# --- networks ---------------------------------------------------------------------------------------------------------

def create_network(
        spec: Spec, plain_too: bool = False, unoptimised_too: bool = False, floor_too: bool = False) -> Network:
    """Create a model, with weights where they are at hand, and its forms.

    Args:
        spec: Which model.
        plain_too: Measure it without reparameterisation as well.
        unoptimised_too: Measure a network of this zoo as `unoptimise` returns it as well.
        floor_too: Measure the floor of a network of this zoo as well, see `timm_lfnsb.bench.floor`.

    Raises:
        BenchError: When there is no such model, or it cannot be made at that size.
    """
    from ..models.count import count_model
    from .floor import bare_network

    located = spec.name.startswith(('local-dir:', 'hf-hub:'))
    config = None if located else timm.models.get_pretrained_cfg(spec.name)
    full_name = f'{config.architecture}.{config.tag}' if config else spec.name
    embedded = spec.size is None and full_name in embedded_weights()
    create: dict[str, Any] = {'pretrained': embedded or (located and spec.size is None)}
    if not create['pretrained'] and not getattr(config, 'label_names', None):
        create['num_classes'] = NUM_CLASSES
    if spec.size is not None:
        create['pretrained_cfg_overlay'] = {'input_size': (3, spec.size, spec.size)}
        create['img_size'] = spec.size
    try:
        try:
            model = timm.create_model(spec.name, **create)
        except TypeError as error:
            if 'img_size' not in str(error):
                raise
            del create['img_size']  # takes any size as it is
            model = timm.create_model(spec.name, **create)
        model = model.eval()
        input_size = tuple(timm.data.resolve_model_data_config(model)['input_size'])
        if not create['pretrained']:
            # Noise on plain colours: pictures are more than noise, which networks answer weakly.
            settle_norms(model, torch.randn(4, *input_size) + torch.randn(4, input_size[0], 1, 1))
        count = count_model(spec.name, model)
    except Exception as error:  # registry, Hub, file formats and networks each raise types of their own
        raise BenchError(f'cannot create the model {spec.label}: {one_line(error)}') from error

    info = {
        'params': count.params, 'macs': count.macs, 'input_size': list(input_size), 'num_classes': count.num_classes,
        'weights': full_name if create['pretrained'] else None, 'peer': spec.peer, 'accuracy': None,
    }
    if embedded:
        info['accuracy'] = weights_info(full_name)['metrics'].get('test', {}).get('accuracy')
    network = Network(spec, model, create, input_size, info)
    if spec.file:
        network.forms = {spec.precision: model}
        return network
    network.forms['reparameterised'] = timm.utils.reparameterize_model(model)
    if list(network.forms['reparameterised'].state_dict()) == list(model.state_dict()) and not isinstance(
            model, MixedFeatureNet):
        network.forms = {'plain': model}  # has nothing to reparameterise
    elif plain_too:
        network.forms['plain'] = model
    if unoptimised_too and isinstance(model, MixedFeatureNet):
        network.forms['unoptimised'] = unoptimise(model)
    if floor_too and isinstance(model, MixedFeatureNet):
        network.forms['convolutions'] = bare_network(model)
    return network


def unoptimise(model: MixedFeatureNet) -> nn.Module:
    """The same network from textbook parts, to compare with: a copy that computes the same.

    timm's own coordinate attention, torch's PReLU, torch's own memory format; nothing is folded.
    """
    from timm.layers import create_attn

    from ..models.layers import ConvNormAct, CoordAttn, PReLU, StemConv

    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            replacement: Any = None
            if isinstance(child, CoordAttn):
                rd_chs, chs = child.conv1.weight.shape[:2]
                replacement = create_attn('coord', chs, rd_channels=rd_chs, bias=True)
            elif isinstance(child, PReLU):
                replacement = nn.PReLU(child.num_parameters)
            elif isinstance(child, StemConv):
                # Without the memory format it chooses.
                child.__class__ = ConvNormAct  # type: ignore[assignment]
            if replacement is not None:
                replacement.load_state_dict(child.state_dict())
                setattr(parent, name, replacement)
    return model.eval()


@torch.inference_mode()
def settle_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Let the batch norms of an untrained model bring their inputs to unit size, so that activations keep their scale.

    Without this a deep untrained network may end in denormal numbers, which are slow. Means stay zero and variances
    become mean squares: few images, alike as random ones are, would have differences too small to divide by. Scales
    that timm starts at zero become one: a runtime could leave out what is multiplied by zero. Slopes of PReLU become
    different: exporters share tensors that are equal, and OpenVINO does not fuse a PReLU whose slopes are shared.

    Args:
        model: In eval mode.
        images: Batch (B, C, H, W).
    """
    def settle(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        norm.running_mean.zero_()
        norm.running_var.copy_(x.square().mean([dim for dim in range(x.ndim) if dim != 1]))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.PReLU):
            module.weight.uniform_(0.2, 0.3)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            hooks.append(module.register_forward_pre_hook(settle))
            if module.affine:
                module.weight.masked_fill_(module.weight == 0, 1.)
    model(images)
    for hook in hooks:
        hook.remove()


def export_network(network: Network, form: str, runtime: str, images: torch.Tensor, path: Path) -> None:
    """Write a network as a file for its runtime and the shape of these images.

    Args:
        network: What to write.
        form: 'reparameterised' for the file of `timm-lfnsb export`, 'convolutions' for its floor, any other as it is.
        runtime: One of `EXPORTED`.
        images: Batch (B, C, H, W).
        path: File with the suffix of the runtime.
    """
    if form == 'reparameterised' or 'reparameterised' not in network.forms:
        from ..export.export import export_model
        export_model(network.plain, path, batch=len(images))
        return
    if form == 'convolutions':
        from .floor import bare_graph
        model = bare_graph(network.plain)  # type: ignore[arg-type]
    else:
        model = copy.deepcopy(network.forms[form])
    onnx_file = path.with_suffix('.onnx')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(
            model, (images,), str(onnx_file), input_names=['input'], output_names=['output'], dynamo=False)
    if runtime == 'openvino':
        import openvino
        openvino.save_model(openvino.convert_model(onnx_file), path, compress_to_fp16=False)


def training_step(
        model: nn.Module, images: torch.Tensor, compiled: bool = False, amp: bool = False,
) -> Callable[[], torch.Tensor]:
    """A training step as `timm-lfnsb run train.py --cosine-harmony 1 --opt adamw` does it, without reading data.

    Args:
        model: Is trained in place, on random labels.
        images: Batch (B, C, H, W).
        compiled: With torch.compile, as --torchcompile.
        amp: In bfloat16 autocast.

    Returns:
        A function that does one step and returns the loss.
    """
    from timm.optim import create_optimizer_v2

    from ..train.task import CosineHarmonyTask

    task = CosineHarmonyTask(model.train(), nn.CrossEntropyLoss(), device=images.device, verbose=False)
    optimizer = create_optimizer_v2(task.trainable_module, opt='adamw', lr=1e-4)
    if compiled:
        task.compile()
    labels = torch.randint(model.num_classes, (len(images),), device=images.device)  # type: ignore[call-overload]

    def step() -> torch.Tensor:
        with ExitStack() as stack:
            if amp:
                stack.enter_context(torch.autocast(images.device.type, torch.bfloat16))
            loss = task(images, labels)['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def prediction(model: nn.Module, images: torch.Tensor, amp: bool = False) -> Callable[[], torch.Tensor]:
    """A function that predicts these images in inference mode."""
    def predict() -> torch.Tensor:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            if amp:
                stack.enter_context(torch.autocast(images.device.type, torch.bfloat16))
            return model(images)

    return predict


# --- timing -----------------------------------------------------------------------------------------------------------

def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on a GPU between two events in its queue."""
    if device == 'cpu':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def interleave(subjects: Sequence[Subject], seconds: float, rounds: int, device: str = 'cpu') -> None:
    """Time the subjects in turns, into their `rounds`.

    Args:
        subjects: What takes part.
        seconds: Time of each, warm-up aside; up to three times this where the rounds of one differ by much.
        rounds: Least number of rounds.
        device: 'cpu' or 'cuda'.
    """
    for subject in subjects:
        start, calls = time.perf_counter(), 0
        while calls < 3 or time.perf_counter() - start < seconds / 4:
            last = seconds_of(subject.run, device)
            calls += 1
        subject.calls = max(1, math.ceil(seconds / rounds / last))
    done = 0
    while done < rounds or (done < 3 * rounds and any(_spread(subject.rounds) > NOISY for subject in subjects)):
        for subject in subjects:
            subject.run()  # caches, memory, and threads that others left spinning
            times = [seconds_of(subject.run, device) for _ in range(subject.calls)]
            subject.rounds.append(float(np.median(times)))
            subject.fastest = min(subject.fastest, *times)
        done += 1


def _spread(values: Sequence[float]) -> float:
    low, median, high = np.percentile(values, (25, 50, 75))
    return float((high - low) / median)


def matmul_subject(device: str, amp: bool) -> Subject:
    """A square matrix product, whose row gets `flops`, the operations of one call."""
    size = 1024 if device == 'cpu' else 8192
    first, second = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if amp else torch.float32)
                     for _ in range(2))
    out = torch.empty_like(first)

    def product() -> None:
        with torch.inference_mode():
            torch.mm(first, second, out=out)

    return Subject(product, {'flops': 2 * size ** 3})


def sharing_subject() -> Subject:
    """An operator of 65538 multiplications: torch shares what has more than 32768 between threads."""
    values = torch.zeros(2 * 32769)

    def multiply() -> None:
        with torch.inference_mode():
            values.mul_(1.)

    return Subject(multiply, {})


def summarise(subjects: Sequence[Subject], matmul: Subject, macs: dict[str, int], peer: str | None) -> None:
    """Turn the rounds of one group into figures in the subjects' rows.

    Args:
        subjects: The group; an interrupted round, or a subject without rounds, is left out.
        matmul: The matrix product of the same rounds.
        macs: Multiply-accumulates of an image by the model's label.
        peer: Label of the model that ratios refer to.
    """
    count = min((len(subject.rounds) for subject in (*subjects, matmul)), default=0)
    if not count:
        return
    rate = matmul.row['flops'] / float(np.median(matmul.rounds[:count])) / 1e9
    for subject in subjects:
        row, times = subject.row, subject.rounds[:count]
        batch = row['batch']
        low, median, high = (1000 * float(value) / batch for value in np.percentile(times, (25, 50, 75)))
        row.update(
            ms_per_image={'median': median, 'q1': low, 'q3': high, 'min': 1000 * subject.fastest / batch},
            images_per_second=1000 / median, rounds=count, calls=subject.calls, noisy=_spread(times) > NOISY,
            matmul_gflops=rate)
        if row['task'] == 'predict' and row['form'] != 'convolutions':
            row['gflops'] = 2 * macs[row['model']] / median / 1e6

    def fastest_first(subject: Subject) -> float:
        return subject.row['ms_per_image']['median']

    by_model: dict[tuple[str, str], list[Subject]] = {}
    for subject in subjects:
        by_model.setdefault((subject.row['model'], subject.row['form']), []).append(subject)
    for candidates in by_model.values():
        min(candidates, key=fastest_first).row['best'] = True
    reference = min((s for s in subjects if s.row['model'] == peer), key=fastest_first, default=None)
    if reference is None:
        return
    for subject in subjects:
        ratios = np.asarray(subject.rounds[:count]) / np.asarray(reference.rounds[:count])
        low, median, high = (float(value) for value in np.percentile(ratios, (25, 50, 75)))
        subject.row['ratio'] = {
            'median': median, 'q1': low, 'q3': high, 'rounds': [round(float(ratio), 4) for ratio in ratios]}


# --- the whole run ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """What to measure, and how long.

    Attributes:
        models: Names of models, NAME or NAME@SIZE.
        peers: Models to compare with; ratios refer to the first.
        runtimes: Some of `RUNTIMES`; empty for eager and the exported ones that are installed.
        batches: Images of a prediction.
        threads: Threads of every runtime, None for torch's choice.
        plain: Measure the networks without reparameterisation as well.
        unoptimised: Measure the networks from textbook parts as well, see `unoptimise`.
        floor: Measure what their convolutions take alone as well, see `timm_lfnsb.bench.floor`.
        profile: Add where the time of the best rows goes, operator by operator.
        memory_formats: Some of `MEMORY_FORMATS`, for eager and compiled; the better one is shown. Unoptimised networks
            are always contiguous.
        train: Time training steps as well, eager and compiled where `runtimes` names them.
        train_batch: Images of a training step.
        seconds: Time of each network in each runtime and batch.
        rounds: Least number of rounds.
        cold_starts: Fresh processes of each network and runtime; 0 leaves out cold start, import and memory.
        device: 'cpu' or 'cuda'.
        amp: bfloat16 autocast, for eager and compiled.
    """

    models: Sequence[str] = DEFAULT_MODELS
    peers: Sequence[str] = DEFAULT_PEERS
    runtimes: Sequence[str] = ()
    batches: Sequence[int] = (1, 8, 32)
    threads: int | None = None
    plain: bool = False
    unoptimised: bool = False
    floor: bool = False
    profile: bool = False
    memory_formats: Sequence[str] = tuple(MEMORY_FORMATS)
    train: bool = False
    train_batch: int = 32
    seconds: float = 2.
    rounds: int = 10
    cold_starts: int = 3
    device: str = 'cpu'
    amp: bool = False


def check_settings(settings: Settings) -> list[str]:
    """The runtimes to measure.

    Raises:
        BenchError: When settings are out of range, do not fit together, or need what is not installed.
    """
    def installed(runtime: str) -> bool:
        # torch writes the file with the package onnx, which no runtime brings along
        return all(importlib.util.find_spec(name) for name in (runtime, 'onnx'))

    for names, known, what in ((settings.runtimes, RUNTIMES, 'runtime'),
                               (settings.memory_formats, MEMORY_FORMATS, 'memory format')):
        for name in names:
            if name not in known:
                raise BenchError(f"there is no {what} '{name}': there are {', '.join(known)}.")
    if not settings.memory_formats or not settings.batches:
        raise BenchError('name at least one memory format and one batch size.')
    if min(*settings.batches, settings.train_batch, settings.rounds, 1 if settings.threads is None
           else settings.threads) < 1 or settings.seconds <= 0 or settings.cold_starts < 0:
        raise BenchError('batch sizes, threads, rounds and seconds must be positive.')
    if settings.device not in ('cpu', 'cuda'):
        raise BenchError(f"the device must be cpu or cuda, not '{settings.device}'.")
    if settings.device == 'cuda' and not torch.cuda.is_available():
        raise BenchError('torch finds no CUDA device here: leave out --device cuda.')
    runtimes = list(dict.fromkeys(settings.runtimes))
    on_cpu = settings.device == 'cpu' and not settings.amp
    if not runtimes:
        runtimes = ['eager', *(name for name in EXPORTED if on_cpu and installed(name))]
    for name in runtimes:
        if name in EXPORTED and not on_cpu:
            raise BenchError(f'{name} is measured on the CPU in float32 only: leave out --device cuda and --amp.')
        if name in EXPORTED and not installed(name):
            raise BenchError(
                f"{name} needs a package that is not installed: pip install 'timm-lfnsb[export]', or leave it out of "
                '--runtime.')
    return runtimes


def run_benchmark(
        settings: Settings,
        progress: Callable[[str], None] = lambda message: None,
        save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure everything that the settings name.

    Args:
        settings: What to measure.
        progress: Gets a line for each part.
        save: Gets the report after each part, with `complete` False until the end.

    Returns:
        The report as plain lists, strings and numbers. After a keyboard interrupt it holds what was measured until
        then, and its `complete` is False. A network that failed somewhere has an `error` in that row.

    Raises:
        BenchError: When the settings cannot be met.
    """
    runtimes = check_settings(settings)
    given = [parse_spec(text) for text in settings.models] + [parse_spec(text, peer=True) for text in settings.peers]
    if not given:
        raise BenchError('name a model to measure.')
    specs: dict[str, Spec] = {}
    for spec in given:
        if specs.setdefault(spec.label, spec).file != spec.file:
            raise BenchError(f'two files are called {spec.label}: rename one, so that they can be told apart.')
    peer = next((spec.label for spec in given if spec.peer), None)
    threads = settings.threads or torch.get_num_threads()
    report = describe_run(settings, runtimes, threads, peer)
    try:
        with (_torch_state(threads, 'compiled' in runtimes),
              tempfile.TemporaryDirectory(prefix='timm-lfnsb-bench') as folder):
            run = _Run(settings, report, threads, peer, Path(folder), progress, save)
            run.create(list(specs.values()))
            for task, batches in (('predict', settings.batches), ('train', [settings.train_batch])):
                for runtime in runtimes:
                    if task == 'train' and (not settings.train or runtime in EXPORTED):
                        continue
                    for batch in batches:
                        run.measure_group(task, runtime, batch)
            if settings.cold_starts:
                run.measure_processes()
        report['complete'] = True
    except KeyboardInterrupt:
        progress('interrupted: what follows is what was measured until now')
    report['load'].append(_load())
    save(report)
    return report


def group_name(task: str, runtime: str, batch: int) -> str:
    return f'{"training step, " if task == "train" else ""}{RUNTIMES[runtime]}, batch {batch}'


def fits(spec: Spec, task: str, runtime: str, batch: int) -> bool:
    """Whether this can be measured there: a file only in its runtime, and at its batch size where that is fixed."""
    if spec.file is None:
        return True
    return task == 'predict' and EXPORTED.get(runtime) == spec.file.suffix and (
        ExportedModel(spec.file).batch_size in (None, batch))


class _Run:
    """The parts of one run, which share its settings and its report."""

    def __init__(
            self, settings: Settings, report: dict[str, Any], threads: int, peer: str | None, folder: Path,
            progress: Callable[[str], None], save: Callable[[dict[str, Any]], None],
    ):
        self.settings = settings
        self.report = report
        self.threads = threads
        self.peer = peer
        self.folder = folder
        self.progress = progress
        self.save = save
        self.networks: list[Network] = []
        self.files: dict[tuple[str, str, str, int], Path] = {}

    def create(self, specs: Sequence[Spec]) -> None:
        self.progress('create: ' + ', '.join(spec.label for spec in specs))
        for spec in specs:
            network = create_network(spec, self.settings.plain, self.settings.unoptimised, self.settings.floor)
            self.networks.append(network)
            self.report['models'][spec.label] = network.info

    def measure_group(self, task: str, runtime: str, batch: int) -> None:
        """Time all networks in one runtime at one batch size."""
        from .floor import bare_training

        self.progress(group_name(task, runtime, batch))
        if task == 'train' and self.settings.device == 'cpu':
            keep_freed_memory()
        if runtime == 'compiled':
            torch.compiler.reset()
        subjects: list[Subject] = []
        for network in self.networks:
            if not fits(network.spec, task, runtime, batch):
                continue
            forms = network.forms
            if task == 'train':  # what is reparameterised does not train
                forms = {'plain': network.plain, **{k: v for k, v in forms.items() if k == 'unoptimised'}}
                if 'convolutions' in network.forms:
                    forms['convolutions'] = bare_training(network.plain)  # type: ignore[arg-type]
            for form, model in forms.items():
                formats: Sequence[str | None] = self.settings.memory_formats
                if runtime in EXPORTED:
                    formats = [None]
                elif form == 'unoptimised':
                    formats = ['contiguous']
                for memory_format in formats:
                    row: dict[str, Any] = {
                        'task': task, 'runtime': runtime, 'batch': batch, 'model': network.spec.label, 'form': form,
                        'memory_format': memory_format, 'best': False,
                    }
                    self.report['results'].append(row)
                    try:
                        subjects.append(self._prepare(network, model, row))
                    except Exception as error:  # exporters, compilers and runtimes raise types of their own
                        row['error'] = one_line(error).replace(f'{self.folder}{os.sep}', '')
                        self.progress(f'  {network.spec.label} failed: {row["error"]}')
        matmul = matmul_subject(self.settings.device, self.settings.amp)
        sharing = [sharing_subject()] if self.settings.device == 'cpu' and self.threads > 1 else []
        try:
            if subjects:
                interleave(
                    [*sharing, *subjects, matmul], self.settings.seconds, self.settings.rounds, self.settings.device)
        finally:
            self.report['sharing_us'][group_name(task, runtime, batch)] = [
                round(1e6 * seconds, 2) for subject in sharing for seconds in subject.rounds]
            macs = {network.spec.label: network.info['macs'] for network in self.networks}
            summarise(subjects, matmul, macs, self.peer)
        self.save(self.report)
        if self.settings.profile:
            for subject in subjects:
                if subject.row['best'] and subject.row['form'] not in ('unoptimised', 'convolutions'):
                    try:
                        subject.row['profile'] = self._profile(subject)
                    except Exception as error:  # as above; the times stay
                        self.progress(f'  no profile of {subject.row["model"]}: {one_line(error)}')
            self.save(self.report)

    def _profile(self, subject: Subject) -> bench_profile.Profile:
        row = subject.row
        if subject.feed is None:
            return bench_profile.profile_torch(subject.run, self.settings.device)
        network = next(network for network in self.networks if network.spec.label == row['model'])
        profile = {
            'onnxruntime': bench_profile.profile_onnxruntime, 'openvino': bench_profile.profile_openvino,
        }[row['runtime']]
        return profile(self._file(network, row, torch.empty(0)), subject.feed, self.threads)

    def _prepare(self, network: Network, model: nn.Module, row: dict[str, Any]) -> Subject:
        """What to time: a call that has run once and given the right outputs."""
        settings = self.settings
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(row['batch'], *network.input_size, generator=generator)
        if row['runtime'] in EXPORTED:
            exported = ExportedModel(self._file(network, row, images), self.threads)
            if exported.metadata.get('input') == 'uint8':
                pixels = np.random.default_rng(0).integers(
                    0, 256, (row['batch'], *network.input_size[1:], network.input_size[0]), np.uint8)
                return Subject(lambda: exported(pixels), row, feed=pixels)
            array = images.numpy()
            if row['form'] != 'convolutions':
                # A file may be quantised: it is what it is.
                row['difference'] = self._difference(
                    network, images, exported(array), enforce=network.spec.file is None)
            return Subject(lambda: exported(array), row, feed=array)

        memory_format = getattr(torch, MEMORY_FORMATS[row['memory_format']])
        model = copy.deepcopy(model).to(settings.device).to(memory_format=memory_format)
        batch = images.to(settings.device, memory_format=memory_format)
        compiled = row['runtime'] == 'compiled'
        if compiled:
            # Its own cache, so that the compile time is one.
            os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp(dir=self.folder)
        run: Callable[[], Any]
        if row['task'] == 'train':
            run = training_step(model, batch, compiled, settings.amp)
        else:
            if compiled:
                model.compile(dynamic=False)
            run = prediction(model, batch, settings.amp)
        start = time.perf_counter()
        output = run()
        if compiled:
            row['compile_seconds'] = time.perf_counter() - start
        if row['task'] == 'train':
            if not math.isfinite(output.item()):
                raise BenchError('the loss is not finite.')
        elif row['form'] != 'convolutions':
            row['difference'] = self._difference(network, images, output.float().cpu().numpy())
        return Subject(run, row)

    def _file(self, network: Network, row: dict[str, Any], images: torch.Tensor) -> Path:
        if network.spec.file:
            return network.spec.file.resolve()
        key = (network.spec.label, row['form'], row['runtime'], row['batch'])
        if key not in self.files:
            path = self.folder / f'{len(self.files)}{EXPORTED[row["runtime"]]}'
            export_network(network, row['form'], row['runtime'], images, path)
            self.files[key] = path
        return self.files[key]

    def _difference(
            self, network: Network, images: torch.Tensor, output: np.ndarray, enforce: bool = True) -> float:
        """Largest difference to the plain network's outputs, relative to their largest.

        Raises:
            BenchError: When it is too large: what computes something else need not be timed.
        """
        with torch.inference_mode():
            expected = network.plain(images).numpy()
        difference = float(np.abs(output - expected).max() / np.abs(expected).max())
        low = self.settings.amp or self.settings.device != 'cpu'
        if enforce and not difference <= (LOW_TOLERANCE if low else TOLERANCE):
            raise BenchError(f"its outputs differ from the plain network's by {difference:.2g} of the largest.")
        return difference

    def measure_processes(self) -> None:
        """Cold start, peak memory and import time, in fresh processes taken in turns."""
        settings = self.settings
        runs = max(IMPORTS, settings.cold_starts)
        self.progress(f'fresh processes: import, {runs} times')
        imports: dict[str, list[float]] = {'timm': [], 'timm_lfnsb': []}
        for number in range(runs + 1):
            for module, times in imports.items():
                # CPU time: what they differ by is little beside what else happens on a machine and its disk.
                seconds = self._process(['-c', f'import time, {module}; print(time.process_time())'])
                if number:  # the first one may have compiled modules to byte code
                    times.append(seconds)
        self.report['import'] = {
            'timm': float(np.median(imports['timm'])), 'timm_lfnsb': float(np.median(imports['timm_lfnsb'])),
            'ratio': float(np.median(np.divide(imports['timm_lfnsb'], imports['timm']))), 'runs': runs,
        }
        self.save(self.report)

        rows = [row for row in self.report['results']
                if row['task'] == 'predict' and row['best'] and row['form'] not in ('unoptimised', 'convolutions')]
        first_batch = settings.batches[0]
        starts: dict[int, list[dict[str, float]]] = {}
        for number in range(settings.cold_starts):
            due = [
                row for row in rows if number == 0 or (row['batch'] == first_batch and row['runtime'] != 'compiled')]
            self.progress(f'fresh processes: {len(due)} predictions')
            for row in due:
                if 'error' in row:
                    continue
                try:
                    spec = json.dumps(self._child_spec(row))
                    result = self._process([str(Path(__file__).with_name('process.py')), spec])
                except BenchError as error:
                    row['error'] = str(error)
                    self.progress(f'  {row["model"]} failed: {error}')
                    continue
                if result['peak_bytes'] is not None:
                    row['peak_mb'] = max(row.get('peak_mb', 0), result['peak_bytes'] / 1e6)
                if 'gpu_peak_bytes' in result:
                    row['gpu_peak_mb'] = result['gpu_peak_bytes'] / 1e6
                starts.setdefault(id(row), []).append(result)
                if row['batch'] == first_batch:
                    row['cold_start'] = _cold_start(starts[id(row)])
            self.save(self.report)

    def _child_spec(self, row: dict[str, Any]) -> dict[str, Any]:
        network = next(network for network in self.networks if network.spec.label == row['model'])
        file = self.files.get((row['model'], row['form'], row['runtime'], row['batch']), network.spec.file)
        return {
            'runtime': row['runtime'], 'model': network.spec.name, 'create': network.create,
            'reparameterize': row['form'] == 'reparameterised', 'input_size': network.input_size,
            'memory_format': MEMORY_FORMATS[row['memory_format'] or 'contiguous'], 'batch': row['batch'],
            'threads': self.threads, 'file': str(file.resolve()) if file else None, 'device': self.settings.device,
            'amp': self.settings.amp, 'started': time.monotonic(),
        }

    def _process(self, arguments: Sequence[str]) -> Any:
        """Run Python on its own, and read the JSON it prints last."""
        package = str(Path(__file__).parent.parent.parent)  # found as well where it is not installed
        paths = [package, *filter(None, [os.environ.get('PYTHONPATH')])]
        with tempfile.TemporaryDirectory(dir=self.folder) as cache:
            environment = {
                **os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'OMP_NUM_THREADS': str(self.threads),
                'TORCHINDUCTOR_CACHE_DIR': cache,
            }
            done = subprocess.run(
                [sys.executable, *arguments], env=environment, capture_output=True, text=True, errors='replace')
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ['no output']
        if done.returncode:
            raise BenchError(f'a fresh process ended with {done.returncode}: {lines[-1]}')
        return json.loads(lines[-1])


@contextmanager
def _torch_state(threads: int, compiled: bool) -> Iterator[None]:
    """Set torch's threads and what compiling needs, and put all back as it was."""
    before, cache = torch.get_num_threads(), os.environ.get('TORCHINDUCTOR_CACHE_DIR')
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            if compiled:
                from torch._dynamo import config
                # All models share this limit of 8; those beyond it would run in eager mode, and nobody would know.
                stack.enter_context(config.patch(cache_size_limit=1000))
            yield
    finally:
        torch.set_num_threads(before)
        if cache is not None:
            os.environ['TORCHINDUCTOR_CACHE_DIR'] = cache
        else:
            os.environ.pop('TORCHINDUCTOR_CACHE_DIR', None)


def _cold_start(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    parts = {part: [run[part] for run in runs] for part in ('import', 'create', 'first')}
    totals = [sum(values) for values in zip(*parts.values(), strict=True)]
    return {
        **{part: float(np.median(values)) for part, values in parts.items()},
        'total': float(np.median(totals)), 'min': min(totals), 'max': max(totals), 'runs': len(runs),
    }


def one_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line if len(line) <= 400 else line[:397] + '...'


# --- the machine ------------------------------------------------------------------------------------------------------

def describe_run(settings: Settings, runtimes: Sequence[str], threads: int, peer: str | None) -> dict[str, Any]:
    """An empty report with everything that the figures depend on."""
    versions: dict[str, str | None] = {'python': platform.python_version(), 'timm_lfnsb': __version__}
    for package in ('torch', 'timm', 'onnxruntime', 'openvino'):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        'format': 1,
        'complete': False,
        'date': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        'commit': git_commit(),
        'machine': {
            'cpu': cpu_name(), 'cores': available_cores(), 'threads': threads, 'system': platform.system(),
            'architecture': platform.machine(),
            'vectors': torch.backends.cpu.get_cpu_capability(),
            'gpu': torch.cuda.get_device_name() if settings.device == 'cuda' else None,
        },
        'versions': versions,
        'settings': {
            'runtimes': list(runtimes), 'batches': list(settings.batches), 'train': settings.train,
            'train_batch': settings.train_batch, 'seconds': settings.seconds, 'rounds': settings.rounds,
            'device': settings.device, 'amp': settings.amp, 'peer': peer,
        },
        'load': [_load()],
        'models': {},
        'results': [],
        'sharing_us': {},
        'import': None,
    }


def _load() -> float | None:
    """Processes that want to run, averaged over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, 'getloadavg') else None
