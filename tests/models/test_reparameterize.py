"""reparameterize_model: every norm folded, the same logits; and the faster layers against plain formulas."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn as nn
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
def test_same_logits_whatever_the_mode_and_nothing_left_to_fold(name):
    model = randomised(name, img_size=64)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(x)
        for mode in (True, False):  # timm's scripts fuse before eval()
            fused = reparameterize_model(model.train(mode)).eval()
            assert relative(fused(x), expected) < 1e-5
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # a copy by default
        again = reparameterize_model(fused)
        assert again.state_dict().keys() == fused.state_dict().keys() and torch.equal(again(x), fused(x))
        assert reparameterize_model(model, inplace=True) is model and torch.equal(model(x), fused(x))
    assert not [module for module in fused.modules() if isinstance(module, NORMS)]
    # One convolution where there was a mix, and one for the RepVGGDW.
    assert not any(len(module) > 1 for module in fused.modules() if isinstance(module, nn.ModuleList))
    assert 'RepVggDw' not in repr(fused)


@pytest.mark.parametrize('name', ['lfnsb', 'ddamfn'])
def test_fused_networks_compile_trace_and_run_in_half_precision(name):
    stages = ((64, [{3: 64, 5: 32}]), (128, [{3: 96}]), (256, [{3: 128, 5: 64}, {3: 192}]))  # the real ones take long
    fused = reparameterize_model(randomised(name, stages=stages, img_size=64).eval())
    x = torch.randn(1, 3, 64, 64)
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


def test_without_head_and_as_a_feature_extractor():
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model = randomised('lfn_small', num_classes=0, global_pool='').eval()
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


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('layer', [PReLU(3), CoordAttn(3, 2)], ids=['prelu', 'attention'])
def test_first_and_second_derivatives(layer, training):
    """The second ones are for gradient penalties and optimizers that use the Hessian."""
    layer = copy.deepcopy(layer).double().train(training)
    names = [name for name, _ in layer.named_parameters()]
    parameters = [torch.randn_like(parameter, requires_grad=True) for parameter in layer.parameters()]
    x = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)

    def function(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(function, (x, *parameters))
    assert torch.autograd.gradgradcheck(function, (x, *parameters))
