"""Island loss: the center loss, and centers that turn away from each other."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from .center import CenterLoss


class IslandLoss(CenterLoss):
    """Center loss + island * sum_j sum_(k != j) (cos(c_j, c_k) + 1) over the centers c, each pair counted twice.

    Source: Cai et al. 2018, arXiv 1710.03144, with weight 0.01 and island (their lambda_1) 10. The authors released no
    code that could be compared. As in `CenterLoss`, the first term is the mean over the batch, where the paper sums.

    Args:
        island: Weight of the second term, at least 0. The others, and shapes: see `FeatureLoss`.
    """

    def __init__(self, num_classes: int, feat_dim: int, island: float = 10., learn_centers: bool = True):
        super().__init__(num_classes, feat_dim, learn_centers)
        if not island >= 0:
            raise ValueError(f'IslandLoss needs island of at least 0, got {island}.')
        self.island = island

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        directions = F.normalize(centers, eps=1e-4)
        others = 1 - torch.eye(self.num_classes, dtype=centers.dtype, device=centers.device)
        islands = (others * (directions @ directions.t() + 1)).sum()
        return super().compute(features, prob, centers) + self.island * islands
