"""Functions as models: they name the expressions of `face_folder` by how bright a picture is."""
from __future__ import annotations

import sys

import pytest

PEERS = '''
import numpy as np
import torch

threads = set()

def make(names, moody=0, first=0):
    def classify(faces):
        assert isinstance(faces, list) and all(face.dtype == np.uint8 and face.shape == (48, 48, 3) for face in faces)
        threads.add(torch.get_num_threads())
        levels = np.array([face.mean() + moody * (face[0, 0, 0] % 2) for face in faces])[:, None]
        scores = np.exp(-abs(levels - (np.arange(len(names)) + first) * 50 - 30) / 20)
        return scores / scores.sum(axis=1, keepdims=True)
    classify.label_names = names
    return classify

right = make(['angry', 'happy', 'Neutral', 'sad'])
moody = make(['anger', 'happiness', 'neutral', 'sadness'], 40)
more = make(['angry', 'happy', 'Neutral', 'sad', 'Contempt'], 60)
fewer = make(['happy', 'Neutral', 'sad'], first=1)
foreign = make(['LABEL_0', 'LABEL_1'])
twice = make(['anger', 'Angry'])
nameless = lambda faces: faces
left = lambda faces: [[face[:, :24].mean() / 255, 1 - face[:, :24].mean() / 255, 0, 0] for face in faces]
short = lambda faces: [[1.0]] * len(faces)
negative = lambda faces: [[2.0, -1.0, 0.0, 0.0]] * len(faces)
infinite = lambda faces: [[float('nan')] * 4] * len(faces)
failing = lambda faces: 1 / 0
for function in (left, short, negative, infinite, failing):
    function.label_names = right.label_names
'''


@pytest.fixture
def peers(tmp_path, monkeypatch):
    """The module `peers` in the working directory, freshly imported."""
    (tmp_path / 'peers.py').write_text(PEERS)
    (tmp_path / 'quits.py').write_text('raise SystemExit(3)')
    (tmp_path / 'needs.py').write_text('import no_such_module')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', sys.path[:])
    yield
    sys.modules.pop('peers', None)
