"""The Cosine-Harmony loss against loops in plain NumPy and against the authors' numbers."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import GOLDEN

from timm_lfnsb import CosineHarmonyLoss
from timm_lfnsb.losses.cosine_harmony import VARIANTS


def loop_loss(features, centers, prob, alpha, variant):
    """Equations (3) to (6) of the paper, sample by sample, with NumPy's own correlation."""
    features, centers, prob = (np.asarray(x, dtype=np.float64) for x in (features, centers, prob))
    num, classes = prob.shape
    if variant == 'margin':
        return loop_margin(features, centers, prob, alpha)
    intra = inter = 0.
    for i in range(num):
        for j in range(classes):
            distance = 1 - np.corrcoef(features[i], centers[j])[0, 1]
            intra += prob[i, j] * distance / num
            inter += (1 - prob[i, j]) * distance / (num * (classes - 1))
    var = sum(np.var(features[:, d], ddof=1 if variant == 'reference' else 0) for d in range(features.shape[1]))
    if variant == 'reference':
        return alpha * intra / var + (1 - alpha) * intra / (classes - 1)
    if variant == 'paper':
        return alpha * intra / var + (1 - alpha) * inter
    return alpha * intra / var + (1 - alpha) * (2 - inter)


def loop_margin(features, centers, prob, alpha, margin=0.5):
    """Our variant: the own center near, the nearest wrong one farther by the margin, centers apart."""
    num, classes = prob.shape
    intra = missed = alike = 0.
    for i in range(num):
        distances = [1 - np.corrcoef(features[i], center)[0, 1] for center in centers]
        for j in range(classes):
            nearest = min(distances[k] for k in range(classes) if k != j)
            intra += prob[i, j] * distances[j] / num
            missed += prob[i, j] * max(0., margin + distances[j] - nearest) / num
    for j in range(classes):
        for k in range(j):
            alike += max(0., np.corrcoef(centers[j], centers[k])[0, 1]) / (classes * (classes - 1) / 2)
    return alpha * intra + (1 - alpha) * (missed + alike)


def make(num=9, classes=5, dim=12, **kwargs):
    loss = CosineHarmonyLoss(classes, dim, **kwargs)
    return loss, torch.randn(num, dim), torch.randint(0, classes, (num,))


