"""The losses on features against loops in plain NumPy."""
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from timm_lfnsb.errors import UserError
from timm_lfnsb.losses import LOSSES, create_loss

CENTERED = ('center', 'island', 'affinity', 'separate', 'dda', 'dacl')
ANGULAR = ('arcface', 'cosface', 'sphereface')
pytestmark = pytest.mark.filterwarnings('ignore:__array_wrap__ must:DeprecationWarning')  # in the library, of NumPy
NUM, CLASSES, DIM = 9, 5, 12


def cosine(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def loop_center(x, c, p):
    return sum(p[i, j] * (x[i, d] - c[j, d]) ** 2 / 2
               for i in range(len(x)) for j in range(len(c)) for d in range(x.shape[1])) / len(x)


def loop_island(x, c, p, island=10.):
    pairs = sum(cosine(c[j], c[k]) + 1 for j in range(len(c)) for k in range(len(c)) if j != k)
    return loop_center(x, c, p) + island * pairs


def loop_affinity(x, c, p):
    spread = sum(sum((c[j, d] - np.mean(c[:, d])) ** 2 for j in range(len(c))) / (len(c) - 1)
                 for d in range(x.shape[1]))
    return 2 * loop_center(x, c, p) / spread


def loop_separate(x, c, p):
    intra = inter = 0.
    for i in range(len(x)):
        for j in range(len(c)):
            intra += p[i, j] * (1 - cosine(x[i], c[j])) / len(x)
            inter += (1 - p[i, j]) * (1 + cosine(x[i], c[j])) / (len(x) * (len(c) - 1))
    return intra + inter


def loop_dda(x, c, p, center=0.01, nearest=3.):
    total = 0.
    for i in range(len(x)):
        distances = [np.sum((x[i] - c[j]) ** 2) for j in range(len(c))]
        largest = max(-d for d in distances)
        norm = largest + np.log(sum(np.exp(-d - largest) for d in distances))
        total -= sum(p[i, j] * (-distances[j] - norm) for j in range(len(c))) / (2 * len(x))
    return center * loop_center(x, c, p) + nearest * total


def loop_dacl(x, c, p, net):
    total = 0.
    for i in range(len(x)):
        hidden = net['0.weight'] @ x[i] + net['0.bias']
        hidden = (hidden - hidden.mean()) / np.sqrt(hidden.var() + 1e-5) * net['1.weight'] + net['1.bias']
        weights = 1 / (1 + np.exp(-(net['3.weight'] @ np.tanh(hidden) + net['3.bias'])))
        for j in range(len(c)):
            total += p[i, j] * sum(weights[d] * (x[i, d] - c[j, d]) ** 2 for d in range(x.shape[1])) / (2 * len(x))
    return total


def expected(loss, features, prob):
    tensors = [tensor.detach().double().numpy() for tensor in (features, loss.centers, prob)]
    name = next(name for name, entry in LOSSES.items() if entry.loss is type(loss))
    if name == 'dacl':
        return loop_dacl(*tensors, {key: t.double().numpy() for key, t in loss.attention.state_dict().items()})
    return globals()[f'loop_{name}'](*tensors)


def make(name, num=NUM, **settings):
    return create_loss(name, CLASSES, DIM, **settings), torch.randn(num, DIM), torch.randint(0, CLASSES, (num,))


@pytest.mark.parametrize('name', CENTERED)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_formula(name, dtype):
    loss, features, target = make(name)
    features = features.to(dtype)  # rounded once, here: the loss itself computes in float32
    for targets, prob in ((target, torch.eye(CLASSES)[target]), 2 * (torch.rand(NUM, CLASSES).softmax(dim=1),)):
        value = loss(features, targets)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert value.item() == pytest.approx(expected(loss, features, prob), rel=1e-5)


@pytest.mark.parametrize('name, settings', [('island', dict(island=0.5)), ('dda', dict(center=2., nearest=0.1))])
def test_settings_are_weights_of_the_terms(name, settings):
    loss, features, target = make(name, **settings)
    tensors = [x.detach().double().numpy() for x in (features, loss.centers, torch.eye(CLASSES)[target])]
    value = loss(features, target).item()
    assert value == pytest.approx(globals()[f'loop_{name}'](*tensors, **settings), rel=1e-5)


@pytest.mark.parametrize('name', CENTERED + ANGULAR)
def test_gradients_and_autocast(name):
    if name in ANGULAR:
        pytest.importorskip('pytorch_metric_learning', reason='pip install "timm-lfnsb[losses]" brings it')
    loss, features, target = make(name, **(dict(hidden=3) if name == 'dacl' else {}))
    value = loss(features, target)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(features, target), value)
        assert loss(features.half(), target).dtype == torch.float32
    loss.double()
    names, tensors = zip(*loss.named_parameters(), strict=True)

    def call(x, *parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), (x, target))

    if name in ANGULAR:  # it writes to its weights' data, which a functional call forbids
        assert torch.autograd.gradcheck(lambda x: loss(x, target), features.double().requires_grad_())
        loss(features.double(), target).backward()
        assert loss.loss.W.grad.abs().sum() > 0
    else:
        assert torch.autograd.gradcheck(
            call, (features.double().requires_grad_(), *(t.detach().clone().requires_grad_() for t in tensors)))


