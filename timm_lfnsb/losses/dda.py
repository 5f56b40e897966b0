"""Discriminant distribution-agnostic (DDA) loss: the center loss, and a classification by the nearest center."""
from __future__ import annotations

import torch

from .base import FeatureLoss
from .center import squared_distances


class DDALoss(FeatureLoss):
    """center * center loss + nearest * -mean_i sum_j p_ij log softmax_j(-d_ij) / 2, d the squared Euclidean distance.

    p are the targets (one-hot, or soft). The second term separates classes whatever their number of images.

    Source: Farzaneh and Qi 2020, CVPRW, doi 10.1109/CVPRW50498.2020.00211, and the authors' code
    (amirhfarzaneh/ddaloss-pytorch), where `center` is lamb, 0.01, and `nearest` is gamma, 3 in the code and 4 in its
    README. That code divides the mean of the second term by the batch size once more, so that the term all but vanishes
    in large batches; here it is divided once, as the first one is, so 3 counts for more than there. The weight of the
    whole is 1.

    Args:
        center: Weight of the first term, at least 0.
        nearest: Weight of the second term, at least 0. The others, and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, center: float = 0.01, nearest: float = 3.,
                 learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers, center_std=(2 / max(num_classes, 1)) ** 0.5)
        if not min(center, nearest) >= 0:
            raise ValueError(f'DDALoss needs center and nearest of at least 0, got {center} and {nearest}.')
        self.center = center
        self.nearest = nearest

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        distances = squared_distances(features, centers)
        terms = prob * (self.center * distances - self.nearest * (-distances).log_softmax(dim=1))
        return terms.sum(dim=1).mean() / 2
