"""A timm model as a file for ONNX Runtime, OpenVINO, torch.export or ExecuTorch, checked in that runtime.

The model is reparameterised, and a network of this zoo is written in the operators its runtime executes best; see
`timm_lfnsb.export.lowering`. In int8 files large convolutions are quantised. Half precision means the weights alone:
inputs and outputs stay float32, in which CPUs calculate whatever the file says.
"""
from __future__ import annotations

import copy
import json
import math
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from ..data.images import find_images, read_image
from ..errors import UserError, one_sentence
from ..labels import model_label_names
from ..models.input_config import input_config
from ..models.temperature import TEMPERATURE_KEY, model_temperature
from ..version import __version__
from .exported import INPUT_KEYS, SUFFIXES, ExportedModel
from .lowering import Interface, lower_network
from .writers import WRITERS, Order

CHECK_COUNT = 32  # inputs that every exported file is run on
CALIBRATION_COUNT = 512  # images at most that the activations of an int8 file are calibrated on

LIMITS = {'fp32': (1e-4, 1.), 'fp16': (5e-2, 0.96), 'int8': (math.inf, 0.85)}
"""Precision -> largest difference, as a fraction of the largest output; least fraction of inputs with equal labels."""


@dataclass(frozen=True)
class Report:
    """How an exported file compares with the eager model."""
    path: Path
    format: str
    precision: str
    count: int  # of inputs
    relative_difference: float  # the largest of two outputs, as a fraction of the eager model's largest output
    agreement: float | None  # fraction of inputs with the same label; None for a model without classifier
    size: int  # bytes of the file (OpenVINO: of both)

    def __str__(self) -> str:
        tolerance, needed = LIMITS[self.precision]
        allowed = f' (allowed: {tolerance:.0e})' if tolerance < math.inf else ''
        labels = '' if self.agreement is None else (
            f', labels agree on {round(self.agreement * self.count)} of {self.count} (needed: {needed:.0%})')
        return (
            f'{self.path}: {self.format}, {self.precision}, {self.size / 1e6:.1f} MB; on {self.count} inputs, largest '
            f'difference to the eager model {self.relative_difference:.1e} of its largest output{allowed}{labels}')


def export_model(
        model: nn.Module,
        out: str | os.PathLike[str],
        batch: int | None = 1,
        precision: str = 'fp32',
        with_preprocess: bool = False,
        calibrate: str | os.PathLike[str] | None = None,
) -> Report:
    """Write a model as a file for a runtime, run it there, and compare it with the model.

    Args:
        model: A timm model with its weights; it is left alone. Its `pretrained_cfg` gives what the file says of itself.
        out: The file, with the suffix of its format (`timm_lfnsb.export.exported.SUFFIXES`).
        batch: Images the file takes at a time, None for any number.
        precision: 'fp32', 'fp16', or, for 'onnx' and 'openvino', 'int8'.
        with_preprocess: Take RGB images uint8 (B, H, W, 3) of the input size, not normalised float32 (B, 3, H, W).
        calibrate: int8 only: a folder of face crops, or a prepared data set, of which the training split is taken.

    Raises:
        UserError: When the arguments do not go together, a package is missing, the model cannot be exported, or the
            file disagrees with it; then there is no (new) file.
    """
    out = Path(out)
    format = _check_arguments(out, batch, precision, calibrate)
    config = input_config(model)
    metadata = _metadata(model, config, precision, with_preprocess)
    # As the model's preprocessing crops and resizes them, uint8 (N, C, H, W).
    chans = config['input_size'][0]
    transform = create_transform(**config, is_training=False, normalize=False)
    images = _pictures(None if calibrate is None else Path(calibrate))
    tensors = [transform(image.convert('RGB' if chans == 3 else 'L')) for image in images]
    pixels = torch.stack(tensors).expand(-1, chans, -1, -1).numpy()  # neither grey nor RGB: no picture fits
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ('mean', 'std'))
    normalized = (pixels / np.float32(255) - mean.numpy()) / std.numpy()
    inputs = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)) if with_preprocess else normalized
    model = copy.deepcopy(model).cpu().float().eval()
    with torch.inference_mode():
        parts = torch.from_numpy(normalized[:CHECK_COUNT]).split(8)
        expected = torch.cat([model(part) for part in parts]).numpy()
    example = torch.from_numpy(inputs[:1]).expand(batch or 1, -1, -1, -1).contiguous()
    order = Order(example, batch is None, precision, metadata, inputs[CHECK_COUNT:])
    with tempfile.TemporaryDirectory(prefix='.export-', dir=out.absolute().parent) as folder:
        file = Path(folder, out.name)
        _write(model, (mean, std) if with_preprocess else None, format, file, order)
        outputs = ExportedModel(file)(inputs[:CHECK_COUNT])
        differences = _compare(outputs, expected, getattr(model, 'num_classes', 0) > 0)
        files = sorted(file.parent.iterdir(), key=lambda part: part == file)  # the file itself last
        size = sum(part.stat().st_size for part in files)
        report = Report(out, format, precision, len(outputs), *differences, size)
        tolerance, needed = LIMITS[precision]
        if not report.relative_difference < tolerance or (report.agreement is not None and report.agreement < needed):
            raise UserError(f'the exported file disagrees with the model, so it was not kept ({report}).')
        for part in files:
            os.replace(part, out.with_name(part.name))
    return report


