"""A model as a folder that any static host serves: a page that names the expressions of photographs in the browser."""
from __future__ import annotations

import base64
import hashlib
import math
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
from torch import nn

from ..checkpoints.pack import check_new
from ..errors import UserError, one_sentence
from ..export.export import Report, export_model
from ..export.exported import SUFFIXES
from ..labels import model_label_names
from ..models.input_config import input_config
from ..models.temperature import TEMPERATURE_KEY
from ..predict.faces import FERPLUS_TEMPLATE, YUNET, YUNET_SIDES, YuNetDetector
from ..util.files import write_json
from ..version import __version__

PAGE = Path(__file__).with_name('page')

CDN = 'https://cdn.jsdelivr.net/npm/onnxruntime-web@1.30.0/dist/'
"""Where a page takes ONNX Runtime from that has no files of its own."""
RUNTIME = {
    'ort.wasm.bundle.min.mjs': 'sha384-PLWz+nHEVHpjwBsO0YVdvQj6n5814Iv8E3b8FG0Rp/uIAtjFMCKOpP66iPzedrIG',
    'ort-wasm-simd-threaded.wasm': 'sha384-vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM',
}
"""The two files of the npm package that it needs, and what browsers must find those of the CDN to be."""

FILTERS = {'bilinear': 'linear', 'bicubic': 'cubic'}  # as timm names them -> as ONNX does


def export_web(
        model: nn.Module,
        out: str | os.PathLike[str],
        runtime_dir: str | os.PathLike[str] | None = None,
        precision: str = 'fp32',
        calibrate: str | os.PathLike[str] | None = None,
) -> Report:
    """Write a page that finds faces and names their expressions, and sends nothing anywhere.

    Args:
        model: A timm model with its weights and `label_names` in its `pretrained_cfg`; it is left alone.
        out: The folder; must not hold anything yet.
        runtime_dir: The npm package onnxruntime-web, or its folder `dist`: what the page needs of it is copied.
        precision, calibrate: Of the classifier, as for `export_model`.

    Returns:
        How the classifier compares with the model.

    Raises:
        UserError: When the folder is not empty, files or packages are missing, the model has no label names or wants
            its inputs as the page cannot make them, or the classifier disagrees with it; then nothing is written.
    """
    out = Path(out)
    if out.suffix in SUFFIXES:
        raise UserError(f'{out} is named like a file, but the page is a folder: leave out --format web, or rename it.')
    check_new(out)
    label_names, preparation = model_label_names(model), _preparation(input_config(model))
    own = [] if runtime_dir is None else _runtime_files(Path(runtime_dir))
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.export-', dir=out.absolute().parent) as temporary:
        page = shutil.copytree(PAGE, Path(temporary, out.name))
        report = export_model(model, page / 'classifier.onnx', 1, precision, True, calibrate)
        with one_sentence('the page cannot be written'):
            metadata = _add_preparation(page / 'classifier.onnx', preparation)
            _write_detector(page / 'detector.onnx')
        shutil.copy(YUNET.with_suffix('.LICENSE.txt'), page / 'detector.LICENSE.txt')
        for file in own:
            shutil.copy(file, page)
        runtime = [('./' + file.name, _integrity(file)) for file in own] or [
            (CDN + name, integrity) for name, integrity in RUNTIME.items()]
        write_json(page / 'config.json', {
            'label_names': label_names,
            'template': (FERPLUS_TEMPLATE - FERPLUS_TEMPLATE.mean(axis=0)).tolist(),
            'detector': {'sides': YUNET_SIDES, 'min_score': YuNetDetector().min_score},
            'runtime': [{'url': url, 'integrity': integrity} for url, integrity in runtime],
        })
        template = jinja2.Environment(autoescape=True).from_string((PAGE / 'index.html').read_text(encoding='utf-8'))
        (page / 'index.html').write_text(template.render(
            metadata, cdn='' if own else CDN, version=__version__), encoding='utf-8')
        os.replace(page, out)
    return replace(report, path=out / 'classifier.onnx')


def _runtime_files(folder: Path) -> list[Path]:
    files = [next((path for path in (folder / name, folder / 'dist' / name) if path.is_file()), None)
             for name in RUNTIME]
    if None in files:
        raise UserError(f"{folder} does not have {' and '.join(RUNTIME)}: name a folder with the npm package "
                        'onnxruntime-web (npm pack onnxruntime-web fetches it).')
    return [file for file in files if file]


def _integrity(file: Path) -> str:
    return f"sha384-{base64.b64encode(hashlib.sha384(file.read_bytes()).digest()).decode()}"


