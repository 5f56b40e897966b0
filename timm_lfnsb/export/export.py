"""A timm model as a file for ONNX Runtime, OpenVINO, torch.export or ExecuTorch, checked in that runtime.

The model is reparameterised, and a network of this zoo is written in the operators its runtime executes best; see
`timm_lfnsb.export.lowering`. ONNX files come from torch's older exporter: for these networks it gives the same nodes as the
newer one in a second rather than in 7 (20 with a dynamic batch), keeps global pools as the pooling operator that ONNX
Runtime has in its blocked layout, and lacks only the shapes of a dynamic batch, which are added here: without them the
runtime cannot tell that products keep its layout, and is 1.2 times as slow.

int8 files have their large convolutions quantised, with a scale for each output channel and activations calibrated on
faces; OpenVINO reads the quantised ONNX graph. Measured once for lfnsb.ferplus on the 3355 test faces of FER+, after
calibration on 512 training faces: accuracy 0.811 (ONNX Runtime) and 0.812 (OpenVINO), against 0.815 in float32; 44 and
46 labels differ. Quantising everything is as accurate, and in ONNX Runtime twice as slow as float32.

Half precision means weights of half precision (no label of those 3355 differs): the CPU runtimes calculate with
float32 whatever the file says, so inputs and outputs stay float32.
"""
from __future__ import annotations

import copy
import itertools
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ..labels import model_label_names
from ..predict.exported import (
    EXECUTORCH_METHOD,
    OPENVINO_SECTION,
    SUFFIXES,
    TORCH_EXTRA_FILE,
    ExportedModel,
    RuntimeFileError,
)
from ..version import __version__
from .lowering import lower_network

FORMATS = tuple(SUFFIXES.values())
PRECISIONS = ('fp32', 'fp16', 'int8')
OPSET = 18

CHECK_COUNT = 32
"""Inputs that every exported file is run on."""

CALIBRATION_COUNT = 512
"""Images at most that the activations of an int8 file are calibrated on."""

MIN_INT8_CHANNELS = 32
"""Convolutions of fewer input or output channels, depthwise ones among them, stay as they are in int8 ONNX files: they
have few weights, and their conversions cost ONNX Runtime more than they save."""

MIN_AGREEMENT = {'fp32': 1., 'fp16': 0.96, 'int8': 0.85}
"""Fraction of the check's inputs whose label must be the eager model's, ties within the tolerance aside."""

TOLERANCE = {'fp32': 1e-4, 'fp16': 5e-2, 'int8': None}
"""Largest difference of outputs, as a fraction of the largest output; none for int8."""


class ExportError(RuntimeError):
    """An export that cannot be made, or disagrees with the model; the message is one sentence."""


@dataclass(frozen=True)
class Report:
    """How an exported file compares with the eager model.

    Attributes:
        path: The file.
        format: One of `FORMATS`.
        precision: One of `PRECISIONS`.
        count: Number of inputs.
        max_difference: Largest difference of two outputs.
        relative_difference: The same, as a fraction of the eager model's largest output.
        agreement: Fraction of inputs with the same label; None for a model without classifier.
        size: Bytes of the file (OpenVINO: of both).
    """

    path: Path
    format: str
    precision: str
    count: int
    max_difference: float
    relative_difference: float
    agreement: float | None
    size: int

    def __str__(self) -> str:
        labels = ''
        if self.agreement is not None:
            labels = (f', labels agree on {round(self.agreement * self.count)} of {self.count} '
                      f'(needed: {MIN_AGREEMENT[self.precision]:.0%})')
        tolerance = TOLERANCE[self.precision]
        allowed = f' (allowed: {tolerance:.0e})' if tolerance else ''
        return (
            f'{self.path}: {self.format}, {self.precision}, {self.size / 1e6:.1f} MB; on {self.count} inputs, largest '
            f'difference to the eager model {self.max_difference:.1e}, {self.relative_difference:.1e} of the largest '
            f'output{allowed}{labels}')


