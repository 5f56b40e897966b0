"""Loading from the Hub: the real huggingface_hub client, in a process of its own, against a Hub on loopback."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from support.hub_server import OWNER, Client, ClientError, HubServer, client_env
from timm.models import save_for_hf

from timm_lfnsb.util.files import file_sha256
from timm_lfnsb.weights import names

NAME = 'lfnsb.ferplus'
REPO = f'timm-lfnsb/{NAME}'
EMBEDDED = names.WEIGHTS_DIR / f'{NAME}.safetensors'

LOAD = """
from timm_lfnsb.models.loading import load_model
config = load_model(name, cache_dir=cache).pretrained_cfg
result = config.get('file')
"""
PREFER = """
import timm
result = timm.create_model('lfnsb', pretrained=True, cache_dir=cache).pretrained_cfg['file']
"""
TIMM = "import timm; timm.create_model(name, pretrained=True, cache_dir=cache)"

BOTH = pytest.mark.parametrize('name', [REPO, 'someone/faces'])


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """What repositories hold: 'ours' as it is published, 'theirs' another network's, 'pickled' the same as a pickle."""
    root = tmp_path_factory.mktemp('folders')
    model = timm.create_model(NAME, pretrained=True)
    save_for_hf(model, root / 'ours', safe_serialization=True)
    shutil.copy(EMBEDDED, root / 'ours' / 'model.safetensors')
    torch.manual_seed(3)
    other = timm.create_model('mobilefacenet.affectnet7')
    save_for_hf(other, root / 'theirs', safe_serialization=True)
    save_for_hf(other, root / 'pickled', safe_serialization=False)
    return root


@pytest.fixture(scope='module')
def running():
    with HubServer() as server:
        yield server


@pytest.fixture
def server(running, folders):
    """The Hub with the repositories in their first state, and no faults."""
    running.repos.clear()
    running.lfs.clear()
    running.faults.clear()
    running.add(REPO, folders / 'ours')
    running.add('someone/faces', folders / 'theirs')
    running.add('someone/pickle', folders / 'pickled')
    running.log.clear()
    return running


@pytest.fixture(scope='module')
def client(running, tmp_path_factory):
    with Client(running.url, tmp_path_factory.mktemp('home')) as client:
        yield client


def refused(client: Client, code: str, **variables) -> str:
    """The message of the UserError a snippet ends with: one sentence in one line."""
    with pytest.raises(ClientError) as caught:
        client.run(code, **variables)
    assert caught.value.kind == 'UserError', caught.value
    message = caught.value.message
    assert '\n' not in message and message.endswith('.') and 'Traceback' not in message
    return message


def alter(server: HubServer, repo_id: str) -> None:
    """Commit weights that differ in one bit."""
    content = server.repos[repo_id].commits[server.repos[repo_id].refs['main']]['model.safetensors']
    server.repos[repo_id].commit({'model.safetensors': content[:-1] + bytes([content[-1] ^ 1])})


def test_nothing_is_fetched_unasked(tmp_path):
    """Any connection or name look-up ends the process; the organisation comes from the environment."""
    code = """
import sys
def no_network(event, args):
    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname', 'socket.sendto'):
        sys.exit(f'{event}{args}')
sys.addaudithook(no_network)
import timm, timm_lfnsb
from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.util.files import file_sha256
from timm_lfnsb.weights import names
from timm_lfnsb.cli import main
timm.create_model('lfnsb', pretrained=True)
ExpressionRecognizer()
main(['--help'], standalone_mode=False)
main(['doctor'], standalone_mode=False)
assert names.HUB_ORG == 'mirror' and timm.get_pretrained_cfg('lfnsb.ferplus').hf_hub_id == 'mirror/lfnsb.ferplus'
import socket
socket.getaddrinfo('localhost', 80)  # the guard works
"""
    env = client_env('http://127.0.0.1:9', tmp_path, TIMM_LFNSB_HUB_ORG='mirror')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert result.stderr.strip().splitlines()[-1].startswith("socket.getaddrinfo('localhost'"), result.stderr
    assert not any(tmp_path.iterdir())


def test_hub_preferred(server, client, tmp_path):
    prefer = {'TIMM_LFNSB_WEIGHTS': 'hub'}
    path = client.run(PREFER, env=prefer, cache=tmp_path)
    assert path.startswith(str(tmp_path)) and file_sha256(path) == file_sha256(EMBEDDED)
    assert server.paths('GET')
    # Whoever names a source gets that one.
    code = "import timm; result = timm.create_model('lfnsb', pretrained={}, cache_dir=cache, {}).pretrained_cfg['file']"
    other = code.format(True, 'pretrained_cfg_overlay={"file": file}')
    copy = str(shutil.copy(EMBEDDED, tmp_path / 'copy.safetensors'))
    server.log.clear()
    assert client.run(other, env=prefer, cache=tmp_path / 'c', file=copy) == copy
    assert client.run(code.format(False, 'num_classes=3'), env=prefer, cache=tmp_path / 'd') == str(EMBEDDED)
    assert server.log == []
    # There is no falling back to the embedded file without a word.
    del server.repos[REPO]
    assert f'there is no model {REPO}' in refused(client, PREFER, env=prefer, cache=tmp_path / 'e')


