"""What is left of a network of this zoo without PReLU and the attention of its blocks: mostly convolutions.

What these take in a runtime is a floor for all forms of the network that use its convolutions in float32. They compute
something else.
"""
from __future__ import annotations

import copy

import torch
from timm.utils import reparameterize_model
from torch import nn

from ..export.lowering import LoweredBottleneck, lower_network
from ..models.layers import CoordAttn, eager_inference_on_cpu
from ..models.networks import FusedBottleneck, MixedFeatureNet, pointwise_conv


class _BareBottleneck(FusedBottleneck):
    """Convolutions and residual of a fused block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pointwise = self.pointwise_in_place if eager_inference_on_cpu(x) else pointwise_conv
        y = pointwise(x, self.expand_weight, self.expand_bias)
        y = torch.conv2d(y, self.dw_weight, None, self.stride, self.padding, 1, self.mid_chs)
        y = pointwise(y, self.project_weight, self.project_bias)
        return y.add_(x) if self.residual else y


class _NoGates(nn.Module):
    def factors(self, x: torch.Tensor) -> list[torch.Tensor]:
        return []


def bare_network(model: MixedFeatureNet) -> nn.Module:
    """For PyTorch: reparameterised, then without PReLU and attention."""
    bare = reparameterize_model(model)
    for parent in list(bare.modules()):
        for name, child in parent.named_children():
            if isinstance(child, FusedBottleneck):
                child.__class__ = _BareBottleneck
            elif isinstance(child, nn.PReLU):
                setattr(parent, name, nn.Identity())
    return bare


def bare_graph(model: MixedFeatureNet) -> nn.Module:
    """For an exported file: lowered, with channels padded to whole blocks, then without PReLU and attention."""
    graph = lower_network(model, 'openvino')
    for parent in list(graph.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.PReLU):
                setattr(parent, name, nn.Identity())
            elif isinstance(child, LoweredBottleneck):
                child.gates = _NoGates()  # type: ignore[assignment]
    return graph


def bare_training(model: MixedFeatureNet) -> nn.Module:
    """For training steps: a copy with its norms, without PReLU and attention."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, (CoordAttn, nn.PReLU)):
                setattr(parent, name, nn.Identity())
    return model
