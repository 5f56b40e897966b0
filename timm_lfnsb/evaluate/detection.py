"""What detector and network make of whole pictures: faces found, missed and doubled, and expressions end to end."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from ..data.images import ImageError, find_images, read_image
from ..errors import UserError
from ..labels import match_labels
from ..predict.recognizer import ExpressionRecognizer
from ..util.files import write_json
from ..version import __version__


def evaluate_detector(
        model: str, data_dir: str | Path, out_dir: str | Path, split: str = 'test', detector: str = 'yunet',
        enlarge: int = 1, border: float = 0., progress: bool = True, **settings: Any,
) -> dict[str, Any]:
    """Find and classify the faces of the pictures DATA_DIR/SPLIT/LABEL/FILE, and write detection.json into a folder.

    LABEL is the expression of the one face of each picture, of which the largest found counts; or, where all are
    numbers, how many faces the picture shows: their places are not checked then.

    Args:
        enlarge: Multiple of the size at which pictures are searched.
        border: Width of a border that repeats the outermost pixels, as a fraction of the side: for crops like FER+'s.
        settings: `ExpressionRecognizer`'s.

    Returns:
        The content of detection.json: counts of 'pictures', 'faces', 'found', 'missed' and 'doubled' (found beyond
        those that are there), of 'turned' pictures, and, with expressions, 'accuracy', in which a missed face is
        wrong, and 'accuracy_found'.

    Raises:
        UserError: When there are no pictures, one cannot be read, or label names do not match.
    """
    root = Path(data_dir) / split
    if not root.is_dir():
        raise UserError(f'there is no folder {root}: its pictures belong into {root / "LABEL"}.')
    files = [path for path, _ in find_images(root)]
    if any(path.parent == root for path in files):
        raise UserError(f'{root} has images outside of the label folders: move them into {root / "LABEL"}.')
    names = sorted({path.parent.name for path in files})
    counted = all(name.isdecimal() for name in names)
    recognize = ExpressionRecognizer(model, detector, **settings)
    indices = {} if counted else match_labels(names, recognize.label_names)

    figures = dict.fromkeys(('pictures', 'faces', 'found', 'missed', 'doubled', 'turned'), 0)
    right = 0
    pictures = _pictures(tqdm(files, desc=split, unit='image', disable=not progress), enlarge, border)
    for path, faces in zip(files, recognize.stream(pictures), strict=True):
        if isinstance(faces, ImageError):
            raise UserError(str(faces)) from faces
        there = int(path.parent.name) if counted else 1
        figures['pictures'] += 1
        figures['faces'] += there
        figures['found'] += min(there, len(faces))
        figures['missed'] += max(0, there - len(faces))
        figures['doubled'] += max(0, len(faces) - there)
        figures['turned'] += any(face.turn for face in faces)
        right += not counted and bool(faces) and faces[0].label == recognize.label_names[indices[path.parent.name]]
    accuracy = {} if counted else {
        'accuracy': right / figures['faces'], 'accuracy_found': right / max(1, figures['found'])}
    result = {
        'model': model, 'split': split, **figures, **accuracy, 'detector': detector, 'enlarge': enlarge,
        'border': border, **settings, 'versions': {'timm_lfnsb': __version__, 'opencv': cv2.__version__}}
    write_json(Path(out_dir) / 'detection.json', result)
    return result


def _pictures(files: Sequence[Path] | tqdm, enlarge: int, border: float) -> Iterator[Any]:
    for path in files:
        if enlarge == 1 and not border:
            yield path
            continue
        image = read_image(path)
        height, width = image.shape[:2]
        image = cv2.resize(image, (enlarge * width, enlarge * height), interpolation=cv2.INTER_CUBIC)
        high, wide = round(border * image.shape[0]), round(border * image.shape[1])
        yield np.pad(image, ((high, high), (wide, wide), (0, 0)), mode='edge')


def format_detection(figures: dict[str, Any]) -> str:
    """Format what `evaluate_detector` returns as two lines."""
    text = (f"{figures['detector']} on {figures['split']}: {figures['faces']} faces in {figures['pictures']} pictures, "
            f"{figures['found']} found ({100 * figures['found'] / max(1, figures['faces']):.1f} %), "
            f"{figures['missed']} missed, {figures['doubled']} doubled or false, "
            f"{figures['turned']} picture(s) turned")
    if 'accuracy' in figures:
        text += (f"\n{figures['model']}: {100 * figures['accuracy']:.1f} % right end to end, "
                 f"{100 * figures['accuracy_found']:.1f} % of the faces found")
    return text
