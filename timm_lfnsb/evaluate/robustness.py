"""Robustness: a model's accuracy on images that were turned, shifted, blurred, compressed, lit or tinted otherwise.

Each perturbation changes the image as it lies in the file, before the model's own preprocessing, and nothing in it is
random. Where a turn or a shift needs pixels from beyond the border, the border's pixels are repeated.
"""
from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn

from .predictions import Predictions, compare_predictions, compute_metrics, load_model, predict_folder

SKIN = (198, 134, 106)
"""Colour in the middle of the ramp that stands in for a colour photograph."""

SKIN_LUMINANCE = round(0.299 * SKIN[0] + 0.587 * SKIN[1] + 0.114 * SKIN[2])


class Perturbation(NamedTuple):
    """What is done to an image, in words and as a function from PIL image to PIL image of the same mode."""
    what: str
    function: Callable[[Image.Image], Image.Image]


def _repeat_border(image: Image.Image, x: int, y: int) -> Image.Image:
    pixels = np.asarray(image)
    return Image.fromarray(np.pad(pixels, [(y, y), (x, x)] + [(0, 0)] * (pixels.ndim - 2), mode='edge'))


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Turn counter-clockwise about the middle."""
    border = math.ceil(max(image.size) / 2)
    padded = _repeat_border(image, border, border)
    turned = padded.rotate(degrees, Image.Resampling.BILINEAR)
    return turned.crop((border, border, border + image.width, border + image.height))


def shift(image: Image.Image, right: float, down: float) -> Image.Image:
    """Move what is seen by fractions of width and height, as a box beside the face would show it."""
    x, y = round(right * image.width), round(down * image.height)
    padded = _repeat_border(image, abs(x), abs(y))
    left, top = abs(x) - x, abs(y) - y
    return padded.crop((left, top, left + image.width, top + image.height))


def blur(image: Image.Image, sigma: float) -> Image.Image:
    """Gaussian blur, sigma as a fraction of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(sigma * min(image.size)))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Write as JPEG and read again."""
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=quality)
    with Image.open(file) as again:
        return again.convert(image.mode)


def brighten(image: Image.Image, factor: float) -> Image.Image:
    """Multiply every pixel; what exceeds white is cut off."""
    return ImageEnhance.Brightness(image).enhance(factor)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize to side x side pixels; the model's preprocessing enlarges again."""
    return image.resize((side, side), Image.Resampling.BICUBIC)


def tint(image: Image.Image) -> Image.Image:
    """Colour along a ramp from black over a skin tone to white that keeps the luminance of each pixel."""
    grey = image.convert('L')
    return ImageOps.colorize(grey, 'black', 'white', mid=SKIN, midpoint=SKIN_LUMINANCE).convert(image.mode)


PERTURBATIONS: dict[str, Perturbation] = {
    'hflip': Perturbation('mirrored left to right', ImageOps.mirror),
    'rotate+10': Perturbation('turned by 10 degrees, counter-clockwise', partial(rotate, degrees=10)),
    'rotate-10': Perturbation('turned by 10 degrees, clockwise', partial(rotate, degrees=-10)),
    'shift-left': Perturbation('crop off by 15 % of its width: face to the left', partial(shift, right=-0.15, down=0)),
    'shift-right': Perturbation('crop off by 15 % of its width: face to the right', partial(shift, right=0.15, down=0)),
    'shift-up': Perturbation('crop off by 15 % of its height: face higher', partial(shift, right=0, down=-0.15)),
    'shift-down': Perturbation('crop off by 15 % of its height: face lower', partial(shift, right=0, down=0.15)),
    'blur': Perturbation('Gaussian blur, sigma 1/48 of the side (1 pixel of 48)', partial(blur, sigma=1 / 48)),
    'jpeg30': Perturbation('JPEG of quality 30 at the size in the file', partial(jpeg, quality=30)),
    'brighter': Perturbation('brightness +30 %', partial(brighten, factor=1.3)),
    'darker': Perturbation('brightness -30 %', partial(brighten, factor=0.7)),
    'small': Perturbation('24x24 pixels', partial(shrink, side=24)),
    'tint': Perturbation(
        'colour instead of grey: a tint from black over a skin tone to white, luminance kept', tint),
}
"""The rows of the robustness table, by name."""


def measure_robustness(
        model: str | nn.Module,
        data_dir: str | Path,
        split: str = 'test',
        names: Iterable[str] = tuple(PERTURBATIONS),
        clean: Predictions | None = None,
        **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on perturbed images of one split.

    Args:
        model: See `predict_folder`.
        data_dir: See `predict_folder`.
        split: See `predict_folder`.
        names: Which of `PERTURBATIONS`, in this order.
        clean: The model's predictions on the same split as it is, made here where not given.
        options: More for `predict_folder`: `batch_size`, `device`, `workers`, `progress`, `tta`.

    Returns:
        A dict that JSON can hold: `split`, `count`, `clean_accuracy` and `rows`, by name: `what`, `accuracy`,
        `accuracy_interval` (Wilson, 95 %), `difference` to the clean accuracy and `difference_interval` (95 %, paired
        bootstrap), `agreement` (share of the images that get the same label as when clean). All are fractions.

    Raises:
        EvaluationError: See `predict_folder`.
        ValueError: When there is no perturbation of such a name.
    """
    names = list(names)
    unknown = [name for name in names if name not in PERTURBATIONS]
    if unknown:
        raise ValueError(f"there is no perturbation {', '.join(unknown)}; there are {', '.join(PERTURBATIONS)}.")
    if isinstance(model, str):
        model = load_model(model, inference=True)
    if clean is None:
        clean = predict_folder(model, data_dir, split=split, **options)
    rows = {}
    for name in names:
        what, function = PERTURBATIONS[name]
        perturbed = predict_folder(model, data_dir, split=split, perturb=function, **options)
        metrics, compared = compute_metrics(perturbed), compare_predictions(perturbed, clean)
        rows[name] = {
            'what': what,
            **{key: metrics[key] for key in ('accuracy', 'accuracy_interval')},
            **{key: compared[key] for key in ('difference', 'difference_interval')},
            'agreement': float((perturbed.predicted == clean.predicted).mean()),
        }
    return {'split': split, 'count': len(clean.labels), 'clean_accuracy': float(clean.correct.mean()), 'rows': rows}


def robustness_table(measured: dict[str, Any]) -> str:
    """What `measure_robustness` returns as a Markdown table, in percent and points, with 95 % intervals."""
    def interval(bounds: list[float], sign: str = '') -> str:
        return f'[{100 * bounds[0]:{sign}.1f}, {100 * bounds[1]:{sign}.1f}]'

    lines = [
        '| images | accuracy (%) | difference (points) | same label (%) |',
        '|---|---|---|---|',
        f"| as they are | {100 * measured['clean_accuracy']:.1f} | | |",
    ]
    for row in measured['rows'].values():
        lines.append(
            f"| {row['what']} | {100 * row['accuracy']:.1f} {interval(row['accuracy_interval'])} "
            f"| {100 * row['difference']:+.1f} {interval(row['difference_interval'], '+')} "
            f"| {100 * row['agreement']:.1f} |")
    return '\n'.join(lines)
