"""The command `timm-lfnsb predict`."""
from __future__ import annotations

import json
import signal
import sys

import pytest
import timm
from click.testing import CliRunner
from PIL import Image
from timm.models import save_for_hf

from timm_lfnsb.cli import main
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict import run


@pytest.fixture
def folder(tmp_path, monkeypatch, portrait):
    """Two folders of a portrait each, and a landscape; the working directory, so that paths are short."""
    monkeypatch.chdir(tmp_path)
    for path in ('photos/ann.jpg', 'photos/trip/ann.png'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.fromarray(portrait).save(path)
    Image.new('L', (90, 60), 99).save('photos/sky.png')
    return tmp_path


def predict(*args, encoding: str = 'utf-8') -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    result = CliRunner(charset=encoding).invoke(main, ['predict', *map(str, args)])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_json_lines(folder):
    code, out, err = predict('photos', 'photos/ann.jpg', '--json')
    assert (code, err) == (0, '')
    results = [json.loads(line) for line in out.splitlines()]
    assert [result['image'] for result in results] == [
        'photos/ann.jpg', 'photos/sky.png', 'photos/trip/ann.png', 'photos/ann.jpg']
    assert results[0]['faces'][0]['box'] == results[3]['faces'][0]['box']
    assert [len(result['faces']) for result in results] == [1, 0, 1, 1]
    [face] = results[0]['faces']
    assert list(face) == ['box', 'label', 'score', 'probabilities', 'detection_score', 'points', 'turn']
    assert 'hint' not in results[0] and '--detector none' in results[1]['hint']
    assert face['score'] == face['probabilities'][face['label']] == max(face['probabilities'].values())


def test_table(folder):
    long = 'a long name with spaces, ünd Umlaute.png'
    (folder / 'photos' / 'ann.jpg').rename(folder / 'photos' / long)
    save_for_hf(timm.create_model('lfnsb', pretrained=True), folder / 'soft', safe_serialization=True, model_config={
        'label_names': list(EXPRESSIONS_8), 'softmax_temperature': 3.})  # else the smile is too sure for a runner-up
    code, out, err = predict('photos', '--model', 'local-dir:soft')
    assert code == 0 and err.startswith('No face found in 1 of 3 image(s)') and '--detector none' in err
    head, *rows = out.splitlines()
    assert head.split() == ['image', 'face', 'box', 'expression', 'score', 'runner-up']
    assert [row[:head.index('face')].strip() for row in rows] == [
        f'photos/{long}', 'photos/sky.png', 'photos/trip/ann.png']
    column = head.index('box')
    assert rows[1][column:] == 'no face found'
    for row in (rows[0], rows[2]):
        assert row[column - 2:column] == '  ' and row[column].isdigit()
        label, runner_up = row[head.index('expression'):].split()[0], row[head.index('runner-up'):].split()
        assert label == 'happiness' != runner_up[0] and 0 < float(runner_up[1]) < 0.5


def test_unsure_faces_show_what_they_may_be(folder):
    code, out, err = predict('photos/ann.jpg', '--unsure', '1')
    label, score, first, same, second, _ = out.splitlines()[1].replace(',', ' ').split()[-6:]
    assert code == 0 and (label, first) == ('unsure', 'happiness') and score == same and second != first and not err
    # Of weights without a temperature it is said what P means.
    save_for_hf(timm.create_model('test_resnet', num_classes=8), folder / 'model', safe_serialization=True,
                model_config={'label_names': list(EXPRESSIONS_8)})
    arguments = ('photos/ann.jpg', '--model', 'local-dir:model', '--json')
    code, out, err = predict(*arguments, '--unsure', '0.999')
    assert code == 0 and json.loads(out)['faces'][0]['label'] == 'unsure' and 'no temperature comes with' in err
    assert predict(*arguments)[2] == predict(*arguments, '--unsure', '0.999', '--no-calibration')[2] == ''


def test_lines_come_while_later_images_are_still_to_be_read(folder):
    (folder / 'photos' / 'ann.jpg').unlink()
    lines = run.predict_lines([folder / 'photos'], as_json=True, batch_size=1, workers=0)
    assert 'sky.png' in next(lines)[0]
    (folder / 'photos' / 'trip' / 'ann.png').write_bytes(b'')
    assert [kind for _, kind in lines] == ['problem', 'result']


def test_interrupt_finishes_what_was_read(folder):
    """Ctrl-C while the second image is under way; every image that was read comes out, and no more are read."""
    paths = [folder / 'photos' / 'sky.png'] * 40
    handler = signal.getsignal(signal.SIGINT)
    lines = run.predict_lines(paths, as_json=True, batch_size=1, workers=2)
    next(lines)
    signal.raise_signal(signal.SIGINT)
    *results, (last, kind) = lines
    assert 1 <= len(results) <= 6 and {kind for _, kind in results} == {'result'}
    assert kind == 'problem' and last == f'Interrupted after {len(results) + 1} of 40 images.'
    assert signal.getsignal(signal.SIGINT) is handler


def test_names_that_the_output_cannot_show(folder):
    """A line break in a name stays in the name's row, and a letter that the encoding lacks is escaped."""
    (folder / 'photos' / 'sky.png').rename(folder / 'new\nline 日.png')
    code, out, _ = predict(folder / 'new\nline 日.png', encoding='cp1252')
    assert code == 0 and 'new\\nline \\u65e5.png' in out.splitlines()[1]


def test_bad_images_are_reported_and_the_rest_goes_on(folder):
    (folder / 'empty').mkdir()
    (folder / 'photos' / 'bad.png').write_bytes(b'nothing')
    content = (folder / 'photos' / 'ann.jpg').read_bytes()
    (folder / 'photos' / 'cut.jpg').write_bytes(content[:len(content) // 2])
    code, out, err = predict('photos', 'missing.png', 'empty', '--json', '--annotate', 'out', '--batch-size', 1)
    assert code == 1
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer['image'] for answer in answers if 'faces' in answer] == [
        'photos/ann.jpg', 'photos/sky.png', 'photos/trip/ann.png']
    errors = [answer['error'] for answer in answers if 'faces' not in answer]
    first, *lines = err.splitlines()
    assert 'empty has no images' in first and lines == errors
    assert [line.partition(':')[0] for line in lines] == ['photos/bad.png', 'photos/cut.jpg', 'missing.png']
    assert 'truncated' in lines[1] and 'no such file' in lines[2]
    assert sorted(path.name for path in (folder / 'out').iterdir()) == ['ann.png', 'sky.png', 'trip']


def test_annotated_pictures(folder):
    for _ in range(2):  # again: the same names, and the pictures made before are no input
        code, out, _ = predict('photos', '--annotate', 'photos/faces')
        assert code == 0 and len(out.splitlines()) == 4
        written = sorted(path.relative_to(folder) for path in (folder / 'photos' / 'faces').rglob('*.*'))
        assert [path.as_posix() for path in written] == [
            'photos/faces/ann.png', 'photos/faces/sky.png', 'photos/faces/trip/ann.png']
    with Image.open('photos/faces/trip/ann.png') as picture:
        assert picture.width > 480 and picture.mode == 'RGB'
    before = (folder / 'photos' / 'trip' / 'ann.png').read_bytes()
    code, _, err = predict('photos/trip', '--annotate', 'photos/trip')
    assert code == 1 and '--annotate needs another folder' in err
    assert predict('photos/trip/ann.png', '--annotate', 'photos/trip')[0] == 0  # beside the input, not over it
    assert (folder / 'photos' / 'trip' / 'ann.png').read_bytes() == before
    assert (folder / 'photos' / 'trip' / 'ann-2.png').exists()


def test_a_missing_sample_picture_is_one_sentence(monkeypatch, tmp_path):
    import skimage
    monkeypatch.setattr(skimage, '__file__', str(tmp_path / '__init__.py'))
    code, _, err = predict('--sample')
    assert code == 1 and 'scikit-image brings it' in err and len(err.strip().splitlines()) == 1


def test_sample_whole_images_and_margin(folder):
    code, out, _ = predict('--sample')
    assert code == 0 and ' happiness ' in out
    code, out, _ = predict('photos/sky.png', '--detector', 'none', '--json')
    assert code == 0 and json.loads(out)['faces'][0]['box'] == [0, 0, 90, 60]
    tight, wide = (json.loads(predict('photos/ann.jpg', '--json', '--margin', margin)[1])['faces'][0]
                   for margin in (-0.2, 0.3))
    assert tight['box'] == wide['box'] and tight['probabilities'] != wide['probabilities']


@pytest.mark.parametrize('code, args, message', [
    (1, ['empty'], 'empty has no images'),
    (1, ['photos', '--model', 'lfnsb.rafdb'], 'lfnsb.rafdb has no trained weights'),
    (1, ['photos', '--model', 'local-dir:three'], 'label_names'),
    (1, ['photos', '--model', 'missing.onnx'], 'there is no file missing.onnx'),
    (1, ['photos', '--detector', 'none', '--margin', '0.1'], 'margin and align need a detector'),
    (1, ['photos', '--detector', 'haar'], "'yunet' finds more"),
    (1, ['photos/sky.png', '--annotate', 'photos/ann.jpg/out'], 'Not a directory'),
    (2, ['photos', '--annotate', 'photos/ann.jpg'], 'is a file'),
])
def test_errors_are_one_sentence(folder, code, args, message):
    (folder / 'empty').mkdir()
    if 'local-dir:three' in args:
        save_for_hf(timm.create_model('test_resnet', num_classes=3), folder / 'three', safe_serialization=True)
    found, _, err = predict(*args)
    assert found == code and message in err
    assert err.splitlines()[-1].startswith('Error: ') and (code == 2 or err.count('\n') == 1)


def test_runtimes(folder, monkeypatch):
    pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]'")
    monkeypatch.setenv('TIMM_LFNSB_CACHE', 'cache')
    table = predict('photos/ann.jpg')
    assert predict('photos/ann.jpg', '--runtime', 'onnxruntime') == table
    assert len(list((folder / 'cache').glob('*.onnx'))) == 1
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    assert predict('photos/ann.jpg', '--runtime', 'auto') == table
    code, out, err = predict('photos/ann.jpg', '--runtime', 'onnxruntime')
    assert (code, out) == (1, '') and 'pip install "timm-lfnsb[export]"' in err
