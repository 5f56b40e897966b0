"""Times of calls that share a machine whose speed drifts."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from timeit import timeit
from typing import Any

import numpy as np


def interleave(runs: Sequence[Callable[[], Any]], seconds: float, rounds: int) -> np.ndarray:
    """Time the calls in turns, about `seconds` each; median seconds of a call (len(runs), rounds)."""
    calls = []
    for run in runs:
        start, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - start < seconds / 4:
            last = timeit(run, number=1)
            count += 1
        calls.append(max(1, math.ceil(seconds / rounds / last)))
    times = np.empty((len(runs), rounds))
    for turn in range(rounds):
        for i, run in enumerate(runs):
            run()  # caches, memory, and threads that others left spinning
            times[i, turn] = np.median([timeit(run, number=1) for _ in range(calls[i])])
    return times


def quartiles(values: Any) -> dict[str, float]:
    """Median and quartiles, with five digits."""
    low, median, high = (float(f'{value:.5g}') for value in np.percentile(values, (25, 50, 75)))
    return {'median': median, 'q1': low, 'q3': high}
