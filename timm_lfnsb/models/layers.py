"""Layers of the networks: convolution with norm, PReLU, mixed depthwise convolution, coordinate attention.

Each module that holds a batch norm has a `reparameterize` for `timm.utils.reparameterize_model`, which folds the norm
into the layer before it, in place. timm calls `fuse` or `reparameterize` of every child but not of the model itself,
and goes on into the child it had before `fuse` was called: a module that `fuse` returns must be complete.
"""
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.repvit import RepVggDw as TimmRepVggDw
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..errors import UserError
from .cpu import apply_gates, channels_last_on_cpu, depthwise_in_float32, prelu, strip_means

# For fx these are single operators: it cannot follow what they choose by, and knows them only by their names here.
for _name in ('apply_gates', 'channels_last_on_cpu', 'prelu', 'strip_means'):
    torch.fx.wrap(_name)

Mix = dict[int, int]  # the depthwise convolution of a bottleneck: kernel size -> number of channels it filters


@torch.no_grad()
def fold_norm(layer: nn.Conv2d | nn.Linear, norm: nn.Module) -> bool:
    """Fold a batch norm, by its running statistics, into the layer before it; without them say False."""
    if getattr(norm, 'running_var', None) is None:
        return False
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps,  # type: ignore[arg-type]
        getattr(norm, 'weight', None), getattr(norm, 'bias', None))
    return True


class PReLU(nn.PReLU):
    """nn.PReLU with one slope a channel and a faster gradient on the CPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return prelu(x, self.weight)


class ConvNormAct(nn.Sequential):
    """Convolution without bias (padding k // 2), batch norm, and PReLU per channel where `act` is set."""

    def __init__(
            self, in_chs: int, out_chs: int, kernel_size: int | tuple[int, int] = 1, stride: int = 1, groups: int = 1,
            act: bool = True, device=None, dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        padding = kernel_size // 2 if isinstance(kernel_size, int) else 0
        self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding, groups=groups, bias=False, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)
        if act:
            self.act = PReLU(out_chs, **dd)

    def reparameterize(self) -> None:
        if hasattr(self, 'bn') and fold_norm(self.conv, self.bn):
            del self.bn


class StemConv(ConvNormAct):
    """The first convolution, which chooses the memory format of all that follows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = channels_last_on_cpu(x)
        for module in self:
            x = module(x)
        return channels_last_on_cpu(x)  # one grey channel is in both orders at once, and the convolution took NCHW


def _pixels(kernel_size: Sequence[int]) -> str:
    """Size of the images whose final map, or its rows or columns, a kernel covers."""
    return ' x '.join(str(16 * side) for side in kernel_size if side > 1) or '16'


class GDConv(ConvNormAct):
    """Linear depthwise convolution (GDConv) over whole maps, rows or columns, and batch norm.

    (B, C, H, W) -> (B, C, 1, 1) with `kernel_size` (H, W), (B, C, H, 1) with (1, W), (B, C, 1, W) with (H, 1).
    """

    def __init__(self, chs: int, kernel_size: tuple[int, int], device=None, dtype=None):
        super().__init__(chs, chs, kernel_size, groups=chs, act=False, device=device, dtype=dtype)
        self.height, self.width = kernel_size
        self.size_error = (f'the head is built for images of {_pixels(kernel_size)} pixels: resize them to it, pass '
                           'img_size to create_model, or take lfnsb, which takes any size.')

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(f'{prefix}conv.weight')
        if given is not None and given.shape[2:] != (self.height, self.width):
            raise UserError(
                f'the weights are for images of {_pixels(given.shape[2:])} pixels and the network for '
                f'{_pixels((self.height, self.width))}, but its head has a weight for each place: leave img_size out, '
                'or take lfnsb, whose weights serve images of any size.')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # It has a weight for each position: say so rather than let shapes clash further on.
        torch._assert(self.height == 1 or x.shape[-2] == self.height, self.size_error)
        torch._assert(self.width == 1 or x.shape[-1] == self.width, self.size_error)
        for module in self:
            x = module(x)
        return x


class MixConv(nn.Module):
    """Depthwise convolution whose channel groups have kernels of different sizes (MixConv), no norm, no activation."""

    def __init__(self, mix: Mix, stride: int = 1, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.stride = stride
        self.splits = list(mix.values())
        self.convs = nn.ModuleList([
            nn.Conv2d(chs, chs, kernel, stride, kernel // 2, groups=chs, bias=False, **dd)
            for kernel, chs in mix.items()
        ])
        self.as_built = str(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if depthwise_in_float32(x):
                with torch.autocast('cpu', enabled=False):
                    return self.forward(x.float()).to(x.dtype)
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
        if len(self.splits) == 1 or str(self) != self.as_built:
            return  # nothing to merge, or somebody put other convolutions in
        convs = [conv for conv in self.convs if isinstance(conv, nn.Conv2d)]
        kernel, chs = max(conv.kernel_size[0] for conv in convs), sum(self.splits)
        padded = [F.pad(conv.weight, 4 * [(kernel - conv.kernel_size[0]) // 2]) for conv in convs]
        merged = nn.Conv2d(chs, chs, kernel, self.stride, kernel // 2, groups=chs, bias=False, device='meta')
        merged.weight = nn.Parameter(torch.cat(padded), convs[0].weight.requires_grad)
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


class CoordAttn(StripGates):
    """Coordinate attention, the function and the parameter names of timm's `create_attn('coord', ..., bias=True)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        strips = strip_means(x)
        gate_h, gate_w = self.gates(strips[0], strips[1])
        return apply_gates(x, gate_h, gate_w)


class DirectionAttention(StripGates):
    """One direction-aware attention map of DDAMFN: coordinate attention with learned linear strips as pools."""

    def __init__(self, chs: int, map_size: tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(chs, max(8, chs // 32), **dd)
        self.strip_h = GDConv(chs, (1, map_size[1]), **dd)
        self.strip_w = GDConv(chs, (map_size[0], 1), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate_h, gate_w = self.gates(self.strip_h(x), self.strip_w(x))
        return gate_h * gate_w


class RepVggDw(TimmRepVggDw):
    """timm's RepVGGDW, fused to the dtype of the network."""

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        return TimmRepVggDw.fuse(copy.deepcopy(self).float()).to(self.conv1.weight.dtype)
