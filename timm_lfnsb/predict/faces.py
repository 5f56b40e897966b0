"""From a picture to face crops: OpenCV's face cascade, squares around boxes, five-point alignment."""
from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np

from ..errors import UserError
from .images import ImageInput, read_image

Box: TypeAlias = tuple[int, int, int, int]

FIVE_POINT_TEMPLATE = np.array([
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
])
"""Eyes, nose tip and mouth corners in a crop of 112x112 pixels, those on the left of the image first (x, y)."""

CASCADE = 'haarcascade_frontalface_default.xml'


class HaarDetector:
    """OpenCV's frontal face cascade, with settings that find few false faces.

    It sees upright, frontal faces of at least 24 pixels, and a twentieth of the picture's shorter side. Profiles,
    tilted heads and faces cut by the border are often missed. UserError where OpenCV comes without the cascade.
    """

    def __init__(self) -> None:
        path = Path(getattr(getattr(cv2, 'data', None), 'haarcascades', '')) / CASCADE
        if not hasattr(cv2, 'CascadeClassifier') or not path.is_file():
            raise UserError(
                f'OpenCV {cv2.__version__} comes without the face cascade {CASCADE}: install '
                "'opencv-python-headless<5', or give another detector.")
        self._cascade = cv2.CascadeClassifier(str(path))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the face boxes (N, 4) int, x, y, width, height, largest first, of a uint8 RGB array (H, W, 3)."""
        height, width = image.shape[:2]
        scale = min(1., 1024 / max(height, width))  # larger pictures take long and show no more faces
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        min_side = max(24, min(gray.shape) // 20)
        found = self._cascade.detectMultiScale(
            cv2.equalizeHist(gray), scaleFactor=1.1, minNeighbors=6, minSize=(min_side, min_side))
        boxes = np.rint(np.asarray(found, dtype=np.float64).reshape(-1, 4) / scale).astype(int)
        # Ties broken by place, so that the order of faces does not depend on OpenCV's threads.
        return boxes[np.lexsort((boxes[:, 1], boxes[:, 0], -boxes[:, 2]))]


def crop_face(image: np.ndarray, box: Any, margin: float = 0.) -> np.ndarray:
    """Cut the square (S, S, 3) around a box (x, y, width, height) out of an image (H, W, 3).

    A box that is not square is widened. Beyond the image its border pixels are repeated. `margin` is the fraction of
    the side to add on each of the four sides, above -0.5.
    """
    x, y, width, height = box
    side = max(1, round(max(width, height) * (1 + 2 * margin)))
    rows = round(y + height / 2 - side / 2) + np.arange(side)
    columns = round(x + width / 2 - side / 2) + np.arange(side)
    return image[np.ix_(rows.clip(0, image.shape[0] - 1), columns.clip(0, image.shape[1] - 1))]


def align_matrix(five_points: Any, size: int = 112) -> np.ndarray:
    """Least-squares similarity transform (2, 3) from image pixels to crop pixels; see `align_face`."""
    points = np.asarray(five_points, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f'five_points must be five finite (x, y) pairs, got an array of shape {points.shape}.')
    if size < 1:
        raise ValueError(f'size must be at least 1, got {size}.')
    # As complex numbers a similarity without reflection is w = a z + b, and least squares has a closed form.
    z = points @ (1, 1j)
    w = FIVE_POINT_TEMPLATE @ (1, 1j) * (size / 112)
    z_mean, w_mean = z.mean(), w.mean()
    z, w = z - z_mean, w - w_mean
    spread = np.vdot(z, z).real
    a = np.vdot(z, w) / spread if spread > 1e-6 else 0.
    if not np.isfinite(a) or abs(a) < 1e-6:
        raise ValueError('five_points do not form a face: they (nearly) coincide, or are in the wrong order.')
    b = w_mean - a * z_mean
    return np.array([(a.real, -a.imag, b.real), (a.imag, a.real, b.imag)])


def align_face(image: ImageInput, five_points: Any, size: int = 112) -> np.ndarray:
    """Turn, scale and shift a face so that its five points meet the template of ArcFace, and cut it out.

    Bilinear; beyond the image its border pixels are repeated.

    Args:
        image: Whatever `read_image` takes.
        five_points: (5, 2) pixels (x, y) of the upright image: eyes, nose tip, mouth corners, those on the left first.
        size: Side of the crop, uint8 RGB (size, size, 3); the template is scaled with it.

    Raises:
        ImageError: When the image cannot be read.
        ValueError: When the points are not five finite (x, y) pairs, or lie where no transform fits.
    """
    matrix = align_matrix(five_points, size)
    return cv2.warpAffine(
        read_image(image), matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def aligned_box(five_points: Any) -> tuple[float, float, float, float]:
    """The upright square (x, y, width, height) with the center and the side of the aligned crop."""
    matrix = align_matrix(five_points)
    x, y = cv2.invertAffineTransform(matrix) @ (56, 56, 1)
    side = 112 / math.hypot(*matrix[:, 0])
    return x - side / 2, y - side / 2, side, side


def clip_box(box: Any, image: np.ndarray) -> Box:
    """Round a box to whole pixels and clip it to the image, of which it must cover something."""
    x, y, width, height = box
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(image.shape[1], round(x + width)), min(image.shape[0], round(y + height))
    if right <= left or bottom <= top:
        raise ValueError(f'the detector gave the box {x:g}, {y:g}, {width:g}, {height:g}: empty, or outside the image.')
    return left, top, right - left, bottom - top
