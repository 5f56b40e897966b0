"""Layers of the networks: convolution with norm, PReLU, mixed depthwise convolution, coordinate attention.

Written for speed where the arithmetic leaves a choice, and for `timm.utils.reparameterize_model`: each module that
holds a batch norm folds it into the layer before it, in place, so that its name, its hooks and the names of its
parameters stay. Only the mixed bottlenecks become modules of their own after that, with other names. timm calls `fuse`
or `reparameterize` of every child but not of the model itself, and goes on into the child it had before `fuse` was
called: a module that `fuse` returns must be complete.

What was tried in eager mode, with lfnsb at 112 px in float32, on two cores with AVX-512 that other work shared (medians
of interleaved rounds; the exported graphs are in `timm_lfnsb.export.lowering`):

| training step of 32 images | time, textbook parts in channels-last = 1 |
|---|---|
| textbook parts (timm's attention, torch's PReLU) in the order of the input | 1.20 |
| gradients of our own for PReLU and gates | 0.92 |
| ... computed in place, and one gradient for both strips; with contiguous weights | 0.73-0.76; 0.80-0.87 |
| ... strips and gates in the order of the maps, whatever that of the weights (**taken**) | 0.70-0.78 |
| ... the gradients of PReLU and gates in parts of 1 to 5 MB, which stay in the cache | 0.95-1 times as long |
| torch.compile of the textbook parts, of ours | 0.78, 0.77 |
| bfloat16 autocast (another arithmetic), eager and compiled | 0.74, 0.70 |
| freed memory kept (**taken**, `timm_lfnsb.models.memory`): a bare loop, timm's train script | 0.7-0.9; 0.98-1.01 times |
| ... and one heap for all threads (**taken**): up to 19,000 page faults a step fewer | 0.9-1.17 times |
| huge pages (torch's switch) | 1.1 times as long |
| the kernels of a mix as one convolution, alone: at 56 px, from 28 px on | 0.83; 0.9 to 3 times as long |

| inference after `reparameterize_model`, as a multiple of ResNet-18's time | batch 1 | batch 32 |
|---|---|---|
| separate calls of 17 operators | 1.71 | 1.59 |
| few positions as linear layers, widest maps in parts of 8 MB | 1.54-1.71 | 1.46-1.56 |
| ... no module calls and views that can be spared, in place what can be, by `bench` | 1.6 | 1.34-1.50 |
| ... bare parameters (**taken**), by `bench`, in rounds of quick and slow threads | 1.27-1.38, 1.46-1.52 | 1.29-1.44 |
| ... plain tensors kept beside the parameters, which `to` and `half` do not reach | 0.05-0.1 less | |
| ... parameters looked up one by one; modules called | 0.03-0.1 more; 0.1-0.15 more | |
| ... and weights of depthwise convolutions prepared beforehand, by torch's internal operators | 0.04-0.08 less | |
| ... and both strips concatenated, or both gates by one product of matrices | 0.02-0.05 more | |
| ... and maps viewed as matrices by one call each, so that linear layers need no views (AVX2) | 0-0.04 less | |
| parts of 1.5, 3, 6, 12 MB, when whole batches took 1.62 | | 1.86, 1.53, 1.42, 1.40 |
| both strips by one product with a constant matrix | 1.14 times as long | 1.09 times |
| another function: without attention and PReLU, by `bench --floor` | 0.94-1.03, 1.06-1.10 | 1.13-1.28 |
"""
import copy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.repvit import RepVggDw as TimmRepVggDw
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = [
    'ConvNorm',
    'ConvNormAct',
    'CoordAttn',
    'MixedDepthwiseConv',
    'PReLU',
    'RepVggDw',
    'StemConv',
    'StripGates',
    'eager_inference_on_cpu',
    'fold_norm',
    'spatial_size',
]

# The depthwise convolution of a bottleneck: kernel size -> number of channels it filters.
Mix = dict[int, int]


