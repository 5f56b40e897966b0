"""The Hugging Face Hub: where the weights live there, and a way to load from it that checks before it loads.

Nothing is fetched unless a Hub name is asked for, or `TIMM_LFNSB_WEIGHTS=hub` is set. Own weights are checked against
the SHA-256 that comes with the package; weights of others have none to check against, so they load from safetensors
files only, which hold no code. `timm.create_model('hf-hub:...')` itself works as ever: it compares the size of a
download, not its content, and falls back to pickled files, which torch then reads with `weights_only=True`.
"""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from timm.models import resolve_pretrained_cfg

from ..errors import UserError, did_you_mean, reason
from ..util.files import file_sha256
from .names import DEFAULT_ORG, HUB_ORG, HUB_REVISIONS, WEIGHTS_DIR, hub_id


def prefer_hub(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `build_model_with_cfg` that load own weights from the Hub where `TIMM_LFNSB_WEIGHTS=hub` says so.

    The variable is read at each call. Without it, and wherever the caller names a source of his own, nothing changes.

    Raises:
        UserError: When there are no weights, or they cannot be had: there is no falling back to the embedded file.
    """
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    name = f'{variant}.{cfg.tag}'
    if not (cfg.has_weights or cfg.state_dict):
        raise UserError(
            f"{name} has no trained weights: give a model that has some ({', '.join(HUB_REVISIONS)}, local-dir:PATH or "
            'hf-hub:ID), or start from random ones with pretrained=False.')
    embedded = cfg.file == str(WEIGHTS_DIR / f'{name}.safetensors') and not (cfg.state_dict or cfg.source)
    if os.environ.get('TIMM_LFNSB_WEIGHTS') != 'hub' or not embedded:
        return kwargs
    path = fetch_weights(name, cache_dir=kwargs.get('cache_dir'))
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': str(path)}}


def fetch_weights(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Download own weights, or find them in the cache, and check their SHA-256 by the JSON that comes with the package.

    Without a revision (commit, branch or tag) it is the pinned commit, or 'main' where none is.

    Raises:
        UserError: When it cannot be had, or is another file.
    """
    repo_id = hub_id(name)
    if revision is None and HUB_ORG == DEFAULT_ORG:
        revision = HUB_REVISIONS.get(name)
    expected = json.loads((WEIGHTS_DIR / f'{name}.json').read_text(encoding='utf-8'))['sha256']
    return _download_checked(
        expected, f'model.safetensors of {repo_id} is not the file this version of timm_lfnsb knows (SHA-256 '
        f'{expected[:12]}...), and was not loaded: it was altered, or belongs to another version of the package.',
        repo_id, 'model.safetensors', revision, cache_dir)


def fetch_model(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Download config.json and model.safetensors of any timm model on the Hub; returns the folder with both.

    Raises:
        UserError: When one of them cannot be had or is damaged.
    """
    folder = _download(repo_id, 'config.json', revision, cache_dir).parent  # .../snapshots/COMMIT
    request = (repo_id, 'model.safetensors', folder.name, cache_dir)
    etag = _download(*request).resolve().name  # the cache names a file after what the Hub calls it
    if len(etag) == 64:  # large files after their SHA-256, others after git's SHA-1
        _download_checked(
            etag, f'model.safetensors of {repo_id} is not what the Hub says it is (SHA-256 {etag[:12]}...), and was '
            'not loaded: it was altered or damaged on the way.', *request)
    return folder


def cached_models() -> list[str]:
    """Repositories of models that huggingface_hub's cache has something of."""
    from huggingface_hub import constants
    folders = Path(constants.HF_HUB_CACHE).glob('models--*')
    return sorted(path.name.removeprefix('models--').replace('--', '/') for path in folders)


def describe_error(error: Exception, repo_id: str, what: str = '', revision: str | None = None) -> str:
    """One sentence for what a call of huggingface_hub raised: what is wrong, and what to do.

    `what` and `revision` are the file and the revision that were asked for, if any.
    """
    from huggingface_hub import constants
    host = urlsplit(constants.ENDPOINT).netloc
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    kinds = set().union(*map(_kinds, causes))
    statuses = {getattr(getattr(cause, 'response', None), 'status_code', None) for cause in causes}
    near = did_you_mean(repo_id, {*map(hub_id, HUB_REVISIONS), *cached_models()} - {repo_id})
    sentences = (
        ('OfflineModeIsEnabled' in kinds, f'{what or "the model"} of {repo_id}{near} is not in the cache and '
         'HF_HUB_OFFLINE forbids to fetch it: unset HF_HUB_OFFLINE once, with a network.'),
        (kinds & _UNREACHABLE,
         f'{host} cannot be reached ({reason(error)}): check the network, and HF_ENDPOINT if set.'),
        ('RepositoryNotFoundError' in kinds, f'there is no model {repo_id}{near} on {host}, or it is private or gated: '
         'check the name, ask for access on its page, and log in with `hf auth login` or HF_TOKEN.'),
        ('RevisionNotFoundError' in kinds,
         f'{repo_id} has no revision {revision}: leave it out, or take one of its branches, tags or commits.'),
        ('EntryNotFoundError' in kinds and 'LocalEntryNotFoundError' not in kinds,
         f'{repo_id} has no file {what}: models of timm with config.json and model.safetensors are loaded, no pickled '
         'weights, because they can hold code.'),
        ('LocalTokenNotFoundError' in kinds or 401 in statuses,
         f'{host} does not know you: log in with `hf auth login`, or set HF_TOKEN to a valid token.'),
        (True, f"{host} could not {'give ' + what if what else 'do this'}: {reason(error)}."),
    )
    return next(sentence for applies, sentence in sentences if applies)


_UNREACHABLE = {'TransportError', 'ConnectionError', 'Timeout', 'TimeoutError'}


def _kinds(error: BaseException) -> set[str]:
    """Names of an error's types: huggingface_hub has changed its HTTP library more than once."""
    return {kind.__name__ for kind in type(error).__mro__}


def _download_checked(
        sha256: str, refusal: str, repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None,
) -> Path:
    """`_download`; a file that is not the right one is fetched once more, in case the cache was damaged."""
    for force in (False, True):
        path = _download(repo_id, filename, revision, cache_dir, force)
        if file_sha256(path) == sha256:
            return path
    raise UserError(refusal)


def _download(
        repo_id: str, filename: str, revision: str | None, cache_dir: str | Path | None, force: bool = False,
) -> Path:
    """The cached file, downloaded if need be; a UserError has what huggingface_hub raised as its cause."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    request: dict[str, Any] = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    try:
        cached = None if force else try_to_load_from_cache(**request)
        if isinstance(cached, str) and Path(cached).parent.name == revision:  # a commit, which never changes
            return Path(cached)
        try:
            # One question first: where no answer comes, the download itself would go on asking for minutes.
            get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision))
        except Exception as error:
            if _kinds(error) & _UNREACHABLE:
                if isinstance(cached, str):
                    return Path(cached)
                raise
        return Path(hf_hub_download(**request, force_download=force))
    except Exception as error:  # the client, its HTTP library and the file system each raise types of their own
        raise UserError(describe_error(error, repo_id, filename, revision)) from error
