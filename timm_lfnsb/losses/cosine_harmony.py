"""Cosine-Harmony loss: pulls features toward the center of their class, measured by the adjusted cosine distance.

Source: `A Lightweight Model Enhancing Facial Expression Recognition with Spatial Bias and Cosine-Harmony Loss`,
https://doi.org/10.20944/preprints202408.1304.v1, equations (3) to (6).
"""
from __future__ import annotations

import torch

from .base import FeatureLoss

VARIANTS: tuple[str, ...] = ('reference', 'intended', 'paper', 'margin')

# Length under which a centered vector counts as having no direction; keeps the gradient of a constant one bounded.
_EPS_NORM = 1e-4
# Least variance the intra-class term is divided by, for batches of (nearly) identical features.
_EPS_VAR = 1e-3


def adjusted_cosine_distance(features: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """One minus Pearson's correlation between each feature and each center.

    It does not change when a feature is scaled or shifted. A constant vector has no direction: its distance is 1.

    Returns:
        Distances (N, C) in [0, 2] of features (N, D) from centers (C, D).
    """
    def direction(vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors - vectors.mean(dim=1, keepdim=True)
        return vectors / (vectors.square().sum(dim=1, keepdim=True) + _EPS_NORM ** 2).sqrt()

    return 1 - direction(features) @ direction(centers).t()


class CosineHarmonyLoss(FeatureLoss):
    r"""Cosine-Harmony loss over class centers.

    With the adjusted cosine distance d_ij between feature i and center j, and targets p_ij (one-hot, or soft):

    * intra = mean_i sum_j p_ij d_ij (equation 3)
    * inter = mean_i sum_j (1 - p_ij) d_ij / (C - 1) (equation 4)
    * var = variance over the batch, summed over the D dimensions (equation 5)

    Variants:

    * ``'reference'`` (default): alpha * intra / var + (1 - alpha) * intra / (C - 1). What the authors' released code
      computes: each feature is pulled to its own center, no term separates the classes. var is unbiased.
    * ``'intended'``: alpha * intra / var + (1 - alpha) * (2 - inter). What the paper says the loss is for: features
      near their own center and far from the others. var is biased.
    * ``'paper'``: alpha * intra / var + (1 - alpha) * inter. Equation (6) as printed; minimising it pulls features
      toward wrong centers. var is biased.
    * ``'margin'``: alpha * intra + (1 - alpha) * (missed + alike). Ours: what the paper wants and its formulas do not
      do. missed = mean_i sum_j p_ij max(0, margin + d_ij - min_(k != j) d_ik) is 0 once each feature is nearer to its
      own center than to the nearest wrong one by the margin; alike = mean over pairs of centers of max(0, correlation)
      is 0 once no two centers point the same way. Least value 0, where features lie on centers without correlation.

    'intended' and 'paper' drive the features of all classes into one direction: opposite to all centers ('intended':
    the pull to a feature's own is divided by the variance, which grows meanwhile), or that of all centers ('paper').
    With 'reference' only the classification loss holds learned centers apart. In a batch of one intra is not divided.

    Args:
        num_classes: Number of classes C, at least 2.
        feat_dim: Size of a feature D, at least 2.
        alpha: Balance of the two terms, in [0, 1].
        variant: One of the above.
        learn_centers: Centers are a parameter; else a buffer that keeps its random values, as in the authors' scripts.
        margin: Of variant 'margin', in (0, 1].

    Shape:
        features (N, D), computed in float32 at least; target (N,) class indices, or (N, C) probabilities as mixup makes
        them. Returns a scalar.

    Raises:
        ValueError: On settings out of range, on shapes that do not fit, on a class index out of range.
    """

    def __init__(
            self, num_classes: int, feat_dim: int, alpha: float = 0.1, variant: str = 'reference',
            learn_centers: bool = True, margin: float = 0.5):
        super().__init__(num_classes, feat_dim, learn_centers)
        if not 0 <= alpha <= 1:
            raise ValueError(f'CosineHarmonyLoss needs alpha in [0, 1], got {alpha}.')
        if variant not in VARIANTS:
            raise ValueError(f'Unknown CosineHarmonyLoss variant {variant!r}, choose one of {", ".join(VARIANTS)}.')
        if not 0 < margin <= 1:
            raise ValueError(f'CosineHarmonyLoss needs margin in (0, 1], got {margin}.')
        self.alpha = alpha
        self.variant = variant
        self.margin = margin

    def compute(self, features: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        distance = adjusted_cosine_distance(features, centers)
        intra = (prob * distance).sum(dim=1).mean()
        if self.variant == 'margin':
            return self.alpha * intra + (1 - self.alpha) * self._margin_terms(distance, prob, centers)
        compactness = intra
        if features.shape[0] > 1:
            var = features.var(dim=0, unbiased=self.variant == 'reference').sum()
            compactness = intra / var.clamp_min(_EPS_VAR)

        if self.variant == 'reference':
            separation = intra / (self.num_classes - 1)
        else:
            inter = ((1 - prob) * distance).sum(dim=1).mean() / (self.num_classes - 1)
            separation = inter if self.variant == 'paper' else 2 - inter
        return self.alpha * compactness + (1 - self.alpha) * separation

    def _margin_terms(self, distance: torch.Tensor, prob: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
        """How far features miss the margin to the nearest wrong center, and how far centers point the same way."""
        own = torch.eye(self.num_classes, dtype=torch.bool, device=distance.device)
        # (N, C): for each class as the right one, the nearest of the others
        nearest = distance[:, None].expand(-1, self.num_classes, -1).masked_fill(own, torch.inf).amin(dim=2)
        missed = (prob * (self.margin + distance - nearest).relu()).sum(dim=1).mean()
        alike = (1 - adjusted_cosine_distance(centers, centers)).relu().masked_fill(own, 0)
        return missed + alike.sum() / (self.num_classes * (self.num_classes - 1))