@torch.no_grad()
def fold_norm(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> bool:
    """Fold a batch norm into the convolution or linear layer before it, in place.

    The running statistics are used, whatever mode the norm is in. Computed in double precision, stored in the
    layer's.

    Returns:
        Whether it was folded: something without running statistics is left as it is.
    """
    mean, var = getattr(norm, 'running_mean', None), getattr(norm, 'running_var', None)
    if mean is None or var is None:
        return False

    def double(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.double()

    weight, bias = fuse_conv_bn_weights(
        double(layer.weight), double(layer.bias), double(mean), double(var), norm.eps,  # type: ignore[arg-type]
        double(getattr(norm, 'weight', None)), double(getattr(norm, 'bias', None)))
    dtype, requires_grad = layer.weight.dtype, layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad)
    layer.bias = nn.Parameter(bias.to(dtype), requires_grad)
    return True


@torch.fx.wrap
def channels_last_on_cpu(x: torch.Tensor) -> torch.Tensor:
    """Images or maps on a CPU in channels-last order, in which everything here runs up to twice as fast; see README.

    Other devices keep the order that the caller chose.
    """
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():  # TorchScript's exporter does not know memory formats
            return x
    if x.device.type == 'cpu':
        x = x.contiguous(memory_format=torch.channels_last)
    return x


def spatial_size(x: torch.Tensor) -> tuple[int, int]:
    """Height and width of maps (B, C, H, W), as plain numbers for TorchScript's ONNX exporter, which wants those."""
    height, width = x.shape[-2:]
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            height, width = int(height), int(width)
    return height, width


def eager_on_cpu(x: torch.Tensor) -> bool:
    """Whether operators run one by one on a CPU: nobody traces, compiles or exports them, who would see the others."""
    return (
        type(x) is torch.Tensor and x.device.type == 'cpu'
        and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    )


def eager_inference_on_cpu(x: torch.Tensor) -> bool:
    """Whether results may also be computed in place: nobody asks for gradients or another dtype either."""
    return eager_on_cpu(x) and not torch.is_grad_enabled() and not torch.is_autocast_enabled('cpu')


def _eager_training_on_cpu(x: torch.Tensor) -> bool:
    """Whether a gradient of our own is wanted: compilers make a good one themselves, and other devices have one."""
    return eager_on_cpu(x) and torch.is_grad_enabled()


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
        if torch.is_grad_enabled():  # somebody wants second derivatives, which in-place operators would spoil
            return torch.addcmul(grad_positive, grad_negative, slopes), (grad_negative * x).sum((0, 2, 3))
        grad_positive.addcmul_(grad_negative, slopes)
        return grad_positive, grad_negative.mul_(x).sum((0, 2, 3))


@torch.fx.wrap
def prelu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """PReLU of maps (B, C, H, W) with one slope a channel."""
    if not torch.jit.is_scripting():
        if _eager_training_on_cpu(x):
            return _PReLUFunction.apply(x, weight.to(x.dtype))
    return F.prelu(x, weight)


class PReLU(nn.PReLU):
    """nn.PReLU with one slope a channel and a faster gradient on the CPU."""

    def __init__(self, chs: int, device=None, dtype=None):
        super().__init__(chs, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return prelu(x, self.weight)


class ConvNorm(nn.Sequential):
    """Convolution without bias (padding k // 2 unless given) and batch norm, then what a subclass adds."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int | tuple[int, int] = 1,
            stride: int = 1,
            padding: int | None = None,
            groups: int = 1,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        if padding is None:
            assert isinstance(kernel_size, int)
            padding = kernel_size // 2
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)

    def reparameterize(self) -> None:
        if hasattr(self, 'bn') and fold_norm(self.conv, self.bn):
            del self.bn


class ConvNormAct(ConvNorm):
    """Convolution without bias (padding k // 2), batch norm, and PReLU per channel where `act` is set."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            kernel_size: int = 1,
            stride: int = 1,
            groups: int = 1,
            act: bool = True,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_chs, out_chs, kernel_size, stride, groups=groups, **dd)
        if act:
            self.act = PReLU(out_chs, **dd)


class StemConv(ConvNormAct):
    """The first convolution, which chooses the memory format of all that follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = channels_last_on_cpu(x)
        for module in self:
            x = module(x)
        return channels_last_on_cpu(x)  # one grey channel is in both orders at once, and the convolution took NCHW


class MixedDepthwiseConv(nn.Module):
    """Depthwise convolution whose channel groups have kernels of different sizes (MixConv), no norm, no activation."""

    def __init__(self, mix: Mix, stride: int = 1, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.splits = list(mix.values())
        self.convs = nn.ModuleList([
            nn.Conv2d(chs, chs, kernel, stride, kernel // 2, groups=chs, bias=False, **dd)
            for kernel, chs in mix.items()
        ])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.splits) == 1:
            return self.convs[0](x)
        parts = torch.split(x, self.splits, dim=1)
        out: list[torch.Tensor] = []
        for i, conv in enumerate(self.convs):
            out.append(conv(parts[i]))
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Make it one convolution of the largest kernel, the smaller ones padded with zeros."""
        if len(self.splits) == 1:
            return
        convs = [conv for conv in self.convs if isinstance(conv, nn.Conv2d)]
        kernel, chs = max(conv.kernel_size[0] for conv in convs), sum(self.splits)
        weight = torch.cat([F.pad(conv.weight, 4 * [(kernel - conv.kernel_size[0]) // 2]) for conv in convs])
        merged = nn.Conv2d(
            chs, chs, kernel, convs[0].stride, kernel // 2, groups=chs, bias=False,  # type: ignore[arg-type]
            device=weight.device, dtype=weight.dtype)
        merged.weight = nn.Parameter(weight, convs[0].weight.requires_grad)
        self.splits = [chs]
        self.convs = nn.ModuleList([merged])


class StripGates(nn.Module):
    """What coordinate attentions share: from a strip along each axis to a sigmoid gate along each axis."""

    def __init__(self, chs: int, rd_chs: int, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.conv1 = nn.Conv2d(chs, rd_chs, 1, **dd)
        self.bn1 = nn.BatchNorm2d(rd_chs, **dd)
        self.act = nn.Hardswish()
        self.conv_h = nn.Conv2d(rd_chs, chs, 1, **dd)
        self.conv_w = nn.Conv2d(rd_chs, chs, 1, **dd)

    def gates(self, x_h: torch.Tensor, x_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, 1) and (B, C, 1, W) -> two tensors of these shapes between 0 and 1."""
        if self.training:  # one batch norm over both strips, of one direction, so that all is in the maps' order
            height, width = x_h.shape[2], x_w.shape[3]
            strips = channels_last_on_cpu(torch.cat([x_h, x_w.transpose(2, 3)], dim=2))
            strips = self.act(self.bn1(self.conv1(strips)))
            x_h, x_w = torch.split(strips, [height, width], dim=2)
            return self.conv_h(x_h).sigmoid(), self.conv_w(x_w).sigmoid().transpose(2, 3)
        # The same with running statistics.
        x_h = self.act(self.bn1(self.conv1(x_h)))
        x_w = self.act(self.bn1(self.conv1(x_w)))
        return self.conv_h(x_h).sigmoid(), self.conv_w(x_w).sigmoid()

    def reparameterize(self) -> None:
        if fold_norm(self.conv1, self.bn1):
            self.bn1 = nn.Identity()  # type: ignore[assignment]


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


@torch.fx.wrap
def strip_means(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of each row (B, C, H, 1) and of each column (B, C, 1, W), by plain pools, which runtimes prefer."""
    if not torch.jit.is_scripting():
        if _eager_training_on_cpu(x):
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
        # In place, unless somebody wants second derivatives.
        product = product * gate_h if torch.is_grad_enabled() else product.mul_(gate_h)
        grad_w = F.avg_pool2d(product, (height, 1), divisor_override=1)
        grad_x = grad * gate_h
        grad_x = grad_x * gate_w if torch.is_grad_enabled() else grad_x.mul_(gate_w)
        return grad_x, grad_h, grad_w


@torch.fx.wrap
def apply_gates(x: torch.Tensor, gate_h: torch.Tensor, gate_w: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) times (B, C, H, 1) times (B, C, 1, W)."""
    if not torch.jit.is_scripting():
        if _eager_training_on_cpu(x):
            return _GateFunction.apply(x, gate_h, gate_w)
    return (x * gate_h).mul_(gate_w)


class CoordAttn(StripGates):
    """Coordinate attention, the function and the parameter names of timm's `create_attn('coord', ..., bias=True)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strips = strip_means(x)
        gate_h, gate_w = self.gates(strips[0], strips[1])
        return apply_gates(x, gate_h, gate_w)


class RepVggDw(TimmRepVggDw):
    """timm's RepVGGDW, fused in double precision and to the dtype of the network."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        conv, norm, pointwise, last_norm = (
            copy.deepcopy(module) for module in (*self.conv.children(), self.conv1, self.bn))
        assert isinstance(conv, nn.Conv2d) and isinstance(pointwise, nn.Conv2d)
        dtype, middle = conv.weight.dtype, conv.kernel_size[0] // 2
        if not fold_norm(conv.double(), norm):
            return self
        assert conv.bias is not None and pointwise.bias is not None
        conv.weight[:, :, middle, middle] += pointwise.weight[:, :, 0, 0].double() + 1
        conv.bias += pointwise.bias.double()
        return conv.to(dtype) if fold_norm(conv, last_norm) else self
