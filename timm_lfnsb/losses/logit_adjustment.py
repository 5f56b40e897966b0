"""Training loss on logits that are adjusted by the classes' priors, so that rare classes are not crowded out."""
from __future__ import annotations

import torch
import torch.nn as nn


def prior_logits(counts: torch.Tensor, tau: float) -> torch.Tensor:
    """tau log(prior) of each class (C,), of the images (C,) that training has of it; 0 counts as 1."""
    prior = counts.double().clamp(min=1)
    return (tau * (prior / prior.sum()).log()).float()


class LogitAdjustment(nn.Module):
    """A classification loss of logits + tau log(prior): Menon et al. 2021, arXiv 2007.07314, equation (10).

    The network that minimises it answers as if all classes were equally frequent for tau 1. In use nothing is added.
    `criterion` is a loss of logits (N, C) and targets, `adjustment` (C,) is what `prior_logits` returns.
    """

    adjustment: torch.Tensor

    def __init__(self, criterion: nn.Module, adjustment: torch.Tensor):
        super().__init__()
        self.criterion = criterion
        self.register_buffer('adjustment', adjustment, persistent=False)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.criterion(logits.float() + self.adjustment, target)