def test_a_wrong_name_says_which_are_near(server, client, tmp_path):
    """Those of the zoo and those in the cache, whether the Hub can be asked or not."""
    fetch = 'from timm_lfnsb.weights.fetch import fetch_model\nresult = str(fetch_model(name))'
    client.run(fetch, name='someone/faces')
    for wrong, near in (('timm-lfnsb/lfnsb.ferpls', REPO), ('somone/face', 'someone/faces'), ('me/xyz', None)):
        for env in ({}, {'HF_HUB_OFFLINE': '1'}):
            message = refused(client, LOAD, name=f'hf-hub:{wrong}', cache=tmp_path, env=env)
            assert (f'{wrong} (did you mean {near}' if near else wrong) in message
            assert near or 'did you mean' not in message


def test_our_labels_do_not_come_from_the_hub(server, client, tmp_path):
    """An altered config.json cannot rename the classes: the package's own config counts."""
    server.repos[REPO].commit({'config.json': b'{"architecture": "lfnsb", "label_names": ["x"]}'})
    assert client.run(LOAD + "result = config['label_names'][0]", name=f'hf-hub:{REPO}', cache=tmp_path) == 'neutral'


def test_revisions(server, client, tmp_path):
    first = server.repos[REPO].refs['main']
    alter(server, REPO)
    for revision in (first, 'v1'):
        server.repos[REPO].refs['v1'] = first
        assert first in client.run(LOAD, name=f'hf-hub:{REPO}@{revision}', cache=tmp_path)
        client.run(TIMM, name=f'hf-hub:{REPO}@{revision}', cache=tmp_path)
    assert 'has no revision v9' in refused(client, LOAD, name=f'hf-hub:{REPO}@v9', cache=tmp_path)
    server.log.clear()  # a commit in the cache never changes, so nobody is asked
    client.run(LOAD, name=f'hf-hub:{REPO}@{first}', cache=tmp_path)
    assert server.log == []


def test_pinned_revision(server, client, tmp_path):
    """Once a weight is published and pinned, a later commit on main is not even looked at."""
    first = server.repos[REPO].refs['main']
    alter(server, REPO)
    pin = "from timm_lfnsb.weights import names; names.HUB_REVISIONS['lfnsb.ferplus'] = pin; "
    try:
        assert first in client.run(pin + LOAD, name=f'hf-hub:{REPO}', pin=first, cache=tmp_path)
        assert all(first in path or '/cdn/' in path for path in server.paths('GET') + server.paths('HEAD'))
        message = refused(client, LOAD, name=f'hf-hub:{REPO}@main', cache=tmp_path)  # asked for, so not the pin
        assert 'is not the file this version' in message
    finally:
        client.run(pin, pin=None)


def test_cache_is_used_without_a_network(server, client, tmp_path):
    for name in (REPO, 'someone/faces'):
        client.run(LOAD, name=f'hf-hub:{name}', cache=tmp_path)
    unset = 'from huggingface_hub import constants; constants.HF_HUB_OFFLINE = False'
    with Client('http://127.0.0.1:9', tmp_path / 'home', HF_HUB_OFFLINE='1') as offline:
        for message in ('HF_HUB_OFFLINE forbids to fetch it', '127.0.0.1:9 cannot be reached'):
            for name in (REPO, 'someone/faces'):
                offline.run(LOAD, name=f'hf-hub:{name}', cache=tmp_path)
                assert message in refused(offline, LOAD, name=f'hf-hub:{name}', cache=tmp_path / 'empty')
            assert offline.run(PREFER, env={'TIMM_LFNSB_WEIGHTS': 'hub'}, cache=tmp_path).startswith(str(tmp_path))
            offline.run(unset)
        # A damaged cache cannot be mended then.
        path = offline.run(LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)
        with open(path, 'r+b') as file:
            file.truncate(1000)
        assert 'cannot be reached' in refused(offline, LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)


@BOTH
def test_private_repository(server, client, tmp_path, name):
    server.repos[name].private = True
    assert 'or it is private' in refused(client, LOAD, name=f'hf-hub:{name}', cache=tmp_path)
    assert 'does not know you' in refused(
        client, LOAD, env={'HF_TOKEN': 'hf_wrong'}, name=f'hf-hub:{name}', cache=tmp_path)
    client.run(LOAD, env={'HF_TOKEN': OWNER}, name=f'hf-hub:{name}', cache=tmp_path)


