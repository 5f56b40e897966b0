"""Models run by ONNX Runtime, each exported once into a folder of caches, where that is wanted or faster."""
from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from timeit import timeit
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import nn

from ..errors import one_sentence
from ..models.input_config import input_config
from ..models.temperature import model_temperature
from ..util.files import read_json, write_json
from ..util.machine import cpu_name
from ..version import __version__
from .export import export_model
from .exported import ExportedModel

# Largest difference of a cached file, as a fraction of the largest output; half precision stays below.
TOLERANCE = 2e-2


def cache_folder() -> Path:
    """The folder that `TIMM_LFNSB_CACHE` names, else `timm_lfnsb` among the user's caches."""
    caches = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache')
    return Path(os.environ.get('TIMM_LFNSB_CACHE') or caches / 'timm_lfnsb').expanduser().absolute()


def in_onnxruntime(model: nn.Module) -> ExportedModel:
    """Export a model, unless that was done before, and open the file with as many threads as torch has.

    What was cached is compared with the model, and made again where it is damaged.

    Args:
        model: A timm model in eval mode on the CPU; it is left alone.

    Raises:
        UserError: When a package is missing, the model cannot be exported, or the folder cannot be written.
    """
    folder = cache_folder()
    with one_sentence(f'ONNX Runtime cannot run the model from the cache folder {folder}'):
        import onnxruntime
        file = folder / f'{_fingerprint(model, onnxruntime.__version__)}.onnx'
        if network := _open(file, model):
            return network
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix('.lock')):
            network = _open(file, model)  # by now another process may have made it
            if network is None:
                export_model(model, file, batch=None)
                network = ExportedModel(file, torch.get_num_threads())
    return network


def in_faster_runtime(model: nn.Module, batch_size: int) -> nn.Module | ExportedModel:
    """`in_onnxruntime` where that is faster than the model, which is given back where it is not, or anything fails.

    They are timed in turns with batches of `batch_size`, for about a second. The result stays beside the file, and
    holds for this kind of processor, number of threads and release of torch.
    """
    try:
        network = in_onnxruntime(model)
        notes = network.path.with_suffix('.json')
        case = f'{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {batch_size}'
        try:
            known = read_json(notes)
        except (OSError, ValueError):
            known = {}
        if case not in known:
            known[case] = measure(model, network, batch_size)
            write_json(notes, known)
        return network if known[case]['onnxruntime'] < known[case]['torch'] else model
    except Exception:  # whatever is wrong with another runtime, torch is there
        return model


def measure(model: nn.Module, network: ExportedModel, batch_size: int) -> dict[str, float]:
    """Least seconds that a batch takes in each of the two runtimes."""
    # Not `interleave`: where other processes have the cores, its seven calls of torch can take a minute.
    calls, best, start = _calls(model, network, batch_size), [math.inf] * 2, time.perf_counter()
    with torch.inference_mode():
        while math.inf in best or time.perf_counter() - start < 0.6:
            best = [min(least, timeit(call, number=1)) for least, call in zip(best, calls, strict=True)]
    return dict(zip(('torch', 'onnxruntime'), best, strict=True))


def _fingerprint(model: Any, runtime: str) -> str:
    """SHA-256 of what the file depends on: weights, what its metadata say, and releases."""
    said = input_config(model), model.pretrained_cfg.get('label_names'), model_temperature(model)
    digest = hashlib.sha256(repr((type(model).__name__, said, __version__, torch.__version__, runtime)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {tensor.shape}'.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _open(file: Path, model: nn.Module) -> ExportedModel | None:
    """A cached file, None where it is not there, cannot be run or gives other outputs than the model."""
    try:
        network = ExportedModel(file, torch.get_num_threads())
        with torch.inference_mode():
            expected, outputs = (call() for call in _calls(model, network, 2))
        difference = np.abs(outputs - expected).max() / np.abs(expected).max()
        return network if difference < TOLERANCE else None
    except Exception:  # a damaged file can fail anywhere; what else is wrong shows when it is made again
        return None


def _calls(
        model: nn.Module, network: ExportedModel, count: int,
) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """The model and its file on the same noise."""
    images = np.random.default_rng(0).standard_normal((count, *input_config(model)['input_size']), np.float32)
    tensor = torch.from_numpy(images).to(next(model.parameters()))
    return lambda: model(tensor).float().numpy(), lambda: network(images)
