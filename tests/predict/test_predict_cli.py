"""The command `timm-lfnsb predict`."""
from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_lfnsb.cli import main
from timm_lfnsb.models.networks import MixedFeatureNet


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> Iterator[str]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('model')
    save_for_hf(timm.create_model('lfnsb.affectnet8'), folder, safe_serialization=True)
    yield f'local-dir:{folder}'
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def portrait() -> Image.Image:
    return Image.fromarray(skimage.data.astronaut()).crop((100, 20, 340, 220))


@pytest.fixture
def folder(tmp_path, monkeypatch, portrait):
    """Two folders of a portrait each, and a landscape; the working directory, so that paths are short."""
    monkeypatch.chdir(tmp_path)
    for path in ('photos/ann.jpg', 'photos/trip/ann.png'):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        portrait.save(path)
    Image.new('L', (90, 60), 99).save('photos/sky.png')
    return tmp_path


@pytest.fixture
def predict(capsys):
    """Run the command; return its exit code, stdout and stderr."""
    def run(*args):
        with pytest.raises(SystemExit) as exit_info:
            main.main(['predict', *map(str, args)], prog_name='timm-lfnsb')
        return exit_info.value.code, *capsys.readouterr()
    return run


def test_the_network_runs_reparameterised(folder, model, predict, monkeypatch):
    used = []
    forward = MixedFeatureNet.forward
    monkeypatch.setattr(MixedFeatureNet, 'forward', lambda self, x: used.append(self) or forward(self, x))
    assert predict('photos/ann.jpg', '--model', model)[0] == 0
    assert used and not any('BatchNorm' in type(module).__name__ for network in used for module in network.modules())


def test_json_lines(folder, model, predict):
    code, out, err = predict('photos', 'photos/ann.jpg', '--model', model, '--json')
    assert (code, err) == (0, '')
    results = [json.loads(line) for line in out.splitlines()]
    assert [result['image'] for result in results] == [
        'photos/ann.jpg', 'photos/sky.png', 'photos/trip/ann.png', 'photos/ann.jpg']
    assert results[0] == results[3]
    assert [len(result['faces']) for result in results] == [1, 0, 1, 1]
    [face] = results[0]['faces']
    assert list(face) == ['box', 'label', 'score', 'probabilities']
    assert len(face['box']) == 4 and len(face['probabilities']) == 8
    assert face['score'] == face['probabilities'][face['label']] == max(face['probabilities'].values())


def test_table(folder, model, predict):
    long = 'a portrait whose name is long and has spaces, ünd Umlaute.png'
    (folder / 'photos' / 'ann.jpg').rename(folder / 'photos' / long)
    code, out, err = predict('photos', '--model', model)
    assert (code, err) == (0, '')
    head, *rows = out.splitlines()
    assert head.split() == ['image', 'face', 'box', 'expression', 'score', 'runner-up']
    assert [row[:head.index('face')].strip() for row in rows] == [
        f'photos/{long}', 'photos/sky.png', 'photos/trip/ann.png']
    column = head.index('box')
    assert rows[1][column:] == 'no face found'
    for row in (rows[0], rows[2]):
        assert row[column - 2:column] == '  ' and row[column].isdigit()
        assert row[head.index('score'):].startswith('0.')


