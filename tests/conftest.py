"""Shared fixtures: the authors' weights made by rule, the optional FER+ folder, the optional clone of timm."""
from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import timm_lfnsb  # noqa: F401  (registers the models)

# Two test processes share the cores, and so do the processes they start.
torch.set_num_threads(1)
os.environ['OMP_NUM_THREADS'] = '1'

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / 'golden'


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


def golden_networks() -> dict[str, dict]:
    """Outputs of the authors' released code, by the name they gave the network."""
    return {entry['model']: entry for entry in json.loads((GOLDEN / 'networks.json').read_text())}


def rule_weights(keys: dict[str, list[int]], salt: int) -> dict[str, torch.Tensor]:
    """The state dict the golden outputs were made with: each tensor from its key alone."""
    state_dict = {}
    for key, shape in keys.items():
        rng = np.random.Generator(np.random.PCG64([zlib.crc32(key.encode()), salt]))
        n = rng.standard_normal(shape).astype(np.float32)
        if key.endswith('num_batches_tracked'):
            value = np.zeros((), dtype=np.int64)
        elif key.endswith('running_mean'):
            value = 0.1 * n
        elif key.endswith('running_var'):
            value = np.exp(0.2 * n)
        elif len(shape) >= 2:
            value = n / np.float32(np.sqrt(np.prod(shape[1:])))
        elif key.endswith('prelu.weight'):
            value = 0.25 + 0.05 * n
        elif key.endswith('weight'):
            value = 1 + 0.1 * n
        else:
            value = 0.1 * n
        state_dict[key] = torch.from_numpy(np.asarray(value))
    return state_dict


def rule_input(salt: int, batch: int, size: int) -> torch.Tensor:
    rng = np.random.Generator(np.random.PCG64([0, salt]))
    return torch.from_numpy(rng.standard_normal((batch, 3, size, size)).astype(np.float32))


@pytest.fixture(scope='session')
def timm_scripts() -> Path:
    """A clone of timm with the scripts that its wheel leaves out."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip('set TIMM_SCRIPTS to a clone of https://github.com/huggingface/pytorch-image-models')
    if not (Path(folder) / 'train.py').is_file():
        pytest.fail(f'TIMM_SCRIPTS={folder} has no train.py')
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
