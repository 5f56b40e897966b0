"""Tracks of people, and expressions smoothed along them."""
from __future__ import annotations

import copy
import tracemalloc
import weakref

import numpy as np
import pytest
from PIL import Image

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.data.images import ImageError
from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.frames import Footage, Frame
from timm_lfnsb.predict.recognizer import Face
from timm_lfnsb.predict.timeline import Timelines
from timm_lfnsb.predict.tracking import Tracks, follow

SURE = (0.9, 0.1)


def numbers(tracks, *boxes_by_time):
    """The tracks of boxes, each (time, boxes)."""
    return [[track for track, _ in tracks.update(time, boxes, [SURE] * len(boxes))] for time, boxes in boxes_by_time]


def test_people_keep_their_numbers_whatever_their_order():
    """Two people walk through the picture and away from the camera, and the detector swaps them."""
    def boxes(i):
        left, right = (10 + 8 * i, 50, 80 - i, 80 - i), (400 - 12 * i, 60, 60, 70)
        return [left, right] if i % 3 else [right, left]

    found = numbers(Tracks(25), *((i / 25, boxes(i)) for i in range(12)))
    assert found[0] == [1, 2] and all(pair == ([1, 2] if i % 3 == 0 else [2, 1]) for i, pair in enumerate(found))


@pytest.mark.parametrize('away, number', [(0.9, 1), (1.3, 2)])
@pytest.mark.parametrize('silent', [False, True])
@pytest.mark.parametrize('seen', [1, 20])
def test_patience_is_in_seconds(away, number, silent, seen):
    """However long the track was before, and whether frames came meanwhile or none."""
    box = [(10, 10, 50, 50)]
    before = [(i / 20, box) for i in range(seen)]
    last = before[-1][0]
    gap = [] if silent else [(last + i / 20, []) for i in range(1, round(20 * away))]
    found = numbers(Tracks(20, patience=1), *before, *gap, (last + away, box))
    assert found[0] == [1] and found[-1] == [number]


def test_somebody_elsewhere_is_somebody_else():
    assert numbers(Tracks(25), (0, [(0, 0, 50, 50)]), (0.04, [(300, 0, 50, 50)])) == [[1], [2]]


def test_a_track_is_expected_where_it_moves_to():
    """At five frames a second a face comes to move by twice its width: its speed tells who it is."""
    def box(i):
        return [(round(1.5 * i * i), 20, 40, 40)]

    found = numbers(Tracks(5), *((i / 5, box(i)) for i in range(30)))
    assert found[-1] == [1] and box(29)[0][0] - box(28)[0][0] > 80