class WithPreprocess(nn.Module):
    """A model that takes uint8 images (B, H, W, C) of its input size, and normalises them itself."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model
        self.num_classes = getattr(model, 'num_classes', 0)
        scale = 1 / torch.tensor(std, dtype=torch.float32)
        self.register_buffer('scale', (scale / 255).view(-1, 1, 1))
        self.register_buffer('shift', (-torch.tensor(mean, dtype=torch.float32) * scale).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.permute(0, 3, 1, 2).float() * self.scale + self.shift)


class HalfInside(nn.Module):
    """A model in half precision between float32 images and outputs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = copy.deepcopy(model).half()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images.half()).float()


def export_model(
        model: nn.Module,
        out: str | os.PathLike[str],
        format: str | None = None,
        batch: int | None = 1,
        precision: str = 'fp32',
        with_preprocess: bool = False,
        calibrate: str | os.PathLike[str] | None = None,
) -> Report:
    """Write a model as a file for a runtime, run it there, and compare it with the model.

    Args:
        model: A timm model with its weights; it is left alone. Its `pretrained_cfg` gives the input's size and
            normalisation, and the label names (none: the file has none, and `ExpressionRecognizer` refuses it).
        out: The file, with the suffix of its format (`timm_lfnsb.runtimes.SUFFIXES`).
        format: One of `FORMATS`; None goes by the suffix.
        batch: Images the file takes at a time, None for any number.
        precision: One of `PRECISIONS`; int8 for 'onnx' and 'openvino'.
        with_preprocess: Let the file take RGB images uint8 (B, H, W, 3) of its input size instead of normalised
            float32 (B, 3, H, W).
        calibrate: int8 only: a folder of face crops, searched recursively, or a prepared data set, of which the
            training split is taken.

    Returns:
        The comparison.

    Raises:
        ExportError: When the arguments do not go together, a package is missing, the model cannot be exported, or the
            file disagrees with it; then there is no (new) file.
    """
    out = Path(out)
    format = _check_arguments(out, format, batch, precision, calibrate)
    config = _data_config(model)
    shape = (batch or 1, *config['input_size'])
    metadata = _metadata(model, config, precision, with_preprocess)
    reference = copy.deepcopy(model).cpu().float().eval()
    example = torch.zeros(shape)
    if with_preprocess:
        reference = WithPreprocess(reference, config['mean'], config['std']).eval()
        example = torch.zeros(_channels_last(shape), dtype=torch.uint8)
    images = find_calibration_images(calibrate) if calibrate is not None else []
    if calibrate is not None and len(images) <= CHECK_COUNT:
        raise ExportError(f'{calibrate} has {len(images)} images: give some hundreds of faces to calibrate with.')
    calibration = _inputs(images[CHECK_COUNT:], config, with_preprocess)

    plain = copy.deepcopy(model).cpu().float()
    try:
        lowered = lower_network(plain, {'onnx': 'onnxruntime', 'openvino': 'openvino'}.get(format, 'torch'))
    except Exception as error:
        raise ExportError(f'the model cannot be reparameterised: {_one_line(error)}') from error
    if precision == 'fp16' and format == 'torch-export':
        lowered = HalfInside(lowered)
    if with_preprocess:
        lowered = WithPreprocess(lowered, config['mean'], config['std'])
    lowered = lowered.eval().requires_grad_(False)

    write = {
        'onnx': _write_onnx, 'openvino': _write_openvino, 'torch-export': _write_torch, 'executorch': _write_executorch,
    }[format]
    folder = out.absolute().parent
    if not folder.is_dir():
        raise ExportError(f'there is no folder {folder}: make it first.')
    with tempfile.TemporaryDirectory(prefix='.export-', dir=folder) as temporary:
        file = Path(temporary) / out.name
        try:
            with _quiet(), torch.no_grad():
                write(lowered, example, file, batch is None, precision, metadata, calibration)
        except ModuleNotFoundError as error:
            raise ExportError(_missing(format, error)) from error
        except ExportError:
            raise
        except Exception as error:  # exporters raise nearly anything
            raise ExportError(f'the model cannot be exported as {format}: {_one_line(error)}') from error
        checked = _inputs(images[:CHECK_COUNT], config, with_preprocess) if images else None
        report = compare(reference, file, precision, _stack(checked or check_inputs(config, with_preprocess)))
        report = Report(**{**vars(report), 'path': out})
        parts = sorted(Path(temporary).iterdir(), key=lambda part: part == file)  # the file itself last
        for part in parts:
            os.replace(part, folder / part.name)
    return report


