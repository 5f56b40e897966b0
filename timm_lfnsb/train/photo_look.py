"""Augmentation that gives pictures the look of photographs taken by people: less sharp, darker, tilted, compressed."""
from __future__ import annotations

from typing import Any

import torch
from torchvision.transforms import Compose, v2
from torchvision.transforms.v2 import functional as F


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


class PhotoLook:
    """Random resolution, tilt and shift, blur, gamma and JPEG compression, for pictures before timm's own augmentation.

    Each takes place with probability `p`, by torch's global generator. Tilt (up to 10 degrees) and shift (up to 6 % of
    each side) continue the picture's border. The shorter side falls to between 24 pixels and its own length, and is
    brought up again. Blur has a standard deviation of up to 2 % of the shorter side, gamma lies in [0.5, 2], JPEG
    quality in [30, 95].
    """

    def __init__(self, p: float = 0.3):
        self.p = p
        self.jpeg = v2.JPEG(quality=(30, 95))

    def __call__(self, image: Any) -> Any:
        """Change a PIL image; its size and mode stay."""
        width, height = image.size
        side = min(width, height)
        if torch.rand(()) < self.p:
            pad = -(-max(width, height) // 4)
            image = F.pad(image, [pad] * 4, padding_mode='edge')
            shift = [round(_uniform(-0.06, 0.06) * length) for length in (width, height)]
            image = F.affine(image, _uniform(-10, 10), shift, 1., [0., 0.], v2.InterpolationMode.BILINEAR)
            image = F.center_crop(image, [height, width])
        if torch.rand(()) < self.p and side > 24:
            factor = _uniform(24, side) / side
            image = F.resize(image, [max(1, round(height * factor)), max(1, round(width * factor))])
            image = F.resize(image, [height, width])
        if torch.rand(()) < self.p:
            sigma = _uniform(0.002, 0.02) * side
            image = F.gaussian_blur(image, 2 * max(1, round(2 * sigma)) + 1, sigma)
        if torch.rand(()) < self.p:
            image = F.adjust_gamma(image, 2 ** _uniform(-1, 1))
        if torch.rand(()) < self.p:
            image = self.jpeg(image)
        return image


def prepend_transform(dataset: Any, first: Any) -> None:
    """Put a transform of PIL images before those that timm's loader gave a dataset."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    # With --train-img-sizes timm's own come later, outside of the dataset.
    dataset.transform = first if dataset.transform is None else Compose([first, dataset.transform])
