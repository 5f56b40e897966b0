"""The Hugging Face Hub: where the weights live there, and a way to load from it that checks before it loads.

Nothing is fetched unless a Hub name is asked for, or `TIMM_LFNSB_WEIGHTS=hub` is set. Own weights are checked against
the SHA-256 that comes with the package; weights of others have none to check against, so they load from safetensors
files only, which hold no code. `timm.create_model('hf-hub:...')` itself works as ever: it compares the size of a
download, not its content, and falls back to pickled files, which torch then reads with `weights_only=True`.
"""
from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from timm.models import resolve_pretrained_cfg

from ..errors import UserError
from ..util.files import file_sha256
from ..version import __version__
from .names import DEFAULT_ORG, HUB_ORG, HUB_REVISIONS, WEIGHTS_DIR, hub_id

_COMMIT = re.compile('[0-9a-f]{40}')
_SHA256 = re.compile('[0-9a-f]{64}')


def prefer_hub(variant: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for `build_model_with_cfg` that load own weights from the Hub where `TIMM_LFNSB_WEIGHTS=hub` says so.

    The variable is read at each call. Without it, and wherever the caller names a source of his own, nothing changes.

    Args:
        variant: Name of the network.
        kwargs: What `build_model_with_cfg` is to be called with, `pretrained_cfg` and so on among it.

    Raises:
        UserError: See `fetch_weights`; there is no falling back to the embedded file. Also for another value.
    """
    choice = os.environ.get('TIMM_LFNSB_WEIGHTS') or 'embedded'
    if choice not in ('embedded', 'hub'):
        raise UserError(f"TIMM_LFNSB_WEIGHTS is {choice!r}: it must be 'embedded' (the default) or 'hub'.")
    overlay = kwargs.get('pretrained_cfg_overlay') or {}
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    name = f'{variant}.{cfg.tag}'
    if not (cfg.has_weights or cfg.state_dict):
        raise UserError(
            f"{name} has no trained weights: give a model that has some ({', '.join(HUB_REVISIONS)}, local-dir:PATH or "
            'hf-hub:ID), or start from random ones with pretrained=False.')
    if choice == 'embedded' or cfg.state_dict or cfg.source or cfg.file != str(WEIGHTS_DIR / f'{name}.safetensors'):
        return kwargs
    try:
        path = fetch_weights(name, cache_dir=kwargs.get('cache_dir'))
    except UserError as error:
        raise UserError(
            f'{error} TIMM_LFNSB_WEIGHTS=hub asks for the Hub; without it the embedded weights load.') from error
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': str(path)}}


def fetch_weights(name: str, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """Download own weights, or find them in the cache, and check them.

    A file that is not the right one is fetched once more, in case the cache was damaged.

    Args:
        name: Name of embedded weights, for instance 'lfnsb.ferplus'.
        revision: Commit, branch or tag; default the pinned commit, or 'main' where none is.
        cache_dir: Cache folder instead of huggingface_hub's own.

    Returns:
        Path of the file in the cache; its SHA-256 is the one in the JSON that comes with the package.

    Raises:
        UserError: When it cannot be had, or is another file.
    """
    repo_id = hub_id(name)
    pinned = HUB_REVISIONS.get(name) if HUB_ORG == DEFAULT_ORG and revision is None else None
    expected = json.loads((WEIGHTS_DIR / f'{name}.json').read_text(encoding='utf-8'))['sha256']
    path = _download(repo_id, 'model.safetensors', revision or pinned, cache_dir)
    if file_sha256(path) != expected:
        path = _download(repo_id, 'model.safetensors', revision or pinned, cache_dir, force=True)
        if file_sha256(path) != expected:
            raise UserError(
                f'model.safetensors of {repo_id} is not the file this version of timm_lfnsb knows (SHA-256 '
                f'{expected[:12]}...), and was not loaded: it was altered, or belongs to another version of the '
                'package.')
    if pinned and _commit_of(path) != pinned:
        raise UserError(f'{repo_id} was asked for the pinned commit {pinned} and gave another: it was not loaded.')
    return path


def fetch_model(repo_id: str, revision: str | None = None, cache_dir: str | Path | None = None) -> str:
    """Download config.json and the safetensors file of any timm model on the Hub into the cache.

    Args:
        repo_id: 'ORG/NAME'.
        revision: Commit, branch or tag; default 'main'.
        cache_dir: Cache folder instead of huggingface_hub's own.

    Returns:
        The commit both files are of.

    Raises:
        UserError: When one of them cannot be had, is damaged, or the repository wants other files than safetensors.
    """
    config_path = _download(repo_id, 'config.json', revision, cache_dir)
    commit = _commit_of(config_path)
    try:
        config = json.loads(config_path.read_text(encoding='utf-8'))
        pretrained_cfg = config.get('pretrained_cfg', config)
        filename = pretrained_cfg.get('hf_hub_filename') or 'model.safetensors'
        foreign = pretrained_cfg.get('custom_load')
    except (ValueError, AttributeError):
        raise UserError(f'config.json of {repo_id} is not one of a timm model.') from None
    try:
        if foreign or not str(filename).endswith('.safetensors'):
            raise UserError
        path = _download(repo_id, filename, commit, cache_dir)
        etag = path.resolve().name  # the cache names a file after what the Hub calls it: for large files the SHA-256
        if _SHA256.fullmatch(etag) and file_sha256(path) != etag:
            path = _download(repo_id, filename, commit, cache_dir, force=True)
            if file_sha256(path) != etag:
                raise UserError(f'{filename} of {repo_id} is not what the Hub says it is (SHA-256 {etag[:12]}...), and '
                               'was not loaded: it was altered or damaged on the way.')
    except UserError as error:
        if error.args and not _missing(error.__cause__):
            raise
        raise UserError(
            f'{repo_id} has no model.safetensors, and pickled weights from the Hub are not loaded, because they can '
            'hold code: ask its author for a safetensors file.') from None
    return commit


def describe_error(error: BaseException, repo_id: str, what: str = '', revision: str | None = None) -> str:
    """One sentence for what the Hub's client raised: what is wrong, and what to do.

    Args:
        error: Any exception from a call of huggingface_hub.
        repo_id: The repository that was asked.
        what: The file that was asked for, if any.
        revision: The revision that was asked for, if any.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub
    host = urlsplit(constants.ENDPOINT).netloc
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, hub.OfflineModeIsEnabled) for cause in causes):
        return (f'{what or "the model"} of {repo_id} is not in the cache and HF_HUB_OFFLINE forbids to fetch it: unset '
                'HF_HUB_OFFLINE once, with a network.')
    if any('Timeout' in type(cause).__name__ for cause in causes):
        return (f'{host} did not answer in time: try again later, or raise HF_HUB_ETAG_TIMEOUT and '
                'HF_HUB_DOWNLOAD_TIMEOUT (seconds).')
    if any(_is_unreachable(cause) for cause in causes):
        return f'{host} cannot be reached ({first_line(error)}): check the network, and HF_ENDPOINT if you set it.'
    if any(type(cause).__name__ == 'FileMetadataError' for cause in causes):
        return f'{host} does not answer as a Hub does: check HF_ENDPOINT if you set it, and proxies.'
    error = next((cause for cause in causes if isinstance(cause, hub.HfHubHTTPError)), error)
    if isinstance(error, hub.GatedRepoError):
        return f'{repo_id} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN.'
    if isinstance(error, hub.RepositoryNotFoundError):
        return (f'there is no model {repo_id} on {host}, or it is private: check the name, and log in with '
                '`hf auth login` or set HF_TOKEN if it is private.')
    if isinstance(error, hub.RevisionNotFoundError):
        return f'{repo_id} has no revision {revision}: leave it out, or take one of its branches, tags or commits.'
    if _missing(error):
        return f'{repo_id} has no file {what}: it is not a timm model, or another revision has it.'
    if isinstance(error, hub.HFValidationError):
        return f"'{repo_id}' is no name of a Hub repository: it must be ORG/NAME."
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    if isinstance(error, hub.LocalTokenNotFoundError) or status == 401:
        return f'{host} does not know you: log in with `hf auth login`, or set HF_TOKEN to a valid token.'
    if status == 403:
        return f'you may not do this with {repo_id}: your account or token lacks the permission.'
    if status is not None:
        return f'{host} answered with error {status}: try again later.'
    if 'Consistency check failed' in str(error):
        return f'the download of {what} from {repo_id} is incomplete and was thrown away: try again.'
    return f"{host} could not {'give ' + what if what else 'do this'} ({first_line(error)}): try again."


