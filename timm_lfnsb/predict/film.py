"""Where drawn frames go: a video file, or a window."""
from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from ..errors import UserError, one_sentence, reason

TICK = Fraction(1, 90_000)  # of a second, as MPEG counts
SUFFIXES = '.mp4', '.mkv', '.mov'


class FilmWriter:
    """Writes frames, all of one size with even sides, into a video file: H.264, or MPEG-4 where PyAV has no libx264.

    Args:
        path: Its ending, one of `SUFFIXES`, says which container it is.
        rate: Frames a second, for the encoder; each frame is shown from its own time on.

    Raises:
        UserError: When the ending is another one, or PyAV is missing.
        OSError: When the file cannot be written.
    """

    def __init__(self, path: Path, rate: float) -> None:
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"a video's file name ends in {', '.join(SUFFIXES)}, not in {path.suffix!r}.")
        with one_sentence('no video can be written'):
            import av
        path.touch()  # PyAV would say it at the first frame only
        self._container = cast(Any, av.open(str(path), 'w'))
        codec = 'libx264' if 'libx264' in av.codecs_available else 'mpeg4'
        self._stream = self._container.add_stream(codec, rate=max(1, round(rate)))
        self._stream.pix_fmt = 'yuv420p'
        self._stream.codec_context.time_base = TICK
        self._frame, self._last = av.VideoFrame, -1

    def write(self, image: np.ndarray, seconds: float) -> None:
        """Add the frame, uint8 RGB (H, W, 3), that is shown from `seconds` on."""
        if self._last < 0:
            self._stream.height, self._stream.width = image.shape[:2]
        frame = self._frame.from_ndarray(image, format='rgb24')
        self._last = frame.pts = max(self._last + 1, round(seconds / TICK))
        frame.time_base = TICK
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write what is left."""
        if self._last >= 0:
            self._container.mux(self._stream.encode())
        self._container.close()


class Window:
    """A window that shows frames; Tk's, because OpenCV's headless package has none.

    Raises:
        UserError: When there is no display, or Python was built without Tk.
    """

    def __init__(self, title: str) -> None:
        try:
            import tkinter

            from PIL import ImageTk
            self._root = tkinter.Tk()
        except Exception as error:  # where Tk is missing, so is the type of its errors
            raise UserError(f'no window can be shown here ({reason(error)}): leave --view out; --annotate OUT.mp4 '
                            'writes the same pictures.') from error
        self._photo = ImageTk.PhotoImage
        self._root.title(title)
        self._label = tkinter.Label(self._root)
        self._label.pack()
        self.open = True
        self._root.protocol('WM_DELETE_WINDOW', self._stop)
        for key in ('<Escape>', 'q'):
            self._root.bind(key, self._stop)

    def _stop(self, event: Any = None) -> None:
        self.open = False

    def show(self, image: np.ndarray) -> None:
        """Show a frame, uint8 RGB (H, W, 3), and take what keys and mouse did: `open` says whether to go on."""
        photo = self._photo(Image.fromarray(image))
        self._label.configure(image=photo)
        self._shown = photo  # Tk holds no reference to it
        self._root.update()

    def close(self) -> None:
        """Close the window."""
        self._root.destroy()
