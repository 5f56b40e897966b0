"""A moving picture, predicted frame by frame: what `timm-lfnsb video` prints, draws and shows."""
from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from ..errors import UserError, one_sentence
from ..export.exported import ExportedModel, is_exported
from ..util.files import replacing
from .film import FilmWriter, Window
from .frames import open_footage
from .recognizer import ExpressionRecognizer
from .run import Kind, first_interrupt
from .timeline import FrameDrawer, Timelines
from .tracking import VideoFrame

PROBLEMS = 5  # printed; the rest is counted


def video_lines(
        source: str, model: str | ExportedModel = 'lfnsb', as_json: bool = False, annotate: Path | None = None,
        summary: Path | None = None, view: bool = False, fps: float | None = None, folder_rate: float = 25.,
        smooth: float = 0.5, patience: float = 1., **settings: Any,
) -> Generator[tuple[str, Kind], None, None]:
    """Yield CSV, a row a person and frame, or JSON, a line a frame, and hints and problems, each with what it is.

    The first Ctrl-C, a closed window, and a caller who takes no more lines end the reading: what is finished by then
    is kept, also in the files.

    Args:
        source: A file, a folder of images, or the number of a camera.
        annotate: A video file to write, as `FrameDrawer` draws it, without sound.
        summary: A picture to write, as `Timelines` draws it.
        view: Show in a window what `annotate` writes.
        model, settings: `ExpressionRecognizer`'s; the others are of its method `video`.

    Raises:
        UserError: When nothing can be predicted or shown at all.
        OSError: When a file cannot be written.
    """
    for path in filter(None, (annotate, summary)):
        if not path.parent.is_dir():
            raise UserError(f'there is no folder {path.parent}: make it first.')
    if summary:
        with one_sentence('--summary cannot draw'):
            from matplotlib.figure import Figure
        if summary.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
            raise UserError(f'--summary {summary}: give a file name that ends in .png, .svg or .pdf.')
    # Frames are searched beside each other and beside the network: more threads in each would wait for cores, busily.
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        window = Window(source) if view else None
        if window:
            stack.callback(window.close)
        try:
            if isinstance(model, str) and is_exported(model):
                model = ExportedModel(model, threads=1)
            recognizer = ExpressionRecognizer(model, **settings)
            camera = source.isdecimal() and not Path(source).exists()
            footage = open_footage(int(source) if camera else source, fps, folder_rate)
            interrupted = stack.enter_context(first_interrupt())
            frames = recognizer.video(replace(footage, frames=takewhile(
                lambda _: not interrupted.is_set() and (window is None or window.open), footage.frames,
            )), smooth=smooth, patience=patience)
        except ValueError as error:
            raise UserError(str(error)) from error
        drawer, timelines = FrameDrawer(recognizer.label_names), Timelines(
            recognizer.label_names, footage.rate)
        film = annotate and FilmWriter(stack.enter_context(replacing(annotate)), footage.rate)
        bar = stack.enter_context(tqdm(total=footage.count, unit='frame', leave=False, disable=None))
        people = done = broken = 0
        closed = False
        start, processor = time.perf_counter(), time.process_time()
        try:
            if not as_json:
                yield _row(['frame', 'time', 'track', 'x', 'y', 'width', 'height', 'expression', 'score',
                            *recognizer.label_names]), 'result'
            for frame in frames:
                bar.update()
                if frame.image is not None:
                    done += 1
                    people = max(people, *(person.track for person in frame.people), 0)
                    timelines.add(frame)
                    if film or window:
                        drawn = drawer(frame)
                        if film:
                            film.write(drawn, frame.time)
                        if window:
                            window.show(drawn)
                broken += frame.error is not None
                with tqdm.external_write_mode():
                    if frame.error and broken <= PROBLEMS:
                        yield str(frame.error), 'problem'
                    yield from ((line, 'result') for line in _lines(frame, as_json))
        except GeneratorExit:  # nobody wants more lines
            if not done:
                raise
            closed = True
        if not done:
            raise UserError(f'{source}: no frame could be read' + (
                ' before it was interrupted.' if interrupted.is_set() else '.'))
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
        if film:
            film.close()
        if summary:
            with replacing(summary) as temporary:
                timelines.figure(source).savefig(temporary)
    if closed:
        return
    if broken > PROBLEMS:
        yield f'{source}: {broken} frames or parts of it could not be read.', 'problem'
    if interrupted.is_set():
        yield f'Interrupted after {done} frames.', 'problem'
    yield (f'{done} frames in {seconds:.1f} s: {done / seconds:.1f} frames/s, {1000 * processor / done:.0f} ms of '
           f'processor time each; {people} {"person" if people == 1 else "people"}.'), 'hint'


def _lines(frame: VideoFrame, as_json: bool) -> Iterator[str]:
    if as_json:
        yield json.dumps(frame.as_dict())
        return
    for person in frame.people:
        values = (f'{value:.4f}' for value in (person.score, *person.probabilities.values()))
        yield _row([frame.index, f'{frame.time:.3f}', person.track, *person.box, person.label, *values])


def _row(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator='').writerow(cells)
    return text.getvalue()