def compare(model: nn.Module, file: Path, precision: str, inputs: np.ndarray) -> Report:
    """Run an exported file and the eager model on the same inputs.

    Raises:
        ExportError: When they disagree by more than `TOLERANCE` and `MIN_AGREEMENT` allow.
    """
    try:
        runtime = ExportedModel(file)
        outputs = runtime(inputs)
    except RuntimeFileError as error:
        raise ExportError(f'the exported file does not run, so it was not kept: {error}') from error
    with torch.inference_mode():
        expected = torch.cat([model(part) for part in torch.from_numpy(inputs).split(8)]).numpy()
    size = sum(part.stat().st_size for part in file.parent.iterdir() if part.stem == file.stem)
    if outputs.shape != expected.shape:
        raise ExportError(f'{file.name} gives outputs {outputs.shape} where the model gives {expected.shape}.')
    difference = float(np.abs(outputs - expected).max())
    largest = float(np.abs(expected).max())
    relative = difference / largest if largest else difference
    tolerance = TOLERANCE[precision]
    agreement = None
    if getattr(model, 'num_classes', 0):
        # Of two outputs that are equal up to the tolerance either is right.
        top = np.take_along_axis(expected, outputs.argmax(1)[:, None], 1)[:, 0]
        agreement = float(np.mean(expected.max(1) - top <= 2 * (TOLERANCE['fp32'] or 0) * largest))
    report = Report(file, runtime.format, precision, len(inputs), difference, relative, agreement, size)
    if not (np.isfinite(outputs).all() and (tolerance is None or relative <= tolerance)
            and (agreement is None or agreement >= MIN_AGREEMENT[precision])):
        raise ExportError(f'the exported file disagrees with the model, so it was not kept ({report}).')
    return report


def check_inputs(config: dict[str, Any], with_preprocess: bool) -> list[np.ndarray]:
    """Crops of scikit-image's portrait, at random places, sizes and angles, preprocessed as the config says."""
    import skimage
    portrait = Image.open(Path(skimage.__file__).parent / 'data' / 'astronaut.png').convert('RGB')
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(CHECK_COUNT):
        side = rng.uniform(70, 140)
        x, y = rng.normal((224, 114), 12) - side / 2
        turned = portrait.rotate(rng.uniform(-20, 20), Image.Resampling.BILINEAR, center=(224, 114))
        crops.append(turned.crop((round(x), round(y), round(x + side), round(y + side))))
    return _preprocess(crops, config, with_preprocess)


def find_calibration_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Up to `CALIBRATION_COUNT` + `CHECK_COUNT` images of a folder, or of its `train` split, spread evenly.

    Raises:
        ExportError: When there are none.
    """
    from ..predict.faces import find_images
    root = Path(folder)
    if (root / 'train').is_dir():
        root = root / 'train'
    if not root.is_dir():
        raise ExportError(f'there is no folder {folder} to calibrate with.')
    try:
        paths = [path for path, _ in find_images([root])]
    except ValueError as error:
        raise ExportError(f'nothing to calibrate with: {error}') from error
    np.random.default_rng(0).shuffle(paths)
    return paths[:CALIBRATION_COUNT + CHECK_COUNT]


def _check_arguments(
        out: Path, format: str | None, batch: int | None, precision: str, calibrate: Any,
) -> str:
    """The format, after all checks that need no model."""
    by_format = {format: suffix for suffix, format in SUFFIXES.items()}
    if format is None:
        if out.suffix not in SUFFIXES:
            raise ExportError(
                f"the format is not clear from the name {out}: end it in one of {', '.join(SUFFIXES)}, "
                'or give --format.')
        format = SUFFIXES[out.suffix]
    if format not in FORMATS:
        raise ExportError(f"there is no format {format!r}, only {', '.join(FORMATS)}.")
    if out.suffix != by_format[format]:
        raise ExportError(f'a file of the format {format} ends in {by_format[format]}, {out.name} does not.')
    if out.is_dir():
        raise ExportError(f'{out} is a folder: give the name of a file.')
    if batch is not None and batch < 1:
        raise ExportError(f'the batch must be 1 or more, or dynamic, not {batch}.')
    if precision not in PRECISIONS:
        raise ExportError(f"there is no precision {precision!r}, only {', '.join(PRECISIONS)}.")
    if format == 'executorch' and (batch is None or precision != 'fp32'):
        raise ExportError('executorch files have a fixed batch and fp32: give --batch with a number, and no precision.')
    if precision == 'int8' and format not in ('onnx', 'openvino'):
        raise ExportError(f'int8 is there for onnx and openvino, not for {format}.')
    if (precision == 'int8') != (calibrate is not None):
        raise ExportError('int8 needs faces to calibrate with (--calibrate FOLDER), and nothing else takes them.')
    return format


def _data_config(model: nn.Module) -> dict[str, Any]:
    """timm's input settings of a model, with as many values as it has channels."""
    config = dict(resolve_model_data_config(model))
    chans = getattr(model, 'in_chans', config['input_size'][0])
    if chans != config['input_size'][0]:
        config['input_size'] = (chans, *config['input_size'][1:])
    if chans != len(config['mean']):  # as timm's loaders do when the config still has the values of RGB weights
        for key in ('mean', 'std'):
            config[key] = (sum(config[key]) / len(config[key]),) * chans
    return config


