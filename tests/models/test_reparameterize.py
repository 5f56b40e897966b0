"""reparameterize_model: every norm folded, the same logits; and the faster layers against plain formulas."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from support import golden_networks, rule_input, rule_weights
from timm.layers import create_attn
from timm.utils import reparameterize_model

from timm_lfnsb.models import cpu
from timm_lfnsb.models.cpu import FusedBottleneck
from timm_lfnsb.models.layers import CoordAttn, PReLU, fold_norm
from timm_lfnsb.models.networks import Bottleneck

MODELS = ['lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet']
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def randomised(name: str, **kwargs) -> nn.Module:
    """A network whose norms have statistics that matter."""
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, NORMS):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('size', [112, 64])
def test_same_logits_whatever_the_mode(name, size):
    kwargs = {} if name == 'lfnsb' else {'img_size': size}
    model = randomised(name, **kwargs)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.eval()(x)
        for mode in (True, False):  # timm's scripts fuse before eval()
            fused = reparameterize_model(copy.deepcopy(model).train(mode)).eval()
            assert relative(fused(x), expected) < 1e-5


@pytest.mark.parametrize('name', MODELS)
def test_nothing_is_left_to_fold_and_a_second_call_changes_nothing(name):
    model = randomised(name).eval()
    before = copy.deepcopy(model.state_dict())
    fused = reparameterize_model(model)
    assert not [module for module in fused.modules() if isinstance(module, NORMS)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # a copy by default
    again = reparameterize_model(fused)
    assert again.state_dict().keys() == fused.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in fused.state_dict().items())
    assert reparameterize_model(model, inplace=True) is model
    assert not [module for module in model.modules() if isinstance(module, NORMS)]
    # One convolution where there was a mix, and one for the RepVGGDW.
    assert not any(len(module) > 1 for module in fused.modules() if isinstance(module, nn.ModuleList))
    assert 'RepVggDw' not in repr(fused)


@pytest.mark.parametrize('entry, name', [
    ('lfnsb_7', 'lfnsb'), ('lfn', 'lfn_small'), ('mfn', 'mfn'), ('ddamfn_7', 'ddamfn')])
def test_golden_vectors_hold_after_folding(entry, name):
    data = golden_networks()[entry]
    classes = 7 if 'logits' in data else 0
    state = rule_weights(data['keys'], data['salt'])
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, num_classes=classes), num_classes=classes)
    fused = reparameterize_model(model.eval())
    with torch.no_grad():
        out = fused(rule_input(data['salt'], data['batch'], data['input_size']))
    expected = torch.tensor(data['logits'] if classes else data['embedding_l2'])
    torch.testing.assert_close(out if classes else F.normalize(out), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['lfnsb', 'ddamfn'])
def test_fused_networks_compile_trace_and_run_in_half_precision(name):
    fused = reparameterize_model(randomised(name).eval())
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        expected = fused(x)
        torch.testing.assert_close(torch.jit.script(fused)(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.fx.symbolic_trace(fused)(x), expected, rtol=1e-4, atol=1e-5)
        compiled = torch.compile(fused, backend='aot_eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
        half = copy.deepcopy(fused).bfloat16()
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        assert (half(x.bfloat16()).float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_large_batches_go_through_in_parts(monkeypatch):
    fused = reparameterize_model(randomised('lfnsb').eval())
    x = torch.randn(5, 3, 112, 112)
    sizes: list[int] = []
    forward = FusedBottleneck.forward
    monkeypatch.setattr(FusedBottleneck, 'forward', lambda self, x: sizes.append(len(x)) or forward(self, x))
    with torch.no_grad():
        expected = fused(x)
        assert set(sizes) == {5}
        monkeypatch.setattr(cpu, 'PART_BYTES', 600_000)  # the widest maps of an image have 1.2 MB and less
        torch.testing.assert_close(fused(x), expected)
    assert {1, 5} < set(sizes)


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('batch, size', [(0, 6), (1, 6), (3, 24)])  # no, few and many positions
def test_a_fused_block_in_place_is_the_block_and_leaves_its_input_alone(batch, size, memory_format, stride):
    block = Bottleneck(16, 16, {3: 12, 5: 8}, stride)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    block.eval()
    x = torch.randn(batch, 16, size, size + 1).to(memory_format=memory_format)
    before = x.clone()
    with torch.no_grad():
        expected = block(x)
        fused = copy.deepcopy(block).fuse()
        assert type(fused) is FusedBottleneck
        torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)  # with gradients, nothing in place
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(fused(x).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize('change, part', [
    ('attn', nn.Identity()),
    ('expand.act', nn.Identity()),
    ('expand.bn', nn.Identity()),
    ('expand.conv', None),
    ('conv_dw.convs.0', nn.Conv2d(12, 12, 3, padding=1, groups=12)),
    ('conv_dw.convs.0', nn.Conv2d(12, 12, 3, padding=1, groups=6, bias=False)),
    ('conv_dw.convs.0', nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)),
    ('conv_dw.convs.0', nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False, padding_mode='reflect')),
])
@pytest.mark.parametrize('mix', [{3: 12}, {3: 12, 5: 8}])
def test_a_block_with_a_part_of_the_users_computes_the_same(mix, change, part):
    if change == 'expand.conv':
        part = nn.Conv2d(16, sum(mix.values()), 3, padding=1, bias=False)
    block = Bottleneck(16, 16, mix).eval()
    block.set_submodule(change, part)
    x = torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(block).fuse()(x), block(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['lfnsb', 'mfn'])
def test_gradients_go_through_a_fused_network(name):
    """For saliency maps, say."""
    model = randomised(name).eval()
    x = torch.randn(2, 3, 112, 112)
    grads = []
    for network in (model, reparameterize_model(model)):
        image = x.clone().requires_grad_()
        network(image)[:, 0].sum().backward()
        grads.append(image.grad)
    assert relative(grads[1], grads[0]) < 1e-4


def test_without_classifier_and_as_a_feature_extractor():
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        for kwargs in (dict(num_classes=0), dict(num_classes=0, global_pool='')):
            model = randomised('lfn_small', **kwargs).eval()
            assert relative(reparameterize_model(model)(x), model(x)) < 1e-5
        extractor = randomised('lfnsb', features_only=True).eval()
        for fused, plain in zip(reparameterize_model(extractor)(x), extractor(x), strict=True):
            assert relative(fused, plain) < 1e-5


def test_a_norm_without_running_statistics_stays():
    conv, norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
    assert not fold_norm(conv, norm)
    assert fold_norm(conv, nn.BatchNorm2d(4))


@pytest.mark.parametrize('training', [True, False])
def test_coordinate_attention_is_timms(training):
    """Forward, gradients and running statistics of timm's own layer, which has the same keys."""
    chs, rd_chs = 48, 8
    timms = create_attn('coord', chs, rd_channels=rd_chs, bias=True)
    ours = CoordAttn(chs, rd_chs)
    nn.init.uniform_(timms.bn1.running_var, 0.5, 2)
    ours.load_state_dict(timms.state_dict())
    results = []
    for module in (timms, ours):
        torch.manual_seed(1)
        x = torch.randn(3, chs, 6, 10, requires_grad=True)
        out = module.train(training)(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in module.parameters()),
                        *(buffer.float() for buffer in module.buffers())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
