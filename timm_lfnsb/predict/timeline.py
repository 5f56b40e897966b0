"""Expressions over time, drawn: video frames with boxes and a strip that runs, and one timeline a person."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..labels import EXPRESSIONS_8, canonical_name
from .tracking import Person, VideoFrame

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the color-blind can tell apart, in the order of `EXPRESSIONS_8`.
COLORS = ('#b0b0b0', '#e69f00', '#0072b2', '#f0e442', '#cc79a7', '#009e73', '#d55e00', '#56b4e9')
MIN_SIDE = 480  # smaller frames are enlarged for drawing
STRIP_SECONDS = 10
STRIP_ROWS = 3


def colors(label_names: Sequence[str]) -> list[tuple[int, ...]]:
    """RGB of each expression, the same in every model; names that are none get what is left."""
    known = dict(zip(EXPRESSIONS_8, COLORS, strict=True))
    rest = [color for name, color in known.items() if name not in map(canonical_name, label_names)] or list(COLORS)
    chosen = (known.get(canonical_name(name), rest[i % len(rest)]) for i, name in enumerate(label_names))
    return [ImageColor.getrgb(color) for color in chosen]


def stacked(probabilities: np.ndarray, palette: Sequence[tuple[int, ...]], height: int) -> np.ndarray:
    """Columns (height, N, 3) of probabilities (N, C), one colour on the other from below; white where a row is NaN."""
    levels = (np.arange(height, 0, -1) - 0.5) / height
    above = np.nan_to_num(probabilities).cumsum(axis=1)[:, :-1]
    columns = np.array(palette, np.uint8)[(levels[:, None, None] > above).sum(axis=2)]
    columns[:, np.isnan(probabilities).any(axis=1)] = 255
    return columns


@dataclass
class _Row:
    """Of the strip: who is shown there, in which second last, and the pixels (H, W, 3)."""

    pixels: np.ndarray
    person: Person | None = None
    seen: float = -math.inf


class FrameDrawer:
    """Draws frames one after the other, all at the size of the first: boxes, names, and a strip below.

    The strip shows the probabilities of up to three people in the last ten seconds, and what the colours mean. Frames
    under 480 pixels are enlarged by a whole number.
    """

    def __init__(self, label_names: Sequence[str]) -> None:
        self._names, self._palette = tuple(label_names), colors(label_names)
        self._rows: list[_Row] = []
        self._column = 0  # of the strip, since the first frame

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """The frame, which must have an image, as an array (H, W, 3) of even sides."""
        assert frame.image is not None
        height, width = frame.image.shape[:2]
        if not self._rows:
            self._lay_out(width, height)
        picture = Image.fromarray(np.ascontiguousarray(frame.image)).resize(self._size, Image.Resampling.BILINEAR)
        canvas = self._background.copy()
        canvas.paste(picture, (0, 0))
        draw = ImageDraw.Draw(canvas)
        for person in frame.people:
            self._draw_person(draw, person, self._size[0] / width, self._size[1] / height)
        self._move_rows(frame)
        for i, row in enumerate(self._rows):
            top = self._size[1] + i * self._line * 2
            canvas.paste(Image.fromarray(row.pixels), (self._gutter, top + 2))
            if row.person and frame.time - row.seen <= STRIP_SECONDS:
                lines = f'{row.person.track}  {row.person.label}\n    {row.person.score:.2f}'
                fill = 'black' if row.seen == frame.time else '#999999'
                draw.text((4, top + self._line), lines, font=self._font, fill=fill, anchor='lm', spacing=1)
        return np.asarray(canvas)

    def _lay_out(self, width: int, height: int) -> None:
        """Sizes that fit the first frame, and what never changes: the legend."""
        zoom = math.ceil(MIN_SIDE / max(width, height))
        self._size = width * zoom, height * zoom
        font_size = max(12, min(self._size) // 34)
        self._font, self._line = ImageFont.load_default(size=font_size), round(1.4 * font_size)
        longest = max(self._font.getlength(name) for name in self._names)
        self._gutter = math.ceil(longest) + 3 * font_size
        row_shape = 2 * self._line - 4, max(1, self._size[0] - self._gutter), 3
        self._rows = [_Row(np.full(row_shape, 255, np.uint8)) for _ in range(STRIP_ROWS)]

        cell = math.ceil(longest) + 2 * font_size
        columns = max(1, self._size[0] // cell)
        top = self._size[1] + STRIP_ROWS * 2 * self._line
        full = max(self._size[0], cell), top + math.ceil(len(self._names) / columns) * self._line
        self._background = Image.new('RGB', (full[0] + full[0] % 2, full[1] + full[1] % 2), 'white')
        draw = ImageDraw.Draw(self._background)
        for i, (name, color) in enumerate(zip(self._names, self._palette, strict=True)):
            x, y = i % columns * cell + 4, top + (i // columns + 0.5) * self._line
            draw.rectangle((x, y - font_size / 2, x + font_size, y + font_size / 2), fill=color)
            draw.text((x + 1.4 * font_size, y), name, font=self._font, fill='black', anchor='lm')

    def _draw_person(self, draw: ImageDraw.ImageDraw, person: Person, across: float, down: float) -> None:
        left, top = person.box[0] * across, person.box[1] * down
        right, bottom = left + person.box[2] * across - 1, top + person.box[3] * down - 1
        best = max(person.probabilities, key=person.probabilities.__getitem__)  # the label may be `UNSURE`
        color = self._palette[self._names.index(best)]
        draw.rectangle((left, top, right, bottom), outline='black', width=4)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=color, width=2)
        text = f'{person.track}  {person.label} {person.score:.2f}'
        width = self._font.getlength(text) + 8
        x, y = max(0, min(left, self._size[0] - width)), max(0, top - self._line)
        draw.rectangle((x, y, x + width, y + self._line), fill='black')
        draw.text((x + 4, y + self._line / 2), text, font=self._font, fill='white', anchor='lm')

    def _move_rows(self, frame: VideoFrame) -> None:
        """Move the strip on by the time that has passed; who comes new takes a row that was nobody's for its length."""
        width = self._rows[0].pixels.shape[1]
        column = round(frame.time * width / STRIP_SECONDS)
        step, self._column = min(width, column - self._column), max(column, self._column)
        for person in frame.people:
            if not any(row.person and row.person.track == person.track for row in self._rows):
                for row in self._rows:
                    if frame.time - row.seen > STRIP_SECONDS:
                        row.person, row.seen, row.pixels[:] = person, frame.time, 255
                        break
        here = {person.track: person for person in frame.people}
        for row in self._rows:
            if step > 0:
                row.pixels[:, :-step] = row.pixels[:, step:].copy()
                row.pixels[:, -step:] = 255
            if row.person and row.person.track in here:
                row.person, row.seen = here[row.person.track], frame.time
                values = np.array([list(row.person.probabilities.values())])
                row.pixels[:, -max(1, step):] = stacked(values, self._palette, len(row.pixels))


