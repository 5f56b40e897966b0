"""From a picture to face crops: reading images, OpenCV's face cascade, five-point alignment.

Inside the package a picture is a uint8 RGB array (H, W, 3), upright.
"""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from PIL import Image, ImageOps

ImageInput: TypeAlias = str | os.PathLike[str] | Image.Image | np.ndarray
Box: TypeAlias = tuple[int, int, int, int]

FIVE_POINT_TEMPLATE = np.array([
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
])
"""Eyes, nose tip and mouth corners in a crop of 112x112 pixels, those on the left of the image first (x, y)."""

IMAGE_SUFFIXES = frozenset('.bmp .gif .jfif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp'.split())
"""What counts as an image when a folder is searched."""

CASCADE = 'haarcascade_frontalface_default.xml'


class ImageError(ValueError):
    """An image that cannot be used; the message is one sentence that says why."""


def read_image(source: ImageInput) -> np.ndarray:
    """Read an image into upright 8-bit RGB.

    The EXIF orientation of files and PIL images is applied. 16-bit values are scaled down, never clipped.
    Transparent pixels are laid on white. Of an animation the first frame is taken.

    Args:
        source: Path, PIL image of any mode that converts to RGB, or array (H, W), (H, W, 3) RGB or (H, W, 4) RGBA
            of uint8, uint16, or floats in [0, 1].

    Returns:
        uint8 array (H, W, 3), RGB.

    Raises:
        ImageError: When the file is missing, damaged or too large for Pillow's decompression bomb limit, or an array
            has another shape, type or range.
        TypeError: When `source` is none of these.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _from_pil(source, 'image')
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f'an image is a path, a PIL image or a numpy array, not {type(source).__name__}.')
    name = os.fspath(source)
    if not os.path.exists(name):
        raise ImageError(f'{name}: no such file.')
    try:
        image = Image.open(name)
    except Exception as error:  # every decoder has its own
        raise _unreadable(name, error) from error
    with image:
        return _from_pil(image, name)


def _unreadable(name: str, error: Exception) -> ImageError:
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f'{name}: not an image, or damaged.')
    reason = str(error).strip().partition('\n')[0].rstrip('.') or type(error).__name__
    return ImageError(f'{name}: cannot be read as an image ({reason}).')


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == 'I':  # 32-bit integers, which hold 16-bit pictures in practice
            array = np.asarray(image)
            if array.min() < 0 or array.max() > 65535:
                raise ValueError('it has 32-bit values beyond 65535')
            return _from_array(array.astype(np.uint16))
        if image.mode == 'F' or image.mode.startswith('I;16'):
            return _from_array(np.asarray(image))
        return _from_array(np.asarray(image.convert('RGBA' if image.has_transparency_data else 'RGB')))
    except Exception as error:  # truncated data shows only here, and every decoder has its own errors
        raise _unreadable(name, error) from error


def _from_array(array: np.ndarray) -> np.ndarray:
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageError(f'an image array has the shape (H, W), (H, W, 3) or (H, W, 4), not {array.shape}.')
    if array.dtype.kind == 'f':
        if not (array.min() >= -1e-3 and array.max() <= 1 + 1e-3):  # NaN fails both
            raise ImageError('an image array of floats must lie in [0, 1].')
        array = np.rint(array.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif array.dtype.kind == 'u' and array.dtype.itemsize == 2:
        array = np.rint(array * np.float32(255 / 65535)).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise ImageError(f'an image array is of uint8, uint16 or floats in [0, 1], not {array.dtype}.')
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.shape[2] == 4:
        alpha = array[:, :, 3:] / np.float32(255)
        return np.rint(array[:, :, :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(array)


def find_images(inputs: Sequence[Path], skip: Path | None = None) -> list[tuple[Path, Path]]:
    """List images, folders searched recursively and sorted.

    Args:
        inputs: Files, which are taken whatever their name, and folders. Hidden files in folders are left out.
        skip: A folder to leave out of the search, such as one for results below a folder of inputs.

    Returns:
        For each image its path, and its path relative to the folder it was found in (its name for a given file).

    Raises:
        ValueError: When a folder holds no image.
    """
    skipped = skip.resolve() if skip else None
    images: list[tuple[Path, Path]] = []
    for path in inputs:
        if not path.is_dir():
            images.append((path, Path(path.name)))
            continue
        found = sorted(
            file for file in path.rglob('*')
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith('.') and file.is_file()
            and not (skipped and skipped in file.resolve().parents))
        if not found:
            raise ValueError(f'{path} has no images ({", ".join(sorted(IMAGE_SUFFIXES))}).')
        images += [(file, file.relative_to(path)) for file in found]
    return images


class HaarDetector:
    """OpenCV's frontal face cascade, with settings that find few false faces.

    It sees upright, frontal faces whose side is at least a twentieth of the picture's shorter side (and 24 pixels);
    larger pictures are searched at 1024 pixels. Profiles, tilted heads and faces cut by the border are often missed,
    and round textures are sometimes taken for a face.

    Raises:
        RuntimeError: When the installed OpenCV comes without the cascade.
    """

    MAX_SIDE = 1024

    def __init__(self) -> None:
        folder = getattr(getattr(cv2, 'data', None), 'haarcascades', '')
        path = Path(folder) / CASCADE
        if not hasattr(cv2, 'CascadeClassifier') or not path.is_file():
            raise RuntimeError(
                f'OpenCV {cv2.__version__} comes without the face cascade {CASCADE}: install '
                "'opencv-python-headless<5', or give another detector.")
        self._cascade = cv2.CascadeClassifier(str(path))

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return the face boxes (N, 4) int, x, y, width, height, largest first, of a uint8 RGB array (H, W, 3)."""
        height, width = image.shape[:2]
        scale = min(1., self.MAX_SIDE / max(height, width))
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
        min_side = max(24, min(gray.shape) // 20)
        found = self._cascade.detectMultiScale(
            cv2.equalizeHist(gray), scaleFactor=1.1, minNeighbors=6, minSize=(min_side, min_side))
        boxes = np.rint(np.asarray(found, dtype=np.float64).reshape(-1, 4) / scale).astype(int)
        # Ties broken by place, so that the order of faces does not depend on OpenCV's threads.
        order = np.lexsort((boxes[:, 1], boxes[:, 0], -boxes[:, 2]))
        return boxes[order]


def crop_face(image: np.ndarray, box: Any, margin: float = 0.) -> np.ndarray:
    """Cut out the square around a face box.

    A box that is not square is widened to one around the same center, so that the face keeps its proportions. Where
    the square leaves the image, the border pixels are repeated.

    Args:
        image: Array (H, W, 3).
        box: x, y, width, height in pixels.
        margin: Fraction of the square's side to add on each of its four sides, above -0.5; negative cuts tighter.

    Returns:
        Array (S, S, 3).
    """
    x, y, width, height = box
    side = max(1, round(max(width, height) * (1 + 2 * margin)))
    rows = round(y + height / 2 - side / 2) + np.arange(side)
    columns = round(x + width / 2 - side / 2) + np.arange(side)
    return image[np.ix_(rows.clip(0, image.shape[0] - 1), columns.clip(0, image.shape[1] - 1))]


def align_matrix(five_points: Any, size: int = 112) -> np.ndarray:
    """Least-squares similarity transform (rotation, scale, translation) of five face points onto the template.

    Args:
        five_points: (5, 2) pixels (x, y): eyes, nose tip, mouth corners, those on the left of the image first.
        size: Side of the aligned crop.

    Returns:
        Matrix (2, 3) that maps image pixels to crop pixels.

    Raises:
        ValueError: When the points are not five finite (x, y) pairs, or lie where no transform fits.
    """
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
    """Turn, scale and shift a face so that its five points meet the usual 112x112 template, and cut it out.

    The crop that face recognition and most expression data sets use (the template of ArcFace and MobileFaceNet).
    Bilinear; beyond the image its border pixels are repeated.

    Args:
        image: Whatever `read_image` takes; the points are pixels of the upright image.
        five_points: (5, 2) pixels (x, y): eyes, nose tip, mouth corners, those on the left of the image first.
        size: Side of the crop; the template is scaled with it.

    Returns:
        uint8 array (size, size, 3), RGB.

    Raises:
        ValueError: When the image cannot be read (`ImageError`), or the points are unusable.
    """
    matrix = align_matrix(five_points, size)
    return cv2.warpAffine(
        read_image(image), matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def aligned_box(five_points: Any) -> tuple[float, float, float, float]:
    """The upright square (x, y, width, height) with the center and the side of the aligned crop."""
    (a, minus_b, shift_x), (b, _, shift_y) = align_matrix(five_points)
    scale = math.hypot(a, b)
    x, y = np.linalg.solve([(a, minus_b), (b, a)], (56 - shift_x, 56 - shift_y))
    side = 112 / scale
    return x - side / 2, y - side / 2, side, side


def clip_box(box: Any, image: np.ndarray) -> Box:
    """Round a box to whole pixels and clip it to the image.

    Raises:
        ValueError: When nothing of it lies inside.
    """
    x, y, width, height = (float(value) for value in box)
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(image.shape[1], round(x + width)), min(image.shape[0], round(y + height))
    if right <= left or bottom <= top:
        raise ValueError(f'the detector gave the box {x:g}, {y:g}, {width:g}, {height:g}, which is empty or outside '
                         f'the image of {image.shape[1]}x{image.shape[0]} pixels.')
    return left, top, right - left, bottom - top
