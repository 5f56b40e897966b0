"""Reading images, finding, cropping and aligning faces."""
from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from skimage.transform import SimilarityTransform

from timm_lfnsb import align_face
from timm_lfnsb.predict.faces import (
    FIVE_POINT_TEMPLATE,
    HaarDetector,
    ImageError,
    align_matrix,
    aligned_box,
    clip_box,
    crop_face,
    find_images,
    read_image,
)


@pytest.fixture(scope='module')
def astronaut() -> np.ndarray:
    return skimage.data.astronaut()


@pytest.fixture
def gradient() -> np.ndarray:
    """RGB (6, 8, 3) with another value everywhere, none of it symmetric."""
    return np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def test_import_does_not_import_opencv():
    code = "import sys, timm_lfnsb; assert 'cv2' not in sys.modules; timm_lfnsb.align_face; assert 'cv2' in sys.modules"
    subprocess.run([sys.executable, '-c', code], check=True)


# Reading

def test_path_pil_and_array_agree(tmp_path, gradient):
    Image.fromarray(gradient).save(tmp_path / 'a.png')
    for source in (tmp_path / 'a.png', str(tmp_path / 'a.png'), Image.fromarray(gradient), gradient):
        np.testing.assert_array_equal(read_image(source), gradient)


def test_exif_orientation_is_applied(tmp_path, gradient):
    for orientation, stored in {
        3: np.rot90(gradient, 2), 6: np.rot90(gradient), 8: np.rot90(gradient, -1), 2: gradient[:, ::-1],
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f'{orientation}.png'
        Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
        np.testing.assert_array_equal(read_image(path), gradient)
        with Image.open(path) as image:
            np.testing.assert_array_equal(read_image(image), gradient)


@pytest.mark.parametrize('dtype', ['<u2', '>u2'])
def test_16_bit_is_scaled(tmp_path, dtype):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.repeat(np.array([[0, 1, 128, 255]], dtype=np.uint8)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(values.astype(dtype)), expected)
    Image.fromarray(values).save(tmp_path / 'a.png')  # I;16
    Image.fromarray(values.astype(np.int32)).save(tmp_path / 'a.tif')  # I
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png'), expected)
    np.testing.assert_array_equal(read_image(tmp_path / 'a.tif'), expected)
    np.testing.assert_array_equal(read_image(Image.fromarray(values.astype(np.int32))), expected)


def test_integers_beyond_16_bit_are_refused():
    with pytest.raises(ImageError, match='beyond 65535'):
        read_image(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)))


def test_floats(tmp_path, gradient):
    np.testing.assert_array_equal(read_image(gradient / 255), gradient)
    np.testing.assert_array_equal(read_image((gradient / 255).astype(np.float32)), gradient)
    Image.fromarray((gradient[:, :, 0] / 255).astype(np.float32)).save(tmp_path / 'f.tif')
    np.testing.assert_array_equal(read_image(tmp_path / 'f.tif')[:, :, 2], gradient[:, :, 0])
    for wrong in (gradient.astype(float), gradient / 255 - 0.1, np.full((2, 2), np.nan)):
        with pytest.raises(ImageError, match=r'\[0, 1\]'):
            read_image(wrong)


def test_grey_palette_bilevel_and_cmyk(tmp_path, gradient):
    grey = gradient[:, :, 0]
    Image.fromarray(grey).save(tmp_path / 'l.png')
    np.testing.assert_array_equal(read_image(tmp_path / 'l.png'), np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(read_image(grey), np.stack([grey] * 3, axis=2))
    palette = Image.fromarray(gradient).quantize(48)
    palette.save(tmp_path / 'p.gif')
    np.testing.assert_array_equal(read_image(tmp_path / 'p.gif'), np.asarray(palette.convert('RGB')))
    np.testing.assert_array_equal(read_image(Image.fromarray(grey > 60)), np.stack([255 * (grey > 60)] * 3, axis=2))
    Image.new('CMYK', (16, 16), (0, 255, 255, 0)).save(tmp_path / 'c.jpg')  # full magenta and yellow: red
    assert np.abs(read_image(tmp_path / 'c.jpg').astype(int) - (255, 0, 0)).max() <= 3


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 127)]], dtype=np.uint8)
    expected = [[(10, 20, 30), (255, 255, 255), (128, 128, 128)]]
    Image.fromarray(rgba).save(tmp_path / 'rgba.png')
    for source in (rgba, Image.fromarray(rgba), tmp_path / 'rgba.png'):
        np.testing.assert_array_equal(read_image(source), expected)
    np.testing.assert_array_equal(read_image(rgba.astype(np.uint16) * 257), expected)
    la = Image.merge('LA', [Image.fromarray(rgba[:, :, 0]), Image.fromarray(rgba[:, :, 3])])
    np.testing.assert_array_equal(read_image(la), [[(10,) * 3, (255,) * 3, (128,) * 3]])
    palette = Image.new('P', (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / 'p.png', transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / 'p.png'), [[(200, 0, 0), (255, 255, 255)]])


