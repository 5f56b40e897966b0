"""Cosine-Harmony loss: pulls features toward the center of their class, measured by the adjusted cosine distance.

Source: `A Lightweight Model Enhancing Facial Expression Recognition with Spatial Bias and Cosine-Harmony Loss`,
https://doi.org/10.20944/preprints202408.1304.v1, equations (3) to (6).
"""
from __future__ import annotations

import torch
import torch.nn as nn

VARIANTS: tuple[str, ...] = ('reference', 'intended', 'paper')

# Length under which a centered vector counts as having no direction; keeps the gradient of a constant one bounded.
_EPS_NORM = 1e-4
# Least variance the intra-class term is divided by, for batches of (nearly) identical features.
_EPS_VAR = 1e-3


def adjusted_cosine_distance(features: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """One minus Pearson's correlation between each feature and each center.

    It does not change when a feature is scaled or shifted. A constant vector has no direction: its distance is 1.

    Args:
        features: (N, D).
        centers: (C, D).

    Returns:
        Distances (N, C) in [0, 2].
    """
    features = features - features.mean(dim=1, keepdim=True)
    centers = centers - centers.mean(dim=1, keepdim=True)
    features = features / (features.square().sum(dim=1, keepdim=True) + _EPS_NORM ** 2).sqrt()
    centers = centers / (centers.square().sum(dim=1, keepdim=True) + _EPS_NORM ** 2).sqrt()
    return 1 - features @ centers.t()


class CosineHarmonyLoss(nn.Module):
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

    The last two drive the features of all classes into one direction, which is opposite to all centers, their own too
    ('intended': the pull to it is divided by the variance, which grows meanwhile), or that of all centers ('paper').
    With 'reference' nothing drives classes together, and centers that begin nearly orthogonal keep them apart; nothing
    but the classification loss would hold learned centers apart, though.

    A batch of one has no variance: its intra-class term is not divided.

    Args:
        num_classes: Number of classes C, at least 2.
        feat_dim: Size of a feature D, at least 2.
        alpha: Balance of the two terms, in [0, 1].
        variant: One of the above.
        learn_centers: Centers are a parameter; else a buffer with the random values they start from, as in the
            authors' scripts, where the optimizer never sees them.

    Shape:
        features (N, D), any floating type (computed in float32 at least); target (N,) class indices, or (N, C)
        probabilities as mixup or label votes make them. Returns a scalar.

    Raises:
        ValueError: On settings out of range, on shapes that do not fit, on a class index out of range.
    """

    def __init__(
            self,
            num_classes: int,
            feat_dim: int,
            alpha: float = 0.1,
            variant: str = 'reference',
            learn_centers: bool = True,
    ):
        super().__init__()
        if num_classes < 2:
            raise ValueError(f'CosineHarmonyLoss needs at least 2 classes, got num_classes={num_classes}.')
        if feat_dim < 2:
            raise ValueError(f'CosineHarmonyLoss needs features of at least 2 values, got feat_dim={feat_dim}.')
        if not 0 <= alpha <= 1:
            raise ValueError(f'CosineHarmonyLoss needs alpha in [0, 1], got {alpha}.')
        if variant not in VARIANTS:
            raise ValueError(f'Unknown CosineHarmonyLoss variant {variant!r}, choose one of {", ".join(VARIANTS)}.')
        self.num_classes = num_classes
        self.feat_dim = feat_dim
        self.alpha = alpha
        self.variant = variant
        centers = torch.randn(num_classes, feat_dim)
        if learn_centers:
            self.centers = nn.Parameter(centers)
        else:
            self.register_buffer('centers', centers)

    def extra_repr(self) -> str:
        learned = isinstance(self.centers, nn.Parameter)
        return (f'num_classes={self.num_classes}, feat_dim={self.feat_dim}, alpha={self.alpha}, '
                f'variant={self.variant!r}, learn_centers={learned}')

    def _target_probabilities(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if features.ndim != 2 or features.shape[1] != self.feat_dim or features.shape[0] == 0:
            raise ValueError(
                f'CosineHarmonyLoss expects features of shape (N, {self.feat_dim}), got {tuple(features.shape)}.')
        num_samples = features.shape[0]
        if target.is_floating_point():
            if target.shape != (num_samples, self.num_classes):
                raise ValueError(
                    f'CosineHarmonyLoss expects soft targets of shape ({num_samples}, {self.num_classes}), '
                    f'got {tuple(target.shape)}.')
            return target.to(features.dtype)
        if target.shape != (num_samples,):
            raise ValueError(
                f'CosineHarmonyLoss expects {num_samples} class indices, got a target of shape {tuple(target.shape)}.')
        # Reading values would break the graph of torch.compile.
        if not torch.compiler.is_compiling():
            low, high = int(target.min()), int(target.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f'CosineHarmonyLoss has classes 0 to {self.num_classes - 1}, got labels from {low} to {high}.')
        classes = torch.arange(self.num_classes, device=target.device)
        return (target[:, None] == classes).to(features.dtype)

    def forward(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            prob = self._target_probabilities(features, target)
            distance = adjusted_cosine_distance(features, self.centers.to(features.dtype))

            intra = (prob * distance).sum(dim=1).mean()
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
