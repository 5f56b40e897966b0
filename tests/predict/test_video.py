"""The command `timm-lfnsb video`."""
from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from timm_lfnsb.cli import main
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict import video
from timm_lfnsb.predict.recognizer import ExpressionRecognizer, Face


class Quick(ExpressionRecognizer):
    """Finds a face in each frame at once, but in black ones; its place is at twice the brightness."""

    def __init__(self, model, **settings):
        self.label_names, self.model, self.batch_size, self.workers = EXPRESSIONS_8, SimpleNamespace(), 1, 0
        self.unsure = settings.get('unsure', 0.)

    def stream(self, images):
        for image in images:
            value = int(image.mean())
            scores = np.full(8, 0.04)
            scores[value % 8] = 0.72
            face = Face((2 * value, 4, 20, 20), 'x', 0.72, dict(zip(EXPRESSIONS_8, scores.tolist(), strict=True)))
            yield [face] if value else []


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(video, 'ExpressionRecognizer', Quick)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of frames: five with a face that moves, two black ones, three more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'frames').mkdir()
    for i, value in enumerate((10, 12, 14, 16, 18, 0, 0, 20, 22, 24)):
        Image.new('RGB', (96, 64), (value,) * 3).save(tmp_path / 'frames' / f'{i}.png')
    return tmp_path


