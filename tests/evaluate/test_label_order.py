"""The order of a classifier's outputs, found from labelled images."""
from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate.label_order import assign, find_label_order

GREYS = dict(anger=20, disgust=60, fear=100, happiness=140, neutral=180, sadness=220)
FAST = dict(workers=0, progress=False, device='cpu')


class Greys(nn.Module):
    """Knows classes by how bright an image is; `bias` goes to the logits."""

    def __init__(self, names, bias=(0,), scale=40.):
        super().__init__()
        self.num_classes = len(names)
        self.pretrained_cfg = dict(input_size=(3, 8, 8), mean=(0,) * 3, std=(1,) * 3, crop_pct=1)
        self.centers = torch.tensor([GREYS[name] / 255 for name in names])
        self.bias = nn.Parameter(torch.tensor(bias, dtype=torch.float))
        self.scale = scale

    def forward(self, images):
        return -self.scale * (images.mean((1, 2, 3))[:, None] - self.centers) ** 2 + self.bias


def make_faces(folder, counts=None, names=None, noise=3):
    rng = np.random.default_rng(0)
    for name, grey in GREYS.items():
        target = folder / (names or {}).get(name, name)
        target.mkdir(parents=True)
        for i in range((counts or {}).get(name, 12)):
            Image.fromarray(np.full((8, 8, 3), grey + rng.normal(0, noise), np.uint8)).save(target / f'{i}.png')
    return folder


@pytest.mark.parametrize('names, split, bias', [
    ('sadness happiness anger neutral fear disgust', '', [0.]),
    # Two outputs that are never the highest, as of rare classes, would tie in a matrix of counts.
    ('disgust happiness fear neutral anger sadness', 'validation', [-9., 0, -9, 0, 0, 0]),
])
def test_the_order_is_found(names, split, bias, tmp_path):
    names = tuple(names.split())
    make_faces(tmp_path / split, names={'happiness': 'Happy'})
    found = find_label_order(Greys(names, bias, scale=300.), tmp_path, **FAST)
    assert found.label_names == names and found.share > 0.99 and found.images == 72
    assert found.accuracy == pytest.approx(4 / 6 if bias[0] else 1)


@pytest.mark.parametrize('kwargs, model, reason', [
    (dict(counts={'fear': 9}), Greys(list(GREYS)), r'too few images of fear \(9\): give at least 10 of each class'),
    ({}, Greys([*GREYS, 'fear']), r'has images of 6 classes \(anger, .*\) and the checkpoint has 7 outputs: add'),
    ({}, Greys(list(GREYS)[1:]), 'has images of 6 classes .* and the checkpoint has 5 outputs: leave out'),
    (dict(names={'fear': 'Angry'}), Greys(list(GREYS)[:5]), r'folders \[Angry, anger, .*mean the same'),
    # As good as guessing: what a class looks like says nothing.
    (dict(noise=60), Greys(list(GREYS), scale=0.01), r'but only \d+ % of 1000 bootstrap samples give it, and 95 %'),
])
def test_what_tells_no_order_is_refused_in_one_sentence(kwargs, model, reason, tmp_path):
    with pytest.raises(UserError, match=reason) as caught:
        find_label_order(model, make_faces(tmp_path, **kwargs), **FAST)
    assert '. ' not in str(caught.value).replace(str(tmp_path), '')


def test_assignment_is_the_best_of_all():
    confusion = np.random.default_rng(0).normal(size=(5, 5))
    best = max(permutations(range(5)), key=lambda order: sum(confusion[i, j] for j, i in enumerate(order)))
    assert tuple(assign(confusion)) == best