@pytest.mark.parametrize('entry', json.loads((GOLDEN / 'losses.json').read_text()), ids=lambda e: f"n{e['batch']}")
def test_golden_losses(entry):
    classes, dim, num = entry['num_classes'], entry['feat_dim'], entry['batch']
    rng = np.random.Generator(np.random.PCG64([classes * 1000 + num, 1]))
    centers = rng.standard_normal((classes, dim)).astype(np.float32)
    features = rng.standard_normal((num, dim, 7, 7)).astype(np.float32).mean(axis=(2, 3))
    labels = rng.integers(0, classes, num)
    assert labels.tolist() == entry['labels']
    loss = CosineHarmonyLoss(classes, dim, alpha=entry['alpha'], variant='reference')
    loss.centers.data = torch.from_numpy(centers)
    value = loss(torch.from_numpy(features), torch.from_numpy(labels)).item()
    assert value == pytest.approx(entry['loss'], rel=1e-4)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('alpha', [0., 0.1, 0.7, 1.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_formula(variant, alpha, dtype):
    loss, features, target = make(alpha=alpha, variant=variant)
    features = features.to(dtype)  # rounded once, here: the loss itself computes in float32
    for targets, prob in ((target, torch.eye(5)[target]), 2 * (torch.rand(9, 5).softmax(dim=1),)):  # soft ones, too
        expected = loop_loss(features.double(), loss.centers.detach(), prob, alpha, variant)
        value = loss(features, targets)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('variant', VARIANTS)
def test_gradients_and_autocast(variant):
    loss, features, target = make(variant=variant)
    expected = loss(features, target)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(features, target), expected)
        assert loss(features.bfloat16(), target).dtype == torch.float32
    loss.double()
    assert torch.autograd.gradcheck(lambda x, c: torch.func.functional_call(loss, {'centers': c}, (x, target)), (
        features.double().requires_grad_(), loss.centers.detach().clone().requires_grad_()))


def test_where_each_variant_ends():
    """Features free to move, with learned centers: 'margin' alone keeps all apart, and 'intended' has no floor."""
    own, within, between, nearest, values = {}, {}, {}, {}, {}
    target = torch.arange(5).repeat_interleave(8)
    same = target[:, None] == target
    for variant in VARIANTS:
        torch.manual_seed(0)
        loss = CosineHarmonyLoss(5, 32, variant=variant)
        features = torch.randn(40, 32, requires_grad=True)
        optimizer = torch.optim.Adam([features, *loss.parameters()], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            values[variant] = loss(features, target)
            values[variant].backward()
            optimizer.step()
        correlations = np.corrcoef(features.detach().numpy(), loss.centers.detach().numpy())
        own[variant] = correlations[range(40), 40 + target.numpy()].mean()
        within[variant] = correlations[:40, :40][same.numpy()].mean()
        between[variant] = correlations[:40, :40][~same.numpy()].mean()
        nearest[variant] = (correlations[:40, 40:] - 9 * np.eye(5)[target.numpy()]).max()  # of the wrong centers
    assert within['reference'] > 0.99 and own['reference'] > 0.99 and between['reference'] < 0.1
    assert between['intended'] > 0.99 and own['intended'] < -0.99  # one direction, opposite to all centers
    assert between['paper'] > 0.99 and own['paper'] > 0.99  # one direction for all
    assert own['margin'] > 0.95 and within['margin'] > 0.95 and between['margin'] < 0.1
    assert nearest['margin'] < 0.1 < nearest['reference']  # no feature has a correlation with any wrong center
    assert 0 <= values['margin'] < 0.01


@pytest.mark.parametrize('learn_centers', [True, False])
def test_the_margin_variant_undoes_a_collapse(learn_centers):
    """From features of one direction, and centers of nearly one, it finds the way apart; it never falls below 0."""
    loss, _, target = make(num=40, dim=32, variant='margin', learn_centers=learn_centers)
    if learn_centers:
        loss.centers.data = loss.centers.data[:1] + 0.01 * loss.centers.data
    features = (torch.randn(1, 32) + 0.01 * torch.randn(40, 32)).requires_grad_()
    optimizer = torch.optim.Adam([features, *loss.parameters()], lr=0.1)
    values = []
    for _ in range(300):
        optimizer.zero_grad()
        value = loss(features, target)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert min(values) >= 0 and values[-1] < 0.2 < values[0]
    correlations = np.corrcoef(features.detach().numpy(), loss.centers.detach().numpy())[:40, 40:]
    assert (correlations.argmax(axis=1) == target.numpy()).all()


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('change', [
    lambda features, centers: features[:1],
    lambda features, centers: features[:1].expand(9, -1).clone(),
    lambda features, centers: features * 1e15,
    lambda features, centers: features.index_fill(0, torch.tensor(0), 3.25),
    lambda features, centers: features.index_fill(0, torch.tensor(0), 0),
    lambda features, centers: features + 0 * centers[0].zero_(),
], ids=['batch of one', 'all alike', 'huge', 'constant feature', 'zero feature', 'zero center'])
def test_ugly_cases_stay_finite(variant, change):
    loss, features, target = make(variant=variant)
    features = change(features, loss.centers.data)
    target = target[:len(features)]
    features.requires_grad_()
    value = loss(features, target)
    value.backward()
    assert value.isfinite()
    assert features.grad.isfinite().all() and loss.centers.grad.isfinite().all()


@pytest.mark.parametrize('features, target, message', [
    ((9, 12), torch.full((9,), 5), 'classes 0 to 4, got labels from 5 to 5'),
    ((9, 12), torch.full((9,), -1), 'classes 0 to 4'),
    ((9, 11), torch.zeros(9, dtype=torch.long), r'shape \(N, 12\) .* got \(9, 11\)'),
    ((9, 12, 7, 7), torch.zeros(9, dtype=torch.long), r'shape \(N, 12\)'),
    ((0, 12), torch.zeros(0, dtype=torch.long), r'shape \(N, 12\)'),
    ((9, 12), torch.zeros(8, dtype=torch.long), r'\(N,\)'),
    ((9, 12), torch.zeros(9, 4), r'\(N, 5\), got \(9, 12\) and \(9, 4\)'),
    ((9, 12), torch.zeros(9), r'\(N, 5\)'),
])
def test_bad_input_is_a_clear_value_error(features, target, message):
    loss = CosineHarmonyLoss(5, 12)
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(features), target)


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_classes=1), 'at least 2 classes'), (dict(feat_dim=1), '2 values of a feature'),
    (dict(alpha=1.5), r'alpha in \[0, 1\]'), (dict(variant='best'), "variant 'best'.*reference, intended, paper")])
def test_bad_settings_are_a_clear_value_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CosineHarmonyLoss(**{'num_classes': 3, 'feat_dim': 4, **kwargs})