def _metadata(model: nn.Module, config: dict[str, Any], precision: str, with_preprocess: bool) -> dict[str, str]:
    pretrained_cfg = getattr(model, 'pretrained_cfg', None) or {}
    tag = pretrained_cfg.get('tag')
    metadata = {
        'model': (pretrained_cfg.get('architecture') or type(model).__name__) + (f'.{tag}' if tag else ''),
        'input': 'uint8' if with_preprocess else 'normalized',
        'precision': precision,
        'timm_lfnsb': __version__,
        **{key: json.dumps(config[key]) for key in ('input_size', 'mean', 'std', 'crop_pct')},
        **{key: config[key] for key in ('interpolation', 'crop_mode')},
    }
    if pretrained_cfg.get('label_names'):
        try:
            metadata['label_names'] = json.dumps(model_label_names(model))
        except ValueError as error:
            raise ExportError(f'{error}') from error
    if pretrained_cfg.get('license'):
        metadata['license'] = pretrained_cfg['license']
    return metadata


def _channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    batch, chans, height, width = shape
    return batch, height, width, chans


def _preprocess(images: Sequence[Image.Image], config: dict[str, Any], with_preprocess: bool) -> list[np.ndarray]:
    transform = create_transform(**config, is_training=False, normalize=not with_preprocess)
    mode = 'RGB' if config['input_size'][0] == 3 else 'L'
    tensors = [transform(image.convert(mode)) for image in images]
    if len(tensors) and tensors[0].shape[0] != config['input_size'][0]:  # neither grey nor RGB: no picture fits
        tensors = [tensor[:1].expand(config['input_size']).contiguous() for tensor in tensors]
    if with_preprocess:
        tensors = [tensor.permute(1, 2, 0).contiguous() for tensor in tensors]
    return [tensor.numpy() for tensor in tensors]


def _inputs(paths: Sequence[Path], config: dict[str, Any], with_preprocess: bool) -> list[np.ndarray]:
    from ..predict.faces import ImageError, read_image
    try:
        return _preprocess([Image.fromarray(read_image(path)) for path in paths], config, with_preprocess)
    except ImageError as error:
        raise ExportError(str(error)) from error


