"""Shared fixtures: the optional FER+ folder, the optional clone of timm, a tiny data set, pictures."""
from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from support import ROOT

import timm_lfnsb  # noqa: F401  (registers the models)

# Two test processes share the cores, and so do the processes they start.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'

@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def timm_scripts() -> Path:
    """A clone of timm with the scripts that its wheel leaves out."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip('set TIMM_SCRIPTS to a clone of https://github.com/huggingface/pytorch-image-models')
    return Path(folder)


@pytest.fixture(scope='session')
def ferplus_source() -> Path:
    """The folder of FER+ zips."""
    folder = Path(os.environ.get('TIMM_LFNSB_FERPLUS', ROOT.parent / 'shared' / 'data' / 'ferplus'))
    if not (folder / 'test.zip').is_file():
        pytest.skip('set TIMM_LFNSB_FERPLUS to the folder with the FER+ zips (test.zip, ...)')
    return folder


@pytest.fixture(scope='session')
def face_folder(tmp_path_factory) -> Path:
    """A tiny folder data set of two splits, four classes, six noisy images each: no real face in it."""
    from PIL import Image
    root = tmp_path_factory.mktemp('faces')
    rng = np.random.default_rng(0)
    for split in ('train', 'validation'):
        for i, label in enumerate(('anger', 'happiness', 'neutral', 'sadness')):
            folder = root / split / label
            folder.mkdir(parents=True)
            for j in range(6):
                pixels = rng.integers(0, 60, (48, 48)) + 50 * i
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{label}{j}.png')
    (root / 'class_map.txt').write_text('neutral\nhappiness\nsadness\nanger\n')
    return root


@pytest.fixture(scope='session')
def portrait() -> np.ndarray:
    """RGB (200, 240, 3) with one face, near (76, 46, 97, 97): small, so that the search is quick."""
    return np.ascontiguousarray(skimage.data.astronaut()[20:220, 100:340])


@pytest.fixture
def gradient() -> np.ndarray:
    """RGB (6, 8, 3) with another value everywhere, none of it symmetric."""
    return np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