def test_unreadable_files(tmp_path, monkeypatch, astronaut):
    with pytest.raises(ImageError, match='no such file'):
        read_image(tmp_path / 'missing.png')
    with pytest.raises(ImageError, match='cannot be read'):
        read_image(tmp_path)
    for name, content in {'empty.png': b'', 'text.jpg': b'not a picture'}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match='not an image'):
            read_image(tmp_path / name)
    for suffix in ('png', 'jpg', 'webp', 'tif'):
        path = tmp_path / f'cut.{suffix}'
        Image.fromarray(astronaut).save(path)
        path.write_bytes(path.read_bytes()[:9000])
        with pytest.raises(ImageError, match=f'cut.{suffix}'):
            read_image(path)
    Image.fromarray(astronaut).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ImageError, match='decompression bomb'):
        read_image(tmp_path / 'bomb.png')


@pytest.mark.parametrize('array', [
    np.zeros((0, 5), np.uint8), np.zeros(5, np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((1, 4, 4, 3), np.uint8),
    np.zeros((4, 4), np.int64), np.zeros((4, 4), bool), np.zeros((4, 4), np.uint32),
])
def test_wrong_arrays(array):
    with pytest.raises(ImageError, match='image array'):
        read_image(array)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match='not bytes'):
        read_image(b'photo.jpg')  # type: ignore[arg-type]


def test_find_images(tmp_path):
    for name in ('b/2.JPG', 'b/1.png', 'a.tiff', 'notes.txt', '.hidden.png', 'out/a.png'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = find_images([tmp_path, tmp_path / 'notes.txt'], skip=tmp_path / 'out')
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found] == ['a.tiff', 'b/1.png', 'b/2.JPG', 'notes.txt']
    assert [relative.as_posix() for _, relative in found] == ['a.tiff', 'b/1.png', 'b/2.JPG', 'notes.txt']
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='has no images'):
        find_images([tmp_path / 'empty'])


# Finding and cropping

