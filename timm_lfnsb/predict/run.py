"""Images and folders of images, predicted one after the other: what `timm-lfnsb predict` prints."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from click import format_filename
from tqdm import tqdm

from ..errors import UserError
from ..util.files import replacing
from .annotate import annotation_paths, draw_faces
from .images import ImageError, find_images
from .recognizer import ExpressionRecognizer, Face


def predict_lines(
        inputs: Sequence[Path], as_json: bool = False, annotate: Path | None = None, **settings: Any,
) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a table, or of one JSON object an image, each with whether it reports a problem instead.

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
    targets = annotation_paths(found, annotate) if annotate else []
    yield from ((problem, True) for problem in problems)

    names = [format_filename(path) for path, _ in found]
    width, label_width = max(map(len, ('image', *names))), max(map(len, ('expression', *recognizer.label_names)))
    table = f'{{:{width}}}  {{:4}}  {{:19}}  {{:{label_width}}}  {{:5}}  {{}}'
    if not as_json:
        yield table.format('image', 'face', 'box', 'expression', 'score', 'runner-up'), False
    # Progress on a terminal only, and not for a few single images.
    bar = tqdm(found, unit='image', leave=False, disable=None if len(found) > 10 else True)
    for i, faces in enumerate(recognizer.stream(path for path, _ in bar)):
        path = found[i][0]
        with tqdm.external_write_mode():
            if isinstance(faces, ImageError):
                yield str(faces), True
                if as_json:
                    yield json.dumps({'image': str(path), 'error': str(faces)}), False
                continue
            if as_json:
                yield json.dumps({'image': str(path), 'faces': [face.as_dict() for face in faces]}), False
            else:
                yield from ((table.format(names[i], *cells).rstrip(), False) for cells in _cells(faces))
        if annotate:
            targets[i].parent.mkdir(parents=True, exist_ok=True)
            with replacing(targets[i]) as temporary:
                draw_faces(path, faces).save(temporary)


def _cells(faces: Sequence[Face]) -> Iterator[tuple[str, ...]]:
    if not faces:
        yield '-', 'no face found', '', '', ''
    for number, face in enumerate(faces, 1):
        x, y, width, height = face.box
        second = ' '.join(f'{name} {value:.2f}' for value, name in sorted(
            ((value, name) for name, value in face.probabilities.items()), reverse=True)[1:2])
        yield str(number), f'{x},{y} {width}x{height}', face.label, f'{face.score:.2f}', second
