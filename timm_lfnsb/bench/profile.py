"""Where the time of one call goes, operator by operator, as the runtimes' own profilers see it.

A profiler slows what it watches, small operators more than large ones: shares are for finding out what to look at, the
benchmark's times are for quoting.
"""
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..predict.exported import openvino_core

CALLS = 5
"""Calls that a profile adds up."""

Profile = list[dict[str, Any]]
"""Entries `operator`, `calls` and `ms` of one call and `share` of all time, the longest first."""


def profile_torch(run: Callable[[], Any], device: str = 'cpu') -> Profile:
    """Profile a call of PyTorch, by the time inside of each operator (on a GPU, of each kernel)."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    if device == 'cpu':
        os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # else it reports a missing GPU as an error
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == 'cuda' else [])
    run()
    with profile(activities=activities) as profiler:
        for _ in range(CALLS):
            run()
    events = profiler.key_averages()
    if device == 'cuda':  # the operators that launched the kernels have their time as well
        return _entries(
            (event.key, event.count, event.self_device_time_total / 1000) for event in events
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
    return _entries((event.key, event.count, event.self_cpu_time_total / 1000) for event in events)


def profile_onnxruntime(path: str | Path, images: np.ndarray, threads: int) -> Profile:
    """Profile a file in ONNX Runtime, after its own optimisation of the graph."""
    import onnxruntime
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-profile') as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, 'profile'))
        session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        feed = {session.get_inputs()[0].name: images}
        for _ in range(CALLS + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    nodes = [event for event in events if event.get('cat') == 'Node' and event['name'].endswith('_kernel_time')]
    nodes = nodes[len(nodes) // (CALLS + 1):]  # without the first call
    return _entries((event['args']['op_name'], 1, event['dur'] / 1000) for event in nodes)


def profile_openvino(path: str | Path, images: np.ndarray, threads: int) -> Profile:
    """Profile a file in OpenVINO, after its own optimisation of the graph."""
    compiled = openvino_core().compile_model(path, 'CPU', {
        'PERF_COUNT': True, 'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32',
        'INFERENCE_NUM_THREADS': threads})
    request = compiled.create_infer_request()
    request.infer([images])
    nodes = []
    for _ in range(CALLS):
        request.infer([images])
        # By the kernel and not by the status, for what took no whole microsecond is not reported as executed. What was
        # fused or needs no work has no kernel.
        nodes += [
            (info.node_type, 1, info.real_time.total_seconds() * 1000)
            for info in request.profiling_info if not info.exec_type.startswith(('undef', 'unknown'))]
    return _entries(nodes)


def _entries(events: Iterable[tuple[str, int, float]]) -> Profile:
    """Add up (operator, calls, milliseconds) by operator."""
    sums: dict[str, list[float]] = {}
    for operator, calls, ms in events:
        entry = sums.setdefault(operator, [0, 0.])
        entry[0] += calls / CALLS
        entry[1] += ms / CALLS
    total = sum(ms for _, ms in sums.values()) or 1.
    return [
        {'operator': operator, 'calls': round(calls, 1), 'ms': ms, 'share': ms / total}
        for operator, (calls, ms) in sorted(sums.items(), key=lambda item: -item[1][1]) if ms > 0]
