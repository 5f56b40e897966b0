"""Checkpoints of whole networks in networks of features, and of heads that are made for one image size."""
from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from timm_lfnsb.errors import UserError


def saved(folder, name: str, prefix: str = '', **kwargs) -> tuple[torch.nn.Module, str]:
    """A network with norms that have seen something, and its file."""
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    save_file({prefix + key: value for key, value in model.state_dict().items()}, folder / 'whole.safetensors')
    return model.eval(), str(folder / 'whole.safetensors')


@pytest.mark.parametrize('kwargs', [
    {}, dict(out_indices=(0, 2)), *(dict(feature_cls=kind) for kind in ('getter', 'dict', 'hook'))], ids=str)
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_features_only_takes_the_checkpoint_of_a_whole_network(kwargs, prefix, tmp_path):
    whole, path = saved(tmp_path, 'mobilefacenet', prefix, num_classes=5)
    features = timm.create_model('mobilefacenet', features_only=True, checkpoint_path=path, **kwargs).eval()
    images = torch.randn(1, 3, 48, 48)  # without its head it takes any size
    with torch.no_grad():
        maps = features(images)
        expected = whole.forward_intermediates(images, intermediates_only=True)
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    torch.testing.assert_close(maps, [expected[i] for i in kwargs.get('out_indices', range(4))])
    features.load_state_dict(features.state_dict())  # and its own


def test_features_only_refuses_another_network(tmp_path):
    _, path = saved(tmp_path, 'lfn_small')
    with pytest.raises(UserError, match=r'of another network. Missing keys: 38') as error:
        timm.create_model('mfn', features_only=True, checkpoint_path=path)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize('name, size, other', [
    ('mobilefacenet', 48, 64), ('lfn_small', 112, 128), ('ddamfn', (32, 48), (32, 64)), ('mfn', (64, 48), 48)])
def test_heads_of_one_size_say_which(name, size, other, tmp_path):
    model, path = saved(tmp_path, name, img_size=size, num_classes=7)
    height, width = size if isinstance(size, tuple) else (size, size)
    overlay = dict(file=path, num_classes=7)
    for source in (dict(checkpoint_path=path), dict(pretrained=True, pretrained_cfg_overlay=overlay)):
        timm.create_model(name, num_classes=7, img_size=size, **source)
        with pytest.raises(UserError, match=rf'images of (.*x )?{width} pixels .*leave img_size out, or take lfnsb'):
            timm.create_model(name, num_classes=7, img_size=other, **source)
    high, wide = other if isinstance(other, tuple) else (other, other)
    with pytest.raises(AssertionError, match=rf'built for images of (\d+ x )?({height}|{width}) pixels.*take lfnsb'):
        model(torch.zeros(1, 3, high, wide))
