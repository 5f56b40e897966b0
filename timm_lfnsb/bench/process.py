"""What a fresh process of the benchmark does: load one model, predict, and report times and peak memory as JSON.

`timm_lfnsb.bench.measure` runs this file by its path: imported as a part of the package it would bring torch and timm along,
which a process that only runs an exported file does not need. Imports stay inside functions, where their time counts.
"""
from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_runtimes() -> Any:
    """The module `timm_lfnsb.predict.exported`, without the package around it."""
    spec = importlib.util.spec_from_file_location('timm_lfnsb_exported', Path(__file__).parent.parent / 'predict' / 'exported.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_memory() -> int | None:
    """Highest resident memory of this process in bytes, None where the system does not say."""
    try:
        # Not ru_maxrss: on Linux a process inherits that from the one that started it.
        with open('/proc/self/status') as file:
            fields = dict(line.split(':', 1) for line in file)
        return 1024 * int(fields['VmHWM'].split()[0])
    except (OSError, KeyError):
        try:
            import resource
        except ModuleNotFoundError:
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """Load and predict as `spec` says (see `timm_lfnsb.bench.child_spec`).

    Returns:
        Seconds until the imports were done (`import`, from the start of the process), to create the model (`create`)
        and of the first prediction (`first`); `peak_bytes` after some more.
    """
    runtime = spec['runtime']
    shape = (spec['batch'], *spec['input_size'])
    predict: Callable[[], Any]
    if runtime in ('onnxruntime', 'openvino'):
        import numpy as np
        runtimes = load_runtimes()
        __import__(runtime)
        imported = time.monotonic()
        network = runtimes.ExportedModel(spec['file'], spec['threads'])
        created = time.monotonic()
        images = np.zeros(shape, np.float32)
        if network.metadata.get('input') == 'uint8':
            images = np.zeros((shape[0], *shape[2:], shape[1]), np.uint8)

        def predict() -> Any:
            return network(images)
    else:
        import timm
        import torch

        import timm_lfnsb  # noqa: F401  (registers the models)
        imported = time.monotonic()
        torch.set_num_threads(spec['threads'])
        model = timm.create_model(spec['model'], **spec['create']).eval()
        if spec['reparameterize']:
            model = timm.utils.reparameterize_model(model)
        memory_format = getattr(torch, spec['memory_format'])
        model = model.to(spec['device']).to(memory_format=memory_format)
        if runtime == 'compiled':
            model.compile(dynamic=False)
        created = time.monotonic()
        batch = torch.zeros(shape).to(spec['device'], memory_format=memory_format)

        def predict() -> Any:
            with torch.inference_mode(), torch.autocast(batch.device.type, torch.bfloat16, enabled=spec['amp']):
                return model(batch).cpu()
    predict()
    first = time.monotonic()
    result = {'import': imported - spec['started'], 'create': created - imported, 'first': first - created}
    for _ in range(3):
        predict()
    result['peak_bytes'] = peak_memory()
    if spec['device'] != 'cpu':
        result['gpu_peak_bytes'] = torch.cuda.max_memory_allocated()
    return result


if __name__ == '__main__':
    # The folder of this file is on the path in place of the current one: its modules must not shadow others.
    sys.path.pop(0)
    print(json.dumps(run(json.loads(sys.argv[1]))))
