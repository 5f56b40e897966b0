"""Where models are put, and what comes with them."""
from __future__ import annotations

import pytest
import timm
import torch

from timm_lfnsb.errors import UserError
from timm_lfnsb.models.loading import load_model, to_device
from timm_lfnsb.models.temperature import model_temperature


@pytest.mark.parametrize('cuda, mps, expected', [
    (False, False, 'cpu'), (False, True, 'mps'), (True, False, 'cuda'), (True, True, 'cuda'),
])
def test_auto_takes_what_is_there(monkeypatch, cuda, mps, expected):
    asked = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: mps)
    monkeypatch.setattr(torch.nn.Module, 'to', lambda self, device: asked.append(device) or self)
    for device in ('auto', 'cpu', 'xla:1'):
        to_device(torch.nn.Identity(), device)
    assert asked == [expected, 'cpu', 'xla:1']


def test_no_such_device():
    with pytest.raises(UserError, match="cannot use the device 'gpu'"):
        to_device(torch.nn.Identity(), 'gpu')


def test_a_model_without_a_tag_has_no_temperature(monkeypatch):
    own = torch.nn.Identity()
    own.pretrained_cfg = {'label_names': ('a', 'b')}
    monkeypatch.setattr(timm, 'create_model', lambda *args, **kwargs: own)
    assert load_model('resnet18') is own and model_temperature(own) is None
