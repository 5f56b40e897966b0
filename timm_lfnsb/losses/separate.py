"""Separate loss: features turn toward the center of their class and away from the others."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import FeatureLoss


class SeparateLoss(FeatureLoss):
    """intra + inter, from the cosine s_ij of feature i and center j, and targets p_ij (one-hot, or soft).

    * intra = mean_i sum_j p_ij (1 - s_ij)
    * inter = mean_i sum_j (1 - p_ij) (1 + s_ij) / (C - 1)

    It lies in [0, 4]. With as many images of each class its least value is 1 - 1 / (C - 1), where features lie on their
    centers and the directions of these add up to 0; so two centers may still come near each other.

    Source: Li et al. 2019, ACML, PMLR 101:897-911. Its equations and its weight were not at hand, nor is there code of
    the authors: this is what the abstract says (greatest similarity within a class, least between classes), in the
    cosines of normalised features, with weight 1. Arguments and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers)

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        # eps keeps the gradient of a feature of length 0 bounded.
        cosine = F.normalize(features, eps=1e-4) @ F.normalize(centers, eps=1e-4).t()
        intra = (prob * (1 - cosine)).sum(dim=1).mean()
        inter = ((1 - prob) * (1 + cosine)).sum(dim=1).mean() / (self.num_classes - 1)
        return intra + inter
