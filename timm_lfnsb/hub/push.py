"""Publish a timm folder, or weights of the package, on the Hugging Face Hub: checked first, then in one commit."""
from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf

from ..labels import model_label_names
from ..util.files import file_sha256
from ..version import __version__
from ..weights.fetch import describe_error
from ..weights.names import DEFAULT_ORG, HUB_REVISIONS, WEIGHTS_DIR, embedded_weights, hub_id, weights_info

NEEDED = ('config.json', 'model.safetensors')
# What may lie beside them; neither pickles nor code, which readers of a repository might run, nor pictures of data.
_SUFFIXES = {'.safetensors', '.json', '.md', '.txt', '.yaml', '.yml', '.onnx'}
_NAMES = {'LICENSE', 'NOTICE'}
_PICKLES = {'.bin', '.pth', '.pt', '.pkl', '.pickle', '.ckpt', '.tar', '.npy', '.npz', '.joblib'}


class PushError(RuntimeError):
    """Something that must not or cannot be published; one sentence that says what to do."""


@dataclass(frozen=True)
class PushFile:
    """A file to publish: its name, its size in bytes, and its SHA-256."""
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Push:
    """What was published, or would be.

    Attributes:
        repo_id: 'ORG/NAME'.
        files: Every file of the commit.
        card: The README.md among them.
        has_metrics: Whether the card's `model-index` holds any, which the Hub shows.
        url: Page of the commit or the pull request; None for a dry run.
        commit: The commit; None for a dry run.
    """
    repo_id: str
    files: tuple[PushFile, ...]
    card: str
    has_metrics: bool
    url: str | None = None
    commit: str | None = None


def push(
        source: str,
        repo_id: str | None = None,
        private: bool = False,
        create_pr: bool = False,
        dry_run: bool = False,
        metrics: str | Path | None = None,
        license: str | None = None,
) -> Push:
    """Publish a folder or embedded weights on the Hub.

    Args:
        source: A timm folder (see `timm_lfnsb.checkpoints.pack`), or the name of embedded weights such as 'lfnsb.ferplus'.
        repo_id: 'ORG/NAME', made if it is not there; default for embedded weights: their own, see `hub_id`.
        private: Make the repository a private one.
        create_pr: Open a pull request instead of changing the branch 'main'.
        dry_run: Check everything that can be checked here, and contact nobody.
        metrics: The metrics.json that `timm-lfnsb evaluate` wrote of a folder's model, for a folder without README.md.
        license: Identifier of the weights' licence, for instance 'apache-2.0', for a folder without README.md.

    Raises:
        PushError: When the source is no complete, sound model folder, or the Hub does not take it.
    """
    if repo_id is None:
        if source not in embedded_weights():
            if not Path(source).exists():
                raise PushError(
                    f"there is no folder {source}, and the embedded weights are {', '.join(embedded_weights())}.")
            raise PushError(f'{source} needs a repository to go to: name one with --repo-id ORG/NAME.')
        repo_id = hub_id(source)
    _check_repo_id(repo_id)
    with staged(source, repo_id, metrics, license) as folder:
        files, card, has_metrics = check_folder(folder)
        result = Push(repo_id, files, card, has_metrics)
        if dry_run:
            return result
        url, commit = _upload(folder, files, repo_id, private, create_pr, source)
    return Push(repo_id, files, card, has_metrics, url, commit)


@contextmanager
def staged(
        source: str,
        repo_id: str,
        metrics: str | Path | None = None,
        license: str | None = None,
) -> Iterator[Path]:
    """A temporary folder with exactly the files to publish, removed at the end.

    Raises:
        PushError: When there is no such source, or it has files that are not to be published.
    """
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-push-') as temporary:
        folder = Path(temporary)
        if Path(source).is_dir():
            _stage_folder(Path(source), folder, repo_id, metrics, license)
        elif source in embedded_weights():
            if metrics or license:
                raise PushError(f'{source} has a card with metrics and licence: leave out --metrics and --license.')
            _stage_embedded(source, folder, repo_id)
        else:
            raise PushError(f'{source} is neither a folder nor the name of embedded weights '
                            f"({', '.join(embedded_weights())}).")
        _portable_config(folder / 'config.json')
        yield folder


def check_folder(folder: Path) -> tuple[tuple[PushFile, ...], str, bool]:
    """Check a folder as a reader of it would meet it.

    Returns:
        Its files, the text of its README.md, and whether that has metrics in its `model-index`.

    Raises:
        PushError: When the model does not load or has no label names, or the card has no licence or is not valid.
    """
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    except Exception as error:  # configs and files can make timm raise nearly anything
        raise PushError(f"timm cannot load the folder: {' '.join(str(error).split())[:300]}") from error
    try:
        model_label_names(model)
    except ValueError as error:
        raise PushError(str(error)) from None
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise PushError(f'model.safetensors has values that are not finite, in {broken[0]}: do not publish it.')
    card = (folder / 'README.md').read_text(encoding='utf-8')
    has_metrics = _check_card(card)
    paths = sorted(folder.iterdir())
    return tuple(PushFile(path.name, path.stat().st_size, file_sha256(path)) for path in paths), card, has_metrics