@BOTH
def test_truncated_download_is_thrown_away(server, client, tmp_path, name):
    """A file that is shorter than the Hub said."""
    server.faults['short'] = -1
    assert 'Consistency check failed' in refused(client, LOAD, name=f'hf-hub:{name}', cache=tmp_path)
    server.faults.clear()
    client.run(LOAD, name=f'hf-hub:{name}', cache=tmp_path)  # nothing of it stays behind


def test_altered_on_the_way(server, client, tmp_path):
    """One bit: sizes agree, so only a SHA-256 sees it. Ours is fetched again, then refused; timm's path loads it."""
    for name in (REPO, 'someone/faces'):
        server.faults['altered'] = 1
        client.run(LOAD, name=f'hf-hub:{name}', cache=tmp_path / 'once')
        server.faults['altered'] = -1
        message = refused(client, LOAD, name=f'hf-hub:{name}', cache=tmp_path / 'always')
        assert 'was not loaded' in message and 'altered' in message
    client.run(TIMM, name=f'hf-hub:{REPO}', cache=tmp_path / 'timm')  # documented in timm_lfnsb.weights.fetch


def test_altered_on_the_hub(server, client, tmp_path):
    """Someone else's commit in our repository, with a hash that is right for it."""
    alter(server, REPO)
    for name, code, env in ((f'hf-hub:{REPO}', LOAD, {}), ('', PREFER, {'TIMM_LFNSB_WEIGHTS': 'hub'})):
        assert 'is not the file this version of timm_lfnsb knows' in refused(
            client, code, env=env, name=name, cache=tmp_path)
    alter(server, 'someone/faces')  # theirs to change
    client.run(LOAD, name='hf-hub:someone/faces', cache=tmp_path)


def test_damaged_cache_heals(server, client, tmp_path):
    path = client.run(LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)
    for damage in (1000, 0):
        with open(path, 'r+b') as file:
            file.truncate(damage)
        client.run(LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)
        assert file_sha256(path) == file_sha256(EMBEDDED)


def test_pickled_weights_are_refused(server, client, tmp_path):
    repo = server.repos['someone/pickle']
    config = json.loads(repo.commits[repo.refs['main']]['config.json'])
    for extra in ({}, {'hf_hub_filename': 'pytorch_model.bin'}, {'custom_load': 'hf', 'hf_hub_filename': 'x.npz'}):
        changed = {**config, 'pretrained_cfg': {**config['pretrained_cfg'], **extra}}
        repo.commit({'config.json': json.dumps(changed).encode()})
        message = refused(client, LOAD, name='hf-hub:someone/pickle', cache=tmp_path)
        assert 'has no file model.safetensors' in message and 'no pickled weights' in message
    assert not any('pytorch_model' in path for _, path, _ in server.log)  # not even fetched


@pytest.mark.parametrize('config, weights, message', [
    (b'{', None, 'cannot load the model'),
    (b'{"architecture": "evil", "pretrained_cfg": {}}', None, 'Unknown model'),
    (None, b'\x80\x04 no safetensors' * 1000, 'cannot load the model'),
    (b'{"architecture": "mfn", "num_classes": 7, "pretrained_cfg": {}}', None, 'of another network'),
])
def test_broken_repository(server, client, tmp_path, config, weights, message):
    files = {'config.json': config, 'model.safetensors': weights}
    server.repos['someone/faces'].commit({name: content for name, content in files.items() if content is not None})
    assert message in refused(client, LOAD, name='hf-hub:someone/faces', cache=tmp_path)


@pytest.mark.parametrize('name, message', [
    ('timm-lfnsb/nothing', 'there is no model timm-lfnsb/nothing on 127.0.0.1'),
    ('someone/faces@old', 'someone/faces has no revision old'),
    ('a/b/c', "'namespace/repo_name': 'a/b/c'"),
    ('someone/empty', 'someone/empty has no file config.json'),
])
def test_not_there(server, client, tmp_path, name, message):
    server.repos['someone/empty'] = type(server.repos[REPO])()
    server.repos['someone/empty'].commit({'README.md': b'# nothing'})
    assert message in refused(client, LOAD, name=f'hf-hub:{name}', cache=tmp_path)
    assert message in refused(client, LOAD, env={'HF_TOKEN': OWNER}, name=f'hf-hub:{name}', cache=tmp_path)


def test_time_out(server, client, tmp_path):
    """A Hub that does not answer at all: one question, one sentence; what is in the cache still loads."""
    client.run(LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)
    server.log.clear()
    server.faults['silent'] = -1
    for name in (REPO, 'someone/faces'):
        message = refused(client, LOAD, name=f'hf-hub:{name}', cache=tmp_path / 'empty')
        assert 'cannot be reached' in message and 'timed out' in message
    assert len(server.log) == 2
    client.run(LOAD, name=f'hf-hub:{REPO}', cache=tmp_path)