def _stack(inputs: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(list(itertools.islice(itertools.cycle(inputs), CHECK_COUNT)))


def _write_onnx(
        model: nn.Module, example: torch.Tensor, file: Path, dynamic: bool, precision: str, metadata: dict[str, str],
        calibration: list[np.ndarray],
) -> None:
    import onnx
    torch.onnx.export(
        model, (example,), str(file), dynamo=False, opset_version=OPSET, input_names=['input'],
        output_names=['output'],
        dynamic_axes={'input': {0: 'batch'}, 'output': {0: 'batch'}} if dynamic else None)
    network = onnx.load(file)
    if dynamic:
        _add_shapes(network)
    if precision == 'fp16':
        _halve_weights(network)
    onnx.helper.set_model_props(network, metadata)
    onnx.checker.check_model(network)
    onnx.save(network, file)
    if precision == 'int8':
        _quantize_onnx(file, calibration, len(example), metadata)


def _add_shapes(network: Any) -> None:
    """Note the shapes of all values, with the name of the batch; runtimes lose it at the first Resize."""
    import onnx
    fixed = onnx.ModelProto()
    fixed.CopyFrom(network)
    batch = 997  # a prime that no other dimension is likely to be
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    del network.graph.value_info[:]
    for value in onnx.shape_inference.infer_shapes(fixed).graph.value_info:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value == batch:
                dim.dim_param = 'batch'
        network.graph.value_info.append(value)


def _halve_weights(network: Any) -> None:
    """Store float32 weights in half precision, with a Cast behind each that runtimes evaluate when they load."""
    import onnx
    from onnx import numpy_helper
    casts = []
    for weight in network.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or np.prod(weight.dims) < 16:
            continue
        half = numpy_helper.to_array(weight).astype(np.float16)
        if not np.isfinite(half).all():
            raise ExportError(f'the weight {weight.name} has values beyond half precision: keep fp32.')
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(half, f'{name}.half'))
        casts.append(onnx.helper.make_node('Cast', [f'{name}.half'], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *network.graph.node]
    del network.graph.node[:]
    network.graph.node.extend(nodes)


def _quantize_onnx(file: Path, calibration: list[np.ndarray], batch: int, metadata: dict[str, str]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            parts = (calibration[i:i + batch] for i in range(0, len(calibration) - batch + 1, batch))
            self.batches = ({'input': np.stack(part)} for part in parts)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    prepared = file.with_name('prepared.onnx')
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    network = onnx.load(prepared)
    shapes = {weight.name: tuple(weight.dims) for weight in network.graph.initializer}
    wide = [node.name for node in network.graph.node
            if node.op_type == 'Conv' and min(shapes.get(node.input[1], (0,))[:2], default=0) >= MIN_INT8_CHANNELS]
    if not wide:
        raise ExportError('the model has no convolutions that are worth int8: keep fp32.')
    quantize_static(
        prepared, str(file), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=['Conv'],
        nodes_to_quantize=wide, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        # Ranges averaged over the batches: a single odd image among 512 else halved the accuracy.
        extra_options={'CalibMovingAverage': True})
    prepared.unlink()
    network = onnx.load(file)
    onnx.helper.set_model_props(network, metadata)
    onnx.save(network, file)


def _write_openvino(
        model: nn.Module, example: torch.Tensor, file: Path, dynamic: bool, precision: str, metadata: dict[str, str],
        calibration: list[np.ndarray],
) -> None:
    import openvino
    source = file.with_suffix('.onnx')
    # Its convolutions between quantising and dequantising nodes are what OpenVINO runs as int8.
    _write_onnx(
        model, example, source, dynamic, 'int8' if precision == 'int8' else 'fp32', metadata, calibration)
    network = openvino.convert_model(source)
    for key, value in metadata.items():
        network.set_rt_info(value, [OPENVINO_SECTION, key])
    openvino.save_model(network, file, compress_to_fp16=precision == 'fp16')
    source.unlink()


def _write_torch(
        model: nn.Module, example: torch.Tensor, file: Path, dynamic: bool, precision: str, metadata: dict[str, str],
        calibration: list[np.ndarray],
) -> None:
    program = _torch_program(model, example, dynamic)
    torch.export.save(program, file, extra_files={TORCH_EXTRA_FILE: json.dumps(metadata)})


def _torch_program(model: nn.Module, example: torch.Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    if not dynamic:
        return torch.export.export(model, (example,))
    # An example of one image would fix the batch.
    return torch.export.export(
        model, (torch.cat([example, example]),), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))


def _write_executorch(
        model: nn.Module, example: torch.Tensor, file: Path, dynamic: bool, precision: str, metadata: dict[str, str],
        calibration: list[np.ndarray],
) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    program = to_edge_transform_and_lower(
        _torch_program(model, example, dynamic), partitioner=[XnnpackPartitioner()],
        constant_methods={EXECUTORCH_METHOD: json.dumps(metadata)})
    file.write_bytes(program.to_executorch().buffer)


def _missing(format: str, error: ModuleNotFoundError) -> str:
    name = (error.name or '').partition('.')[0]
    if format == 'executorch':
        return f'the format executorch needs {name}: pip install executorch brings it.'
    return f"the format {format} needs {name}: pip install 'timm-lfnsb[export]' brings it."


def _one_line(error: BaseException) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:300] + ' ...'


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their age and of constants; what counts is the comparison afterwards."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
