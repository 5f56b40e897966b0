"""Reading images of every kind, and finding them in folders."""
from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

from timm_lfnsb.data.images import ImageError, find_images, read_image
from timm_lfnsb.errors import UserError


@pytest.mark.parametrize('orientation, stored', [
    (1, np.array), (3, lambda a: np.rot90(a, 2)), (6, np.rot90), (8, lambda a: np.rot90(a, -1)),
    (2, lambda a: a[:, ::-1]),
])
def test_path_and_pil_agree_with_exif_orientation_applied(tmp_path, gradient, orientation, stored):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored(gradient))).save(tmp_path / 'a.png', exif=exif)
    with Image.open(tmp_path / 'a.png') as image:
        for source in (image, tmp_path / 'a.png', str(tmp_path / 'a.png'), gradient):
            np.testing.assert_array_equal(read_image(source), gradient)
        assert image.getexif()[0x0112] == orientation  # people's own images stay as they are


def test_16_bit_is_scaled(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    expected = np.repeat([[[0], [1], [128], [255]]], 3, axis=2)
    Image.fromarray(values).save(tmp_path / 'a.png')  # I;16
    Image.fromarray(values.astype(np.int32)).save(tmp_path / 'a.tif')  # I
    for source in (values.astype('<u2'), values.astype('>u2'), tmp_path / 'a.png', tmp_path / 'a.tif',
                   Image.fromarray(values.astype(np.int32))):
        np.testing.assert_array_equal(read_image(source), expected)
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
    palette = Image.fromarray(gradient).quantize(48)
    palette.save(tmp_path / 'p.gif')
    np.testing.assert_array_equal(read_image(tmp_path / 'p.gif'), palette.convert('RGB'))
    for source, expected in (
            (tmp_path / 'l.png', grey), (grey, grey), (Image.fromarray(grey > 60), 255 * (grey > 60))):
        np.testing.assert_array_equal(read_image(source), np.stack([expected] * 3, axis=2))
    Image.new('CMYK', (16, 16), (0, 255, 255, 0)).save(tmp_path / 'c.jpg')  # full magenta and yellow: red
    assert np.abs(read_image(tmp_path / 'c.jpg').astype(int) - (255, 0, 0)).max() <= 3


def test_transparency_is_laid_on_white(tmp_path):
    rgba = np.array([[(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 127)]], dtype=np.uint8)
    Image.fromarray(rgba).save(tmp_path / 'rgba.png')
    for source in (rgba, Image.fromarray(rgba), tmp_path / 'rgba.png', rgba.astype(np.uint16) * 257):
        np.testing.assert_array_equal(read_image(source), [[(10, 20, 30), (255, 255, 255), (128, 128, 128)]])
    la = Image.merge('LA', [Image.fromarray(rgba[:, :, 0]), Image.fromarray(rgba[:, :, 3])])
    np.testing.assert_array_equal(read_image(la), [[(10,) * 3, (255,) * 3, (128,) * 3]])
    palette = Image.new('P', (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / 'p.png', transparency=1)
    np.testing.assert_array_equal(read_image(tmp_path / 'p.png'), [[(200, 0, 0), (255, 255, 255)]])


def test_unreadable_files(tmp_path, monkeypatch, portrait):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'text.jpg').write_bytes(b'not a picture')
    for name, message in (('missing.png', 'no such file'), ('', 'cannot be read'), ('empty.png', 'not an image'),
                          ('text.jpg', 'not an image')):
        with pytest.raises(ImageError, match=message):
            read_image(tmp_path / name)
    for suffix in ('png', 'jpg', 'webp', 'tif'):
        path = tmp_path / f'cut.{suffix}'
        Image.fromarray(portrait).save(path)
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
        with pytest.raises(ImageError, match=f'cut.{suffix}'):
            read_image(path)
    Image.fromarray(portrait).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(ImageError, match='decompression bomb'):
        read_image(tmp_path / 'bomb.png')


def test_wrong_arrays_and_types():
    for shape, dtype in (((0, 5), 'u1'), (5, 'u1'), ((4, 4, 2), 'u1'), ((1, 4, 4, 3), 'u1'), ((4, 4), 'i8'),
                         ((4, 4), '?'), ((4, 4), 'u4')):
        with pytest.raises(ImageError, match='image array'):
            read_image(np.zeros(shape, dtype))
    for wrong in (None, 3, ['photo.jpg']):
        with pytest.raises(ImageError, match=r'not (NoneType|int|list)'):
            read_image(wrong)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r'^frame 7: an image array'):
        read_image(np.zeros((4, 4, 2), np.uint8), 'frame 7')


def test_contents_and_tensors(gradient):
    file = io.BytesIO()
    Image.fromarray(gradient).save(file, 'PNG')
    tensor = torch.from_numpy(gradient).permute(2, 0, 1)
    for source in (file, file, file.getvalue(), tensor, tensor / 255, (tensor / 255).to(torch.float64)):
        np.testing.assert_array_equal(read_image(source), gradient)
    for source in (tensor[0], tensor[:1]):
        np.testing.assert_array_equal(read_image(source), np.repeat(gradient[:, :, :1], 3, axis=2))
    for source, message in ((tensor[None], 'shape'), (b'photo.jpg', 'not an image'), (tensor.float(), r'\[0, 1\]')):
        with pytest.raises(ImageError, match=message):
            read_image(source)


@pytest.mark.parametrize('name, readable, advice', [
    ('a.heic', False, 'pip install pillow-heif'), ('a.heic', True, ''), ('a.NEF', False, 'into a JPEG'),
    ('a.svg', False, 'JPEG or PNG'), ('a.png', True, ''),
])
def test_unknown_formats_say_what_reads_them(tmp_path, monkeypatch, name, readable, advice):
    """A damaged file of a format that is read is no reason to install anything."""
    known = {suffix: kind for suffix, kind in Image.registered_extensions().items() if suffix not in ('.heic', '.HEIC')}
    monkeypatch.setattr(Image, 'registered_extensions', lambda: {**known, '.heic': 'HEIF'} if readable else known)
    (tmp_path / name).write_bytes(bytes(500))
    assert find_images(tmp_path)
    with pytest.raises(ImageError, match=f'{name}: not an image, or damaged{f"; .*{advice}" if advice else "[.]$"}'):
        read_image(tmp_path / name)


def test_heic(tmp_path, portrait):
    heif = pytest.importorskip('pillow_heif', reason='pip install pillow-heif to test HEIC')
    heif.from_pillow(Image.fromarray(portrait)).save(tmp_path / 'IMG_1.HEIC', quality=95)
    [(path, _)] = find_images(tmp_path)
    assert np.abs(read_image(path).astype(int) - portrait).mean() < 4


def test_find_images(tmp_path):
    for name in ('b/2.JPG', 'b/1.png', 'a.tiff', 'notes.txt', '.hidden.png', 'out/a.png'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = find_images(tmp_path, skip=tmp_path / 'out') + find_images(tmp_path / 'notes.txt')
    expected = ['a.tiff', 'b/1.png', 'b/2.JPG', 'notes.txt']
    assert [path.relative_to(tmp_path).as_posix() for path, _ in found] == expected
    assert [relative.as_posix() for _, relative in found] == expected
    os.symlink(tmp_path / 'round.jpg', tmp_path / 'round.jpg')
    assert 'round.jpg' in [str(relative) for _, relative in find_images(tmp_path, skip=tmp_path / 'out')]
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='has no images'):
        find_images(tmp_path / 'empty')