def run(*args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(main, ['video', *map(str, args)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stdout, result.stderr


def frames_of(path) -> list[float]:
    with av.open(str(path)) as container:
        return [frame.time for frame in container.decode(video=0)]


def test_csv(folder, quick):
    code, out, err = run('frames', '--smooth', 0, '--folder-rate', 10)
    assert code == 0 and re.fullmatch(
        r'10 frames in [\d.]+ s: [\d.]+ frames/s, \d+ ms of processor time each; 1 person\.\n', err)
    rows = list(csv.DictReader(out.splitlines()))
    assert list(rows[0]) == ['frame', 'time', 'track', 'x', 'y', 'width', 'height', 'expression', 'score',
                             *EXPRESSIONS_8]
    assert [int(row['frame']) for row in rows] == [0, 1, 2, 3, 4, 7, 8, 9]
    assert [float(row['time']) for row in rows] == [0, 0.1, 0.2, 0.3, 0.4, 0.7, 0.8, 0.9]
    assert {row['track'] for row in rows} == {'1'}
    assert [row['expression'] for row in rows] == [
        EXPRESSIONS_8[value % 8] for value in (10, 12, 14, 16, 18, 20, 22, 24)]
    assert rows[0]['x'] == '20' and rows[0]['score'] == rows[0]['sadness'] == '0.7200'


def test_json_has_a_line_for_every_frame(folder, quick):
    (folder / 'frames' / '3.png').write_bytes(b'')
    code, out, err = run('frames', '--json', '--smooth', 10, '--patience', 0.04)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [line['frame'] for line in lines] == list(range(10))
    assert 'frames/3.png' in lines[3]['error'] and lines[3]['error'] in err and '9 frames' in err
    assert lines[5] == {'frame': 5, 'time': 0.2, 'people': []}
    first, last = lines[0]['people'][0], lines[-1]['people'][0]
    assert first['track'] == 1 and last['track'] > 1  # 80 ms were more than its patience
    assert last['label'] == 'fear' != max(last['now'], key=last['now'].get)  # smoothed: as it came


def test_annotated_film_and_summary(folder, quick):
    code, out, err = run('frames', '--annotate', 'out.mp4', '--summary', 'out.png', '--folder-rate', 10, '--fps', 5)
    assert code == 0 and len(out.splitlines()) == 5 and '5 frames' in err
    np.testing.assert_allclose(frames_of('out.mp4'), [0, 0.2, 0.4, 0.6, 0.8], atol=2e-3)
    with Image.open('out.png') as picture:
        assert picture.width > 800
    assert sorted(path.name for path in folder.iterdir()) == ['frames', 'out.mp4', 'out.png']


def test_interrupt_keeps_what_is_finished(folder, quick):
    handler = signal.getsignal(signal.SIGINT)
    lines = video.video_lines('frames', as_json=True, annotate=folder / 'out.mp4', summary=folder / 'out.png')
    for _ in range(3):
        next(lines)
    signal.raise_signal(signal.SIGINT)
    rest = list(lines)
    assert [kind for _, kind in rest[-2:]] == ['problem', 'hint'] and len(rest) <= 4
    assert re.fullmatch(r'Interrupted after [34] frames\.', rest[-2][0])
    assert len(frames_of('out.mp4')) in (3, 4) and (folder / 'out.png').exists()
    assert signal.getsignal(signal.SIGINT) is handler


def test_nobody_reads_on(folder, quick):
    """As after `| head`: the film of what was printed is whole; nothing is left where nothing was read."""
    lines = video.video_lines('frames', annotate=folder / 'out.mp4', summary=folder / 'out.png')
    for _ in range(4):
        next(lines)
    lines.close()
    assert len(frames_of('out.mp4')) == 3 and (folder / 'out.png').exists()
    lines = video.video_lines('frames', annotate=folder / 'none.mp4')
    next(lines)
    lines.close()
    assert sorted(path.name for path in folder.iterdir()) == ['frames', 'out.mp4', 'out.png']


def test_a_closed_pipe_ends_quietly(folder):
    """In a process of its own, with the real network, whose output nobody reads."""
    for path in list((folder / 'frames').iterdir())[2:]:
        path.unlink()
    process = subprocess.Popen([sys.executable, '-m', 'timm_lfnsb', 'video', 'frames', '--json', '--annotate', 'o.mp4'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=300) != 0 and 'Traceback' not in err and 'Exception' not in err
    assert len(frames_of('o.mp4')) >= 1


def test_many_broken_frames_are_counted(folder, quick):
    for i in range(1, 9):
        (folder / 'frames' / f'{i}.png').write_bytes(b'')
    code, out, err = run('frames')
    assert code == 1 and len(out.splitlines()) == 3
    assert err.count('.png') == video.PROBLEMS and 'frames: 8 frames or parts of it could not be read.' in err


class FakeWindow:
    """A window that is closed after two frames."""

    def __init__(self, title):
        self.open, self.shown = True, []
        FakeWindow.last = self

    def show(self, image):
        self.shown.append(image)
        self.open = len(self.shown) < 2

    def close(self):
        self.closed = True


def test_closing_the_window_ends(folder, quick, monkeypatch):
    monkeypatch.setattr(video, 'Window', FakeWindow)
    code, out, err = run('frames', '--view', '--json')
    assert code == 0 and len(out.splitlines()) == 2 == len(FakeWindow.last.shown) and FakeWindow.last.closed
    assert FakeWindow.last.shown[0].shape[1] == 480 and '2 frames' in err


def test_a_number_is_a_camera(folder, quick, monkeypatch):
    """Unless there is a file of that name."""
    asked = []

    class Camera:
        def __init__(self, number):
            asked.append(number)

        def isOpened(self):
            return False

    monkeypatch.setattr(cv2, 'VideoCapture', Camera)
    code, _, err = run('12')
    assert code == 1 and asked == [12] and 'camera 12 cannot be opened' in err
    (folder / 'frames').rename('12')
    assert run('12')[0] == 0 and asked == [12]


@pytest.mark.parametrize('args, code, message', [
    (['missing.mp4'], 1, 'there is no file or folder missing.mp4'),
    (['black', '--annotate', 'no/out.mp4'], 1, 'there is no folder no: make it first'),
    (['black', '--annotate', 'out.gif'], 1, "not in '.gif'"),
    (['black', '--summary', 'out.xyz'], 1, 'give a file name that ends in .png'),
    (['black', '--fps', '0'], 2, 'is not in the range'),
    (['black', '--annotate', 'out.mp4'], 1, 'black: no frame could be read.'),
    (['black', '--annotate', 'black'], 2, 'is a directory'),
])
def test_errors_are_one_sentence_and_leave_nothing(folder, quick, args, code, message):
    (folder / 'black').mkdir()
    (folder / 'black' / '0.png').write_bytes(b'')
    found, _, err = run(*args)
    assert found == code and message in err and err.splitlines()[-1].startswith('Error: ')
    assert sorted(path.name for path in folder.iterdir()) == ['black', 'frames']


def test_a_missing_extra_is_named(folder, quick, monkeypatch):
    (folder / 'film.mp4').write_bytes(b'')
    monkeypatch.setitem(sys.modules, 'av', None)
    for args in (['film.mp4'], ['frames', '--annotate', 'out.mp4']):
        code, _, err = run(*args)
        assert code == 1 and 'pip install "timm-lfnsb[video]" brings it' in err
