"""Pictures as they come: files, PIL images, arrays and tensors, read into uint8 RGB arrays (H, W, 3), upright."""
from __future__ import annotations

import io
import os
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import UserError, reason

with suppress(ImportError):
    import pillow_heif
    pillow_heif.register_heif_opener()

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | torch.Tensor

_RAW = '.3fr .arw .cr2 .cr3 .dcr .dng .erf .iiq .kdc .mrw .nef .nrw .orf .pef .raf .rw2 .rwl .srw .x3f'.split()

IMAGE_SUFFIXES = frozenset(_RAW).union(
    '.apng .avif .avifs .bmp .dds .dib .eps .exr .gif .heic .heics .heif .heifs .hif .icns .ico .j2c .j2k .jfif .jp2 '
    '.jpc .jpe .jpeg .jpf .jpg .jpx .jxl .mpo .pbm .pcx .pgm .png .pnm .ppm .psd .qoi .sgi .svg .tga .tif .tiff .webp '
    '.xbm .xpm'.split())
"""What counts as an image when a folder is searched, whether it can be read or not."""

_ADVICE = {
    **dict.fromkeys(('.heic', '.heics', '.heif', '.heifs', '.hif'), 'pip install pillow-heif reads HEIC'),
    **dict.fromkeys(('.avif', '.avifs'), 'pip install -U pillow reads AVIF, from release 11.3 on'),
    **dict.fromkeys(('.exr', '.jxl', '.svg'), 'save it as JPEG or PNG first'),
    **dict.fromkeys(_RAW, 'develop the raw file into a JPEG first'),
}
"""Suffix -> what to do about a file of a format that Pillow does not read, as it is installed."""


class ImageError(UserError):
    """An image that cannot be used."""


def read_image(source: ImageInput, name: str = '') -> np.ndarray:
    """Read an image into a uint8 array (H, W, 3), upright RGB.

    16-bit values are scaled down, never clipped. Transparent pixels are laid on white. Of an animation the first frame
    is taken.

    Args:
        source: Path; content of a file, as bytes or an open binary file; PIL image of any mode that converts to RGB;
            array (H, W), (H, W, 3) RGB or (H, W, 4) RGBA, or tensor (H, W) or (C, H, W) with as many channels, of
            uint8, uint16, or floats in [0, 1].
        name: What errors call it, by default its path, or 'image'.

    Raises:
        ImageError: When a file is missing, damaged or too large for Pillow, an array has another shape or range, or
            `source` is none of these.
    """
    path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ''
    name = name or path or 'image'
    try:
        if isinstance(source, torch.Tensor):
            return _from_tensor(source)
        if isinstance(source, np.ndarray):
            return _from_array(source)
        if isinstance(source, Image.Image):
            return _from_pil(ImageOps.exif_transpose(source))
        if not isinstance(source, (str, os.PathLike, bytes)) and not hasattr(source, 'read'):
            raise ImageError('an image is a path, bytes, an open binary file, a PIL image, an array or a tensor, '
                             f'not {type(source).__name__}.')
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            ImageOps.exif_transpose(image, in_place=True)  # ours; a copy takes nearly as long as decoding
            return _from_pil(image)
    except ImageError as error:
        raise ImageError(f'{name}: {error}') from None
    except FileNotFoundError as error:
        raise ImageError(f'{name}: no such file.') from error
    except Image.UnidentifiedImageError as error:
        suffix = Path(path).suffix.lower()
        advice = '' if suffix in Image.registered_extensions() else _ADVICE.get(suffix, '')
        raise ImageError(f"{name}: not an image, or damaged{'; ' if advice else ''}{advice}.") from error
    except Exception as error:  # every decoder has its own, many only when the data are read
        raise ImageError(f"{name}: cannot be read as an image ({reason(error).rstrip('.')}).") from error


def _from_tensor(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    if array.ndim != 3:
        return _from_array(array)
    return _from_array(array[0] if array.shape[0] == 1 else array.transpose(1, 2, 0))


def _from_pil(image: Image.Image) -> np.ndarray:
    if image.mode == 'I':  # 32-bit integers, which hold 16-bit pictures in practice
        array = np.asarray(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError('it has 32-bit values beyond 65535')
        return _from_array(array.astype(np.uint16))
    if image.mode == 'F' or image.mode.startswith('I;16'):
        return _from_array(np.asarray(image))
    mode = 'RGBA' if image.has_transparency_data else 'RGB'
    return _from_array(np.asarray(image if image.mode == mode else image.convert(mode)))


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


def find_images(path: Path, skip: Path | None = None) -> list[tuple[Path, Path]]:
    """The images below a folder, but for those below `skip` and hidden ones, with their relative paths, sorted.

    A file is taken whatever its name is, and without looking whether it is there.

    Raises:
        UserError: When a folder holds no image.
    """
    if not path.is_dir():
        return [(path, Path(path.name))]
    skipped = skip and Path(os.path.realpath(skip))  # resolve() fails at links in a circle before Python 3.13
    found = sorted(
        file for file in path.rglob('*')
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith('.') and not file.is_dir()
        and not (skipped and skipped in Path(os.path.realpath(file)).parents))
    if not found:
        raise UserError(f'{path} has no images: no file in it has a suffix of pictures, such as .jpg or .png.')
    return [(file, file.relative_to(path)) for file in found]


def sample_picture() -> Path:
    """NASA's portrait of Eileen Collins, which comes with scikit-image; UserError where that is missing."""
    try:
        import skimage
        path = Path(skimage.__file__).parent / 'data' / 'astronaut.png'
    except ImportError:
        path = None
    if path is None or not path.is_file():
        raise UserError(
            'the sample picture is missing: pip install --force-reinstall --no-deps scikit-image brings it.')
    return path
