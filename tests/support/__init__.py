"""What the tests share: places, and the authors' outputs with the weights they were made by."""
from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
GOLDEN = TESTS / 'golden'


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
