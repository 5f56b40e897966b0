"""One function a format: a lowered network as a file."""
from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .exported import EXECUTORCH_METHOD, OPENVINO_SECTION, TORCH_EXTRA_FILE, import_openvino

# Convolutions of fewer channels stay as they are in int8 files: their conversions cost more than they save.
MIN_INT8_CHANNELS = 32


@dataclass(frozen=True)
class Order:
    """What a file is to be: for batches of `example`'s size or any (`dynamic`), int8 by means of `calibration`."""

    example: torch.Tensor
    dynamic: bool
    precision: str
    metadata: dict[str, str]
    calibration: np.ndarray


def write_onnx(model: nn.Module, file: Path, order: Order) -> None:
    """Write ONNX by torch's older exporter: faster than the newer, and it keeps global pools as pooling operators."""
    import onnx
    torch.onnx.export(
        model, (order.example,), str(file), dynamo=False, opset_version=18, input_names=['input'],
        output_names=['output'],
        dynamic_axes={'input': {0: 'batch'}, 'output': {0: 'batch'}} if order.dynamic else None)
    network = onnx.load(file)
    if order.dynamic:
        _add_shapes(network)
    if order.precision == 'fp16':
        _halve_weights(network)
    if order.precision == 'int8':
        onnx.save(network, file)
        _quantize(file, order.calibration, len(order.example))
        network = onnx.load(file)
    onnx.helper.set_model_props(network, order.metadata)
    onnx.save(network, file)


def _add_shapes(network: Any) -> None:
    """Note the shapes of all values, by which ONNX Runtime sees that products keep its layout; a Resize hides them."""
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
        casts.append(onnx.helper.make_node('Cast', [f'{weight.name}.half'], [weight.name], to=onnx.TensorProto.FLOAT))
        weight.CopyFrom(numpy_helper.from_array(half, f'{weight.name}.half'))
    nodes = [*casts, *network.graph.node]
    del network.graph.node[:]
    network.graph.node.extend(nodes)


def _quantize(file: Path, calibration: np.ndarray, batch: int) -> None:
    """Quantise the large convolutions of an ONNX file, with a scale for each output channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    starts = range(0, len(calibration) - batch + 1, batch)
    batches = ({'input': calibration[start:start + batch]} for start in starts)

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(batches, None)

    prepared = file.with_name('prepared.onnx')
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    wide = [node.name for node in graph.node
            if node.op_type == 'Conv' and min(shapes.get(node.input[1], (0,))[:2]) >= MIN_INT8_CHANNELS]
    quantize_static(
        prepared, str(file), Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=['Conv'],
        nodes_to_quantize=wide, per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        # Ranges averaged over the batches: a single odd image among 512 else halved the accuracy.
        extra_options={'CalibMovingAverage': True})
    prepared.unlink()


def write_openvino(model: nn.Module, file: Path, order: Order) -> None:
    """Write OpenVINO's two files, from ONNX: int8 is what that file quantises."""
    openvino = import_openvino()
    source = file.with_suffix('.onnx')
    write_onnx(model, source, replace(order, precision='int8' if order.precision == 'int8' else 'fp32'))
    network = openvino.convert_model(source)
    for key, value in order.metadata.items():
        network.set_rt_info(value, [OPENVINO_SECTION, key])
    openvino.save_model(network, file, compress_to_fp16=order.precision == 'fp16')
    source.unlink()


def write_torch(model: nn.Module, file: Path, order: Order) -> None:
    """Write torch's own exported program."""
    torch.export.save(_program(model, order), file, extra_files={TORCH_EXTRA_FILE: json.dumps(order.metadata)})


def write_executorch(model: nn.Module, file: Path, order: Order) -> None:
    """Write a program for ExecuTorch, its convolutions by XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    program = to_edge_transform_and_lower(
        _program(model, order), partitioner=[XnnpackPartitioner()],
        constant_methods={EXECUTORCH_METHOD: json.dumps(order.metadata)})
    file.write_bytes(program.to_executorch().buffer)


def _program(model: nn.Module, order: Order) -> torch.export.ExportedProgram:
    if not order.dynamic:
        return torch.export.export(model, (order.example,))
    # An example of one image would fix the batch.
    example = torch.cat([order.example, order.example])
    return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim('batch', min=1)},))


WRITERS = {'onnx': write_onnx, 'openvino': write_openvino, 'torch-export': write_torch, 'executorch': write_executorch}
