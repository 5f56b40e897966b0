"""timm-lfnsb push: what is checked before anybody is asked, and publishing to a Hub on loopback."""
from __future__ import annotations

import hashlib
import json
import re
import shutil
import socket

import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from huggingface_hub import constants
from support import TESTS
from support.hub_server import OWNER, Client, HubServer
from timm.models import save_for_hf

from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.hub.card import render_card
from timm_lfnsb.hub.push import push
from timm_lfnsb.weights.names import WEIGHTS_DIR, weights_info

NAME = 'lfnsb.ferplus'
REPO = f'timm-lfnsb/{NAME}'
CARD = '---\nlicense: mit\nlibrary_name: timm\n---\n\n# A model\n'


@pytest.fixture
def no_network(monkeypatch):
    for name in ('connect', 'connect_ex', 'sendto'):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail('network used'))
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *_, **__: pytest.fail('network used'))


@pytest.fixture(scope='module')
def original(tmp_path_factory):
    """A model of somebody's own, as timm writes it, with a card."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp('original')
    save_for_hf(timm.create_model('mobilefacenet.rafdb'), path, safe_serialization=True)
    (path / 'README.md').write_text(CARD)
    return path


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / 'own')


def test_dry_run_shows_every_file_and_the_card(no_network, folder):
    (folder / '.cache').mkdir()
    (folder / '.DS_Store').write_bytes(b'x')
    (folder / 'LICENSE').write_text('MIT')
    result = CliRunner().invoke(main, ['push', str(folder), '--repo-id', 'me/own', '--dry-run'])
    contents = {path.name: path.read_bytes() for path in sorted(folder.glob('[!.]*'))}
    config = json.loads(contents['config.json'])
    del config['model_args']['num_classes']  # transformers passes it itself, and fails when it is there twice
    contents['config.json'] = json.dumps(config, indent=2).encode()
    listing, _, card = result.output.partition('\n\n')
    assert result.exit_code == 0 and card == f'{CARD}\n'
    assert [line.split() for line in listing.splitlines()] == [['would', 'publish', 'me/own'], *(
        [name, f'{len(content):,}', 'bytes', 'sha256', hashlib.sha256(content).hexdigest()]
        for name, content in contents.items())]


def test_card_of_a_folder_without_one(no_network, folder, tmp_path):
    (folder / 'README.md').unlink()
    with pytest.raises(UserError, match='--license'):
        push(str(folder), 'me/own', dry_run=True)
    card = push(str(folder), 'me/own', dry_run=True, license='mit').card
    assert yaml.safe_load(card.split('---\n')[1])['license'] == 'mit' and 'me/own' in card
    metrics = {**weights_info(NAME)['metrics']['test'], 'split': 'test'}
    for content, message in ((metrics, 'other labels'), ([], r'is no metrics\.json')):  # eight, the model has seven
        (tmp_path / 'metrics.json').write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            push(str(folder), 'me/own', dry_run=True, license='mit', metrics=tmp_path / 'metrics.json')


@pytest.mark.parametrize('name, content, message', [
    *((name, b'x', f'{name} is not to be published') for name in (
        'pytorch_model.bin', 'optimizer.PT', 'last.pth.tar', 'modeling.py', 'face.png')),
    ('data', 'a folder', 'data is not to be published'), ('a.txt', 'a link', 'a.txt is not to be published'),
    ('config.json', dict(label_names=['a', 'b']), 'the model has 7 classes, but'),
    ('config.json', dict(pretrained_cfg={}, label_names=None), 'no label_names'),
    ('config.json', b'{', 'cannot load the model'),
    ('README.md', b'# no front matter\n', 'names no licence'),
    ('README.md', b'---\nlicense: [unclosed\n---\n', 'no valid front matter'),
    ('README.md', b'---\nlicense: mit\nmodel-index: nonsense\n---\n', 'no valid front matter'),
    ('model.safetensors', b'\x80\x04 a pickle', 'cannot load the model'),
])
def test_unsound_folders_are_refused(no_network, folder, name, content, message):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == 'a folder':
        path.mkdir()
    elif content == 'a link':
        path.symlink_to(folder / 'README.md')
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(UserError, match=message):
        push(str(folder), 'me/own', dry_run=True)


@pytest.mark.parametrize('arguments, message', [
    (['nonsense', 'a/b'], 'nonsense is neither a folder nor the name of embedded weights ('),
    ([str(TESTS)], 'tests needs a repository to go to'), ([NAME, 'a/b/c'], "'a/b/c' is no name of a Hub repository")])
def test_what_cannot_be_published(no_network, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        push(*arguments)


# With the Hub on loopback

@pytest.fixture
def server(monkeypatch):
    with HubServer() as server:
        monkeypatch.setattr(constants, 'ENDPOINT', server.url)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_PROGRESS_BARS', True)
        monkeypatch.setenv('HF_TOKEN', OWNER)
        yield server


def publish(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ['push', *map(str, arguments)])
    return result.exit_code, result.output


def test_publish_then_pull(server, tmp_path):
    """The round trip: a fresh process pulls with timm alone, and sees what the embedded weights see."""
    status, output = publish(NAME)
    repo = server.repos[REPO]
    assert not repo.private and len(repo.commits) == 2  # the Hub's own first one, and one of ours
    assert status == 0 and f"{server.url}/{REPO}/commit/{repo.refs['main']}" in output
    files = repo.commits[repo.refs['main']]
    assert set(files) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert files['model.safetensors'] == (WEIGHTS_DIR / f'{NAME}.safetensors').read_bytes()
    assert files['README.md'].decode() == render_card(weights_info(NAME), REPO)
    config = json.loads(files['config.json'])
    assert config['label_names'] == weights_info(NAME)['label_names']
    assert config['softmax_temperature'] == weights_info(NAME)['temperature']

    code = """
