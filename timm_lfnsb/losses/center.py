"""Center loss: pulls features toward the center of their class."""
from __future__ import annotations

import torch

from .base import FeatureLoss


def squared_distances(features: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Squared Euclidean distances (N, C) of features (N, D) from centers (C, D)."""
    # Not by the product of the two: that rounds away small distances of long features, and may fall below 0.
    return (features[:, None] - centers).square().sum(dim=2)


class CenterLoss(FeatureLoss):
    """mean_i sum_j p_ij |x_i - c_j|^2 / 2 for features x, centers c and targets p (one-hot, or soft).

    Source: Wen et al. 2016, doi 10.1007/978-3-319-46478-7_31, equation (2), which sums over the batch; the code of the
    authors (ydwen/caffe-face) takes the mean, and so does this. Weight 0.003 in the paper, 0.008 in the code's example.
    The centers begin small, as there. Arguments and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers, center_std=feat_dim ** -0.5)

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        return (prob * squared_distances(features, centers)).sum(dim=1).mean() / 2