def _check_arguments(out: Path, batch: int | None, precision: str, calibrate: Any) -> str:
    """The format, after all checks that need no model."""
    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(message)

    need(out.suffix in SUFFIXES, f"no format has files like {out}: end the name in one of {', '.join(SUFFIXES)}, or "
                                 'give --format web for a folder with a page.')
    format = SUFFIXES[out.suffix]
    need(out.absolute().parent.is_dir(), f'there is no folder {out.absolute().parent}: make it first.')
    need(format != 'executorch' or (batch is not None and precision == 'fp32'),
         'executorch files have a fixed batch and fp32: give --batch with a number, and no precision.')
    need(precision != 'int8' or format in ('onnx', 'openvino'), f'int8 is for onnx and openvino, not for {format}.')
    need((precision == 'int8') == (calibrate is not None),
         'int8 needs faces to calibrate with (--calibrate FOLDER), and nothing else takes them.')
    return format


def _metadata(model: nn.Module, config: dict[str, Any], precision: str, with_preprocess: bool) -> dict[str, str]:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    entries = {
        'model': '.'.join(filter(None, (cfg.get('architecture') or type(model).__name__, cfg.get('tag')))),
        'input': 'uint8' if with_preprocess else 'normalized',
        'precision': precision,
        'timm_lfnsb': __version__,
        'label_names': model_label_names(model) if cfg.get('label_names') else None,
        'license': cfg.get('license') or None,
        TEMPERATURE_KEY: model_temperature(model),
        **{key: config[key] for key in INPUT_KEYS},
    }
    return {key: value if isinstance(value, str) else json.dumps(value)
            for key, value in entries.items() if value is not None}


def _pictures(folder: Path | None) -> list[Image.Image]:
    """Some to check the file on, the rest to calibrate: of a folder (or its `train` split), else colour noise."""
    rng = np.random.default_rng(0)
    if folder is None:
        return [Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)) for side in range(2, 2 + CHECK_COUNT)]
    root = folder / 'train' if (folder / 'train').is_dir() else folder
    if not root.is_dir():
        raise UserError(f'there is no folder {folder} to calibrate with.')
    paths = [path for path, _ in find_images(root)]
    if len(paths) <= CHECK_COUNT:
        raise UserError(f'{folder} has {len(paths)} images: give some hundreds of faces to calibrate with.')
    rng.shuffle(paths)
    return [Image.fromarray(read_image(path)) for path in paths[:CALIBRATION_COUNT + CHECK_COUNT]]


def _compare(outputs: np.ndarray, expected: np.ndarray, classes: bool) -> tuple[float, float | None]:
    """Largest difference as a fraction of the largest output, and fraction of equal labels."""
    largest = float(np.abs(expected).max()) or 1.
    # Of two outputs that are equal up to the tolerance either is right.
    top = np.take_along_axis(expected, outputs.argmax(1)[:, None], 1)[:, 0]
    agreement = float(np.mean(expected.max(1) - top <= 2 * LIMITS['fp32'][0] * largest)) if classes else None
    return float(np.abs(outputs - expected).max()) / largest, agreement


def _write(model: nn.Module, normalization: Any, format: str, file: Path, order: Order) -> None:
    """Without the exporters' warnings of their age and of constants: what counts is the comparison afterwards."""
    with one_sentence(f'the model cannot be exported as {format}'), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        model = lower_network(model, {'onnx': 'onnxruntime', 'openvino': 'openvino'}.get(format, 'torch'))
        if order.precision == 'fp16' and format == 'torch-export':  # the other writers halve what they write
            model.half()
        WRITERS[format](Interface(model, normalization).eval().requires_grad_(False), file, order)