import timm, timm_lfnsb, torch
from timm_lfnsb.models.loading import load_model
name = 'hf-hub:timm-lfnsb/lfnsb.ferplus'
model = timm.create_model(name, pretrained=True).eval()
load_model(name)  # which compares with the SHA-256 of the package
with torch.no_grad():
    logits = model(torch.linspace(-2, 2, 37632).reshape(1, 3, 112, 112))
result = logits.tolist(), model.pretrained_cfg['label_names'], model.pretrained_cfg['source']
"""
    with Client(server.url, tmp_path / 'reader') as reader:
        logits, labels, source = reader.run(code)
    assert (labels, source) == (weights_info(NAME)['label_names'], 'hf-hub')
    with torch.no_grad():
        images = torch.linspace(-2, 2, 37632).reshape(1, 3, 112, 112)
        expected = timm.create_model(NAME, pretrained=True).eval()(images)
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=0)


def test_publish_a_folder_again(server, folder):
    assert publish(folder, '--repo-id', 'me/own', '--private')[0] == 0
    repo = server.repos['me/own']
    first = repo.refs['main']
    (folder / 'README.md').write_text(CARD + 'More.\n')
    assert publish(folder, '--repo-id', 'me/own', '--private')[0] == 0
    second = repo.refs['main']
    assert repo.private and second != first and repo.commits[second]['README.md'].endswith(b'More.\n')
    repo.private = False
    status, output = publish(folder, '--repo-id', 'me/own', '--private')
    assert status == 1 and 'is there and public' in output and repo.refs['main'] == second


def test_pull_request(server, folder):
    """Into a repository of others, where committing is forbidden."""
    before = server.add('elsewhere/model', folder)
    (folder / 'README.md').write_text(CARD + 'Mended.\n')
    status, output = publish(folder, '--repo-id', 'elsewhere/model')
    assert status == 1 and 'required permissions' in output and output.count('\n') == 1
    status, output = publish(folder, '--repo-id', 'elsewhere/model', '--create-pr')
    assert status == 0 and f'{server.url}/elsewhere/model/discussions/1' in output
    repo = server.repos['elsewhere/model']
    assert repo.refs['main'] == before
    assert repo.commits[repo.refs['refs/pr/1']]['README.md'].endswith(b'Mended.\n')


def test_refused_by_the_hub(server, folder, monkeypatch):
    for token in ('', 'hf_wrong'):
        monkeypatch.setenv('HF_TOKEN', token)
        status, output = publish(folder, '--repo-id', 'me/own')
        assert status == 1 and 'does not know you: log in' in output and server.repos == {}
    monkeypatch.setenv('HF_TOKEN', OWNER)
    (folder / 'README.md').write_text('---\nlicense: [mit]\n---\n')
    status, output = publish(folder, '--repo-id', 'me/own')
    assert status == 1 and 'the Hub does not take the card' in output and '"license" must be a string' in output
    assert len(server.repos['me/own'].commits) == 1
