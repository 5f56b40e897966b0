"""Drawn frames, films of them, and timelines."""
from __future__ import annotations

import sys
from dataclasses import replace

import av
import numpy as np
import pytest

from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.predict.film import FilmWriter, Window
from timm_lfnsb.predict.timeline import STRIP_ROWS, FrameDrawer, Timelines, colors, stacked
from timm_lfnsb.predict.tracking import Person, VideoFrame


def person(track, label='happiness', box=(20, 30, 60, 60), names=EXPRESSIONS_8) -> Person:
    scores = {name: 0.65 if name == label else 0.35 / (len(names) - 1) for name in names}
    return Person(track, box, label, scores[label], scores, scores)


def frame(time, *people, size=(120, 200)) -> VideoFrame:
    return VideoFrame(round(25 * time), time, np.full((*size, 3), 77, np.uint8), list(people))


def share(pixels, color) -> float:
    """Of pixels (H, W, 3), how many have a color."""
    return float((np.asarray(pixels).reshape(-1, 3) == color).all(axis=1).mean())


def test_stacked_probabilities_are_areas():
    palette = [(1, 1, 1), (2, 2, 2), (3, 3, 3)]
    columns = stacked(np.array([(0.5, 0.2, 0.3), (0, 1, 0), (np.nan,) * 3]), palette, 10)
    assert columns.shape == (10, 3, 3)
    assert columns[::-1, 0, 0].tolist() == [1] * 5 + [2] * 2 + [3] * 3  # from below
    assert (columns[:, 1] == 2).all() and (columns[:, 2] == 255).all()


def test_an_expression_has_the_same_color_in_every_model():
    assert colors(EXPRESSIONS_7) == colors(EXPRESSIONS_8)[:7]
    assert colors(('angry', 'Happy')) == [colors(EXPRESSIONS_8)[i] for i in (6, 1)]
    assert len(set(colors(('neutral', 'boredom', 'pride')))) == 3 and len(colors([str(i) for i in range(20)])) == 20


def test_boxes_are_drawn_where_the_faces_are():
    """Around them, not in them, in an enlarged frame, and in frames of other sizes that follow."""
    drawer = FrameDrawer(EXPRESSIONS_8)
    for size, scale in (((120, 200), 3), ((240, 400), 1.5)):
        box = tuple(round(value * 3 / scale) for value in (20, 30, 60, 60))
        drawn = drawer(frame(0, person(1, box=box), size=size))
        assert drawn.shape[1] == 600 and drawn.shape[0] > 360 and drawn.shape[0] % 2 == 0
        happy = colors(EXPRESSIONS_8)[1]
        assert (drawn[90 + 4:270 - 4, 60 + 4:240 - 4] == 77).all()
        assert share(drawn[120:240, 60:64], happy) > 0.4 and share(drawn[120:240, 0:56], happy) == 0


def test_who_is_unsure_has_the_color_of_the_most_probable_expression():
    drawn = [FrameDrawer(EXPRESSIONS_8)(frame(0, replace(person(1), label=label))) for label in ('happiness', 'unsure')]
    assert share(drawn[1], colors(EXPRESSIONS_8)[1]) > 0.5 * share(drawn[0], colors(EXPRESSIONS_8)[1]) > 0


@pytest.mark.parametrize('size', [(1, 1), (33, 51), (64, 480), (300, 20)])
def test_sides_are_even_and_names_stay_inside(size):
    drawer = FrameDrawer(EXPRESSIONS_8)
    drawn = drawer(frame(0, person(123456, box=(0, 0, size[1], size[0])), size=size))
    assert drawn.shape[0] % 2 == drawn.shape[1] % 2 == 0
    assert drawer(frame(1, size=(99, 98))).shape == drawn.shape


