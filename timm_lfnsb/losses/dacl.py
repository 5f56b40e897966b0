"""Sparse center loss of DACL (deep attentive center loss): the center loss on the dimensions that matter."""
from __future__ import annotations

import torch
import torch.nn as nn

from .base import FeatureLoss


class SparseCenterLoss(FeatureLoss):
    """mean_i sum_j p_ij sum_d a_id (x_id - c_jd)^2 / 2 for features x, centers c and targets p (one-hot, or soft).

    The weights a in (0, 1) come from a small network on the features that is trained with them. Nothing in the formula
    keeps the weights from falling to 0; its small weight beside the classification loss does.

    Source: Farzaneh and Qi 2021, WACV, and the authors' code (amirhfarzaneh/dacl): weight 0.01. Their attention sees
    the map before it is averaged (25,088 values, through layers of 3,584, 512 and 64, with batch norm); this one sees
    the features, through one layer of `hidden`, with layer norm, which can do with a batch of one. Their softmax over
    two values is a sigmoid of their difference, as here.

    Args:
        hidden: Width of the attention network. The others, and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, hidden: int = 64, learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers, center_std=(2 / max(num_classes, 1)) ** 0.5)
        if hidden < 1:
            raise ValueError(f'SparseCenterLoss needs hidden of at least 1, got {hidden}.')
        self.attention = nn.Sequential(
            nn.Linear(feat_dim, hidden), nn.LayerNorm(hidden), nn.Tanh(), nn.Linear(hidden, feat_dim), nn.Sigmoid())

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        attention = self.attention(features.to(self.centers.dtype)).to(features.dtype)
        distances = (attention[:, None] * (features[:, None] - centers).square()).sum(dim=2)
        return (prob * distances).sum(dim=1).mean() / 2