def _preparation(config: dict[str, Any]) -> str:
    """timm's evaluation transform of a square crop, and grey values as Pillow's, in ONNX's text format.

    ONNX Runtime's antialiasing is Pillow's, in the same whole numbers.
    """
    chans, size, other = config['input_size']
    scale, filter = math.floor(size / config['crop_pct']), FILTERS.get(config['interpolation'])
    if chans not in (1, 3) or size != other or scale < size or not filter:
        raise UserError(
            f"the page makes square inputs of 1 or 3 channels, resized by {' or '.join(FILTERS)}, and the model takes "
            f"{config['input_size']}, {config['interpolation']}, crop_pct {config['crop_pct']:g}.")
    start = round((scale - size) / 2)
    luma = 'int32[3] luma = {19595, 38470, 7471}, int32 half = {32768}, int32 whole = {65536},' if chans == 1 else ''
    grey = '''
        wide = Cast <to = 6> (rgb)
        weighted = Mul (wide, luma)
        summed = ReduceSum (weighted, two)
        rounded = Add (summed, half)
        shifted = Div (rounded, whole)
        colors = Cast <to = 2> (shifted)''' if chans == 1 else 'colors = Identity (rgb)'
    return f'''prepare (uint8[side, side, 4] pixels) => (uint8[1, {size}, {size}, {chans}] prepared)
        <int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] three = {{3}},
         {luma}
         int64[4] scale = {{1, {chans}, {scale}, {scale}}}, int64[2] axes = {{2, 3}},
         int64[2] start = {{{start}, {start}}}, int64[2] end = {{{start + size}, {start + size}}}> {{
        rgb = Slice (pixels, zero, three, two)
        {grey}
        planes = Transpose <perm = [2, 0, 1]> (colors)
        batch = Unsqueeze (planes, zero)
        resized = Resize <mode = "{filter}", antialias = 1, cubic_coeff_a = -0.5,
                          exclude_outside = 1> (batch, , , scale)
        cropped = Slice (resized, start, end, axes)
        prepared = Transpose <perm = [0, 2, 3, 1]> (cropped)
    }}'''


def _join(preparation: str, network: Any) -> Any:
    """A network behind a graph in ONNX's text format that takes its input's place."""
    import onnx
    import onnx.compose
    import onnx.parser
    version = next(entry.version for entry in network.opset_import if not entry.domain)
    first = onnx.parser.parse_model(f'<ir_version: {network.ir_version}, opset_import: ["": {version}]> {preparation}')
    return onnx.compose.merge_models(first, network, [('prepared', network.graph.input[0].name)])


def _add_preparation(file: Path, preparation: str) -> dict[str, str]:
    """Let a classifier take a square RGBA crop (side, side, 4) and give probabilities; returns its metadata."""
    import onnx
    network = _join(preparation, onnx.load(file))
    metadata = {entry.key: entry.value for entry in network.metadata_props} | {'input': 'rgba'}
    temperature = float(metadata.pop(TEMPERATURE_KEY, 1.))  # what stays in a file's metadata is still to be applied
    network.graph.initializer.append(onnx.helper.make_tensor('temperature', onnx.TensorProto.FLOAT, [], [temperature]))
    network.graph.node.extend([
        onnx.helper.make_node('Div', ['output', 'temperature'], ['scaled']),
        onnx.helper.make_node('Softmax', ['scaled'], ['probabilities'], axis=1)])
    network.graph.output[0].name = 'probabilities'
    del network.metadata_props[:]
    onnx.helper.set_model_props(network, metadata)
    onnx.save(network, file)
    return metadata


def _write_detector(file: Path) -> None:
    """Write YuNet for RGBA pictures (height, width, 4) of any size whose sides are multiples of 32."""
    import onnx
    network = onnx.load(YUNET)
    del network.graph.value_info[:]
    for value, *names in [(network.graph.input[0], 'height', 'width'), *((value,) for value in network.graph.output)]:
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip(dims[2:] if names else dims[1:2], names or ['places'], strict=True):
            dim.dim_param = name
    onnx.save(_join('''prepare (uint8[height, width, 4] pixels) => (float[1, 3, height, width] prepared)
        <int64[3] bgr = {2, 1, 0}> {
        colors = Gather <axis = 2> (pixels, bgr)
        planes = Transpose <perm = [2, 0, 1]> (colors)
        batch = Unsqueeze <axes = [0]> (planes)
        prepared = Cast <to = 1> (batch)
    }''', network), file)