def test_training_stays_in_channels_last_order(memory_format):
    """Whatever the order of the weights: products of a map and gates in another order are slow."""
    attention = CoordAttn(16, 8).train().to(memory_format=memory_format)
    strips = torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last)
    gate_h, gate_w = attention.gates(strips.mean(3, keepdim=True), strips.mean(2, keepdim=True))
    assert gate_h.shape == (2, 16, 5, 1) and gate_w.shape == (2, 16, 1, 6)
    assert gate_h.stride(1) == gate_w.stride(1) == 1


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layer', [PReLU(3), CoordAttn(3, 2)], ids=['prelu', 'attention'])
def test_second_derivatives(layer, training):
    """Of gradient penalties and of optimizers that use the Hessian; gradients computed in place would spoil them."""
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).double().train(training)
    parameters = list(layer.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)

    def gradients(x: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad(layer(x).square().sum(), [x, *parameters], create_graph=True)

    direction = torch.randn_like(x)
    penalty = sum((gradient * (i + 1)).sum() for i, gradient in enumerate(gradients(x)))
    second, = torch.autograd.grad(penalty, x)
    step = 1e-6
    high, low = (
        sum((gradient * (i + 1)).sum() for i, gradient in enumerate(gradients(x + sign * step * direction)))
        for sign in (1, -1))
    assert (second * direction).sum().item() == pytest.approx((high - low).item() / (2 * step), rel=1e-5)


def test_prelu_gradient_against_the_formula():
    act = PReLU(5)
    nn.init.normal_(act.weight)
    x = torch.randn(2, 5, 3, 4)
    x[0, 0, 0, 0] = 0.
    x.requires_grad_()
    grad = torch.randn(2, 5, 3, 4)
    act(x).backward(grad)
    slope = act.weight.detach().view(1, 5, 1, 1)
    torch.testing.assert_close(act(x), torch.where(x > 0, x, slope * x))
    torch.testing.assert_close(x.grad, torch.where(x > 0, grad, slope * grad))
    torch.testing.assert_close(act.weight.grad, (grad * x.detach().clamp(max=0)).sum((0, 2, 3)))
