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
    """`timm_lfnsb.export.exported` in an empty package: the __init__ of the real one imports torch and timm."""
    package = types.ModuleType('timm_lfnsb')
    package.__path__ = [str(Path(__file__).parents[1])]
    sys.modules[package.__name__] = package
    return importlib.import_module('timm_lfnsb.export.exported')


def predictor(model: Any, images: Any, compiled: bool) -> Callable[[], Any]:
    """A call that predicts images in PyTorch."""
    import torch
    images, model = images.to(memory_format=torch.channels_last), model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile(dynamic=False)
    return torch.inference_mode()(functools.partial(model, images))


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
    """Load and predict as `spec` (see `measure.Network.spec`) says: seconds from the start, peak memory in MB."""
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
        predict = predictor(model, torch.zeros(spec['shape']), spec['runtime'] == 'compiled')
    predict()
    return {'cold_start_s': time.monotonic() - spec['started'], 'peak_mb': peak_memory()}


if __name__ == '__main__':
    sys.path.pop(0)  # the folder of this file: its modules must not shadow others
    print(json.dumps(run(json.loads(sys.argv[1]))))
