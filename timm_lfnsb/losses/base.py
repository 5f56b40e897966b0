"""What losses on features with one center for each class share: centers, checks, soft targets, precision."""
from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn as nn


class FeatureLoss(nn.Module):
    """A loss of features and labels that owns a center for each class; subclasses write `compute`.

    The centers move along the gradient of the loss, by the optimizer of the network. The authors of the center, DDA and
    sparse center losses move theirs by an SGD of their own (rate 0.5), along the mean difference from the features of a
    batch, whatever the weight of the loss; with an optimizer such as Adam the weight does not matter here either.

    Args:
        num_classes: Number of classes C, at least 2.
        feat_dim: Size of a feature D, at least 2.
        learn_centers: Centers are a parameter; else a buffer that keeps its random values.
        center_std: Standard deviation of the normal distribution that the centers are drawn from.

    Shape:
        features (N, D), computed in float32 at least, also under autocast; target (N,) class indices, or (N, C)
        probabilities as mixup makes them. Returns a scalar.

    Raises:
        ValueError: On settings out of range, on shapes that do not fit, on a class index out of range.
    """

    takes_soft_targets: ClassVar[bool] = True
    centers: torch.Tensor

    def __init__(self, num_classes: int, feat_dim: int, learn_centers: bool = True, center_std: float = 1.):
        super().__init__()
        if min(num_classes, feat_dim) < 2:
            raise ValueError(f'{type(self).__name__} needs at least 2 classes and 2 values of a feature, got '
                             f'{num_classes} and {feat_dim}.')
        self.num_classes = num_classes
        self.feat_dim = feat_dim
        centers = center_std * torch.randn(num_classes, feat_dim)
        if learn_centers:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer('centers', centers)

    def _target_probabilities(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        soft = target.is_floating_point()
        expected = (len(features), self.num_classes) if soft else (len(features),)
        if features.shape != (max(1, len(features)), self.feat_dim) or target.shape != expected:
            raise ValueError(
                f'{type(self).__name__} expects features of shape (N, {self.feat_dim}) and targets of shape '
                f'(N,) or (N, {self.num_classes}), got {tuple(features.shape)} and {tuple(target.shape)}.')
        if soft:
            return target.to(features.dtype)
        # Reading values would break the graph of torch.compile.
        if not torch.compiler.is_compiling() and not ((target >= 0) & (target < self.num_classes)).all():
            raise ValueError(f'{type(self).__name__} has classes 0 to {self.num_classes - 1}, got labels from '
                             f'{target.min()} to {target.max()}.')
        classes = torch.arange(self.num_classes, device=target.device)
        return (target[:, None] == classes).to(features.dtype)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            prob = self._target_probabilities(features, target)
            return self.compute(features, prob, self.centers.to(features.dtype))

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """The loss (scalar) of features (N, D), target probabilities (N, C) and centers (C, D), all of one dtype."""
        raise NotImplementedError
