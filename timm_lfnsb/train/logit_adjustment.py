"""Training loss on logits that are adjusted by the classes' priors, so that rare classes are not crowded out."""
from __future__ import annotations

import torch
import torch.nn as nn


class LogitAdjustment(nn.Module):
    """A classification loss of logits + tau log(prior): Menon et al. 2021, arXiv 2007.07314, equation (10).

    The network that minimises it answers as if all classes were equally frequent for tau 1; with smaller tau it lies
    between that and plain training. In use nothing is added: the prior is part of the training loss alone.

    Args:
        criterion: Loss of logits (N, C) and targets.
        counts: Images of each class (C,) in training; 0 counts as 1.
        tau: Strength; 0 changes nothing.
    """

    adjustment: torch.Tensor

    def __init__(self, criterion: nn.Module, counts: torch.Tensor, tau: float):
        super().__init__()
        self.criterion = criterion
        prior = counts.double().clamp(min=1)
        adjustment = tau * (prior / prior.sum()).log()
        self.register_buffer('adjustment', adjustment.float(), persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Loss (scalar) of logits (N, C) and targets (N,) or (N, C)."""
        return self.criterion(logits.float() + self.adjustment, target)
