"""A small Hub on loopback for the real huggingface_hub client, with faults to order, and a process that talks to it.

Only what the client of the tests asks for: repositories with commits, branches, private ones and pull requests;
files, from 10 kB on behind a redirect to a "CDN"; a token.
"""
from __future__ import annotations

import base64
import hashlib
import json
import multiprocessing
import os
import re
import secrets
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SIZE = 10_000
OWNER = 'hf_owner'
"""The token of somebody who may write to every organisation but 'elsewhere', and open pull requests there."""


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = 'main', base: str = 'main') -> str:
        """Put files on top of a ref; returns the new commit."""
        oid = secrets.token_hex(20)
        self.commits[oid] = {**self.commits.get(self.refs.get(base, ''), {}), **files}
        self.refs[ref] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class HubServer(ThreadingHTTPServer):
    """Use as a context manager; `url` is the HF_ENDPOINT, `log` has method, path and headers of each request.

    `faults` says what to do wrong, by name, for how many requests (-1: all): on the way of a large file 'short' (half
    of it, called the whole) and 'altered'; for metadata 'silent' (no answer).
    """
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server_port}'
        self.cdn_url = f'http://localhost:{self.server_port}'  # another host: the client keeps its token from it
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: Counter[str] = Counter()
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.closing = threading.Event()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are part of the tests

    def add(self, repo_id: str, folder: Path) -> str:
        """A repository with the files of a folder; returns its commit."""
        self.repos[repo_id] = Repo()
        return self.repos[repo_id].commit({path.name: path.read_bytes() for path in folder.iterdir()})

    def fault(self, name: str) -> bool:
        if count := self.faults[name]:
            self.faults[name] = count - 1
        return bool(count)

    def paths(self, method: str) -> list[str]:
        return [path for verb, path, _ in self.log if verb == method]