def test_one_face_in_the_portrait(astronaut):
    detector = HaarDetector()
    for scale in (0.5, 1, 3):  # 3: beyond the size that is searched
        image = cv2.resize(astronaut, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        boxes = detector(image)
        assert boxes.shape == (1, 4)
        np.testing.assert_allclose(boxes[0] / scale, (177, 66, 95, 95), atol=13)


def test_two_faces_largest_first(astronaut):
    small = cv2.resize(astronaut, (300, 300), interpolation=cv2.INTER_AREA)
    image = np.zeros((512, 812, 3), np.uint8)
    image[:300, :300], image[:, 300:] = small, astronaut
    boxes = HaarDetector()(image)
    assert boxes.shape == (2, 4) and boxes[0, 2] > boxes[1, 2]
    assert boxes[0, 0] > 300 and boxes[1, 0] < 300


@pytest.mark.parametrize('shape', [(1, 1, 3), (1, 3000, 3), (200, 300, 3)])
def test_no_face(shape):
    assert HaarDetector()(np.full(shape, 128, np.uint8)).shape == (0, 4)


def test_missing_cascade(monkeypatch, tmp_path):
    monkeypatch.setattr(cv2.data, 'haarcascades', str(tmp_path))
    with pytest.raises(RuntimeError, match='opencv-python-headless<5'):
        HaarDetector()


def test_crop(gradient):
    np.testing.assert_array_equal(crop_face(gradient, (2, 1, 4, 4)), gradient[1:5, 2:6])
    np.testing.assert_array_equal(crop_face(gradient, (3, 2, 2, 2), margin=0.5), gradient[1:5, 2:6])
    np.testing.assert_array_equal(crop_face(gradient, (2, 1, 4, 4), margin=-0.25), gradient[2:4, 3:5])
    np.testing.assert_array_equal(crop_face(gradient, (3, 1, 2, 4)), gradient[1:5, 2:6])  # widened to a square
    assert crop_face(gradient, (2, 1, 1, 1), margin=-0.49).shape == (1, 1, 3)


def test_crop_beyond_the_border_repeats_it(gradient):
    crop = crop_face(gradient, (-2, -1, 4, 4))
    np.testing.assert_array_equal(crop[1:, 2:], gradient[:3, :2])
    assert (crop[0] == crop[1]).all() and (crop[:, :2] == crop[:, 2:3]).all()


def test_clip_box(gradient):
    assert clip_box((-3.4, 1.6, 20, 2), gradient) == (0, 2, 8, 2)
    for outside in ((9, 0, 4, 4), (0, 0, 0, 3), (-5, 0, 5, 5), (2, 2, -1, 3)):
        with pytest.raises(ValueError, match='outside the image'):
            clip_box(outside, gradient)


# Alignment

def _least_squares(points: np.ndarray, size: int) -> np.ndarray:
    """The four parameters of u = a x - b y + c, v = b x + a y + d from their linear system."""
    target = FIVE_POINT_TEMPLATE * size / 112
    rows = [(x, -y, 1, 0) for x, y in points] + [(y, x, 0, 1) for x, y in points]
    a, b, c, d = np.linalg.lstsq(np.array(rows), np.concatenate([target[:, 0], target[:, 1]]), rcond=None)[0]
    return np.array([(a, -b, c), (b, a, d)])


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('size', [112, 96, 224])
def test_matrix_is_the_least_squares_similarity(seed, size):
    rng = np.random.default_rng(seed)
    transform = SimilarityTransform(
        scale=rng.uniform(0.1, 8), rotation=rng.uniform(-3, 3), translation=rng.uniform(-500, 500, 2))
    points = transform(FIVE_POINT_TEMPLATE)
    points += rng.normal(0, 0.05 * np.ptp(points), points.shape)
    matrix = align_matrix(points, size)
    np.testing.assert_allclose(matrix, _least_squares(points, size), rtol=1e-8, atol=1e-8)
    assert np.linalg.det(matrix[:, :2]) > 0  # never a reflection


def test_exact_points_meet_the_template():
    transform = SimilarityTransform(scale=3, rotation=0.4, translation=(50, 20))
    matrix = align_matrix(transform(FIVE_POINT_TEMPLATE))
    np.testing.assert_allclose(matrix, transform.inverse.params[:2], atol=1e-9)
    x, y, width, height = aligned_box(transform(FIVE_POINT_TEMPLATE))
    np.testing.assert_allclose((x + width / 2, y + height / 2), transform([(56, 56)])[0])
    assert width == height == pytest.approx(3 * 112)


def test_align_face_pixels():
    """A smooth picture sampled through a known transform gives its values at the transformed pixels."""
    y, x = np.mgrid[:300, :400]
    image = np.stack([x * 0.6, y * 0.8, (x + y) * 0.3], axis=2).astype(np.float32) / 255
    transform = SimilarityTransform(scale=1.5, rotation=0.2, translation=(120, 40))
    crop = align_face(image, transform(FIVE_POINT_TEMPLATE))
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    v, u = np.mgrid[:112, :112]
    points = transform(np.stack([u.ravel(), v.ravel()], axis=1))
    expected = np.stack([points[:, 0] * 0.6, points[:, 1] * 0.8, points.sum(axis=1) * 0.3], axis=1)
    assert np.abs(crop.reshape(-1, 3) - expected).max() < 1.5
    assert align_face(image, transform(FIVE_POINT_TEMPLATE), size=64).shape == (64, 64, 3)


def test_align_face_beyond_the_border_repeats_it():
    crop = align_face(np.full((50, 50), 77, np.uint8), FIVE_POINT_TEMPLATE - 60)
    assert (crop == 77).all()


@pytest.mark.parametrize('points', [
    np.zeros((4, 2)), np.zeros((5, 3)), np.zeros(10), np.full((5, 2), np.nan), np.full((5, 2), np.inf),
    np.full((5, 2), 30.), FIVE_POINT_TEMPLATE * 1e-6,
])
def test_unusable_points(points):
    with pytest.raises(ValueError, match='five_points'):
        align_face(np.zeros((100, 100, 3), np.uint8), points)


def test_unusable_size():
    with pytest.raises(ValueError, match='size'):
        align_matrix(FIVE_POINT_TEMPLATE, 0)
