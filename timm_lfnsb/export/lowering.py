"""Networks rewritten for the runtimes that execute exported files: the same function in other operators.

`lower_network` takes a network of this zoo apart and puts it together again from what a runtime executes well. It is
for export alone: no training, one image size, results equal to rounding.

What was tried, with lfnsb at 112 px, batch 1, float32: time as a multiple of ResNet-18's at 112 px in the same run, on
two cores with AVX-512 that other work shared (minima or fastest tenth of interleaved calls, real-time priority for the
two threads; `timm-lfnsb bench` gives medians, which are some hundredths more).
ResNet-18 takes 4.6 ms there at one thread and 2.6 at two in either runtime, some 400 GFLOP/s, so whatever is not a
large convolution weighs more than on slower cores.

| ONNX Runtime 1.32 | 1 thread | 2 threads |
|---|---|---|
| network as it is: 835 nodes, 268 of them change the layout, PReLU takes 42 % of the time | 2.9 | 4.3 |
| merged kernels, strips apart, channels padded to 16, pools as AveragePool, gates as Resize | 2.4 | |
| ... and PReLU as ReLU + 1x1 depthwise convolution: 518 nodes, 1 changes the layout | 0.93-0.98 | 1.20-1.31 |
| ... gates by broadcast, or so multiplied with each other: each product leaves the layout | 1.3, 1.2 | |
| ... pools as ReduceMean | 1.2 | |
| ... PReLU with a second k x k depthwise convolution, or a second 1x1 convolution | 1.02, 1.3 | 1.35 |
| ... PReLU as -(relu(-y) (a - 1) - y), which needs no division: the sum is no longer in place | | 1.33 |
| ... first convolution of the attention before its pools: its hard-swish is no longer fused | | 1.39 |
| ... strips enlarged before the second convolution of the attention, at 7, 14, 28 px maps | | 1.28-1.45 |
| ... pool and convolution as one over a whole row or column, at maps up to 7, 14, 28 px | | 1.24, 1.35, 1.45 |
| PReLU as two 1x1 depthwise convolutions, ReLU and sum fused | 0.93 | 1.17-1.21 |
| ... and the enlarged gates multiplied with each other before the map (**taken**) | 0.93 | 1.14-1.18 |
| ... 28 px padded to 128 channels, 14 px to 256, which divide evenly between the cores | | 1.06, 1.12 times as long |
| ... first convolution of the attention on the map, pools as convolutions with its hard-swish | | 1.03 times |
| ... gates enlarged on both threads: by MaxPool with padding, by linear Resize at 28 px | | 1.01, 1.03 times |
| ... denormals as zeros, no memory arena or pattern, spinning, blocks of work (session options) | | as with |
| another function: without attention; ReLU for PReLU; both (convolutions only) | 0.82; 0.92; 0.75 | -; -; 0.75 |
| int8 (see `timm_lfnsb.export.export`) | 0.62 | 1.24 |

| OpenVINO 2026.4 | 1 thread | 2 threads |
|---|---|---|
| network as it is | 1.07 | |
| merged kernels, strips apart; PReLU stays, for it is fused into the convolution | 0.97-1.13 | 1.22-1.32 |
| ... channels padded to 16, first convolution of the attention before its pools (**taken**) | 0.95-1.10 | 1.18-1.29 |
| ... gates as Resize; pools as ReduceMean; PReLU as for ONNX Runtime | 1.06; 1.07; 1.04 | |
| another function: without attention; ReLU for PReLU; both (convolutions only) | 0.83; 0.92; 0.77 | 0.89; 1.17; 0.77 |
| int8 | 0.6-0.85 | 0.82 |

So convolutions alone take 0.75 to 0.77 of ResNet-18's time. The rest is not arithmetic: a bottleneck has 15 nodes, and
at two threads each of them waits for the other core, for 2 to 4 microseconds of the 5 to 10 that most of them take.
Also, ONNX Runtime's blocked convolutions and pools divide a map between the threads in one way, while its elementwise
operators and Upsample run on one thread for maps of this size: half of the map goes to the other core and back. PReLU
of 96 channels at 28 px took 29 us with a ReLU node and takes 12 without, on one thread 17 and 18. Products remain.
With 16 channels everywhere, so that there is next to nothing to compute, the 12 nodes a block that are not its
convolutions still take 0.17 to 0.22 of ResNet-18's time at two threads, 0.06 to 0.09 at one (AVX2).
At other times, for minutes, ONNX Runtime at two threads takes up to 2.1 times ResNet-18's time with the same file, the
convolutions alone 1.1 times. A cache line then goes to the other core and back in 340 instead of 60 to 80 ns, so the
two cores of this virtual machine seem not to share a cache. `timm-lfnsb bench` tells such rounds apart; one thread
shows nothing of it. A processor of that name without AVX-512 gave 1.01 at one thread and 1.23-1.25 at two.
"""
from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.utils import reparameterize_model

