"""Every command says in one sentence what is wrong, and ends with exit code 1: no traceback, whatever the error."""
from __future__ import annotations

import errno
import shlex
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

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


def assert_one_sentence(result: Result, code: int = 1) -> str:
    """Check how a command failed; returns its message."""
    assert result.exit_code == code and isinstance(result.exception, SystemExit), result.output or result.exception
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


WRONG_CALLS = [
    ('bench --show {broken}', 'broken', 1), ('bench lfnsb --plot {new}.txt', '.txt', 1), ('bench --batch none', '', 2),
    ('card no_such_weights', 'no_such_weights', 1), ('card --folder {empty}', '', 1),
    ('convert {broken} {new} --model lfnsb --labels rafdb', 'broken', 1),
    ('count no_such_model', 'no_such_model', 1),
    ('evaluate --model no_such_model --data-dir {faces} --out {new}', 'no_such_model', 1),
    ('evaluate --model lfnsb.rafdb --data-dir {faces} --out {new}', 'lfnsb.rafdb', 1),
    ('evaluate --model lfnsb.ferplus --data-dir {faces} --split validation --out {new} --device wrong', 'wrong', 1),
    ('export no_such_model {new}.onnx', 'no_such_model', 1), ('export lfnsb.ferplus {new}.jpg', '.jpg', 1),
    ('graft no_such_model {new}.safetensors', 'no_such_model', 1),
    ('pack {missing} {new}', 'missing', 1), ('pack {broken} {new}', 'broken', 1),
    ('predict {image} --model no_such_model', 'no_such_model', 1), ('predict', 'images', 2),
    ('predict {image} --device nonsense', 'nonsense', 1),
    ('prepare folder {missing} {new}', 'missing', 1), ('prepare ferplus {empty} {new}', 'train.zip', 1),
    ('push {missing}', 'missing', 1), ('push {empty} --repo-id me/mine --dry-run', 'empty', 1),
    ('recipe show no_such_recipe', 'no_such_recipe', 1), ('recipe path no_such_recipe', 'no_such_recipe', 1),
    ('reproduce table2 --data-dir {missing} --out {new} --recipe rafdb', '', 1),
    ('reproduce show {broken}', 'broken', 1),
    ('run {missing}', 'missing', 1),
    ('weights verify no_such_weights --data-dir {faces}', 'no_such_weights', 1),
    ('weights runs {empty}', 'empty', 1), ('weights measure lfnsb.ferplus --data-dir {faces}', 'dataset.json', 1),
]


@pytest.mark.parametrize('call, word, code', WRONG_CALLS, ids=[call for call, _, _ in WRONG_CALLS])
def test_wrong_calls(call, word, code, face_folder, tmp_path):
    places = {'faces': face_folder, **{name: tmp_path / name for name in ('missing', 'broken', 'empty', 'new')},
              'image': tmp_path / 'image.png'}
    places['broken'].write_bytes(b'{"this is": neither')
    places['empty'].mkdir()
    Image.new('L', (48, 48)).save(places['image'])
    arguments = [part.format(**places) for part in shlex.split(call)]
    message = assert_one_sentence(CliRunner().invoke(main, arguments), code)
    assert word in message and len(message) < 700 and not places['new'].is_file()


def test_wrong_calls_know_every_command():
    assert {call.split()[0] for call, _, _ in WRONG_CALLS} == {path[0] for path in COMMANDS}
