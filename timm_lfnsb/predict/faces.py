"""From a picture to face crops: the detector YuNet, squares around boxes, five-point alignment."""
from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..data.images import ImageInput, read_image
from ..errors import UserError

try:
    import cv2
    cv2.FaceDetectorYN  # noqa: B018  (another OpenCV unpacked over it leaves a package without parts of it)
except (ImportError, AttributeError, RuntimeError) as error:
    raise UserError(
        f'OpenCV does not work here ({error}), as after two of its packages were installed into one folder: '
        'pip uninstall -y opencv-python opencv-python-headless opencv-contrib-python opencv-contrib-python-headless, '
        'then pip install opencv-python-headless.') from error

_LOADING = threading.Lock()
_THREADS = {'users': 0, 'before': 0}

Box: TypeAlias = tuple[int, int, int, int]

FIVE_POINT_TEMPLATE = np.array([
    (38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041),
])
"""Eyes, nose tip and mouth corners in a crop of 112x112 pixels, those on the left of the image first (x, y)."""

FERPLUS_TEMPLATE = 112 * np.array([(0.31, 0.39), (0.68, 0.39), (0.49, 0.60), (0.35, 0.76), (0.65, 0.76)])
"""The same points where they lie on average in the frames of FER+, which show more of the head."""

YUNET = Path(__file__).with_name('face_detection_yunet_2023mar.onnx')
YUNET_SIDES = 320, 1024, 2048
"""Longest sides at which a picture is searched: faces that fill a large input are not seen, nor tiny ones at 320. The
last only where a face of less than `SMALL_FACE` pixels at 1024 is found: of others like it many are not."""
SMALL_FACE = 30
UPRIGHT_SCORE = 0.88
"""Below this score of its best face a picture is searched in the other turns, too; see `YuNetDetector`."""
TURNED_SCORE = 0.85
"""What the best face must reach there: animals and textures have more chances to look like a face."""
MIN_INPUT = 64  # OpenCV 4 reads memory that was never written where a side is up to 32


class Detection(NamedTuple):
    """A face that a detector found, in pixels of the picture it was given."""

    box: tuple[float, float, float, float]
    """x, y, width, height; leaves the picture where the face does."""
    score: float | None = None
    points: np.ndarray | None = None
    """(5, 2), in the order of `FIVE_POINT_TEMPLATE`."""
    turn: int = 0
    """By how many degrees, 0, 90, 180 or 270, the picture has to be turned counterclockwise to show it upright."""


