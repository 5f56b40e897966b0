"""Angular margin losses of pytorch-metric-learning on features, with class weights of their own."""
from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn as nn

from ..errors import one_sentence


class AngularMarginLoss(nn.Module):
    """A loss of pytorch-metric-learning; subclasses name it, with its own defaults.

    Args:
        num_classes: Number of classes C.
        feat_dim: Size of a feature D.
        margin: Margin between the classes: an angle in degrees (ArcFace), a cosine (CosFace), a whole factor of the
            angle (SphereFace).
        scale: Factor of the logits.

    Shape:
        features (N, D), computed in float32 at least, also under autocast; target (N,) class indices. Returns a scalar.

    Raises:
        UserError: When pytorch-metric-learning is not installed.
        ValueError: On soft targets, which it does not know, and on shapes or a class index that do not fit.
    """

    takes_soft_targets: ClassVar[bool] = False

    def __init__(self, num_classes: int, feat_dim: int, margin: float, scale: float):
        super().__init__()
        if not (margin > 0 and scale > 0):
            raise ValueError(f'margin and scale must be above 0, got {margin} and {scale}.')
        with one_sentence(f'{type(self).__name__} cannot be made'):
            from pytorch_metric_learning import losses
        self.num_classes = num_classes
        self.loss = getattr(losses, type(self).__name__)(num_classes, feat_dim, margin=margin, scale=scale)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if target.is_floating_point():
            raise ValueError(f'{type(self).__name__} takes class indices, no soft targets: leave mixup and cutmix out.')
        if not torch.compiler.is_compiling() and not ((target >= 0) & (target < self.num_classes)).all():
            raise ValueError(f'{type(self).__name__} has classes 0 to {self.num_classes - 1}, got labels from '
                             f'{target.min()} to {target.max()}.')
        with torch.autocast(features.device.type, enabled=False):
            return self.loss(features.to(torch.promote_types(features.dtype, torch.float32)), target)


class ArcFaceLoss(AngularMarginLoss):
    """ArcFace: Deng et al. 2019, arXiv 1801.07698; see `AngularMarginLoss`."""

    def __init__(self, num_classes: int, feat_dim: int, margin: float = 28.6, scale: float = 64.):
        super().__init__(num_classes, feat_dim, margin, scale)


class CosFaceLoss(AngularMarginLoss):
    """CosFace: Wang et al. 2018, arXiv 1801.09414; see `AngularMarginLoss`."""

    def __init__(self, num_classes: int, feat_dim: int, margin: float = 0.35, scale: float = 64.):
        super().__init__(num_classes, feat_dim, margin, scale)


class SphereFaceLoss(AngularMarginLoss):
    """SphereFace: Liu et al. 2017, arXiv 1704.08063; see `AngularMarginLoss`."""

    def __init__(self, num_classes: int, feat_dim: int, margin: int = 4, scale: float = 1.):
        super().__init__(num_classes, feat_dim, margin, scale)