def _stage_folder(
        source: Path,
        folder: Path,
        repo_id: str,
        metrics: str | Path | None,
        license: str | None,
) -> None:
    for path in sorted(source.iterdir()):
        if path.name.startswith('.'):
            continue
        if path.suffix.lower() in _PICKLES:
            raise PushError(f'{path.name} can hold code, as pickles do: only safetensors are published, move it away.')
        if path.is_symlink() or not path.is_file() or not (path.suffix in _SUFFIXES or path.name in _NAMES):
            raise PushError(f'{path.name} is no file of a published model (config.json, model.safetensors, README.md, '
                            'LICENSE, more .json, .md, .txt, .yaml, .onnx or .safetensors): move it away.')
        shutil.copyfile(path, folder / path.name)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise PushError(f"{source} has no {' and no '.join(missing)}: timm-lfnsb pack makes such folders.")
    if (folder / 'README.md').is_file():
        if metrics or license:
            raise PushError(f'{source} has a README.md: leave out --metrics and --license, or move it away.')
        return
    from .card import CardError, render_card_for_folder
    try:
        measured = json.loads(Path(metrics).read_text(encoding='utf-8')) if metrics else None
        card = render_card_for_folder(folder, repo_id, measured, license)
    except CardError as error:
        raise PushError(str(error)) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise PushError(f'{metrics} is no metrics.json of timm-lfnsb evaluate.') from None
    (folder / 'README.md').write_text(card, encoding='utf-8')


def _stage_embedded(name: str, folder: Path, repo_id: str) -> None:
    from .card import render_card
    info = weights_info(name)
    embedded = WEIGHTS_DIR / f'{name}.safetensors'
    if file_sha256(embedded) != info['sha256']:
        raise PushError(f'{embedded.name} is not the file its JSON describes: install the package again.')
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={'file': str(embedded)})
    save_for_hf(model, str(folder), model_config={'label_names': info['label_names']}, safe_serialization=True)
    shutil.copyfile(embedded, folder / 'model.safetensors')  # the very file, whose SHA-256 readers check
    (folder / 'README.md').write_text(render_card(info, repo_id), encoding='utf-8')


def _portable_config(path: Path) -> None:
    """Drop what timm writes twice: transformers passes the number of classes itself, and fails when it is there too."""
    try:
        config: Any = json.loads(path.read_text(encoding='utf-8'))
        if not {'architecture', 'pretrained_cfg'} <= config.keys():
            raise ValueError
    except (ValueError, AttributeError):
        raise PushError('config.json is not that of a timm model: timm-lfnsb pack writes one.') from None
    model_args = config.get('model_args') or {}
    if model_args.pop('num_classes', config.get('num_classes')) != config.get('num_classes'):
        raise PushError('config.json gives two numbers of classes, num_classes and the one in model_args.')
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')


def _check_card(text: str) -> bool:
    """Check what the Hub reads of a card without asking it; returns whether there are metrics."""
    from huggingface_hub import ModelCard
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
    except Exception as error:  # YAML errors, and what huggingface_hub raises for a model-index it cannot read
        raise PushError(f"README.md has no valid front matter: {' '.join(str(error).split())[:300]}") from None
    if not card.data.get('license'):
        raise PushError(
            'README.md names no licence: add license: to its front matter, or give --license where it is generated.')
    return bool(card.data.get('eval_results'))


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    try:
        validate_repo_id(repo_id)
        if '/' not in repo_id:
            raise HFValidationError
    except HFValidationError:
        raise PushError(f"'{repo_id}' is no name of a Hub repository: it must be ORG/NAME.") from None


def _upload(
        folder: Path,
        files: tuple[PushFile, ...],
        repo_id: str,
        private: bool,
        create_pr: bool,
        source: str,
) -> tuple[str, str]:
    """One commit, so that readers never meet half of it; returns its page and its id."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    if not get_token():
        raise PushError('you are not logged in to the Hub: run `hf auth login`, or set HF_TOKEN.')
    api = HfApi(library_name='timm_lfnsb', library_version=__version__)
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushError(f'{repo_id} is there already and is public: leave out --private, or make it private first.')
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(file.name, folder / file.name) for file in files],
            commit_message=f'Add {source} (timm_lfnsb {__version__})' if source in HUB_REVISIONS else
            f'Add model (timm_lfnsb {__version__})',
            create_pr=create_pr,
        )
    except PushError:
        raise
    except Exception as error:  # the client and its HTTP library each raise types of their own
        if 'Invalid metadata in README.md' in str(error):
            raise PushError(f"the Hub does not take the card: {' '.join(str(error).split())}") from error
        raise PushError(describe_error(error, repo_id)) from error
    return (commit.pr_url if create_pr else None) or commit.commit_url, commit.oid


def pin_hint(result: Push) -> str | None:
    """What to write down after publishing own weights: the commit that later versions check against."""
    org, _, name = result.repo_id.partition('/')
    if org == DEFAULT_ORG and name in HUB_REVISIONS and result.commit:
        return f"pin it in timm_lfnsb/weights/fetch.py: HUB_REVISIONS['{name}'] = '{result.commit}'"
    return None
