"""Affinity loss: the center loss over the spread of the centers."""
from __future__ import annotations

import torch

from .base import FeatureLoss
from .center import squared_distances


class AffinityLoss(FeatureLoss):
    """mean_i sum_j p_ij |x_i - c_j|^2 / var for features x, centers c and targets p (one-hot, or soft).

    var is the variance of the centers over the classes, summed over the D dimensions. The loss falls when features come
    near their center, and when all centers go apart.

    Source: Wen et al. 2023 (DAN), arXiv 2109.07270, section 3.1, with weight 1. The paper sums over the batch and does
    not say which variance it means; the authors' code (yaoing/DAN) takes the mean and the unbiased variance, and so
    does this. Arguments and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers)

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        distance = (prob * squared_distances(features, centers)).sum(dim=1).mean()
        return distance / centers.var(dim=0).sum().clamp_min(1e-3)  # for centers that are (nearly) identical
