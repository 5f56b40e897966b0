"""Very many pictures on a local Ray with two workers."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.cli import main
from timm_lfnsb.data.images import ImageError, find_images

NEEDS = 'pip install "timm-lfnsb[ray]" brings it'


def score(*args) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(main, ['score', *map(str, args)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope='module')
def cluster():
    """Ray, started once: it takes seconds."""
    ray = pytest.importorskip('ray', reason=NEEDS)
    os.environ.update(RAY_USAGE_STATS_ENABLED='0', RAY_worker_niceness='0')  # else others' load starves workers
    ray.init('local', num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 28)
    yield ray
    ray.shutdown()


def make(folder, portrait, count):
    """Small pictures: every fourth shows a face, each at its own place; the rest are plain. One is broken."""
    folder.mkdir()
    face = Image.fromarray(portrait).crop((60, 30, 190, 160))
    for number in range(count):
        if number % 4:
            picture = Image.new('RGB', (40, 30), (number % 256, 90, number // 256))
        else:
            picture = Image.new('RGB', (150, 140))
            picture.paste(face, (number % 20, number % 10))
        picture.save(folder / f'{number:04}.png')
    (folder / '0007.png').write_bytes(b'broken')
    return folder


def rows(out) -> list[dict]:
    import pyarrow.parquet as pq
    return sorted(pq.read_table(out).to_pylist(), key=lambda row: row['path'])


@pytest.mark.slow
def test_two_thousand_pictures_and_a_worker_killed(cluster, portrait, tmp_path):
    """The rows are those of the serial result, though a worker dies in the middle."""
    import psutil  # which Ray brings
    folder, out = make(tmp_path / 'photos', portrait, 2000), tmp_path / 'out'
    killed = []

    def kill():
        while len(list(out.glob('*.parquet'))) < 2:
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if 'MapWorker' in ' '.join(process.cmdline()) and not killed:
                killed.append(process)
                process.kill()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    code, text, err = score(folder, out, '--workers', 2)
    thread.join(1)
    assert code == 0 and killed and len(list(out.glob('*.parquet'))) == 8, err
    # Ray itself says there, too, that it tries again.
    assert '2000 pictures and 500 faces; 1499 pictures without a face, 1 with an error; 0 were done' in text
    paths = [str(path) for path, _ in find_images(folder)]
    expected = []
    for path, faces in zip(paths, ExpressionRecognizer(workers=0).stream(paths), strict=True):
        if isinstance(faces, ImageError):
            expected.append((path, None, 'not an image, or damaged.'))
        else:
            expected += [(path, face, None) for face in faces or [None]]
    found = rows(out)
    assert [(row['path'], row['error']) for row in found] == [(path, error) for path, _, error in expected]
    for row, (_, face, _) in zip(found, expected, strict=True):
        if face is None:
            assert {row[key] for key in ('box', 'label', 'score', 'probabilities', 'detection_score')} == {None}
            continue
        assert {key: row[key] for key in ('box', 'label', 'turn')} == {
            'box': list(face.box), 'label': face.label, 'turn': face.turn}
        assert row['detection_score'] == face.detection_score
        # Other faces share the network's batch: the last bit may differ.
        assert row['score'] == pytest.approx(face.score, abs=1e-6)
        assert row['probabilities'] == pytest.approx(face.probabilities, abs=1e-6)


@pytest.mark.slow
def test_goes_on_after_a_kill_without_doing_a_picture_twice(cluster, portrait, tmp_path):
    folder, out = make(tmp_path / 'photos', portrait, 400), tmp_path / 'out'
    first = subprocess.Popen([sys.executable, '-m', 'timm_lfnsb', 'score', folder, out, '--workers', '2'],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not list(out.glob('*.parquet')) and first.poll() is None:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, first.stderr.read()
    before = {row['path'] for row in rows(out)}
    assert 0 < len(before) < 400
    Image.new('RGB', (9, 9)).save(folder / 'new.png')
    code, text, err = score(folder, out)
    assert code == 0 and 'were done before' in text, err
    assert set(Counter(row['path'] for row in rows(out)).values()) == {1}
    assert {row['path'] for row in rows(out)} == {str(path) for path, _ in find_images(folder)} >= before
    assert score(folder, out)[1] == f'All 401 pictures have their rows in {out}.\n'
    code, _, err = score(folder, out, '--unsure', 0.5)
    assert code == 1 and 'other settings' in err and err.count('\n') == 1


@pytest.mark.slow
def test_parquet_and_what_ends_a_run(cluster, portrait, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq
    folder = make(tmp_path / 'photos', portrait, 12)
    contents = [path.read_bytes() for path, _ in find_images(folder)]
    pq.write_table(pa.table({'scan': [*contents, None]}), tmp_path / 'data.parquet', row_group_size=5)
    code, text, _ = score(tmp_path / 'data.parquet', tmp_path / 'out', '--image-column', 'scan', '--workers', 2)
    assert code == 0 and text.startswith('13 pictures and 3 faces; 8 pictures without a face, 2 with an error')
    found = {row['path'].rpartition('#')[2]: row for row in rows(tmp_path / 'out')}
    assert found['7']['error'] == 'not an image, or damaged.' and found['12']['error'] == 'the row has no picture.'
    assert [number for number, row in found.items() if row['label']] == ['0', '4', '8']
    code, _, err = score(folder, tmp_path / 'gpu', '--gpus', 99)
    assert code == 1 and 'too few for a worker with 1 and 99' in err and err.count('\n') == 1

    # Another run takes the folder over while workers start: this one ends, and writes nothing.
    from timm_lfnsb.predict.parquet import Results
    plain = Results.__init__
    monkeypatch.setattr(Results, '__init__', lambda self, folder, settings: (
        plain(self, folder, settings), (tmp_path / 'taken' / '_run').write_text('other'))[0])
    code, _, err = score(folder, tmp_path / 'taken')  # Ray itself may print of workers that ended before
    assert code == 1 and 'another run writes' in err and not list((tmp_path / 'taken').glob('*.parquet'))


@pytest.mark.slow
def test_pipeline_of_ones_own(cluster, portrait, tmp_path):
    from ray.data import ActorPoolStrategy

    from timm_lfnsb.predict.ray import RecognizeBatch
    folder = make(tmp_path / 'photos', portrait, 12)
    pictures = [{'path': str(path), 'bytes': path.read_bytes()} for path, _ in find_images(folder)]
    data = cluster.data.from_items(pictures).map_batches(
        RecognizeBatch, fn_constructor_args=('bytes',), batch_size=5, compute=ActorPoolStrategy(size=2))
    found = sorted(data.take_all(), key=lambda row: row['path'])
    assert [row['path'][-8:] for row in found] == [f'{number:04}.png' for number in range(12)]
    assert [number for number, row in enumerate(found) if row['label']] == [0, 4, 8]
    assert [number for number, row in enumerate(found) if row['error']] == [7]


def test_batches_of_every_kind(portrait, recognize, tmp_path):
    """Paths, bytes, arrays and {bytes, path} give the faces of `recognize`; other columns stay, once a face."""
    pytest.importorskip('ray', reason=NEEDS)
    from timm_lfnsb.predict.ray import RecognizeBatch
    Image.fromarray(portrait).save(tmp_path / 'a.png')
    content = (tmp_path / 'a.png').read_bytes()
    two = np.concatenate([portrait, portrait], axis=1)
    images = np.empty(7, dtype=object)
    images[:] = [str(tmp_path / 'a.png'), content, portrait, {'bytes': content, 'path': 'x'}, two, None, two[:50, :50]]
    step = RecognizeBatch('image', model=recognize.model)
    found = step({'image': images, 'id': np.arange(7), 'place': np.arange(14.).reshape(7, 2)})
    assert found['id'].to_pylist() == [0, 1, 2, 3, 4, 4, 5, 6]
    *same, left, right, error, none = found.drop_columns(['id', 'place']).to_pylist()
    [face] = recognize(portrait)
    numbers = [row.pop('probabilities') for row in same]
    assert [row.pop('score') for row in same] == [max(row.values()) for row in numbers]
    assert same == [{**same[0]}] * 4 and same[0]['box'] == list(face.box) and same[0]['label'] == face.label
    for row in numbers:  # an image's place in its batch may change the last digit
        assert row == pytest.approx(face.probabilities, rel=1e-5, abs=0)
    assert left['label'] and right['label'] and left['box'] != right['box'] and none['label'] is error['label'] is None
    assert error['error'].startswith('an image is a path, bytes') and none['error'] is None
    assert len(step({'image': images[:2]})) == 2
    with pytest.raises(ValueError, match=r'rename or drop .* label'):
        step({'image': images[:1], 'label': np.arange(1)})
    with pytest.raises(ValueError, match='no column image of pictures among id'):
        step({'id': np.arange(1)})


def test_without_ray_one_sentence(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, 'timm_lfnsb.predict.ray', raising=False)
    for package in ('ray', 'pyarrow'):
        monkeypatch.setitem(sys.modules, package, None)
        code, text, err = score(tmp_path, tmp_path / 'out')
        assert (code, text) == (1, '') and err == (
            f'Error: Ray Data cannot be used: it needs {package}: pip install "timm-lfnsb[ray]" brings it.\n')