@dataclass
class Timelines:
    """Collects what people's expressions were and when, in a memory that does not grow with the time.

    Times are put together where they become too many, and of very many people those seen longest are kept.
    """

    label_names: Sequence[str]
    rate: float = 25.  # frames a second
    columns: int = 1000  # at most
    people: int = 200  # at most, of whom `figure` shows `shown`
    shown: int = 20
    _sums: dict[int, np.ndarray] = field(default_factory=dict)  # track -> sums of probabilities, and counts (C + 1)
    _end: float = 0.

    def __post_init__(self) -> None:
        self._seconds = 2 / self.rate  # of a column; one frame each would leave gaps where frames are not quite regular

    def add(self, frame: VideoFrame) -> None:
        """Take the people of one more frame."""
        self._end = max(self._end, frame.time)
        while self._end >= self.columns * self._seconds:
            self._seconds *= 2
            for track, sums in self._sums.items():
                self._sums[track] = np.zeros_like(sums)
                self._sums[track][:self.columns // 2] = sums.reshape(self.columns // 2, 2, -1).sum(axis=1)
        for person in frame.people:
            empty = np.zeros((self.columns, len(self.label_names) + 1), np.float32)
            sums = self._sums.setdefault(person.track, empty)
            sums[int(frame.time / self._seconds)] += (*person.probabilities.values(), 1)
        if len(self._sums) > self.people:
            here = {person.track for person in frame.people}
            del self._sums[min(self._sums, key=lambda track: (track in here, self._sums[track][:, -1].sum()))]

    def figure(self, title: str) -> Figure:
        """One timeline a person: the mean of the smoothed probabilities, as colours on top of each other."""
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        longest = sorted(self._sums, key=lambda track: -self._sums[track][:, -1].sum())[:self.shown]
        rows = sorted(longest)
        figure = Figure(figsize=(10, 1.6 + 0.6 * max(1, len(rows))), dpi=120, layout='constrained')
        palette = colors(self.label_names)
        used = int(self._end / self._seconds) + 1
        panels = figure.subplots(max(1, len(rows)), sharex=True, squeeze=False)[:, 0]
        for axes, track in zip(panels, rows, strict=False):
            sums = self._sums[track][:used]
            with np.errstate(invalid='ignore'):
                means = sums[:, :-1] / sums[:, -1:]  # NaN where nobody is
            axes.imshow(stacked(means, palette, 100), aspect='auto', interpolation='nearest',
                        extent=(0, used * self._seconds, 0, 1))
            axes.set_ylabel(str(track), rotation=0, ha='right', va='center')
        for axes in panels:
            axes.set(yticks=[], ylim=(0, 1), xlim=(0, max(self._seconds, self._end)))
        if not rows:
            title += ': nobody was found'
        elif len(rows) < len(self._sums):
            at_least = 'at least ' if len(self._sums) >= self.people else ''
            title += f' (the {len(rows)} seen longest of {at_least}{len(self._sums)})'
        panels[0].set_title(title)
        panels[-1].set_xlabel('seconds')
        figure.supylabel('person')
        handles = [
            Patch(color=f'#{bytes(color).hex()}', label=name)
            for name, color in zip(self.label_names, palette, strict=True)]
        figure.legend(
            handles=handles, loc='outside lower center', ncols=len(palette), frameon=False, handlelength=1)
        return figure