def test_the_strip_runs_with_the_time_and_remembers_ten_seconds():
    """Half a strip after five seconds of happiness and five of nobody; rows go to newcomers when they are empty."""
    drawer = FrameDrawer(EXPRESSIONS_8)
    happy = colors(EXPRESSIONS_8)[1]
    for i in range(51):
        drawn = drawer(frame(i / 10, person(1)))
    rows = drawn[360:360 + STRIP_ROWS * 2 * drawer._line, drawer._gutter:]
    filled = (rows == happy).all(axis=2).any(axis=0)
    assert filled.mean() == pytest.approx(0.5, abs=0.02) and filled[-10:].all()
    for i in range(51, 101):
        drawn = drawer(frame(i / 10))
    rows = drawn[360:360 + STRIP_ROWS * 2 * drawer._line, drawer._gutter:]
    filled = (rows == happy).all(axis=2).any(axis=0)
    assert filled[:len(filled) // 2 - 10].all() and not filled[len(filled) // 2 + 10:].any()
    drawer(frame(10.1, *(person(track) for track in range(2, 9))))
    assert [row.person.track for row in drawer._rows] == [1, 2, 3]  # the others have boxes only
    drawer(frame(16, person(9)))
    assert [row.person.track for row in drawer._rows] == [9, 2, 3]


def test_timelines_hold_the_mean_of_their_time():
    """Whatever the columns were put together to: against means of all that came, by hand."""
    rng = np.random.default_rng(0)
    names = ('neutral', 'happiness')
    timelines = Timelines(names, rate=25, columns=8)
    rows = []
    for i in range(500):
        value = float(rng.uniform())
        rows.append((i / 25, value))
        probabilities = dict(zip(names, (value, 1 - value), strict=True))
        people = [Person(4, (0, 0, 9, 9), 'neutral', value, probabilities, probabilities)] if i < 250 else []
        timelines.add(frame(i / 25, *people))
    width = timelines._seconds
    assert 20 / 8 <= width < 2 * 20 / 8
    sums = timelines._sums[4]
    assert sums[:, -1].sum() == 250
    for column in range(int(10 / width)):
        inside = [value for time, value in rows if column * width <= time < (column + 1) * width]
        assert sums[column, 0] / sums[column, -1] == pytest.approx(np.mean(inside), abs=1e-3)


def test_of_very_many_people_those_seen_longest_are_kept():
    timelines = Timelines(EXPRESSIONS_8, people=4, shown=2)
    for track in range(1, 10):
        for i in range(10 if track in (2, 5, 6) else 1):
            timelines.add(frame(track + i / 25, person(track)))
    assert {2, 5, 6} < set(timelines._sums) and len(timelines._sums) == 4
    figure = timelines.figure('crowd.mp4')
    assert [axes.get_ylabel() for axes in figure.axes] == ['2', '5']
    assert 'the 2 seen longest of at least 4' in figure.axes[0].get_title()


def test_the_summary_shows_when_somebody_was_there(tmp_path):
    timelines = Timelines(EXPRESSIONS_8)
    for i in range(100):
        people = [person(1, 'anger')] + ([person(2)] if i >= 50 else [])
        timelines.add(frame(i / 25, *people))
    figure = timelines.figure('film.mp4')
    first, second = (axes.images[0].get_array() for axes in figure.axes)
    angry, happy = (colors(EXPRESSIONS_8)[i] for i in (6, 1))
    assert share(first, angry) == pytest.approx(0.65, abs=0.02) and share(second[:, :24], happy) == 0
    assert share(second[:, -24:], happy) == pytest.approx(0.65, abs=0.02)
    figure.savefig(tmp_path / 'summary.png')
    assert 'nobody' in Timelines(EXPRESSIONS_8).figure('film.mp4').axes[0].get_title()


@pytest.mark.parametrize('name', ['film.mp4', 'film.mkv'])
def test_films_keep_the_times_of_their_frames(tmp_path, name):
    times = [0, 0.04, 0.5, 0.54, 0.54, 2]  # two at once come one after the other
    writer = FilmWriter(tmp_path / name, 25)
    for i, time in enumerate(times):
        writer.write(np.full((64, 96, 3), 30 * i, np.uint8), time)
    writer.close()
    with av.open(str(tmp_path / name)) as container:
        frames = list(container.decode(video=0))
    np.testing.assert_allclose([frame.time for frame in frames], times, atol=2e-3)
    np.testing.assert_allclose([frame.to_ndarray(format='rgb24').mean() for frame in frames], range(0, 180, 30), atol=6)


def test_films_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"\.mp4, \.mkv, \.mov, not in '\.gif'"):
        FilmWriter(tmp_path / 'film.gif', 25)
    with pytest.raises(OSError, match='No such file'):
        FilmWriter(tmp_path / 'no' / 'film.mp4', 25)


@pytest.mark.parametrize('how', ['display', 'tk'])
def test_a_window_needs_a_display_and_tk(monkeypatch, how):
    if how == 'tk':
        monkeypatch.setitem(sys.modules, 'tkinter', None)
    elif sys.platform != 'linux':
        pytest.skip('only on Linux can the display be taken away: run this test there')
    monkeypatch.delenv('DISPLAY', raising=False)
    with pytest.raises(UserError, match=r'no window can be shown here .*leave --view out'):
        Window('film')
