"""What is written for speed on a CPU, and computes what the plain form beside it computes.

Training: gradients of PReLU, strip means and gates as a few operators over whole maps. Inference: a mixed bottleneck as
one module (`FusedBottleneck`). Compilers, exporters and other devices get the plain operators.
`timm_lfnsb/results/speed.md` has the measurements.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

PART_BYTES = 8_000_000  # of the widest map of a part of a large batch, which stays in the cache then
FEW_POSITIONS = 1024  # up to which a linear layer is faster than a 1x1 convolution, which prepares its weights first


def channels_last_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """Images or maps on a CPU in channels-last order, in which these networks run up to twice as fast."""
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            # TorchScript's exporter does not know memory formats. It writes sizes into the graph as numbers (see
            # `spatial_size`): so this refuses images of other sizes, also of as many pixels.
            return x.expand(x.shape[0], *[int(size) for size in x.shape[1:]])
    if x.device.type == 'cpu':
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def spatial_size(x: torch.Tensor) -> tuple[int, int]:
    """Height and width of maps (B, C, H, W), as plain numbers for TorchScript's ONNX exporter, which wants those."""
    height, width = x.shape[-2:]
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            height, width = int(height), int(width)
    return height, width


def _eager_on_cpu(x: torch.Tensor, training: bool) -> bool:
    """Whether operators run one by one on a CPU, with gradients or without: nobody traces, compiles or exports them."""
    return (
        type(x) is torch.Tensor and x.device.type == 'cpu' and torch.is_grad_enabled() == training
        and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    )


def depthwise_in_float32(x: torch.Tensor) -> bool:
    """Whether depthwise convolutions should leave an autocast on the CPU: where gradients, slow in bfloat16, follow."""
    return (
        type(x) is torch.Tensor and x.device.type == 'cpu' and torch.is_grad_enabled()
        and torch.is_autocast_enabled('cpu') and not torch.jit.is_tracing()
    )


# Gradients are computed in place, unless somebody wants second derivatives, which that would spoil.


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x * factor if torch.is_grad_enabled() else x.mul_(factor)


class _PReLUFunction(torch.autograd.Function):
    """PReLU with a vectorised gradient: torch's own kernel on the CPU goes element by element."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.prelu(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        slopes = weight.view(-1, 1, 1)
        grad_positive = torch.ops.aten.threshold_backward(grad, x, 0)  # where x > 0
        grad_negative = grad - grad_positive
        if torch.is_grad_enabled():
            return torch.addcmul(grad_positive, grad_negative, slopes), (grad_negative * x).sum((0, 2, 3))
        return grad_positive.addcmul_(grad_negative, slopes), grad_negative.mul_(x).sum((0, 2, 3))


def prelu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PReLU of maps (B, C, H, W) with one slope a channel."""
    if not torch.jit.is_scripting():
        if _eager_on_cpu(x, training=True):
            return _PReLUFunction.apply(x, weight.to(x.dtype))
    return F.prelu(x, weight)


class _StripsFunction(torch.autograd.Function):
    """Means over rows and over columns, with one gradient for both: torch's pools make copies for theirs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = x.shape[-2:]
        return F.avg_pool2d(x, (1, width)), F.avg_pool2d(x, (height, 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_h: torch.Tensor, grad_w: torch.Tensor) -> torch.Tensor:
        return grad_h / grad_w.shape[-1] + grad_w / grad_h.shape[-2]


def strip_means(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each row (B, C, H, 1) and of each column (B, C, 1, W), by plain pools, which runtimes prefer."""
    if not torch.jit.is_scripting():
        if _eager_on_cpu(x, training=True):
            return _StripsFunction.apply(x)
    height, width = spatial_size(x)
    return F.avg_pool2d(x, (1, width)), F.avg_pool2d(x, (height, 1))