def test_bad_images_are_reported_and_the_rest_goes_on(folder, model, predict):
    (folder / 'empty').mkdir()
    (folder / 'photos' / 'bad.png').write_bytes(b'nothing')
    content = (folder / 'photos' / 'ann.jpg').read_bytes()
    (folder / 'photos' / 'cut.jpg').write_bytes(content[:len(content) // 2])
    code, out, err = predict(
        'photos', 'missing.png', 'empty', '--model', model, '--json', '--annotate', 'out', '--batch-size', 1)
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


def test_annotated_pictures(folder, model, predict):
    (folder / 'photos' / 'ann.png').write_bytes((folder / 'photos' / 'trip' / 'ann.png').read_bytes())
    for _ in range(2):  # again: the same names, and the pictures made before are no input
        code, out, _ = predict('photos', '--model', model, '--annotate', 'photos/faces')
        assert code == 0 and len(out.splitlines()) == 5
        written = sorted(path.relative_to(folder) for path in (folder / 'photos' / 'faces').rglob('*.*'))
        assert [path.as_posix() for path in written] == [
            'photos/faces/ann-2.png', 'photos/faces/ann.png', 'photos/faces/sky.png', 'photos/faces/trip/ann.png']
    with Image.open('photos/faces/trip/ann.png') as picture:
        assert picture.width > 480 and picture.mode == 'RGB'


def test_annotate_does_not_overwrite_inputs(folder, model, predict):
    before = (folder / 'photos' / 'trip' / 'ann.png').read_bytes()
    code, _, err = predict('photos/trip', '--model', model, '--annotate', 'photos/trip')
    assert code == 2 and '--annotate needs another folder' in err
    code, _, _ = predict('photos/trip/ann.png', '--model', model, '--annotate', 'photos/trip')
    assert code == 0
    assert (folder / 'photos' / 'trip' / 'ann.png').read_bytes() == before
    assert (folder / 'photos' / 'trip' / 'ann-2.png').exists()


def test_whole_images_and_margin(folder, model, predict):
    code, out, _ = predict('photos/sky.png', '--model', model, '--detector', 'none', '--json')
    assert code == 0 and json.loads(out)['faces'][0]['box'] == [0, 0, 90, 60]
    tight, wide = (
        json.loads(predict('photos/ann.jpg', '--model', model, '--json', '--margin', margin)[1])['faces'][0]
        for margin in (-0.2, 0.3))
    assert tight['box'] == wide['box'] and tight['probabilities'] != wide['probabilities']


def test_progress_is_not_on_stdout(folder, model, predict, portrait):
    for i in range(12):
        Image.fromarray(np.full((30, 30), i, np.uint8)).save(folder / 'photos' / f'{i:02}.png')
    code, out, _ = predict('photos', '--model', model, '--json')
    assert code == 0 and all(json.loads(line) for line in out.splitlines()) and len(out.splitlines()) == 15


@pytest.mark.parametrize('args, message', [
    (['empty'], 'empty has no images'),
    (['photos', '--model', 'nonsense'], 'cannot load the model nonsense'),
    (['photos', '--model', 'lfnsb.rafdb'], 'lfnsb.rafdb has no trained weights'),
    (['photos', '--model', 'local-dir:empty'], 'cannot load the model local-dir:empty'),
    (['photos', '--detector', 'none', '--margin', '0.1'], '--margin needs a detector'),
    (['photos', '--annotate', 'photos/ann.jpg'], 'is a file'),
    ([], '--sample'),
])
def test_errors_are_one_sentence(folder, predict, args, message):
    (folder / 'empty').mkdir()
    code, out, err = predict(*args)
    assert code != 0 and out == ''
    assert message in err and 'Traceback' not in err
    assert err.splitlines()[-1].startswith('Error: ')


def test_unusable_settings_of_a_good_model(folder, model, predict):
    for args, message in ((['--margin', '9'], 'margin must be'), (['--device', 'gpu'], "cannot use the device 'gpu'")):
        code, out, err = predict('photos', '--model', model, *args)
        assert (code, out) == (1, '') and err.startswith('Error: ') and message in err and err.count('\n') == 1


def test_model_without_label_names(folder, tmp_path, predict):
    save_for_hf(timm.create_model('lfnsb.affectnet8', num_classes=3), tmp_path / 'three', safe_serialization=True)
    code, out, err = predict('photos', '--model', f"local-dir:{tmp_path / 'three'}")
    assert (code, out) == (1, '') and 'label_names' in err and err.count('\n') == 1