from ..models.layers import ConvNormAct
from ..models.networks import DirectionAttention, FusedBottleneck, MixedFeatureNet, SpatialBiasHead

RUNTIMES = ('onnxruntime', 'openvino', 'torch')
"""'torch' stands for exported programs of torch: torch.export, ExecuTorch."""

# The weight of a convolution, (out, in) of a 1x1, and its bias.
Layer = tuple[torch.Tensor, torch.Tensor | None]

BLOCK = 16
"""Channels that the runtimes' blocked layouts keep together; where a layer's do not divide by it, it is padded."""


@torch.no_grad()
def lower_network(model: nn.Module, runtime: str) -> nn.Module:
    """Reparameterise a model and, if it is a network of this zoo, write it in the operators that suit a runtime.

    Args:
        model: A timm model; it is left alone.
        runtime: One of `RUNTIMES`.

    Returns:
        A model in eval mode that computes the same logits (or the same embedding, for one without classifier).
    """
    assert runtime in RUNTIMES
    model = reparameterize_model(copy.deepcopy(model).eval(), inplace=True).eval()
    if isinstance(model, MixedFeatureNet):
        if isinstance(model.head, SpatialBiasHead) and model.global_pool:
            _lower_spatial_bias(model, model.head)
        _lower_children(model, runtime)
    return model


def _lower_children(module: nn.Module, runtime: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, FusedBottleneck):
            setattr(module, name, LoweredBottleneck(child, runtime))
        elif isinstance(child, DirectionAttention):
            strips = [child.strip_h.conv, child.strip_w.conv]
            setattr(module, name, LoweredGates(
                (child.conv1.weight, child.conv1.bias), (child.conv_h.weight, child.conv_h.bias),
                (child.conv_w.weight, child.conv_w.bias), strips[0].out_channels, runtime, strips))
        elif isinstance(child, ConvNormAct):
            # torch's own programs keep the layer, with the memory order that the first one chooses.
            if hasattr(child, 'act') and runtime != 'torch':
                setattr(module, name, _lower_act(child.conv, child.act.weight, runtime))
        else:
            _lower_children(child, runtime)