@pytest.mark.parametrize('smooth', [0, 0.25, 2])
def test_smoothing_is_an_exponential_mean_in_seconds(smooth):
    """At irregular times, against the recursion written out; a newcomer starts with what is seen."""
    rng = np.random.default_rng(0)
    times = np.cumsum(rng.uniform(0.01, 0.3, 15))
    rows = rng.dirichlet(np.ones(4), 15)
    tracks = Tracks(25, smooth=smooth)
    expected = rows[0]
    for i, (time, row) in enumerate(zip(times, rows, strict=True)):
        if i:
            weight = np.exp(-(time - times[i - 1]) / smooth) if smooth else 0
            expected = weight * expected + (1 - weight) * row
        boxes = [(100, 100, 60, 60)] + [(300, 100, 50, 50)] * (i == 7)
        (_, mean), *others = tracks.update(time, boxes, [row, (1, 0, 0, 0)][:len(boxes)])
        np.testing.assert_allclose(mean, expected, atol=1e-9)
        assert not others or others[0][1].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize('options', [{'smooth': -1}, {'patience': -1}, {'smooth': float('nan')}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match='at least 0'):
        Tracks(25, **options)


def test_a_missing_tracker_says_what_brings_it(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'norfair', None)
    with pytest.raises(UserError, match=r'timm-lfnsb\[video\]'):
        Tracks()


def fake_recognize(images, scores=SURE):
    """A face in every image, whose place the first pixel says."""
    for image in images:
        place = (int(image[0, 0, 0]), 5, 40, 40)
        yield [Face(place, 'neutral', scores[0], dict(zip(EXPRESSIONS_8, scores, strict=False)))]


def test_broken_frames_stay_in_their_places():
    images = [np.zeros((4, 4, 3), np.uint8) if i not in (0, 3, 5) else ImageError(f'frame {i}') for i in range(6)]
    frames = (Frame(i, i / 25, image) for i, image in enumerate(images))

    def recognize(images):
        for i, faces in enumerate(fake_recognize(images)):
            yield faces if i != 1 else ImageError('no detector')

    results = list(follow(frames, recognize, Tracks()))
    assert [frame.index for frame in results] == list(range(6))
    assert [str(frame.error) for frame in results] == ['frame 0', 'None', 'no detector', 'frame 3', 'None', 'frame 5']
    assert [[person.track for person in frame.people] for frame in results] == [[], [1], [], [], [1], []]
    assert results[0].as_dict() == {'frame': 0, 'time': 0, 'error': 'frame 0'}
    assert list(results[1].as_dict()['people'][0]) == ['track', 'box', 'label', 'score', 'probabilities', 'now']


@pytest.mark.parametrize('count', [600, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_frames(count):
    """People come and go all the time; neither frames nor tracks nor timelines stay."""
    alive: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    def frames():
        for i in range(count):
            image = np.full((8, 8, 3), i % 200, np.uint8)
            alive[i] = image
            yield Frame(i, i / 25, image)

    timelines, sizes, most = Timelines(('neutral', 'happiness'), people=5, columns=50), [], 0
    tracemalloc.start()
    try:
        for frame in follow(frames(), fake_recognize, Tracks(patience=0.2)):
            timelines.add(frame)
            most = max(most, len(alive))
            if frame.index % 100 == 99:
                sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert most <= 3 and frame.people[0].track >= count // 200
    half = len(sizes) // 2  # the first one has what is loaded once
    assert max(sizes[half:]) < max(sizes[:half]) + 50_000


def test_the_portrait_moves_shrinks_leaves_and_comes_back(recognize, portrait):
    """With the real detector and network: two people, of whom one goes for a second and a half."""
    pictures = {side: Image.fromarray(portrait).resize((side * 6 // 5, side)) for side in range(100, 140, 4)}

    def picture(i):
        canvas = Image.new('RGB', (420, 160), (90, 110, 120))
        canvas.paste(pictures[136 - 4 * i], (10 + 6 * i, 5))
        if i < 3 or i > 5:
            canvas.paste(pictures[128], (250, 20))
        return np.asarray(canvas)

    footage = Footage((Frame(i, i / 2, picture(i)) for i in range(8)), 2)
    frames = list(recognize.video(footage, patience=1))
    left = [person for frame in frames for person in frame.people if person.box[0] < 200]
    right = [person for frame in frames for person in frame.people if person.box[0] >= 200]
    assert [person.track for person in left] == [left[0].track] * 8
    assert left[-1].box[2] < left[0].box[2] and left[-1].box[0] > left[0].box[0]
    tracks = [person.track for person in right]
    assert len(tracks) == 5 and len(set(tracks[:3])) == 1 and tracks[3:] == [3, 3]
    assert {person.label for person in left} == {'happiness'}


def test_scores_are_those_of_a_still_picture_and_who_is_not_sure_enough_is_unsure(recognize, portrait):
    def person(recognizer):
        [frame] = recognizer.video(Footage(iter([Frame(0, 0, portrait)]), 25))
        return frame.people[0]

    still, unsure = recognize(portrait)[0], copy.copy(recognize)
    assert (person(recognize).label, person(recognize).score) == (still.label, pytest.approx(still.score, abs=1e-5))
    unsure.unsure = 0.9999
    assert person(unsure).label == 'unsure' and person(unsure).score == pytest.approx(still.score, abs=1e-5)


def test_live_frames_come_out_before_the_next_one_is_asked_for(recognize, portrait):
    asked = []

    def frames():
        for i in range(8):
            asked.append(i)
            yield Frame(i, i / 25, portrait)

    assert isinstance(recognize, ExpressionRecognizer) and recognize.batch_size == 8
    first = next(recognize.video(Footage(frames(), 25, live=True)))
    assert first.index == 0 and asked == [0] and recognize.batch_size == 8
