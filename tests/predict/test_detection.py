"""`timm-lfnsb evaluate --detector`: faces found, missed and doubled, and expressions end to end."""
from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from timm_lfnsb.cli import main


@pytest.fixture
def evaluate(tmp_path, portrait):
    """Runs the command on pictures that are saved by name: a portrait, two of them, and none."""
    two = np.concatenate([portrait, portrait], axis=1)
    pictures = {'one': portrait, 'two': two, 'none': np.zeros((90, 90), np.uint8)}

    def run(*names: str, **options: object) -> tuple[str, dict]:
        for name in names:
            path = tmp_path / 'data' / 'test' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pictures[path.stem]).save(path)
        arguments = [f'--{key}={value}' for key, value in options.items()]
        result = CliRunner().invoke(main, [
            'evaluate', '--model=lfnsb', '--detector=yunet', f'--data-dir={tmp_path / "data"}', f'--out={tmp_path}',
            *arguments])
        file = tmp_path / 'detection.json'
        return result.output, json.loads(file.read_text()) if file.exists() else {}

    return run


@pytest.mark.parametrize('options', [{}, dict(enlarge=2, border=0.2)])
def test_expressions(evaluate, options):
    text, figures = evaluate('happy/one.png', 'happy/none.png', 'sad/one.png', 'happy/two.png', **options)
    assert [figures[key] for key in ('pictures', 'faces', 'found', 'missed', 'doubled')] == [4, 4, 3, 1, 1]
    assert figures['accuracy'] == 2 / 4 and figures['accuracy_found'] == 2 / 3
    assert '3 found (75.0 %)' in text and '50.0 % right end to end' in text


def test_numbers_of_faces(evaluate):
    _, figures = evaluate('2/two.png', '0/one.png', '3/two.png', '0/none.png')
    assert [figures[key] for key in ('pictures', 'faces', 'found', 'missed', 'doubled')] == [4, 5, 4, 1, 1]
    assert 'accuracy' not in figures


def test_wrong_calls(evaluate, tmp_path):
    assert 'is not in the range' in evaluate('happy/one.png', **{'min-score': 2})[0]
    for option, value in ('tta', 'hflip'), ('seconds', 1), ('batch-size', 64), ('workers', 0), ('compare', 'mfn'):
        assert f'--{option} is for crops' in evaluate('happy/one.png', **{option: value})[0]
    crops = ['evaluate', '--model=lfnsb', f'--data-dir={tmp_path}', f'--out={tmp_path}']
    for flag in '--no-calibration', '--common-classes':
        message = CliRunner().invoke(main, [*crops, '--detector=yunet', flag]).output
        assert flag in message and 'is for crops' in message
    assert 'a second --model is for crops' in evaluate('happy/one.png', model='lfn_small')[0]
    assert '--border is for whole pictures' in CliRunner().invoke(main, [*crops, '--border=0.2']).output


def test_wrong_folders(evaluate, tmp_path):
    assert 'Error: there is no folder' in evaluate(split='validation')[0]
    assert 'unknown class name' in evaluate('gloomy/one.png')[0]
    (tmp_path / 'data' / 'test' / 'gloomy' / 'one.png').rename(tmp_path / 'data' / 'test' / 'happy.png')
    (tmp_path / 'data' / 'test' / '1').mkdir()
    (tmp_path / 'data' / 'test' / '1' / 'bad.png').touch()
    assert 'outside of the label folders' in evaluate()[0]
    (tmp_path / 'data' / 'test' / 'happy.png').unlink()
    assert 'bad.png: not an image' in evaluate()[0]
