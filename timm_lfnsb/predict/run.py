"""Images and folders of images, predicted one after the other: what `timm-lfnsb predict` prints."""
from __future__ import annotations

import json
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from click import format_filename
from PIL import Image
from tqdm import tqdm

from ..data.images import ImageError, find_images
from ..errors import UserError
from ..labels import UNSURE
from ..util.files import replacing
from .annotate import annotation_paths, draw_faces
from .recognizer import ExpressionRecognizer, Face

Kind: TypeAlias = Literal['result', 'hint', 'problem']

PLAIN = ('no temperature comes with these weights, so the scores that --unsure looks at are plain softmax, which may '
         'be too sure or not sure enough.')
HINT = ('where an image is a crop of a face already, --detector none takes it whole; --min-score 0.5 also finds faint '
        'faces, and a larger or brighter picture shows more of them.')


def predict_lines(
        inputs: Sequence[Path], as_json: bool = False, annotate: Path | None = None, **settings: Any,
) -> Iterator[tuple[str, Kind]]:
    """Yield the lines of a table, or of one JSON object an image, and hints and problems, each with what it is.

    The first Ctrl-C ends the reading of images; those that were read are still finished.

    Pictures with the faces drawn in go into the folder `annotate`; `settings` are `ExpressionRecognizer`'s.

    Raises:
        UserError: When nothing can be predicted at all.
        OSError: When a picture cannot be written.
    """
    if annotate and any(path.is_dir() and path.resolve() == annotate.resolve() for path in inputs):
        raise UserError('--annotate needs another folder than the one the images are in.')
    found, problems = [], []
    for path in inputs:
        try:
            found += find_images(path, skip=annotate)
        except UserError as error:
            problems.append(str(error))
    if not found:
        raise UserError(' '.join(problems))
    try:
        recognizer = ExpressionRecognizer(**settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    if annotate:
        annotate.mkdir(parents=True, exist_ok=True)  # before the work, if it fails
    warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # large pictures are wanted here
    targets = annotation_paths(found, annotate) if annotate else []
    yield from ((problem, 'problem') for problem in problems)
    if recognizer.unsure and recognizer.temperature is None and settings.get('calibration', True):
        yield PLAIN, 'hint'

    names = [_one_line(format_filename(path)) for path, _ in found]
    width, label_width = max(map(len, ('image', *names))), max(map(len, ('expression', *recognizer.label_names)))
    table = f'{{:{width}}}  {{:4}}  {{:19}}  {{:{label_width}}}  {{:5}}  {{}}'
    if not as_json:
        yield table.format('image', 'face', 'box', 'expression', 'score', 'runner-up'), 'result'
    # Progress on a terminal only, and not for a few single images.
    bar = tqdm(found, unit='image', leave=False, disable=None if len(found) > 10 else True)
    done = without = 0
    with first_interrupt() as interrupted:
        paths = takewhile(lambda _: not interrupted.is_set(), (path for path, _ in bar))
        for done, faces in enumerate(recognizer.stream(paths), 1):
            path = found[done - 1][0]
            with tqdm.external_write_mode():
                if isinstance(faces, ImageError):
                    yield _one_line(str(faces)), 'problem'
                    if as_json:
                        yield json.dumps({'image': str(path), 'error': str(faces)}), 'result'
                    continue
                without += not faces
                if as_json:
                    result = {'image': str(path), 'faces': [face.as_dict() for face in faces]}
                    yield json.dumps(result if faces else {**result, 'hint': f'no face found: {HINT}'}), 'result'
                else:
                    yield from ((table.format(names[done - 1], *cells).rstrip(), 'result') for cells in _cells(faces))
            if annotate:
                target = targets[done - 1]
                target.parent.mkdir(parents=True, exist_ok=True)
                with replacing(target) as temporary:
                    draw_faces(path, faces).save(temporary)
    if without and not as_json:
        yield f'No face found in {without} of {done} image(s): {HINT}', 'hint'
    if interrupted.is_set():
        yield f'Interrupted after {done} of {len(found)} images.', 'problem'


@contextmanager
def first_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one interrupts as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: Any) -> None:
        signal.signal(number, previous)
        event.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)


def _one_line(text: str) -> str:
    """Text with line breaks and the like as escape sequences."""
    return ''.join(char if char.isprintable() or '\udc80' <= char <= '\udcff' else ascii(char)[1:-1] for char in text)


def _cells(faces: Sequence[Face]) -> Iterator[tuple[str, ...]]:
    if not faces:
        yield '-', 'no face found', '', '', ''
    for number, face in enumerate(faces, 1):
        x, y, width, height = face.box
        # Where the face is unsure, what it may be stands among the runners-up.
        second = ', '.join(f'{name} {value:.2f}' for value, name in sorted(
            ((value, name) for name, value in face.probabilities.items()), reverse=True)[face.label != UNSURE:2])
        turned = f' turned {face.turn}' if face.turn else ''
        yield str(number), f'{x},{y} {width}x{height}{turned}', face.label, f'{face.score:.2f}', second