class _GateFunction(torch.autograd.Function):
    """x * gate_h * gate_w, whose gradients of the gates sum by a pool: sums over single axes of a map are slow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
        return (x * gate_h).mul_(gate_w)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, gate_h, gate_w = ctx.saved_tensors
        height, width = x.shape[-2:]
        product = grad * x
        grad_h = F.avg_pool2d(product * gate_w, (1, width), divisor_override=1)
        grad_w = F.avg_pool2d(_times(product, gate_h), (height, 1), divisor_override=1)
        return _times(grad * gate_h, gate_w), grad_h, grad_w


def apply_gates(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) times (B, C, H, 1) times (B, C, 1, W)."""
    if not torch.jit.is_scripting():
        if _eager_on_cpu(x, training=True):
            return _GateFunction.apply(x, gate_h, gate_w)
    return (x * gate_h).mul_(gate_w)


def _pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, linear: bool) -> torch.Tensor:
    """A 1x1 convolution of maps (B, in, H, W) whose weight is a matrix (out, in)."""
    if linear:
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight[:, :, None, None], bias)


def _as_matrix(conv: nn.Conv2d) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (out, in) and bias of a 1x1 convolution."""
    assert conv.bias is not None
    return nn.Parameter(conv.weight.detach().flatten(1), conv.weight.requires_grad), conv.bias  # type: ignore[return-value]


class FusedBottleneck(nn.Module):
    """A mixed bottleneck whose norms are folded: the same function of bare parameters.

    At batch 1 much of the time goes to Python and to starting operators, so there are no modules inside, few positions
    go through the 1x1 convolutions as matrices, and large batches go through in parts that stay in the cache.
    The parameters must stay parameters: prune or parametrise before `reparameterize_model`.
    """

    def __init__(self, block: Any):
        super().__init__()
        self.residual = block.residual
        conv_dw = block.conv_dw.convs[0]
        self.mid_chs, self.stride, self.padding = conv_dw.out_channels, conv_dw.stride, conv_dw.padding
        self.expand_weight, self.expand_bias = _as_matrix(block.expand.conv)
        self.slopes = block.expand.act.weight
        self.dw_weight = conv_dw.weight
        self.reduce_weight, self.reduce_bias = _as_matrix(block.attn.conv1)
        self.gate_h_weight, self.gate_h_bias = _as_matrix(block.attn.conv_h)
        self.gate_w_weight, self.gate_w_bias = _as_matrix(block.attn.conv_w)
        self.project_weight, self.project_bias = _as_matrix(block.project.conv)
        self.train(block.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fast, few = False, False  # whether nobody asks for gradients, and whether positions are few
        if not torch.jit.is_scripting():
            if _eager_on_cpu(x, training=False) and not torch.is_autocast_enabled('cpu'):
                batch, _, height, width = x.shape
                if batch > 1 and batch * self.mid_chs * height * width * x.element_size() > PART_BYTES:
                    count = max(1, PART_BYTES // (self.mid_chs * height * width * x.element_size()))
                    return torch.cat([self.forward(part) for part in x.split(count)])
                fast, few = True, batch * height * width <= FEW_POSITIONS
        y = F.prelu(_pointwise(x, self.expand_weight, self.expand_bias, few), self.slopes)
        y = F.conv2d(y, self.dw_weight, None, self.stride, self.padding, 1, self.mid_chs)
        height, width = spatial_size(y)
        weight, bias = self.reduce_weight, self.reduce_bias
        gate_h = F.hardswish(_pointwise(F.avg_pool2d(y, (1, width)), weight, bias, fast), fast)
        gate_w = F.hardswish(_pointwise(F.avg_pool2d(y, (height, 1)), weight, bias, fast), fast)
        gate_h = _pointwise(gate_h, self.gate_h_weight, self.gate_h_bias, fast).sigmoid_()
        gate_w = _pointwise(gate_w, self.gate_w_weight, self.gate_w_bias, fast).sigmoid_()
        y = y.mul_(gate_h).mul_(gate_w) if fast else y * gate_h * gate_w
        y = _pointwise(y, self.project_weight, self.project_bias, few)
        return y.add_(x) if self.residual else y
