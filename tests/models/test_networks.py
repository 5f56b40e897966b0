"""The networks against the authors' numbers and against what timm promises for its own models."""
from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support import golden_networks, rule_input, rule_weights
from timm.utils import reparameterize_model

from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.models.layers import MixConv
from timm_lfnsb.models.networks import SpatialBiasHead, default_cfgs

MODELS = sorted(default_cfgs)
FIXED_SIZE = ['ddamfn', 'lfn_small', 'mfn', 'mobilefacenet']
OUR_NAMES = {'lfnsb_7': 'lfnsb', 'lfnsb_8': 'lfnsb', 'lfn': 'lfn_small', 'mfn': 'mfn', 'ddamfn_7': 'ddamfn'}


def load_golden(entry: dict, path, wrap: str = 'plain') -> torch.nn.Module:
    weights = rule_weights(entry['keys'], entry['salt'])
    num_classes = len(entry['logits'][0]) if 'logits' in entry else 0
    if wrap == 'plain':
        file = path / 'authors.safetensors'
        save_file(weights, file)
    else:
        file = path / 'authors.pth'
        if wrap == 'module.':
            weights = {f'module.{key}': value for key, value in weights.items()}
        torch.save({'state_dict' if wrap == 'module.' else wrap: weights, 'iter': 7}, file)
    return timm.create_model(
        OUR_NAMES[entry['model']], pretrained=True, num_classes=num_classes,
        pretrained_cfg_overlay=dict(file=str(file), num_classes=num_classes)).eval()


def relative_error(actual: torch.Tensor, expected: list) -> float:
    expected = torch.tensor(expected)
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_features(features: torch.Tensor, entry: dict) -> None:
    assert relative_error(features.flatten()[entry['features']['index']], entry['features']['value']) < 1e-4


@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('name', OUR_NAMES)
def test_golden_outputs(name, fused, tmp_path):
    entry = golden_networks()[name]
    model = load_golden(entry, tmp_path)
    if fused:
        reparameterize_model(model, inplace=True)
    with torch.no_grad():
        features = model.forward_features(rule_input(entry['salt'], entry['batch'], entry['input_size']))
        output = model.forward_head(features)
    if 'logits' in entry:
        assert relative_error(output, entry['logits']) < 1e-4
    else:
        assert relative_error(F.normalize(output), entry['embedding_l2']) < 1e-4
    if 'features' in entry:
        assert list(features.shape) == entry['features']['shape']
        assert_features(features, entry)


@pytest.mark.parametrize('wrap', ['model_state_dict', 'state_dict', 'module.'])
def test_wrapped_checkpoints_load_alike(wrap, tmp_path):
    entry = golden_networks()['lfnsb_7']
    model = load_golden(entry, tmp_path, wrap)
    with torch.no_grad():
        output = model(rule_input(entry['salt'], entry['batch'], entry['input_size']))
    assert relative_error(output, entry['logits']) < 1e-4


def test_incomplete_authors_checkpoint_is_refused(tmp_path):
    entry = golden_networks()['lfnsb_7']
    entry = dict(entry, keys={k: v for k, v in entry['keys'].items() if 'features.5.model.3.CA.conv2' not in k})
    with pytest.raises(RuntimeError, match=r"Missing keys: 2 \['stages\.1\.4\.attn\.conv_h"):
        load_golden(entry, tmp_path)


@pytest.mark.parametrize('source, target, drop', [
    ('lfnsb_7', 'lfnsb', 'features.5.'), ('lfn', 'lfnsb', ''), ('lfnsb_7', 'lfn_small', ''), ('mfn', 'ddamfn', '')])
def test_lenient_loading_never_leaves_random_weights(source, target, drop, tmp_path):
    """train.py --pretrained-path sets num_classes=-1, and timm then loads without complaint about missing keys."""
    entry = golden_networks()[source]
    keys = {k: v for k, v in entry['keys'].items() if not (drop and k.startswith(drop))}
    save_file(rule_weights(keys, 1), tmp_path / 'authors.safetensors')
    with pytest.raises(RuntimeError, match='another network'):
        timm.create_model(target, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(
            file=str(tmp_path / 'authors.safetensors'), num_classes=-1))


def test_fine_tuning_from_an_authors_checkpoint_takes_all_but_the_classifier(tmp_path):
    entry = golden_networks()['lfnsb_7']
    save_file(rule_weights(entry['keys'], 1), tmp_path / 'authors.safetensors')
    model = timm.create_model('lfnsb', pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'authors.safetensors'), num_classes=-1)).eval()
    assert_features(model.forward_features(rule_input(1, 2, 112)).detach(), entry)
    assert model(rule_input(1, 2, 112)).shape == (2, 5)


