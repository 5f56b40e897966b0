"""Exported files, run in the runtime they were made for: ONNX Runtime, OpenVINO, torch.export and ExecuTorch.

A file carries what its user has to know, as strings, lists as JSON: `model`, `label_names`, `INPUT_KEYS`, `precision`,
`input`, which is 'normalized' for float32 (B, C, H, W) or 'uint8' for RGB (B, H, W, C), and, where it is known,
`TEMPERATURE_KEY`: outputs are logits that were not divided by it.
"""
from __future__ import annotations

import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_sentence
from ..models.temperature import TEMPERATURE_KEY, check_temperature

SUFFIXES = {'.onnx': 'onnx', '.xml': 'openvino', '.pt2': 'torch-export', '.pte': 'executorch'}
"""File suffix -> format, as reports of `timm-lfnsb export` name it."""

# Of the metadata: how timm's preprocessing makes the input.
INPUT_KEYS = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')

# Where files of these formats keep the metadata.
TORCH_EXTRA_FILE, OPENVINO_SECTION, EXECUTORCH_METHOD = 'timm_lfnsb.json', 'timm_lfnsb', 'metadata'

# The function that runs a batch, the metadata, and the batch size or what the runtime has in place of it.
Opened = tuple[Callable[[np.ndarray], np.ndarray], dict[str, str], Any]


def is_exported(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of an exported file, by its suffix; timm's names and prefixes are not."""
    name = os.fspath(name)
    return Path(name).suffix in SUFFIXES and not name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:'))


class ExportedModel:
    """An exported file, open in its runtime on the CPU, whose threads are `threads` or the runtime's own choice.

    `metadata` is what the file says about itself (see the module), and may be empty. `batch_size` is the batch it is
    made for, None where it takes any. May be called by several threads; a copy or a pickle opens the file again.

    Raises:
        UserError: When there is no such file, it is damaged, or its runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None):
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise UserError(f"{self.path} is no exported model: those end in {', '.join(SUFFIXES)}.")
        if not self.path.is_file():
            raise UserError(f'there is no file {self.path}.')
        with one_sentence(f'{self.path} cannot be opened'):
            self._run, self.metadata, batch = _OPEN[self.path.suffix](self.path, threads)
        self.batch_size = batch if isinstance(batch, int) and batch > 0 else None
        self._threads = threads
        known = self.value(TEMPERATURE_KEY) if TEMPERATURE_KEY in self.metadata else None
        self.softmax_temperature = check_temperature(known, self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._threads)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """The outputs (N, C) of images as `metadata['input']` says, in parts of the batch that the file is made for.

        Raises:
            UserError: When the runtime refuses the images, for instance those of another size.
        """
        count, size = len(images), self.batch_size or len(images)
        if count % size:  # the last part is filled up with anything
            images = np.concatenate([images, np.repeat(images[-1:], size - count % size, axis=0)])
        with one_sentence(f'{self.path} does not run'):
            outputs = [np.array(self._run(np.ascontiguousarray(images[i:i + size]))) for i in range(0, count, size)]
        return np.concatenate(outputs)[:count]

    def value(self, key: str) -> Any:
        """An entry of the metadata, lists and numbers parsed; UserError where there is none."""
        if key not in self.metadata:
            raise UserError(f'{self.path} has no {key} in its metadata: make the file with `timm-lfnsb export`.')
        try:
            return json.loads(self.metadata[key])
        except json.JSONDecodeError:
            return self.metadata[key]


def _open_onnx(path: Path, threads: int | None) -> Opened:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    # Else its threads keep a core busy after every batch.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    entry = session.get_inputs()[0]
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return lambda images: session.run(None, {entry.name: images})[0], metadata, entry.shape[0]


def import_openvino() -> Any:
    """The package openvino, imported without its telemetry, which would report the import to Google Analytics."""
    hidden = 'openvino_telemetry' not in sys.modules
    if hidden:
        sys.modules['openvino_telemetry'] = None  # type: ignore[assignment]  # its import fails, and a stub is taken
    try:
        import openvino
    finally:
        if hidden:
            sys.modules.pop('openvino_telemetry', None)
    return openvino


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the life of the process, so that its CPU plugin stays.

    Else whichever thread lets go of the last model frees a signal stack of the thread that loaded the plugin, and the
    next signal with a handler ends the process.
    """
    return import_openvino().Core()


def _open_openvino(path: Path, threads: int | None) -> Opened:
    model = openvino_core().read_model(path)
    # Else OpenVINO calculates in bfloat16 on processors that can.
    config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    compiled = openvino_core().compile_model(model, 'CPU', config)
    metadata = {}
    if model.has_rt_info([OPENVINO_SECTION]):
        entries = model.get_rt_info([OPENVINO_SECTION]).value
        metadata = {key: str(getattr(entry, 'value', entry)) for key, entry in entries.items()}  # some releases wrap
    batch = model.input(0).partial_shape[0]
    requests = threading.local()  # one a thread: a request that is busy refuses

    def run(images: np.ndarray) -> np.ndarray:
        if not hasattr(requests, 'request'):
            requests.request = compiled.create_infer_request()
        return requests.request.infer([images])[0]

    return run, metadata, batch.is_static and batch.get_length()


def _open_torch(path: Path, threads: int | None) -> Opened:
    import torch
    if threads:
        torch.set_num_threads(threads)
    extra = {TORCH_EXTRA_FILE: ''}
    program = torch.export.load(str(path), extra_files=extra)
    module = torch.no_grad()(program.module())
    placeholder = program.graph_signature.user_inputs[0]
    batch = next(node for node in program.graph.nodes if node.name == placeholder).meta['val'].shape[0]
    metadata = json.loads(extra[TORCH_EXTRA_FILE] or '{}')
    return lambda images: module(torch.from_numpy(images)).numpy(), metadata, batch


def _open_executorch(path: Path, threads: int | None) -> Opened:
    import torch
    from executorch.runtime import Runtime
    del threads  # it has one pool for all
    program = Runtime.get().load_program(str(path))
    forward = program.load_method('forward')
    metadata = {}
    if EXECUTORCH_METHOD in program.method_names:
        metadata = json.loads(program.load_method(EXECUTORCH_METHOD).execute([])[0])
    batch = forward.metadata.input_tensor_meta(0).sizes()[0]
    return lambda images: forward.execute([torch.from_numpy(images)])[0].numpy(), metadata, batch


_OPEN = dict(zip(SUFFIXES, (_open_onnx, _open_openvino, _open_torch, _open_executorch), strict=True))
