"""Where models are put."""
from __future__ import annotations

import pytest
import torch

from timm_lfnsb.errors import UserError
from timm_lfnsb.models.loading import to_device


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
