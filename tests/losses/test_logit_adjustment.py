"""The adjusted classification loss against its formula, and what minimises it."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.loss import SoftTargetCrossEntropy

from timm_lfnsb.losses.logit_adjustment import LogitAdjustment, prior_logits


@pytest.mark.parametrize('tau', [0., 0.5, 1.])
def test_the_formula(tau):
    """Equation (10) of Menon et al. by loops: -log(exp(f_y + tau log p_y) / sum_j exp(f_j + tau log p_j))."""
    counts, logits, target = np.array([90., 9., 1.]), np.random.default_rng(0).normal(size=(5, 3)), [0, 1, 2, 1, 0]
    prior = counts / counts.sum()
    expected = np.mean([
        -np.log(np.exp(row[y]) * prior[y] ** tau / sum(np.exp(row[j]) * prior[j] ** tau for j in range(3)))
        for row, y in zip(logits, target, strict=True)])
    loss = LogitAdjustment(torch.nn.CrossEntropyLoss(), prior_logits(torch.tensor(counts), tau))
    assert loss(torch.tensor(logits), torch.tensor(target)).item() == pytest.approx(expected, rel=1e-5)
    soft = LogitAdjustment(SoftTargetCrossEntropy(), prior_logits(torch.tensor(counts), tau))
    one_hot = torch.nn.functional.one_hot(torch.tensor(target), 3).float()
    assert soft(torch.tensor(logits), one_hot).item() == pytest.approx(expected, rel=1e-5)


def test_an_empty_class_and_half_precision_stay_finite():
    adjustment = prior_logits(torch.tensor([100, 0]), 1.)
    assert adjustment.isfinite().all()
    loss = LogitAdjustment(torch.nn.CrossEntropyLoss(), adjustment)
    assert loss(torch.zeros(2, 2, dtype=torch.float16), torch.tensor([0, 1])).isfinite()
    assert not loss.state_dict()
