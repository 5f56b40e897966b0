"""Frames of files, folders and cameras."""
from __future__ import annotations

import threading
import time

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from timm_lfnsb.data.images import ImageError
from timm_lfnsb.errors import UserError
from timm_lfnsb.predict.frames import open_footage


def write_film(path, images, rate=20, codec='libx264', rotation=None, **options):
    """A film of arrays, with a key frame every ten."""
    with av.open(str(path), 'w', options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.gop_size = 'yuv420p', 10
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format='rgb24')))
        container.mux(stream.encode())
    return path


def greys(*values):
    return [np.full((32, 48, 3), value, np.uint8) for value in values]


@pytest.fixture(scope='module')
def noisy():
    """Forty frames that the codec cannot make small."""
    return list(np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3), np.uint8))


def read(source, **options):
    """Indices, times and images of what can be read, the errors, and what was known before."""
    footage = open_footage(source, **options)
    frames = list(footage.frames)
    good = [frame for frame in frames if isinstance(frame.image, np.ndarray)]
    return good, [frame.image for frame in frames if isinstance(frame.image, ImageError)], footage


@pytest.mark.parametrize('name', ['film.mp4', 'film.mkv', 'film.avi'])
def test_every_frame_of_a_file(tmp_path, name):
    good, errors, footage = read(write_film(tmp_path / name, greys(*range(20, 200, 20)), codec='mpeg4'))
    assert not errors and footage.rate == 20 and footage.count == 9 and not footage.live
    assert [frame.index for frame in good] == list(range(9))
    np.testing.assert_allclose([frame.time for frame in good], np.arange(9) / 20, atol=1e-3)
    np.testing.assert_allclose([frame.image.mean() for frame in good], range(20, 200, 20), atol=6)
    assert good[0].image.shape == (32, 48, 3) and good[0].image.dtype == np.uint8


@pytest.mark.parametrize('fps, indices', [(5, [0, 4, 8]), (8, [0, 3, 5, 8]), (100, list(range(10))), (0.1, [0])])
def test_frames_a_second(tmp_path, fps, indices):
    """The first frame of each 1 / fps seconds; never more than there are."""
    for i, image in enumerate(greys(*range(10))):
        Image.fromarray(image).save(tmp_path / f'{i}.png')
    film = write_film(tmp_path / 'film.mp4', greys(*range(10)))
    for source in (film, tmp_path):
        good, _, footage = read(source, fps=fps, folder_rate=20)
        assert [frame.index for frame in good] == indices
        assert footage.rate == min(fps, 20) and abs(footage.count - len(indices)) <= 1


def test_a_folder_in_the_order_of_its_numbers(tmp_path):
    for value in (2, 10, 1, 33):
        Image.fromarray(greys(value)[0]).save(tmp_path / f'frame{value}.png')
    (tmp_path / 'frame5.png').write_bytes(b'')
    good, [error], footage = read(tmp_path, folder_rate=10)
    assert [frame.image.max() for frame in good] == [1, 2, 10, 33] and footage.count == 5
    assert [frame.time for frame in good] == [0, 0.1, 0.3, 0.4] and 'frame5.png' in str(error)


@pytest.mark.parametrize('degrees', [90, 180, -90])
def test_videos_of_phones_are_turned_upright(tmp_path, degrees):
    if not hasattr(av.video.stream.VideoStream, 'set_display_rotation'):
        pytest.skip('PyAV cannot write rotated videos before release 18: pip install -U av')
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48] = 255  # the top left corner is bright
    film = write_film(tmp_path / 'film.mp4', [np.rot90(upright, -degrees // 90)], rotation=degrees)
    [frame], _, _ = read(film)
    assert np.abs(frame.image.astype(int) - upright).mean() < 3


@pytest.mark.parametrize('name, options', [
    ('film.mp4', {'movflags': 'faststart'}), ('film.mkv', {}), ('film.avi', {})])
def test_a_file_cut_short_gives_what_is_there_and_says_so(tmp_path, noisy, name, options):
    path = write_film(tmp_path / name, noisy, **options)
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])
    good, errors, _ = read(path)
    assert 10 <= len(good) <= 25 and errors and all(str(path) in str(error) for error in errors)
    assert 'cut short' in str(errors[-1]) or 'damaged' in str(errors[-1])


def test_damage_in_the_middle_does_not_end_a_file(tmp_path, noisy):
    path = write_film(tmp_path / 'film.mp4', noisy, movflags='faststart')
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(1)
    middle = len(content) // 2
    content[middle:middle + 4000] = rng.bytes(4000)
    path.write_bytes(content)
    good, errors, _ = read(path)
    assert 1 <= len(errors) and 25 <= len(good) < 40 and good[-1].time == pytest.approx(1.95)
    assert 'Errno' not in str(errors[0]) and f'{path}: frame ' in str(errors[0])


@pytest.mark.parametrize('source, message', [
    ('missing.mp4', 'there is no file or folder'), ('text.mp4', 'cannot be read as a video'),
    ('empty', 'has no images'),
    ('sound.wav', 'no pictures'), ('late.mp4', 'before its index was written'), (7, 'camera 7 cannot be opened'),
    (10 ** 12, 'camera 1000000000000 cannot be opened'),
])
def test_what_is_no_moving_picture(tmp_path, monkeypatch, noisy, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.mp4').write_text('no film')
    with av.open('sound.wav', 'w') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout='mono')
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    content = write_film(tmp_path / 'late.mp4', noisy[:10]).read_bytes()
    (tmp_path / 'late.mp4').write_bytes(content[:len(content) // 2])
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: FakeCamera([]))
    with pytest.raises(UserError, match=message):
        open_footage(source)


@pytest.mark.parametrize('options', [{'fps': 0}, {'fps': -1}, {'folder_rate': 0}, {'fps': float('nan')}])
def test_rates_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match='above 0'):
        open_footage(tmp_path, **options)


class FakeCamera:
    """cv2.VideoCapture, whose frames come when `go` is set and end after the last one; none: it does not open."""

    def __init__(self, images, go=None):
        self.images, self.go, self.released, self.opened = list(images), go, threading.Event(), bool(images)

    def isOpened(self):
        return self.opened

    def get(self, what):
        return 0.  # as many drivers say

    def read(self):
        if self.go:
            self.go.acquire(timeout=20)
        return (True, self.images.pop(0)) if self.images else (False, None)

    def release(self):
        self.released.set()


def test_a_camera_gives_the_newest_frame(monkeypatch):
    """Frames that come while nobody asks are skipped, colours are turned to RGB, and the end is said."""
    blue = [np.full((8, 8, 3), (200, value, 0), np.uint8) for value in range(6)]
    go = threading.Semaphore(0)
    camera = FakeCamera(blue, go)
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: camera)
    footage = open_footage(0)
    assert footage.live and footage.rate == 30 and footage.count is None
    go.release()
    first = next(footage.frames)
    assert first.image[0, 0].tolist() == [0, 0, 200] and (first.index, first.time) == (0, 0)
    for _ in range(5):
        go.release()
    while camera.images:
        time.sleep(0.001)
    rest = []
    go.release()
    for frame in footage.frames:
        rest.append(frame)
    assert len(rest) < 6 and 'gives no more frames' in str(rest[-1].image) and rest[-1].index == 6
    assert camera.released.is_set()


def test_leaving_a_camera_lets_go_of_it(monkeypatch):
    camera = FakeCamera(greys(*range(200)))
    monkeypatch.setattr(cv2, 'VideoCapture', lambda number: camera)
    footage = open_footage(0)
    next(footage.frames)
    footage.frames.close()
    assert camera.released.is_set()
