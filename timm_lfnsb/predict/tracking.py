"""One track a person through the frames of a moving picture, and expressions smoothed along it."""
from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from ..data.images import ImageError
from ..errors import one_sentence
from ..labels import UNSURE
from .faces import Box
from .frames import Frame

SURROUNDINGS = 2
"""Multiple of a box's sides that is followed, because a face may move by more than its width from frame to frame."""
MIN_OVERLAP = 0.2
"""Least intersection over union of that with where its track was expected."""


@dataclass(frozen=True)
class Person:
    """Somebody's face in one frame, with the expression smoothed along the track."""

    track: int  # the same number in every frame, from 1; whoever comes back after a while gets a new one
    box: Box  # x, y, width, height in pixels of the frame
    label: str  # the most probable expression, smoothed, or `UNSURE`
    score: float  # its probability
    probabilities: dict[str, float]  # of every expression by name, calibrated and smoothed
    now: dict[str, float]  # the same for this frame alone, calibrated


@dataclass(frozen=True)
class VideoFrame:
    """One frame of a moving picture, and who is in it."""

    index: int  # in its source, from 0
    time: float  # in seconds, from the first frame on
    image: np.ndarray | None  # uint8 RGB (H, W, 3), None where it cannot be read
    people: list[Person]  # in the detector's order
    error: ImageError | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON, without the image."""
        place: dict[str, Any] = {'frame': self.index, 'time': round(self.time, 4)}
        if self.error:
            return {**place, 'error': str(self.error)}
        return {**place, 'people': [{**asdict(person), 'box': list(person.box)} for person in self.people]}


class Tracks:
    """Gives boxes that follow each other numbers, and smooths their probabilities.

    Boxes are matched to where norfair's Kalman filters expect the tracks, by intersection over union. Nobody is
    recognised: whoever stays away for longer than `patience`, or comes back elsewhere, is somebody new.

    Args:
        rate: Frames a second.
        smooth: Time constant in seconds of the exponential mean, in which what was seen t seconds ago counts by
            exp(-t / smooth); 0 for none.
        patience: Seconds for which a track waits for a face that is not found.

    Raises:
        ValueError: When `smooth` or `patience` is negative.
        UserError: When norfair is missing.
    """

    def __init__(self, rate: float = 25., smooth: float = 0.5, patience: float = 1.) -> None:
        if not smooth >= 0 or not patience >= 0:
            raise ValueError(f'smooth and patience must be at least 0, got {smooth} and {patience}.')
        with one_sentence('faces cannot be followed'):
            import norfair
        norfair.distances.logger.setLevel('ERROR')  # it warns of expected boxes that have shrunk to nothing
        self._detection = norfair.Detection
        self._rate, self._smooth, self._memory = rate, smooth, max(1, round(patience * rate))
        self._tracker = cast(Any, norfair.Tracker(
            'iou', 1 - MIN_OVERLAP, hit_counter_max=self._memory, initialization_delay=0, past_detections_length=0))
        self._means: dict[int, tuple[float, np.ndarray]] = {}  # track -> when it was seen last, smoothed probabilities
        self._last: float | None = None

    def update(
            self, time: float, boxes: Sequence[Sequence[float]], probabilities: Sequence[Any],
    ) -> list[tuple[int, np.ndarray]]:
        """The track and the smoothed probabilities (C) of each box (x, y, width, height) of the frame at `time`."""
        passed = 1 if self._last is None else round((time - self._last) * self._rate)
        self._last = time
        # With this period a hit makes good for all frames without one: each track waits for the same time.
        for _ in range(min(passed, self._memory + 2) - 1):
            self._tracker.update(period=self._memory)
        middles = ((np.array([x + width / 2, y + height / 2]), np.array([width, height]) * SURROUNDINGS / 2)
                   for x, y, width, height in boxes)
        seen = [self._detection(np.array([middle - half, middle + half]), data=i)
                for i, (middle, half) in enumerate(middles)]
        alive = self._tracker.update(seen, period=self._memory)
        numbers = {one.last_detection.data: one.id for one in alive if one.last_detection.age == one.age}
        self._means = {one.id: self._means[one.id] for one in alive if one.id in self._means}
        return [(numbers[i], self._mean(numbers[i], time, np.asarray(row))) for i, row in enumerate(probabilities)]

    def _mean(self, track: int, time: float, row: np.ndarray) -> np.ndarray:
        if self._smooth and track in self._means:
            before, mean = self._means[track]
            row = row + math.exp(-(time - before) / self._smooth) * (mean - row)
        self._means[track] = time, row
        return row


def follow(
        frames: Iterable[Frame], recognize: Callable[[Iterable[np.ndarray]], Iterator[Any]], tracks: Tracks,
        unsure: float = 0.,
) -> Iterator[VideoFrame]:
    """Yield each frame with the people in it, in order, as soon as `recognize` gives their faces.

    Args:
        recognize: `ExpressionRecognizer.stream`, from images to their faces in the same order.
        unsure: Call people whose smoothed score is below this `UNSURE`.
    """
    waiting: deque[Frame] = deque()

    def images() -> Iterator[np.ndarray]:
        for frame in frames:
            waiting.append(frame)
            if not isinstance(frame.image, ImageError):
                yield frame.image

    def broken() -> Iterator[VideoFrame]:
        while waiting and isinstance(error := waiting[0].image, ImageError):
            frame = waiting.popleft()
            yield VideoFrame(frame.index, frame.time, None, [], error)

    for faces in recognize(images()):
        yield from broken()
        frame = waiting.popleft()
        if isinstance(faces, ImageError):
            yield VideoFrame(frame.index, frame.time, None, [], faces)
            continue
        now = [np.array(list(face.probabilities.values())) for face in faces]
        people = []
        for face, row, (track, mean) in zip(
                faces, now, tracks.update(frame.time, [face.box for face in faces], now), strict=True):
            smoothed = dict(zip(face.probabilities, mean.tolist(), strict=True))
            best = max(smoothed, key=smoothed.__getitem__)
            label = best if smoothed[best] >= unsure else UNSURE
            people.append(Person(track, face.box, label, smoothed[best], smoothed,
                                 dict(zip(face.probabilities, row.tolist(), strict=True))))
        yield VideoFrame(frame.index, frame.time, cast(np.ndarray, frame.image), people)
    yield from broken()