class Refusal(Exception):
    """An error as the Hub words it: status, code and message."""


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict[str, Any] | list[Any] = b'', **headers: str) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {'Content-Type': 'application/json', **headers}
        self.send_response(status)
        for name, value in {'Content-Length': str(len(body)), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    @property
    def owner(self) -> bool:
        """Whether the client is the owner of the repositories, or nobody."""
        header = self.headers.get('Authorization')
        if header not in (None, f'Bearer {OWNER}'):
            raise Refusal(401, '', 'Invalid credentials in Authorization header')
        return header is not None

    def repo(self, repo_id: str) -> Repo:
        """The repository, if it is there for this client."""
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not self.owner):
            raise Refusal(404 if self.owner else 401, 'RepoNotFound', 'Repository not found')
        return repo

    def check_may_write(self, repo_id: str) -> None:
        if not self.owner:
            raise Refusal(401, '', 'Invalid credentials in Authorization header')
        if repo_id.startswith('elsewhere/') and 'create_pr' not in self.query:
            raise Refusal(403, '', 'You have read access but not the required permissions for this operation')

    def handle_request(self) -> None:
        self.content = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.log.append((self.command, unquote(self.path), headers))
        if '/resolve/' in url.path and self.server.fault('silent'):
            self.server.closing.wait(30)
            return
        try:
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, f'{self.command} {url.path}'):
                    return method(self, *map(unquote, match.groups()))
            self.answer(404)
        except Refusal as refusal:
            status, code, message = refusal.args
            self.answer(status, {'error': message}, X_Error_Code=code, X_Error_Message=message)

    do_GET = do_HEAD = do_POST = handle_request

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self.repo(repo_id)
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        content = repo.commits[commit].get(name)
        if content is None:
            self.answer(404, X_Error_Code='EntryNotFound', X_Error_Message='Entry not found', X_Repo_Commit=commit)
        elif len(content) >= LFS_SIZE:
            oid = hashlib.sha256(content).hexdigest()
            self.server.lfs.setdefault(oid, content)
            self.answer(302, Location=f'{self.server.cdn_url}/cdn/{oid}', ETag='"of the redirect"',
                        X_Repo_Commit=commit, X_Linked_Etag=f'"{oid}"', X_Linked_Size=str(len(content)))
        else:
            self.answer(200, content, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def cdn(self, oid: str) -> None:
        content = self.server.lfs[oid]
        if self.server.fault('altered'):
            content = content[:-1] + bytes([content[-1] ^ 1])
        if self.server.fault('short'):
            content = content[:len(content) // 2]
        self.answer(200, content)

    def model(self, repo_id: str, revision: str = 'main') -> None:
        repo = self.repo(repo_id)
        commit = repo.resolve(revision)
        self.answer(200, {'id': repo_id, 'modelId': repo_id, 'sha': commit, 'private': repo.private, 'tags': []})

    def create_repo(self) -> None:
        request = json.loads(self.content)
        repo_id = f"{request['organization']}/{request['name']}"
        self.check_may_write(repo_id)
        there = repo_id in self.server.repos
        if not there:
            self.server.repos[repo_id] = Repo(request.get('visibility') == 'private' or bool(request.get('private')))
            self.server.repos[repo_id].commit({'.gitattributes': b'*.safetensors filter=lfs\n'})
        self.answer(409 if there else 200, {'url': f'{self.server.url}/{repo_id}'})

    def validate_yaml(self) -> None:
        front_matter = json.loads(self.content)['content'].split('---\n')[1]
        valid = isinstance(yaml.safe_load(front_matter).get('license'), str)
        errors = [] if valid else [{'message': '"license" must be a string'}]
        self.answer(200 if valid else 400, {'errors': errors, 'warnings': []})

    def preupload(self, repo_id: str, revision: str) -> None:
        self.check_may_write(repo_id)
        self.answer(200, {'files': [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False}
                                    for file in json.loads(self.content)['files']]})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        self.check_may_write(repo_id)
        values = [line['value'] for line in map(json.loads, self.content.splitlines()) if line['key'] == 'file']
        files = {value['path']: base64.b64decode(value['content']) for value in values}
        pull_request = 'create_pr' in self.query
        ref = f'refs/pr/{sum(name.startswith("refs/pr/") for name in repo.refs) + 1}' if pull_request else revision
        oid = repo.commit(files, ref, revision)
        url = f'{self.server.url}/{repo_id}'
        self.answer(200, {
            'success': True, 'commitOid': oid, 'commitUrl': f'{url}/commit/{oid}',
            'pullRequestUrl': f"{url}/discussions/{ref.rpartition('/')[2]}" if pull_request else None})


_ID = r'([^/]+/[^/]+)'
ROUTES = [
    (rf'(?:GET|HEAD) /{_ID}/resolve/([^/]+)/(.+)', Handler.resolve),
    (r'(?:GET|HEAD) /cdn/(\w+)', Handler.cdn),
    (rf'GET /api/models/{_ID}/revision/([^/]+)', Handler.model),
    (rf'GET /api/models/{_ID}', Handler.model),
    (r'POST /api/repos/create', Handler.create_repo),
    (r'POST /api/validate-yaml', Handler.validate_yaml),
    (rf'POST /api/models/{_ID}/preupload/([^/]+)', Handler.preupload),
    (rf'POST /api/models/{_ID}/commit/([^/]+)', Handler.commit),
]


# Process side. huggingface_hub reads HF_ENDPOINT when it is imported, so the client is another process, which runs the
# snippets it is given: importing torch once for each of them would take most of the time of these tests.

class ClientError(Exception):
    """What the snippet raised: `kind` is the name of its type."""

    def __init__(self, kind: str, message: str):
        super().__init__(f'{kind}: {message}')
        self.kind, self.message = kind, message


def client_env(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Environment of a fresh user of the Hub: nothing in the cache, not logged in."""
    env = {key: value for key, value in os.environ.items()
           if not key.startswith(('HF_', 'HUGGING', 'TIMM_LFNSB_')) and 'proxy' not in key.lower()}
    return {
        **env, 'HF_ENDPOINT': endpoint, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '1', 'HF_HUB_ETAG_TIMEOUT': '1',
        'HF_HUB_DOWNLOAD_TIMEOUT': '1', 'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_HUB_DISABLE_TELEMETRY': '1', **more}


def _serve(pipe: Connection, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    import timm_lfnsb  # noqa: F401
    while True:
        code, more, scope = pipe.recv()
        try:
            with mock.patch.dict(os.environ, more):
                exec(code, scope)
            pipe.send((scope.get('result'), None))
        except BaseException as error:
            pipe.send((None, (type(error).__name__, str(error))))


class Client:
    """A Python process of its own with timm_lfnsb imported, as a context manager."""

    def __init__(self, endpoint: str, home: Path, **env: str):
        context = multiprocessing.get_context('spawn')
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, client_env(endpoint, home, **env)), daemon=True)
        self.process.start()
        theirs.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()

    def run(self, code: str, env: dict[str, str] | None = None, **variables: Any) -> Any:
        """Run a snippet; returns what it leaves in `result`, raises ClientError for whatever it raises."""
        self.pipe.send((code, env or {}, variables))
        try:
            result, error = self.pipe.recv()
        except EOFError:
            raise AssertionError('the client process ended') from None
        if error:
            raise ClientError(*error)
        return result