def test_an_embedding_network_with_a_classifier_keeps_its_norm(tmp_path):
    entry = golden_networks()['lfn']
    weights = rule_weights({**entry['keys'], 'fc.weight': [4, 256], 'fc.bias': [4]}, 1)
    save_file(weights, tmp_path / 'authors.safetensors')
    model = timm.create_model('lfn_small', pretrained=True, num_classes=4, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'authors.safetensors'), num_classes=4))
    assert torch.equal(model.head.bn.running_mean, weights['bn.running_mean'])
    assert torch.equal(model.fc.weight, weights['fc.weight'])


# design notes section 2, "Counts": without the classifier, the backbone is forward_features alone
@pytest.mark.parametrize('name, kwargs, params', [
    ('lfnsb', dict(num_classes=7), 2_676_147),
    ('lfn_small', dict(num_classes=0), 2_736_372),
    ('mfn', dict(num_classes=0), 4_164_264),
    ('mfn', dict(num_classes=0, features_only=True), 4_006_568),
    ('mobilefacenet', dict(num_classes=0, embed_dim=512), 1_200_512),
])
def test_parameter_counts(name, kwargs, params):
    model = timm.create_model(name, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('in_chans, size', [(3, (48, 48)), (3, (96, 64)), (1, (112, 112))])
def test_other_images(name, in_chans, size):
    model = timm.create_model(name, in_chans=in_chans, img_size=size).eval()
    with torch.no_grad():
        assert model(torch.randn(1, in_chans, *size)).shape == (1, model.num_classes)


def test_lfnsb_takes_any_size_without_being_told():
    model = timm.create_model('lfnsb').eval()
    for height, width in ((17, 17), (56, 112), (113, 97), (224, 224)):
        with torch.no_grad():
            assert model(torch.randn(1, 3, height, width)).shape[0] == 1
    with pytest.raises(AssertionError, match='17 px or more'):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize('name', FIXED_SIZE)
def test_another_size_than_the_head_was_built_for_is_named(name):
    with pytest.raises(AssertionError, match='pass img_size'):
        timm.create_model(name).eval()(torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize('height, width', [(2, 2), (3, 3), (4, 5), (7, 7), (10, 7)])
def test_spatial_bias_head_is_what_its_docstring_says(height, width):
    head = SpatialBiasHead(8, 16, (height, width)).eval()
    x = torch.randn(2, 8, height, width)
    with torch.no_grad():
        out = head(x).numpy()
        reduced = F.adaptive_avg_pool2d(head.reduce(x).relu(), 2).numpy()  # (2, 6, 2, 2)
        positions = torch.from_numpy(reduced.reshape(2, 6, 4))
        # entry e of the channel axis: the sum over a kernel of three entries of all positions
        windows = torch.stack([positions[:, entry:entry + 3] for entry in range(4)], dim=1)  # (2, 4, kernel, positions)
        expected = torch.einsum('bekp,qpk->beq', windows, head.conv.weight) + head.conv.bias
    np.testing.assert_allclose(out, expected.reshape(2, 16), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('tag, labels', [
    ('rafdb', EXPRESSIONS_7), ('affectnet7', EXPRESSIONS_7), ('affectnet8', EXPRESSIONS_8)])
def test_tags_without_weights(name, tag, labels):
    cfg = default_cfgs[name].cfgs[tag]
    assert cfg.label_names == labels and cfg.num_classes == len(labels)
    assert cfg.input_size == (3, 112, 112) and cfg.crop_mode == 'squash' and cfg.crop_pct == 1.0
    assert cfg.interpolation == 'bilinear' and cfg.fixed_input_size == (name in FIXED_SIZE)
    with pytest.raises(RuntimeError, match=f'{name}.{tag} has no trained weights.*lfnsb.ferplus'):
        timm.create_model(f'{name}.{tag}', pretrained=True)
    assert timm.create_model(f'{name}.{tag}', device='meta').num_classes == len(labels)


def test_depthwise_gradients_are_exact_under_autocast():
    """bfloat16 has 8 bits: gradients taken in it differ by up to 1/256."""
    torch.manual_seed(0)
    layer = MixConv({3: 4, 5: 4})
    x = torch.randn(4, 8, 20, 20).bfloat16()
    grad = torch.randn(4, 8, 20, 20).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(grad)
    reference = MixConv({3: 4, 5: 4}).double()
    reference.load_state_dict(layer.state_dict())
    expected = reference(x.double())
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=1 / 256, atol=1e-3)
    for conv, exact in zip(layer.convs, reference.convs, strict=True):
        assert conv.weight.grad.dtype == torch.float32
        torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-4, atol=1e-4)


def test_global_pool_choices():
    with pytest.raises(ValueError, match="pools with 'sb'"):
        timm.create_model('lfnsb', global_pool='max')
    with pytest.raises(ValueError, match='num_classes=0'):
        timm.create_model('lfnsb', global_pool='')
    model = timm.create_model('lfnsb', num_classes=0, global_pool='').eval()
    assert model(torch.randn(1, 3, 112, 112)).shape == (1, 256, 7, 7)
    model.reset_classifier(5)
    assert model(torch.randn(1, 3, 112, 112)).shape == (1, 5)
