"""Exported files, run in the runtime they were made for: ONNX Runtime, OpenVINO, torch.export and ExecuTorch.

A file carries what its user has to know, as strings: `model`, `label_names`, `input_size`, `mean`, `std`,
`interpolation`, `crop_pct`, `crop_mode`, `input` and `precision` (lists as JSON). `timm_lfnsb.export.export` writes them.
"""
from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = {'.onnx': 'onnx', '.xml': 'openvino', '.pt2': 'torch-export', '.pte': 'executorch'}
"""File suffix -> format, as `timm-lfnsb export --format` names it."""

INPUTS = ('normalized', 'uint8')
"""What a file takes: normalised float32 (B, C, H, W), or RGB uint8 (B, H, W, C)."""

TORCH_EXTRA_FILE = 'timm_lfnsb.json'
OPENVINO_SECTION = 'timm_lfnsb'
EXECUTORCH_METHOD = 'metadata'

Run = Callable[[np.ndarray], np.ndarray]


class RuntimeFileError(RuntimeError):
    """A file that cannot be run; the message is one sentence that says what to do."""


def is_exported(name: str | os.PathLike[str]) -> bool:
    """Whether a model's name is that of an exported file, by its suffix; timm's names and prefixes are not."""
    name = os.fspath(name)
    return Path(name).suffix in SUFFIXES and not name.startswith(('hf-hub:', 'hf_hub:', 'local-dir:'))


class ExportedModel:
    """An exported file, open in its runtime on the CPU.

    Args:
        path: A file with one of `SUFFIXES`; an OpenVINO .xml needs its .bin beside it.
        threads: Threads that compute one batch, or None for the runtime's own choice.

    Attributes:
        path: The file.
        format: One of the values of `SUFFIXES`.
        metadata: What the file says about itself (see the module), string to string; may be empty.
        batch_size: The batch the file is made for, or None where it takes any.

    Raises:
        RuntimeFileError: When there is no such file, it is damaged, or its runtime is not installed.
    """

    metadata: dict[str, str]
    batch_size: int | None

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None):
        self.path = Path(path)
        if self.path.suffix not in SUFFIXES:
            raise RuntimeFileError(f"{self.path} is no exported model: those end in {', '.join(SUFFIXES)}.")
        if not self.path.is_file():
            raise RuntimeFileError(f'there is no file {self.path}.')
        self.format = SUFFIXES[self.path.suffix]
        open_file = {
            'onnx': _open_onnx, 'openvino': _open_openvino, 'torch-export': _open_torch, 'executorch': _open_executorch,
        }[self.format]
        try:
            self._run, self.metadata, self.batch_size = open_file(self.path, threads)
        except RuntimeFileError:
            raise
        except ModuleNotFoundError as error:
            needed = f"pip install {'executorch' if self.format == 'executorch' else repr('timm-lfnsb[export]')}"
            raise RuntimeFileError(
                f'{self.path.name} needs {(error.name or "its runtime").partition(".")[0]}: {needed} brings it.',
            ) from error
        except Exception as error:  # each runtime has its own
            raise RuntimeFileError(f'{self.path} cannot be opened: {_one_line(error)}') from error

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return the outputs (B, C) of a batch, which goes through in parts where the file has a fixed batch.

        Args:
            images: What `metadata['input']` says; float32 (B, C, H, W) where it says nothing.

        Raises:
            RuntimeFileError: When the runtime refuses the images.
        """
        size = self.batch_size or len(images)
        outputs = []
        for start in range(0, len(images), size):
            part = np.ascontiguousarray(images[start:start + size])
            count = len(part)
            if count < size:  # the last part, filled up with anything
                part = np.concatenate([part, np.repeat(part[-1:], size - count, axis=0)])
            try:
                outputs.append(np.array(self._run(part)[:count]))
            except Exception as error:
                raise RuntimeFileError(f'{self.path} does not run: {_one_line(error)}') from error
        return np.concatenate(outputs)

    def value(self, key: str) -> Any:
        """An entry of the metadata, lists and numbers parsed.

        Raises:
            RuntimeFileError: When the file does not have it.
        """
        text = self.metadata.get(key)
        if text is None:
            raise RuntimeFileError(
                f"{self.path} has no {key} in its metadata, so its {'outputs' if key == 'label_names' else 'inputs'} "
                f'cannot be told: make the file with `timm-lfnsb export`.')
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + ' ...'


def _fixed(shape: Sequence[Any]) -> int | None:
    return shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None


def _open_onnx(path: Path, threads: int | None) -> tuple[Run, dict[str, str], int | None]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    # Its threads would else keep a core busy for a while after every batch.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    entry = session.get_inputs()[0]
    return (
        lambda images: session.run(None, {entry.name: images})[0],
        dict(session.get_modelmeta().custom_metadata_map),
        _fixed(entry.shape),
    )


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's `Core`, one for the life of the process.

    Its CPU plugin gives the thread that loads it a signal stack, and frees it in whichever thread lets go of the last
    model, after which the next signal with a handler ends the process. With this core the plugin stays.
    """
    import openvino
    return openvino.Core()


def _open_openvino(path: Path, threads: int | None) -> tuple[Run, dict[str, str], int | None]:
    core = openvino_core()
    model = core.read_model(path)
    # Else OpenVINO calculates in bfloat16 on processors that can.
    config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    compiled = core.compile_model(model, 'CPU', config)
    metadata = {}
    if model.has_rt_info([OPENVINO_SECTION]):
        entries = model.get_rt_info([OPENVINO_SECTION]).value
        # Some releases wrap the entries.
        metadata = {key: str(getattr(entry, 'value', entry)) for key, entry in entries.items()}
    batch = model.input(0).partial_shape[0]
    return (
        lambda images: compiled([images])[0],
        metadata,
        None if batch.is_dynamic else batch.get_length(),
    )


def _open_torch(path: Path, threads: int | None) -> tuple[Run, dict[str, str], int | None]:
    import torch
    if threads:
        torch.set_num_threads(threads)
    extra = {TORCH_EXTRA_FILE: ''}
    program = torch.export.load(str(path), extra_files=extra)
    module = program.module()
    placeholder = program.graph_signature.user_inputs[0]
    shape = next(node for node in program.graph.nodes if node.name == placeholder).meta['val'].shape

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(images)).numpy()

    text = extra[TORCH_EXTRA_FILE]
    return run, json.loads(text) if text else {}, _fixed(shape)


def _open_executorch(path: Path, threads: int | None) -> tuple[Run, dict[str, str], int | None]:
    import torch
    from executorch.runtime import Runtime
    del threads  # its thread pool is the process's
    program = Runtime.get().load_program(str(path))
    forward = program.load_method('forward')
    shape = forward.metadata.input_tensor_meta(0).sizes()

    def run(images: np.ndarray) -> np.ndarray:
        return forward.execute([torch.from_numpy(images)])[0].numpy()

    metadata = {}
    if EXECUTORCH_METHOD in program.method_names:
        metadata = json.loads(program.load_method(EXECUTORCH_METHOD).execute([])[0])
    return run, metadata, _fixed(tuple(shape))
