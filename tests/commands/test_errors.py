"""Every command says in one sentence what is wrong, and ends with exit code 1: no traceback, whatever the error."""
from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support.train_script import STANDIN, patched

from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError


def leaves(group: click.Group, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, as it is typed."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from leaves(command, *path, name)
        else:
            yield (*path, name), command


COMMANDS = dict(leaves(main))


def assert_one_sentence(result: Result) -> str:
    """Check how a command failed; returns its message."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output or result.exception
    assert 'Traceback' not in result.output
    _, *messages = ('\n' + result.stderr).split('\nError: ')
    assert len(messages) == 1, result.stderr
    return messages[0].strip()


@pytest.mark.parametrize('error, message', [
    (UserError('the cat sits on it: lift her.'), 'the cat sits on it: lift her.'),
    (FileNotFoundError(errno.ENOENT, 'No such file', 'cat.png'), "[Errno 2] No such file: 'cat.png'"),
    (ZeroDivisionError('of the program itself'), None),
])
@pytest.mark.parametrize('path', COMMANDS, ids=' '.join)
def test_every_command_turns_every_error_of_a_user_into_one_sentence(path, error, message, monkeypatch):
    def callback(**_: object) -> None:
        raise error

    monkeypatch.setattr(COMMANDS[path], 'callback', callback)
    monkeypatch.setattr(COMMANDS[path], 'params', [])
    result = CliRunner().invoke(main, list(path))
    assert assert_one_sentence(result) == message if message else result.exception is error


WRONG_CALLS = {
    'bench --show {broken}': 'broken', 'bench lfnsb --plot {new}.txt': '.txt',
    'card no_such_weights': 'no_such_weights',
    'convert {broken} {new} --model lfnsb --labels rafdb': 'broken',
    'count no_such_model': 'no_such_model',
    'evaluate --model lfnsb.rafdb --data-dir {faces} --out {new}': 'lfnsb.rafdb',
    'evaluate --model lfnsb.ferplus --data-dir {faces} --out {new} --device wrong': 'wrong',
    'export lfnsb.ferplus {new}.jpg': '.jpg',
    'graft no_such_model {new}.safetensors': 'no_such_model',
    'pack {missing} {new}': 'missing', 'pack {broken} {new}': 'broken',
    'predict {image} --model no_such_model': 'no_such_model', 'predict {image} --device nonsense': 'nonsense',
    'prepare folder {missing} {new}': 'missing', 'prepare ferplus {empty} {new}': 'train.zip',
    'push {missing}': 'missing', 'push {empty} --repo-id me/mine --dry-run': 'empty',
    'rebalance {empty} {new} --data-dir {faces}': 'dataset.json',
    'recipe show no_such_recipe': 'no_such_recipe', 'recipe path no_such_recipe': 'no_such_recipe',
    'reproduce show {broken}': 'broken', 'reproduce show {missing}': 'missing',
    'run {missing}': 'missing',
    'score {missing} {new}': 'missing',
    'video {missing}': 'missing', 'video {broken}': 'broken',
    'weights verify no_such_weights --data-dir {faces}': 'no_such_weights', 'weights runs {empty}': 'empty',
}


@pytest.mark.parametrize('call', WRONG_CALLS)
def test_wrong_calls(call, face_folder, tmp_path):
    places = {name: tmp_path / name for name in ('missing', 'broken', 'empty', 'new', 'image')}
    places['broken'].write_bytes(b'{"this is": neither')
    places['empty'].mkdir()
    Image.new('L', (48, 48)).save(places['image'], format='png')
    arguments = [part.format(**places, faces=face_folder) for part in shlex.split(call)]
    message = assert_one_sentence(CliRunner().invoke(main, arguments))
    assert WRONG_CALLS[call] in message and len(message) < 700 and not places['new'].is_file()


def test_wrong_calls_know_every_command():
    assert {call.split()[0] for call in WRONG_CALLS} == {path[0] for path in COMMANDS} - {'doctor'}  # asks for nothing


NEARLY_RIGHT = {
    'bench lfnbs --peer none': 'lfnsb', 'card lfnsb-ferplus': 'lfnsb.ferplus', 'count mobilefacnet': 'mobilefacenet',
    'convert {image} {new} --model ddamfm --labels rafdb': 'ddamfn',
    'convert {image} {new} --model dlib-faces --data-dir {faces}': 'dlib_face',
    'evaluate --model lfn_small.ferpus --split train --data-dir {faces} --out {new}': 'ferplus',
    'evaluate --model Resnet_18 --split train --data-dir {faces} --out {new}': 'resnet18',
    'export lfnsb.rafbd {new}.onnx': 'rafdb', 'graft lfn-small {new}.safetensors': 'lfn_small',
    'predict {image} --model LFNSB': 'lfnsb', 'push lfnsb.ferpus --repo-id me/mine': 'lfnsb.ferplus',
    'recipe show affectnet9': 'affectnet8', 'recipe path ferplus_cpu': 'ferplus-cpu',
    'run {standin} --config ferplus-cpu-122': 'ferplus-cpu-112', 'run {standin} --model mobilfacenet': 'mobilefacenet',
    'run {standin} --kd-model-name lfnsb,lfn_smal': 'lfn_small',
    'run {standin} --data-dir {faces} --class-map affectnet_7': 'affectnet7',
    'weights verify lfn_small.ferpls --data-dir {faces}': 'lfn_small.ferplus',
    'weights robustness lfnsb --data-dir {faces} --only turned': None,
}


@pytest.mark.parametrize('call', NEARLY_RIGHT)
def test_wrong_names_say_which_are_near(call, face_folder, tmp_path):
    image = tmp_path / 'image.png'
    Image.new('L', (48, 48)).save(image)
    places = dict(image=image, new=tmp_path / 'new', faces=face_folder, standin=STANDIN)
    with patched():
        message = assert_one_sentence(CliRunner().invoke(main, shlex.split(call.format(**places))))
    near = NEARLY_RIGHT[call]
    assert f'(did you mean {near}' in message if near else 'did you mean' not in message, message


def test_a_folder_in_place_of_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'packed').mkdir()
    message = assert_one_sentence(CliRunner().invoke(main, ['count', 'packed']))
    assert 'local-dir:packed' in message


def test_names_that_the_terminal_cannot_show(face_folder, tmp_path):
    target = tmp_path / '顔'
    result = CliRunner(charset='cp1252').invoke(main, ['prepare', 'folder', str(face_folder), str(target)])
    assert result.exit_code == 0 and target.is_dir() and '\\u9854' in result.output, result.exception


def test_a_command_that_is_nearly_right():
    result = CliRunner().invoke(main, ['predcit', '--sample'])
    assert result.exit_code == 2 and '(did you mean predict?)' in result.output
    assert 'did you mean' not in CliRunner().invoke(main, ['xyz']).output
