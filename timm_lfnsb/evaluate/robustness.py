"""Robustness: a model's accuracy on images that were turned, shifted, blurred, compressed, lit or tinted otherwise.

Each perturbation changes the image as it lies in the file, before the model's own preprocessing, and nothing in it is
random. Where a turn or a shift needs pixels from beyond the border, the border's pixels are repeated.
"""
from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torchvision.transforms.functional import adjust_brightness, center_crop, pad

from ..errors import UserError, did_you_mean
from ..models.loading import load_model
from ..util.text import markdown_table
from .metrics import compare_predictions, compute_metrics, percent
from .predictions import Predictions, predict_folder


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    wider = pad(image, math.ceil(max(image.size) / 2), padding_mode='edge')
    return center_crop(wider.rotate(degrees, Image.Resampling.BILINEAR), [image.height, image.width])


def _shift(image: Image.Image, right: float = 0, down: float = 0) -> Image.Image:
    x, y = round(right * image.width), round(down * image.height)
    return pad(image, [x, y, -x, -y], padding_mode='edge')


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 48))


def _jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, 'JPEG', quality=30)
    return Image.open(file).convert(image.mode)


def _tint(image: Image.Image) -> Image.Image:
    skin = (198, 134, 106)  # of luminance 150
    return ImageOps.colorize(image.convert('L'), 'black', 'white', mid=skin, midpoint=150).convert(image.mode)


PERTURBATIONS: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    'hflip': ('mirrored left to right', ImageOps.mirror),
    'rotate+10': ('turned by 10 degrees, counter-clockwise', partial(_rotate, degrees=10)),
    'rotate-10': ('turned by 10 degrees, clockwise', partial(_rotate, degrees=-10)),
    'shift-left': ('crop off by 15 % of its width: face to the left', partial(_shift, right=-0.15)),
    'shift-right': ('crop off by 15 % of its width: face to the right', partial(_shift, right=0.15)),
    'shift-up': ('crop off by 15 % of its height: face higher', partial(_shift, down=-0.15)),
    'shift-down': ('crop off by 15 % of its height: face lower', partial(_shift, down=0.15)),
    'blur': ('Gaussian blur, sigma 1/48 of the side (1 pixel of 48)', _blur),
    'jpeg30': ('JPEG of quality 30 at the size in the file', _jpeg),
    'brighter': ('brightness +30 %', partial(adjust_brightness, brightness_factor=1.3)),
    'darker': ('brightness -30 %', partial(adjust_brightness, brightness_factor=0.7)),
    'small': ('24x24 pixels', partial(Image.Image.resize, size=(24, 24))),
    'tint': ('colour instead of grey: a tint from black over a skin tone to white, luminance kept', _tint),
}
"""The rows of the robustness table: what is done to an image, in words and as a function to an image of its mode."""


def measure_robustness(
        model: str | nn.Module, data_dir: str | Path, split: str = 'test',
        names: Sequence[str] = tuple(PERTURBATIONS), clean: Predictions | None = None, **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on perturbed images of one split, with arguments as for `predict_folder`.

    Args:
        names: Which of `PERTURBATIONS`, in this order.
        clean: The model's predictions on the same split as it is, made here where not given.

    Returns:
        A dict that JSON can hold. In its `rows`, `agreement` is the share of the images that keep their label.

    Raises:
        UserError: See `predict_folder`; also when there is no perturbation of such a name.
    """
    unknown = [name for name in names if name not in PERTURBATIONS]
    if unknown:
        near = did_you_mean(unknown[0], PERTURBATIONS)
        raise UserError(f"there is no perturbation {', '.join(unknown)}{near}; there are {', '.join(PERTURBATIONS)}.")
    if isinstance(model, str):
        model = load_model(model, inference=True)
    clean = clean or predict_folder(model, data_dir, split, **options)
    rows = {}
    for name in names:
        perturbed = predict_folder(model, data_dir, split, perturb=PERTURBATIONS[name][1], **options)
        metrics, compared = compute_metrics(perturbed), compare_predictions(perturbed, clean)
        rows[name] = {
            'what': PERTURBATIONS[name][0],
            **{key: metrics[key] for key in ('accuracy', 'accuracy_interval')},
            **{key: compared[key] for key in ('difference', 'difference_interval')},
            'agreement': float((perturbed.predicted == clean.predicted).mean()),
        }
    return {'split': split, 'count': len(clean.labels), 'clean_accuracy': float(clean.correct.mean()), 'rows': rows}


def robustness_table(measured: dict[str, Any]) -> str:
    """What `measure_robustness` returns as a Markdown table, in percent and points, with 95 % intervals."""
    rows = [[row['what'], percent(row, 'accuracy'), percent(row, 'difference', '+'), percent(row, 'agreement')]
            for row in measured['rows'].values()]
    return markdown_table(
        ['images', 'accuracy (%)', 'difference (points)', 'same label (%)'],
        [['as they are', percent(measured, 'clean_accuracy'), '', ''], *rows])
