"""Networks rewritten for the runtimes that execute exported files: the same function in other operators.

For export alone: no training, one image size, results equal to rounding. What else was tried, and what it costs, is in
`timm_lfnsb/results/speed.md`.
"""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

from ..models.cpu import FusedBottleneck
from ..models.layers import ConvNormAct
from ..models.networks import MixedFeatureNet

RUNTIMES = ('onnxruntime', 'openvino', 'torch')  # the last: exported programs, ExecuTorch's too

# The weight of a convolution, (out, in) of a 1x1, and its bias.
Layer = tuple[torch.Tensor, torch.Tensor | None]


def _whole_blocks(chs: int) -> int:
    """Channels padded to a multiple of 16, which the runtimes' blocked layouts keep together."""
    return -(-chs // 16) * 16


@torch.no_grad()
def lower_network(model: nn.Module, runtime: str) -> nn.Module:
    """A reparameterised copy of a timm model, networks of this zoo in the operators that suit one of `RUNTIMES`."""
    model = reparameterize_model(copy.deepcopy(model).eval(), inplace=True).eval()
    if isinstance(model, MixedFeatureNet):
        _lower_children(model, runtime)
    return model


def _lower_children(module: nn.Module, runtime: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, FusedBottleneck):
            setattr(module, name, LoweredBottleneck(child, runtime))
        elif isinstance(child, ConvNormAct) and runtime != 'torch':
            slopes = child.act.weight if hasattr(child, 'act') else None
            setattr(module, name, child.conv if slopes is None else _lower_act(child.conv, slopes, runtime))
        else:
            _lower_children(child, runtime)


class LoweredBottleneck(nn.Module):
    """A mixed bottleneck of convolutions, for blocked layouts padded to whole blocks of channels."""

    def __init__(self, block: FusedBottleneck, runtime: str):
        super().__init__()
        self.residual = block.residual
        chs = block.mid_chs if runtime == 'torch' else _whole_blocks(block.mid_chs)
        self.expand = _lower_act(_conv((block.expand_weight, block.expand_bias), out_chs=chs), block.slopes, runtime)
        self.conv_dw = _conv(
            (block.dw_weight, None), out_chs=chs, stride=block.stride, padding=block.padding, groups=chs)
        self.gates = LoweredGates(
            (block.reduce_weight, block.reduce_bias),
            [(block.gate_h_weight, block.gate_h_bias), (block.gate_w_weight, block.gate_w_bias)], chs, runtime)
        self.project = _conv((block.project_weight, block.project_bias), in_chs=chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(self.expand(x))
        for gate in self.gates(y):
            y = y * gate
        y = self.project(y)
        return y + x if self.residual else y


class LoweredGates(nn.Module):
    """The gates of a coordinate attention over `chs` channels, in the form that its runtime keeps in its layout."""

    def __init__(self, reduce: Layer, gates: Sequence[Layer], chs: int, runtime: str):
        super().__init__()
        # ONNX Runtime fuses the hard-swish into a convolution right before it, and leaves its layout for a broadcast
        # but not for a Resize; for OpenVINO broadcasts are free, and pooling costs less behind the convolution.
        self.resize, self.conv_first = runtime == 'onnxruntime', runtime == 'openvino'
        rd_chs = _whole_blocks(len(reduce[0])) if self.resize else len(reduce[0])
        self.conv1 = _conv(reduce, chs, rd_chs)
        self.gate_convs = nn.ModuleList(_conv(gate, rd_chs, chs) for gate in gates)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a map is multiplied by: the gates (B, C, H, 1) and (B, C, 1, W), for ONNX Runtime their product."""
        height, width = int(x.shape[2]), int(x.shape[3])  # while tracing they are tensors
        if self.conv_first:
            x = self.conv1(x)
        pooled = [F.avg_pool2d(x, (1, width)), F.avg_pool2d(x, (height, 1))]
        if not self.conv_first:
            pooled = [self.conv1(strip) for strip in pooled]
        gate_h, gate_w = (self.gate_convs[i](F.hardswish(pooled[i])).sigmoid() for i in (0, 1))
        if self.resize:
            gate_h = F.interpolate(gate_h, scale_factor=(1., float(width)), mode='nearest')
            gate_w = F.interpolate(gate_w, scale_factor=(float(height), 1.), mode='nearest')
            return [gate_h * gate_w]  # all on the thread that has enlarged them, and the map is read but once
        return [gate_h, gate_w]


class ConvPReLU(nn.Module):
    """A convolution and PReLU(y) = ReLU((1 - a) y) + a y as two 1x1 depthwise convolutions.

    ONNX Runtime fuses ReLU and sum into them. Slopes above 1 need (1 - a) ReLU(y), for ReLU takes no factor below 0.
    """

    def __init__(self, conv: nn.Conv2d, slopes: torch.Tensor):
        super().__init__()

        def scale(factors: torch.Tensor) -> nn.Conv2d:
            return _conv((factors.view(-1, 1, 1, 1), None), groups=len(factors), bias=False)

        steep = bool((slopes > 1).any())
        self.conv = conv
        self.linear = scale(slopes)
        self.positive = scale(torch.ones_like(slopes) if steep else 1 - slopes)
        self.gain = scale(1 - slopes) if steep else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.linear(x) + self.gain(F.relu(self.positive(x)))


def _lower_act(conv: nn.Conv2d, slopes: torch.Tensor, runtime: str) -> nn.Module:
    slopes = F.pad(slopes, (0, conv.out_channels - slopes.numel()))
    if runtime == 'onnxruntime':
        return ConvPReLU(conv, slopes)
    prelu = nn.PReLU(conv.out_channels)
    prelu.weight.copy_(slopes)
    return nn.Sequential(conv, prelu)


def _conv(
        layer: Layer, in_chs: int | None = None, out_chs: int | None = None, groups: int = 1, **options: Any,
) -> nn.Conv2d:
    """A convolution, with zeros for additional channels."""
    weight, bias = layer
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    in_chs, out_chs = in_chs or weight.shape[1] * groups, out_chs or len(weight)
    conv = nn.Conv2d(in_chs, out_chs, weight.shape[2:], groups=groups, **options)  # type: ignore[arg-type]
    more = out_chs - len(weight)
    conv.weight.copy_(F.pad(weight, (0, 0, 0, 0, 0, conv.weight.shape[1] - weight.shape[1], 0, more)))
    if conv.bias is not None:
        conv.bias.copy_(torch.zeros(out_chs) if bias is None else F.pad(bias, (0, more)))
    return conv


class Interface(nn.Module):
    """A model of any dtype that takes float32 or, given mean and std (C, 1, 1), uint8 (B, H, W, C); float32 outputs."""

    def __init__(self, model: nn.Module, normalization: tuple[torch.Tensor, torch.Tensor] | None):
        super().__init__()
        self.model, self.dtype = model, next(model.parameters()).dtype
        self.normalization = None if normalization is None else nn.ParameterList(normalization)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.normalization is not None:
            mean, std = self.normalization
            images = (images.permute(0, 3, 1, 2) / 255 - mean) / std
        return self.model(images.to(self.dtype)).float()