class YuNetDetector:
    """OpenCV's face detector YuNet: faces of ten pixels and more, tilted up to some 30 degrees, and half profiles.

    May be called by several threads, pickled and copied.

    Args:
        min_score: Detections below this score, in (0, 1), are dropped.
        turn: Search the picture turned by 90, 180 and 270 degrees, too, where no face is found that is surely upright,
            and take the turn with the best score: of 100 faces of FER+ that lie or stand on their heads, 87 are
            turned upright, and of 100 upright ones 1 is turned by mistake.

    Raises:
        UserError: When the network's file, which this package brings, is damaged.
    """

    def __init__(self, min_score: float = 0.7, turn: bool = True) -> None:
        if not 0 < min_score < 1:
            raise ValueError(f'min_score must be between 0 and 1, got {min_score}.')
        self.min_score, self.turn = min_score, turn
        # One a thread, because they keep state, and for each side: one that changes its size asks for all its memory
        # anew, which took a third of the time.
        self._networks = threading.local()
        self._network(0)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.min_score, self.turn)

    def _network(self, number: int) -> Any:
        """The one for the side of that number, from the smallest."""
        networks = self._networks.__dict__.setdefault('by_number', {})
        if number not in networks:
            with _LOADING:  # the level of OpenCV's log is that of the process
                logging = getattr(cv2.utils, 'logging', None)  # OpenCV 4.8 has none, OpenCV 5 warns at every start
                level = logging and logging.setLogLevel(logging.LOG_LEVEL_ERROR)
                try:
                    networks[number] = cv2.FaceDetectorYN.create(str(YUNET), '', (320, 320), self.min_score, 0.3)
                except cv2.error as error:
                    raise UserError(
                        f'OpenCV {cv2.__version__} cannot read {YUNET}: '
                        'pip install --force-reinstall --no-deps timm-lfnsb brings it anew.') from error
                finally:
                    if logging:
                        logging.setLogLevel(level)
        return networks[number]

    def __call__(self, image: np.ndarray) -> list[Detection]:
        """The faces of a uint8 RGB array (H, W, 3), largest first, then from the top and the left."""
        height, width = image.shape[:2]
        longest = max(height, width)
        small = _resized(image, min(1., YUNET_SIDES[1] / longest))
        views = {0: self._search(small)}
        if longest > YUNET_SIDES[1] and (views[0][:, 3] < SMALL_FACE).any():
            larger = _resized(image, min(1., YUNET_SIDES[2] / longest))
            views[0] = self._search(larger)
            views[0][:, :14] *= np.tile((small.shape[1] / larger.shape[1], small.shape[0] / larger.shape[0]), 7)
        # It sees faces that lie or stand on their heads, too, but less surely, and takes them for upright ones.
        if self.turn and _best(views[0]) < UPRIGHT_SCORE:
            views |= {90 * quarters: self._search(np.rot90(small, quarters)) for quarters in (1, 2, 3)}
            views = {turn: found for turn, found in views.items() if turn == 0 or _best(found) >= TURNED_SCORE}
        turn = max(views, key=lambda angle: _best(views[angle]) + 0.05 * (angle == 0))
        found = views[turn]
        # Corners and points as (N, 7, 2), back to the picture as it was given.
        places = np.concatenate([found[:, :2], found[:, :2] + found[:, 2:4], found[:, 4:14]], axis=1).reshape(-1, 7, 2)
        for turned_width in (small.shape[1], small.shape[0], small.shape[1])[:turn // 90][::-1]:
            places = np.stack([turned_width - places[:, :, 1], places[:, :, 0]], axis=2)
        places *= np.array([width / small.shape[1], height / small.shape[0]])
        detections = []
        for corners, points, score in zip(places[:, :2], places[:, 2:], found[:, -1], strict=True):
            (left, top), (right, bottom) = corners.min(axis=0).tolist(), corners.max(axis=0).tolist()
            if left < width and top < height and right > 0 and bottom > 0:
                detections.append(Detection((left, top, right - left, bottom - top), float(score), points, turn))
        # Rounded, so that the order does not hang on the last digits.
        return sorted(detections, key=lambda face: (
            -round(face.box[2]) * round(face.box[3]), round(face.box[1]), round(face.box[0])))

    def _search(self, image: np.ndarray) -> np.ndarray:
        """Rows (N, 15) of x, y, width, height, five points and the score, the best first, in pixels of the image."""
        rows, longest = [np.empty((0, 15))], max(image.shape[:2])
        for number, side in enumerate(sorted({min(side, max(YUNET_SIDES[0], longest)) for side in YUNET_SIDES})):
            network = self._network(number)
            resized = _resized(image, side / longest)
            height, width = resized.shape[:2]
            padded = cv2.cvtColor(resized, cv2.COLOR_RGB2BGR)
            if min(height, width) < MIN_INPUT:
                padding = 0, max(0, MIN_INPUT - height), 0, max(0, MIN_INPUT - width)
                padded = cv2.copyMakeBorder(padded, *padding, cv2.BORDER_CONSTANT)
            network.setInputSize(padded.shape[1::-1])
            found = network.detect(padded)[1]
            if found is not None:
                scale = np.array([image.shape[1] / width, image.shape[0] / height])
                rows.append(np.concatenate([found[:, :14] * np.tile(scale, 7), found[:, 14:]], axis=1))
        kept: list[np.ndarray] = []
        for row in sorted(np.concatenate(rows), key=lambda row: -row[-1]):
            if np.isfinite(row).all() and not any(_same_face(row, other) for other in kept):
                kept.append(row)
        return np.array(kept).reshape(-1, 15)


@contextmanager
def opencv_on_one_thread() -> Iterator[None]:
    """For a pool with a picture a thread: threads of OpenCV's own beside it cost a tenth of the time.

    The setting is that of the process: the last who leaves puts back what the first found.
    """
    with _LOADING:
        if not _THREADS['users']:
            _THREADS['before'] = cv2.getNumThreads()
            cv2.setNumThreads(1)
        _THREADS['users'] += 1
    try:
        yield
    finally:
        with _LOADING:
            _THREADS['users'] -= 1
            if not _THREADS['users']:
                cv2.setNumThreads(_THREADS['before'])


def _resized(image: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return np.ascontiguousarray(image)
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(image), size, interpolation=how)


def _best(found: np.ndarray) -> float:
    """The highest score, 0 where nothing is found."""
    return float(found[0, -1]) if len(found) else 0.


def _same_face(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two boxes overlap by 0.3 of their union, or one lies in the other by 0.6 of the smaller."""
    sides = np.minimum(first[:2] + first[2:4], second[:2] + second[2:4]) - np.maximum(first[:2], second[:2])
    common = sides.clip(0).prod()
    areas = first[2:4].prod(), second[2:4].prod()
    return bool(common > 0.3 * (sum(areas) - common) or common > 0.6 * min(areas))


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


def crop_upright(image: np.ndarray, box: Any, five_points: Any, margin: float = 0.) -> np.ndarray:
    """As `crop_face`, turned around the middle so that the five points stand as upright as in FER+'s frames.

    Bilinear, at the size that the face has, but for very small and very large ones.
    """
    x, y, width, height = box
    side = max(width, height) * (1 + 2 * margin)
    size = crop_size(side)
    matrix = align_matrix(five_points, template=FERPLUS_TEMPLATE)[:, :2]
    matrix *= size / side / math.hypot(*matrix[:, 0])
    shift = (size - 1) / 2 - matrix @ (x + width / 2 - 0.5, y + height / 2 - 0.5)
    return _warped(image, np.column_stack([matrix, shift]), size)


def crop_size(side: float) -> int:
    """The side of a crop that is sampled from `side` pixels: a network's own transform shrinks better than sampling."""
    return min(max(round(side), 48), 1024)


def _warped(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def align_matrix(five_points: Any, size: int = 112, template: np.ndarray = FIVE_POINT_TEMPLATE) -> np.ndarray:
    """Least-squares similarity transform (2, 3) from image pixels to crop pixels; see `align_face`."""
    points = np.asarray(five_points, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f'five_points must be five finite (x, y) pairs, got an array of shape {points.shape}.')
    if size < 1:
        raise ValueError(f'size must be at least 1, got {size}.')
    # As complex numbers a similarity without reflection is w = a z + b, and least squares has a closed form.
    z = points @ (1, 1j)
    w = template @ (1, 1j) * (size / 112)
    z_mean, w_mean = z.mean(), w.mean()
    z, w = z - z_mean, w - w_mean
    spread = np.vdot(z, z).real
    a = np.vdot(z, w) / spread if spread > 1e-6 else 0.
    if not np.isfinite(a) or abs(a) < 1e-6:
        raise ValueError('five_points do not form a face: they (nearly) coincide, or are in the wrong order.')
    b = w_mean - a * z_mean
    return np.array([(a.real, -a.imag, b.real), (a.imag, a.real, b.imag)])


def align_face(
        image: ImageInput, five_points: Any, size: int = 112, template: np.ndarray = FIVE_POINT_TEMPLATE,
) -> np.ndarray:
    """Turn, scale and shift a face so that its five points meet a template, and cut it out.

    Bilinear; beyond the image its border pixels are repeated.

    Args:
        image: Whatever `read_image` takes.
        five_points: (5, 2) pixels (x, y) of the upright image: eyes, nose tip, mouth corners, those on the left first.
        size: Side of the crop, uint8 RGB (size, size, 3); the template is scaled with it.
        template: Where the points come to lie in a crop of 112x112 pixels (5, 2): as in ArcFace, or `FERPLUS_TEMPLATE`.

    Raises:
        ImageError: When the image cannot be read.
        ValueError: When the points are not five finite (x, y) pairs, or lie where no transform fits.
    """
    matrix = align_matrix(five_points, size, template)
    return _warped(read_image(image), matrix, size)


def aligned_box(
        five_points: Any, template: np.ndarray = FIVE_POINT_TEMPLATE) -> tuple[float, float, float, float]:
    """The upright square (x, y, width, height) with the center and the side of the aligned crop."""
    matrix = align_matrix(five_points, template=template)
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
    if max(width, height) > 3 * max(image.shape):
        raise ValueError(f'the detector gave the box {x:g}, {y:g}, {width:g}, {height:g}: far larger than the image.')
    return left, top, right - left, bottom - top
