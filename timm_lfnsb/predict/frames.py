"""Moving pictures as they come: files, cameras and folders of frames, read one frame at a time."""
from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, TypeAlias

import cv2
import numpy as np

from ..data.images import ImageError, find_images, read_image
from ..errors import UserError, one_sentence, reason


@dataclass(frozen=True)
class Frame:
    """One picture of a moving one."""

    index: int  # in its source, from 0
    time: float  # in seconds, from the first frame on
    image: np.ndarray | ImageError  # uint8 RGB (H, W, 3), upright; or what is wrong with it


@dataclass(frozen=True)
class Footage:
    """Frames to come, once, and what is known of them before."""

    frames: Iterator[Frame]
    rate: float  # frames a second
    count: int | None = None  # how many frames come, about
    live: bool = False  # whether frames are lost that nobody takes in time


VideoInput: TypeAlias = str | os.PathLike[str] | int | Footage


def open_footage(source: VideoInput, fps: float | None = None, folder_rate: float = 25.) -> Footage:
    """Open a file, a camera by its number, or a folder of images in the order of their names; `Footage` stays as it is.

    A frame that cannot be read has an `ImageError` in place of its image, and so has one more at the end of a file that
    is shorter than it says. Phones' videos are turned upright. Cameras give the newest frame, and skip those that came
    while nobody asked.

    Args:
        fps: Frames a second to take, by default all.
        folder_rate: Frames a second that a folder's images stand for.

    Raises:
        ValueError: When a rate is not above 0.
        UserError: When there is no such source, it cannot be opened, or PyAV is missing, which reads files.
    """
    if not folder_rate > 0 or (fps is not None and not fps > 0):
        raise ValueError(f'fps and folder_rate must be above 0, got {fps} and {folder_rate}.')
    if isinstance(source, Footage):
        return source
    if isinstance(source, int):
        return _open_camera(source, fps)
    path = Path(source)
    if not path.exists():
        raise UserError(f'there is no file or folder {path}; a camera is a number, the first one 0.')
    return _open_folder(path, fps, folder_rate) if path.is_dir() else _open_file(path, fps)


def _pace(fps: float | None) -> Callable[[float], bool]:
    """Whether the frame at a time is to be taken so that `fps` a second are: the first one of each 1 / fps seconds."""
    last = -1

    def wanted(seconds: float) -> bool:
        nonlocal last
        slot = int(seconds * fps + 1e-6) if fps else last + 1
        is_new, last = slot > last, max(slot, last)
        return is_new

    return wanted


def _open_folder(path: Path, fps: float | None, rate: float) -> Footage:
    def natural(file: Path) -> list[Any]:  # frame10 comes after frame9
        return [int(part) if part.isdecimal() else part for part in re.split(r'(\d+)', str(file))]

    files = sorted((file for file, _ in find_images(path)), key=natural)

    def frames() -> Iterator[Frame]:
        wanted = _pace(fps)
        for index, file in enumerate(files):
            if wanted(index / rate):
                try:
                    yield Frame(index, index / rate, read_image(file))
                except ImageError as error:
                    yield Frame(index, index / rate, error)

    taken = min(fps or rate, rate)
    return Footage(frames(), taken, max(1, round(len(files) * taken / rate)))


def _open_file(path: Path, fps: float | None) -> Footage:
    with one_sentence(f'{path} cannot be read as a video'):
        import av
    try:
        container: Any = av.open(str(path))
    except av.FFmpegError as error:
        raise UserError(f'{path} cannot be read as a video ({_reason(error)}): it is none, or is damaged, or was cut '
                        'short before its index was written.') from error
    if not container.streams.video:
        raise UserError(f'{path} has no pictures in it.')
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    slack = 3 / rate
    seconds = float(stream.duration * stream.time_base) if stream.duration else 0.
    if not seconds and container.duration:  # of the longest stream, where sound may go on for a little
        seconds, slack = container.duration / av.time_base, 0.5 + slack

    def frames() -> Iterator[Frame]:
        wanted, index, start, now = _pace(fps), 0, None, 0.
        with closing(container):
            for picture in _decoded(container, stream):
                if not isinstance(picture, Exception) and picture.time is not None:
                    start = picture.time if start is None else start
                    now = picture.time - start
                if isinstance(picture, Exception) or picture.is_corrupt:
                    what = f' ({_reason(picture)})' if isinstance(picture, Exception) else ''
                    yield Frame(index, now, ImageError(f'{path}: frame {index} at {now:.2f} s is damaged{what}.'))
                elif wanted(now):
                    yield Frame(index, now, np.rot90(picture.to_ndarray(format='rgb24'), round(picture.rotation / 90)))
                index, now = index + 1, now + 1 / rate
        if now + slack < seconds:
            yield Frame(index, now, ImageError(
                f'{path} ends after {now:.2f} of {seconds:.2f} s: it was cut short, or is damaged from there on.'))

    taken = min(fps or rate, rate)
    return Footage(frames(), taken, max(1, round(seconds * taken)) if seconds else None)


def _reason(error: Exception) -> str:
    return getattr(error, 'strerror', None) or reason(error)


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """PyAV's frames, and its errors in the place of those that it cannot decode."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
        except Exception as error:  # the rest cannot be found
            yield error
            return
        try:
            yield from packet.decode()
        except EOFError:
            return
        except Exception as error:
            yield error


def _open_camera(number: int, fps: float | None) -> Footage:
    with one_sentence(f'camera {number} cannot be opened'):
        camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise UserError(f'camera {number} cannot be opened: is it plugged in, is no other program using it, and may '
                        'this one? The first camera is 0.')
    rate = camera.get(cv2.CAP_PROP_FPS)
    rate = rate if 1 <= rate <= 1000 else 30.  # drivers that do not know say 0 or anything

    def frames() -> Iterator[Frame]:
        newest, stop = Queue[tuple[int, float, Any]](maxsize=1), threading.Event()

        def grab() -> None:
            index, good = 0, True
            while good and not stop.is_set():
                good, image = camera.read()
                with suppress(Empty):
                    newest.get_nowait()  # it came too late for whoever looks
                newest.put((index, time.monotonic(), image if good else None))
                index += 1

        thread = threading.Thread(target=grab, daemon=True)
        thread.start()
        wanted, start = _pace(fps), None
        try:
            while True:
                index, now, image = newest.get()
                start = now if start is None else start
                if image is None:
                    yield Frame(index, now - start, ImageError(f'camera {number} gives no more frames.'))
                    return
                if wanted(now - start):
                    yield Frame(index, now - start, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        finally:
            stop.set()
            thread.join(timeout=5)
            camera.release()

    return Footage(frames(), min(fps or rate, rate), live=True)