@pytest.mark.parametrize('name', CENTERED + ANGULAR)
@pytest.mark.parametrize('change', [
    lambda features, weights: features[:1],
    lambda features, weights: features[:1].expand(NUM, -1).clone(),
    lambda features, weights: features * 1e6,
    lambda features, weights: features.index_fill(0, torch.tensor(0), 3.25),
    lambda features, weights: features.index_fill(0, torch.tensor(0), 0),
    lambda features, weights: features + 0 * weights.flatten()[0].zero_(),
    lambda features, weights: features + 0 * weights.zero_().sum(),
], ids=['batch of one', 'all alike', 'huge', 'constant feature', 'zero feature', 'one zero', 'zero centers'])
def test_ugly_cases_stay_finite(name, change):
    if name in ANGULAR:
        pytest.importorskip('pytorch_metric_learning', reason='pip install "timm-lfnsb[losses]" brings it')
    loss, features, _ = make(name)
    weights = loss.loss.W if name in ANGULAR else loss.centers
    features = change(features, weights.data).requires_grad_()
    target = torch.zeros(len(features), dtype=torch.long)  # all other classes are empty
    value = loss(features, target)
    value.backward()
    assert value.isfinite()
    assert all(tensor.grad.isfinite().all() for tensor in (features, *loss.parameters()))


def test_an_empty_class_keeps_its_center_unless_the_loss_looks_at_all_centers():
    for name in CENTERED:
        loss, features, target = make(name)
        loss(features, target.clamp(max=CLASSES - 2)).backward()
        assert bool(loss.centers.grad[-1].any()) == (name not in ('center', 'dacl')), name


def test_where_separate_ends():
    loss, features, _ = make('separate', num=20)
    features, target = features.requires_grad_(), torch.arange(CLASSES).repeat_interleave(4)
    optimizer = torch.optim.Adam([features, *loss.parameters()], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        value = loss(features, target)
        value.backward()
        optimizer.step()
    centers = torch.nn.functional.normalize(loss.centers.detach())
    assert value.item() == pytest.approx(1 - 1 / (CLASSES - 1), abs=0.01)
    assert centers.mean(dim=0).norm() < 0.1
    assert (torch.nn.functional.normalize(features.detach()) * centers[target]).sum(dim=1).min() > 0.98


@pytest.mark.parametrize('name', CENTERED)
def test_fixed_centers_are_no_parameter(name):
    loss = make(name, learn_centers=False)[0]
    assert 'centers' in loss.state_dict() and 'centers' not in dict(loss.named_parameters())


def loop_angular(name, x, weights, target, margin, scale):
    """Cross entropy of the cosines (times the length of the feature for SphereFace), the target's made harder."""
    total = 0.
    for i in range(len(x)):
        cosines = [cosine(x[i], weights[:, j]) for j in range(weights.shape[1])]
        angle = np.arccos(cosines[target[i]])
        if name == 'arcface':
            margin_angle = np.deg2rad(margin)
            late = angle > np.pi - margin_angle  # beyond, the cosine would rise again
            hard = np.cos(angle) - margin_angle * np.sin(margin_angle) if late else np.cos(angle + margin_angle)
        elif name == 'cosface':
            hard = np.cos(angle) - margin
        else:
            k = np.floor(angle * margin / np.pi)
            hard = (-1) ** k * np.cos(margin * angle) - 2 * k
        logits = np.array(cosines)
        logits[target[i]] = hard
        logits *= scale * (np.linalg.norm(x[i]) if name == 'sphereface' else 1)
        total += (np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target[i]]) / len(x)
    return total


@pytest.mark.parametrize('name, margin, scale', [
    ('arcface', 28.6, 64), ('arcface', 60, 4), ('cosface', 0.35, 64), ('cosface', 0.1, 8), ('sphereface', 4, 1),
    ('sphereface', 2, 3)])
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_angular_margins(name, margin, scale, dtype):
    pytest.importorskip('pytorch_metric_learning', reason='pip install "timm-lfnsb[losses]" brings it')
    loss, features, target = make(name, margin=margin, scale=scale)
    features = features.to(dtype)
    value = loss(features, target)
    weights = loss.loss.W.detach().double().numpy()
    assert value.dtype == torch.float32 == loss.loss.W.dtype
    assert value.item() == pytest.approx(
        loop_angular(name, features.double().numpy(), weights, target.numpy(), margin, scale), rel=1e-4)
    for bad, message in ((torch.eye(CLASSES)[target], 'no soft targets'), (target + CLASSES, 'classes 0 to 4')):
        with pytest.raises(ValueError, match=message):
            loss(features, bad)


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pytorch_metric_learning', None)
    with pytest.raises(UserError, match=r'ArcFaceLoss cannot be made.*pip install "timm-lfnsb\[losses\]"'):
        make('arcface')


@pytest.mark.parametrize('name, settings, message', [
    ('focal', {}, 'no loss focal, choose one of cosine-harmony, center'),
    ('island', dict(margin=1), 'island has no setting margin, only island, learn_centers'),
    ('island', dict(island=-1), 'island of at least 0'), ('dda', dict(nearest=-1), 'center and nearest of at least 0'),
    ('dacl', dict(hidden=0), 'hidden of at least 1'), ('dacl', dict(hidden='wide'), 'dacl cannot be made with'),
    ('cosine-harmony', dict(variant='best'), 'reference, intended, paper, margin'),
    ('cosine-harmony', dict(variant='margin', margin=0), r'margin in \(0, 1\]')])
def test_bad_settings_are_a_clear_value_error(name, settings, message):
    with pytest.raises(ValueError, match=message):
        make(name, **settings)


@pytest.mark.parametrize('name', CENTERED)
def test_bad_input_is_a_clear_value_error(name):
    loss, features, target = make(name)
    for bad, message in (((features[:, 1:], target), r'shape \(N, 12\)'), ((features, target[1:]), r'\(N,\)'),
                         ((features, target + CLASSES), 'classes 0 to 4'), ((features, torch.rand(9, 4)), r'\(N, 5\)')):
        with pytest.raises(ValueError, match=f'{type(loss).__name__}.*{message}'):
            loss(*bad)
