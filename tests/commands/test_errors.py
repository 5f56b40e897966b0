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
    'recipe show no_such_recipe': 'no_such_recipe', 'recipe path no_such_recipe': 'no_such_recipe',
    'reproduce show {broken}': 'broken', 'reproduce show {missing}': 'missing',
    'run {missing}': 'missing',
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
    assert {call.split()[0] for call in WRONG_CALLS} == {path[0] for path in COMMANDS}
