"""How much faster `ExpressionRecognizer.stream` goes through photographs than a loop of calls."""
from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from ..data.images import read_image, sample_picture
from ..errors import UserError
from ..predict.faces import opencv_on_one_thread
from ..predict.recognizer import ExpressionRecognizer, Face
from ..util.machine import available_cores, cpu_name
from ..util.timing import quartiles
from .process import peak_memory

WAYS = ('serial', 'loop', 'stream')


def measure_photographs(
        count: int, model: str = 'lfnsb', side: int = 1024, rounds: int = 10, progress: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Time three ways on `count` JPEG files of side x side pixels that show one face each, in turns.

    Serial: a loop of calls with one thread of torch and of OpenCV. Loop: the same with theirs as they are, which search
    a picture on several cores. Stream.

    Returns:
        Quartiles over the rounds of 'serial', 'loop' and 'stream' (milliseconds of a photograph), of the stream's
        'ratio_serial' and 'ratio_loop' round by round, and of 'serial_cpu', ... (milliseconds of all cores); 'peak_mb'
        after the first round and the last: equal where memory does not grow with the number of photographs.

    Raises:
        UserError: When the results differ.
    """
    recognize = ExpressionRecognizer(model)
    portrait = Image.fromarray(read_image(sample_picture())).resize((side, side), Image.Resampling.BICUBIC)
    rounds = min(rounds, count)
    times: dict[str, list[float]] = {name + kind: [] for name in WAYS for kind in ('', '_cpu')}
    peaks = []
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-bench') as folder:
        files = [Path(folder, f'{i}.jpg') for i in range(count)]
        for i, file in enumerate(files):  # no two alike
            Image.fromarray(np.roll(np.asarray(portrait), (i, -i), axis=(0, 1))).save(file, quality=90)
        ways: dict[str, Callable[[Sequence[Path]], list[Any]]] = {
            'serial': lambda part: _serial(recognize, part), 'loop': lambda part: [recognize(file) for file in part],
            'stream': lambda part: list(recognize.stream(part))}
        recognize(files[:2])  # what happens once, happens here
        for turn in range(rounds):
            part, results = files[turn::rounds], {}
            for name in WAYS[::-1] if turn % 2 else WAYS:
                start, cpu = time.perf_counter(), time.process_time()
                results[name] = ways[name](part)
                times[name].append(1000 * (time.perf_counter() - start) / len(part))
                times[f'{name}_cpu'].append(1000 * (time.process_time() - cpu) / len(part))
            if not all(_same(results[name], results['stream']) for name in ('serial', 'loop')):
                raise UserError('the stream gives other faces than the loop: please report this.')
            peaks.append(peak_memory())
            progress(f'round {turn + 1} of {rounds}, ms a photograph: ' + ', '.join(
                f'{name} {times[name][-1]:.0f}' for name in WAYS))
    return {
        'photographs': count, 'side': side, 'model': model, 'cpu': cpu_name(), 'cores': available_cores(),
        'torch_threads': torch.get_num_threads(), 'opencv_threads': cv2.getNumThreads(),
        'workers': recognize.workers, **{name: quartiles(values) for name, values in times.items()},
        **{f'ratio_{name}': quartiles(np.divide(times['stream'], times[name])) for name in WAYS[:2]},
        'peak_mb': [peaks[0], peaks[-1]]}


def _serial(recognize: ExpressionRecognizer, files: Sequence[Path]) -> list[list[Face]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with opencv_on_one_thread():
            return [recognize(file) for file in files]
    finally:
        torch.set_num_threads(threads)


def _same(first: list[list[Face]], second: list[list[Face]]) -> bool:
    """Whether places are equal and probabilities so up to the rounding of other batches."""
    one, two = ([face for faces in results for face in faces] for results in (first, second))
    return [len(faces) for faces in first] == [len(faces) for faces in second] and all(
        a.box == b.box and np.allclose(list(a.probabilities.values()), list(b.probabilities.values()), atol=1e-4)
        for a, b in zip(one, two, strict=True))


def format_photographs(report: dict[str, Any]) -> str:
    """A few lines of text."""
    first, last = report['peak_mb']
    lines = [
        f'{report["photographs"]} photographs of {report["side"]} px on {report["cores"]} cores of {report["cpu"]}: '
        f'{report["workers"]} workers, {report["torch_threads"]} torch threads, {report["opencv_threads"]} of OpenCV',
    ]
    for name in WAYS:
        wall, cpu = (report[key]['median'] for key in (name, f'{name}_cpu'))
        lines.append(f'{name}: {wall:.1f} ms a photograph, {cpu:.1f} ms of all cores')
    return '\n'.join([
        *lines,
        *(f'stream / {name}: {{median:.2f}} (quartiles {{q1:.2f}} - {{q3:.2f}})'.format(**report[f'ratio_{name}'])
          for name in WAYS[:2]),
        f'peak memory: {first:.0f} MB after the first round, {last:.0f} MB after the last'])