class LoweredBottleneck(nn.Module):
    """A mixed bottleneck of convolutions, for blocked layouts padded to whole blocks of channels."""

    def __init__(self, block: FusedBottleneck, runtime: str):
        super().__init__()
        self.residual = block.residual
        chs = block.mid_chs if runtime == 'torch' else _whole_blocks(block.mid_chs)
        self.expand = _lower_act(_conv((block.expand_weight, block.expand_bias), out_chs=chs), block.slopes, runtime)
        self.conv_dw = _conv((block.dw_weight, None), chs, chs, block.stride, block.padding, depthwise=True)
        self.gates = LoweredGates(
            (block.reduce_weight, block.reduce_bias), (block.gate_h_weight, block.gate_h_bias),
            (block.gate_w_weight, block.gate_w_bias), chs, runtime)
        self.project = _conv((block.project_weight, block.project_bias), in_chs=chs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(self.expand(x))
        for gate in self.gates.factors(y):
            y = y * gate
        y = self.project(y)
        return y + x if self.residual else y


class LoweredGates(nn.Module):
    """The gates of a coordinate attention, each from pool to product in the form its runtime keeps in its layout.

    Args:
        reduce: The layer from the pooled strips to few channels, its norm folded.
        gate_h: From there to the gate along the height.
        gate_w: To the gate along the width.
        chs: Channels of the map, padding included.
        runtime: One of `RUNTIMES`.
        strips: Convolutions that take the place of the average pools over rows and columns.
    """

    def __init__(
            self,
            reduce: Layer,
            gate_h: Layer,
            gate_w: Layer,
            chs: int,
            runtime: str,
            strips: Sequence[nn.Conv2d] | None = None,
    ):
        super().__init__()
        # ONNX Runtime fuses the hard-swish into a convolution right before it, and leaves its layout for a broadcast
        # but not for a Resize; for OpenVINO broadcasts are free, and pooling costs less behind the convolution.
        self.resize = runtime == 'onnxruntime'
        self.pool_first = runtime != 'openvino' or strips is not None
        self.strips = nn.ModuleList(strips) if strips is not None else None
        rd_chs = _whole_blocks(len(reduce[0])) if self.resize else len(reduce[0])
        self.conv1 = _conv(reduce, chs, rd_chs)
        self.act = nn.Hardswish()
        self.conv_h = _conv(gate_h, rd_chs, chs)
        self.conv_w = _conv(gate_w, rd_chs, chs)

    def factors(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What a map is multiplied by: the gates (B, C, H, 1) and (B, C, 1, W), for ONNX Runtime their product."""
        height, width = int(x.shape[2]), int(x.shape[3])  # while tracing they are tensors
        if not self.pool_first:
            x = self.conv1(x)
        if self.strips is not None:
            pooled = [strip(x) for strip in self.strips]
        else:
            pooled = [F.avg_pool2d(x, (1, width)), F.avg_pool2d(x, (height, 1))]
        if self.pool_first:
            pooled = [self.conv1(strip) for strip in pooled]
        gate_h, gate_w = (
            conv(self.act(strip)).sigmoid() for conv, strip in zip((self.conv_h, self.conv_w), pooled, strict=True))
        if self.resize:
            gate_h = F.interpolate(gate_h, scale_factor=(1., float(width)), mode='nearest')
            gate_w = F.interpolate(gate_w, scale_factor=(float(height), 1.), mode='nearest')
            return [gate_h * gate_w]  # all on the thread that has enlarged them, and the map is read but once
        return [gate_h, gate_w]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functools.reduce(torch.mul, self.factors(x))


class ConvPReLU(nn.Module):
    """A convolution and PReLU, the latter as two 1x1 depthwise convolutions: PReLU(y) = ReLU((1 - a) y) + a y.

    ONNX Runtime fuses the ReLU into the one and the sum into the other. As an operator of its own ReLU would run on one
    thread for maps of this size, so that half of the map went from the other core to it and back.
    """

    def __init__(self, conv: nn.Conv2d, slopes: torch.Tensor):
        super().__init__()
        chs = conv.out_channels
        self.conv = conv
        self.linear = nn.Conv2d(chs, chs, 1, groups=chs, bias=False)
        self.positive = nn.Conv2d(chs, chs, 1, groups=chs, bias=False)
        self.gain: nn.Conv2d | None = None
        self.linear.weight.copy_(slopes.view(-1, 1, 1, 1))
        self.positive.weight.copy_((1 - slopes).view(-1, 1, 1, 1))
        if bool((slopes > 1).any()):  # (1 - a) ReLU(y) then, for ReLU takes no factor below 0
            self.gain = copy.deepcopy(self.positive)
            self.positive.weight.fill_(1.)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        positive = F.relu(self.positive(x))
        return self.linear(x) + (positive if self.gain is None else self.gain(positive))


class PooledMap(nn.Module):
    """What is left of the Spatial Bias head: 1x1 convolution, ReLU, average pool to 2x2, all in one row."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.conv = conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = int(x.shape[2]), int(x.shape[3])
        x = F.relu(self.conv(x))
        return F.avg_pool2d(x, ((height + 1) // 2, (width + 1) // 2), (height // 2, width // 2)).flatten(1)


def _lower_act(conv: nn.Conv2d, slopes: torch.Tensor, runtime: str) -> nn.Module:
    slopes = F.pad(slopes, (0, conv.out_channels - slopes.numel()))
    if runtime == 'onnxruntime':
        return ConvPReLU(conv, slopes)
    prelu = nn.PReLU(conv.out_channels)
    prelu.weight.copy_(slopes)
    return nn.Sequential(conv, prelu)


def _lower_spatial_bias(model: MixedFeatureNet, head: SpatialBiasHead) -> None:
    """Write what follows the pool of Spatial Bias, which is linear, and the classifier as one linear layer."""
    entries = 4 * head.reduce.conv.out_channels
    probes = torch.cat([torch.eye(entries), torch.zeros(1, entries)]).view(entries + 1, -1, 2, 2)
    outputs = model.fc(head.conv(probes.flatten(2).transpose(1, 2)).transpose(1, 2).flatten(1))
    linear = nn.Linear(entries, outputs.shape[1])
    linear.weight.copy_((outputs[:-1] - outputs[-1]).T)
    linear.bias.copy_(outputs[-1])
    model.head = PooledMap(head.reduce.conv)
    model.fc = linear


def _whole_blocks(chs: int) -> int:
    return -(-chs // BLOCK) * BLOCK


def _conv(
        layer: Layer,
        in_chs: int | None = None,
        out_chs: int | None = None,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] | str = (0, 0),
        depthwise: bool = False,
) -> nn.Conv2d:
    """A convolution with a bias, and zeros for additional channels."""
    weight, bias = layer
    if weight.dim() == 2:
        weight = weight[:, :, None, None]
    in_chs, out_chs = in_chs or weight.shape[1], out_chs or len(weight)
    conv = nn.Conv2d(
        in_chs, out_chs, weight.shape[2:], stride, padding,  # type: ignore[arg-type]
        groups=out_chs if depthwise else 1)
    assert conv.bias is not None
    conv.weight.zero_()
    conv.weight[:len(weight), :weight.shape[1]] = weight
    conv.bias.zero_()
    if bias is not None:
        conv.bias[:len(weight)] = bias
    return conv
