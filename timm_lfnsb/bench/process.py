"""What a fresh process of the benchmark does: load one model, predict, and print cold start and peak memory as JSON.

`measure` runs this file by its path: imported as a part of the package it would bring torch and timm along, which a
process that only runs an exported file does not need. Imports stay inside functions, where their time counts.
"""
from __future__ import annotations

import functools
import importlib
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_exported() -> Any:
    """`timm_lfnsb.predict.exported` in an empty package: the __init__ of the real one imports torch and timm."""
    package = types.ModuleType('timm_lfnsb')
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules[package.__name__] = package
    return importlib.import_module('timm_lfnsb.predict.exported')


def place(model: Any, images: Any, spec: dict[str, Any]) -> tuple[Any, Any]:
    """A model and images on the device of `spec`, in the memory order that suits convolutions."""
    import torch
    model = model.to(spec['device']).to(memory_format=torch.channels_last)
    return model, images.to(spec['device'], memory_format=torch.channels_last)


def predictor(model: Any, images: Any, spec: dict[str, Any]) -> Callable[[], Any]:
    """A call that predicts images in PyTorch; outputs arrive on the CPU in float32."""
    import torch
    model, images = place(model, images, spec)
    if spec['runtime'] == 'compiled':
        model.compile(dynamic=False)

    def predict() -> Any:
        with torch.inference_mode(), torch.autocast(spec['device'], torch.bfloat16, enabled=spec['amp']):
            return model(images).float().cpu()

    return predict


def peak_memory() -> float:
    """Highest resident memory of this process in MB."""
    try:
        # Not ru_maxrss: on Linux a process inherits that from the one that started it.
        lines = Path('/proc/self/status').read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e6
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def run(spec: dict[str, Any]) -> dict[str, float]:
    """Load and predict as `spec` says (see `measure.Network.spec`).

    Returns:
        Seconds from the start of the process to the first prediction, and peak memory (of a GPU, its own) after more.
    """
    predict: Callable[[], Any]
    if spec['file']:
        import numpy as np
        network = import_exported().ExportedModel(spec['file'], spec['threads'])
        predict = functools.partial(network, np.zeros(spec['shape'], spec['dtype']))
    else:
        import timm
        import torch

        import timm_lfnsb  # noqa: F401  (registers the models)
        torch.set_num_threads(spec['threads'])
        model = timm.utils.reparameterize_model(timm.create_model(**spec['create']).eval())
        predict = predictor(model, torch.zeros(spec['shape']), spec)
    predict()
    seconds = time.monotonic() - spec['started']
    for _ in range(3):
        predict()
    peak = peak_memory() if spec['device'] == 'cpu' else torch.cuda.max_memory_allocated() / 1e6
    return {'cold_start_s': seconds, 'peak_mb': peak}


if __name__ == '__main__':
    sys.path.pop(0)  # the folder of this file: its modules must not shadow others
    print(json.dumps(run(json.loads(sys.argv[1]))))