def _is_unreachable(error: BaseException) -> bool:
    """Whether no answer came; by name, because huggingface_hub has changed its HTTP library more than once."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {'TransportError', 'ConnectionError', 'Timeout'})


def _missing(error: BaseException | None) -> bool:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _commit_of(path: Path) -> str:
    """The commit of a file in the cache, .../snapshots/COMMIT/FILE."""
    return path.parent.name


def _download(
        repo_id: str,
        filename: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force: bool = False,
) -> Path:
    """The cached file, downloaded if need be.

    Raises:
        UserError: With what huggingface_hub raised as its cause.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    request: dict[str, Any] = dict(repo_id=repo_id, filename=filename, revision=revision, cache_dir=cache_dir)
    library: dict[str, Any] = dict(library_name='timm_lfnsb', library_version=__version__)
    try:
        if revision and _COMMIT.fullmatch(revision) and not force:
            cached = try_to_load_from_cache(**request)
            if isinstance(cached, str):
                return Path(cached)
        try:
            # One question first: where no answer comes, the download itself would go on asking for minutes.
            get_hf_file_metadata(
                hf_hub_url(repo_id, filename, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT, **library)
        except Exception as error:
            if _is_unreachable(error):
                cached = None if force else try_to_load_from_cache(**request)
                if isinstance(cached, str):
                    return Path(cached)
                raise
        return Path(hf_hub_download(**request, **library, force_download=force))
    except Exception as error:  # the client, its HTTP library and the file system each raise types of their own
        raise UserError(describe_error(error, repo_id, filename, revision)) from error
