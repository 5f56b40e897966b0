"""Publish a timm folder, or weights of the package, on the Hugging Face Hub: checked first, then in one commit."""
from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from huggingface_hub import HfApi, ModelCard

from ..errors import UserError, did_you_mean
from ..labels import model_label_names
from ..models.loading import load_model
from ..util.files import file_sha256
from ..version import __version__
from ..weights.fetch import describe_error
from ..weights.names import embedded_weights, hub_id, weights_info
from .card import render_card, render_card_for_folder
from .ship import write_embedded

# What may be published: neither pickles nor code, which readers of a repository might run, nor pictures of data.
_PUBLISHED = ('.safetensors', '.json', '.md', '.txt', '.yaml', '.yml', '.onnx', 'LICENSE', 'NOTICE')


class Push(NamedTuple):
    """What was published, or would be: names, sizes in bytes and SHA-256 of files; no `url` if dry."""
    repo_id: str
    files: list[tuple[str, int, str]]
    card: str
    url: str | None = None


def push(
        source: str, repo_id: str | None = None, private: bool = False, create_pr: bool = False, dry_run: bool = False,
        metrics: str | Path | None = None, license: str | None = None,
) -> Push:
    """Publish a folder or embedded weights on the Hub, with the options of `timm-lfnsb push`.

    Args:
        source: A timm folder (`timm-lfnsb pack`), or the name of embedded weights such as 'lfnsb.ferplus'.
        repo_id: 'ORG/NAME', made if it is not there; default for embedded weights: their own, see `hub_id`.
        metrics, license: For the card of a folder without README.md, see `render_card_for_folder`.

    Raises:
        UserError: When the source is no complete, sound model folder, or the Hub does not take it.
    """
    if not repo_id and source not in embedded_weights():
        raise UserError(f'{source}{did_you_mean(source, embedded_weights())} needs a repository to go to: name one '
                        'with --repo-id ORG/NAME.')
    repo_id = repo_id or hub_id(source)
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        raise UserError(f"'{repo_id}' is no name of a Hub repository: it must be ORG/NAME.")
    with staged(source, repo_id, metrics, license) as folder:
        files = [(path.name, path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())]
        result = Push(repo_id, files, (folder / 'README.md').read_text(encoding='utf-8'))
        if dry_run:
            return result
        api = HfApi(library_name='timm_lfnsb', library_version=__version__)
        try:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise UserError(f'{repo_id} is there and public: leave out --private, or make it private first.')
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, create_pr=create_pr,
                commit_message=f'Add model (timm_lfnsb {__version__})')
        except UserError:
            raise
        except Exception as error:  # the client and its HTTP library each raise types of their own
            if 'Invalid metadata in README.md' in str(error):
                raise UserError(f"the Hub does not take the card: {' '.join(str(error).split())}") from error
            raise UserError(describe_error(error, repo_id)) from error
    return result._replace(url=(commit.pr_url if create_pr else None) or commit.commit_url)


@contextmanager
def staged(
        source: str, repo_id: str, metrics: str | Path | None = None, license: str | None = None,
) -> Iterator[Path]:
    """A temporary folder with exactly the files to publish, removed at the end; raises UserError as `push` does."""
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-push-') as temporary:
        folder = Path(temporary)
        card, config = folder / 'README.md', folder / 'config.json'
        if Path(source).is_dir():
            _copy_folder(Path(source), folder)
        elif source in embedded_weights():
            write_embedded(source, folder)
            card.write_text(render_card(weights_info(source), repo_id), encoding='utf-8')
        else:
            raise UserError(f'{source} is neither a folder nor the name of embedded weights'
                            f'{did_you_mean(source, embedded_weights())} '
                            f"({', '.join(embedded_weights())}).")
        if not card.is_file():
            card.write_text(render_card_for_folder(source, repo_id, metrics, license), encoding='utf-8')
        elif metrics or license:
            raise UserError(f'{source} has a card already: leave out --metrics and --license.')
        try:
            data = ModelCard.load(card, ignore_metadata_errors=False).data
        except Exception as error:  # YAML errors, and what huggingface_hub raises for a model-index it cannot read
            reason = shorten(str(error), 300, placeholder=' ...')
            raise UserError(f'README.md has no valid front matter: {reason}') from None
        if not data.get('license'):
            raise UserError('README.md names no licence: add license: to its front matter, or give --license where it '
                            'is generated.')
        written = json.loads(config.read_text(encoding='utf-8'))
        # transformers passes the number of classes itself, and fails when it is there twice.
        written['num_classes'] = written.get('model_args', {}).pop('num_classes', written.get('num_classes'))
        config.write_text(json.dumps(written, indent=2), encoding='utf-8')
        yield folder


def _copy_folder(source: Path, folder: Path) -> None:
    """Copy what may be published of a folder, if a reader of it would meet a sound model."""
    for path in sorted(source.glob('[!.]*')):
        if path.is_symlink() or not path.is_file() or (path.suffix or path.name) not in _PUBLISHED:
            raise UserError(f'{path.name} is not to be published, as pickles, code and pictures are not: move it away '
                            f"({', '.join(_PUBLISHED)} may stay).")
        shutil.copyfile(path, folder / path.name)
    model_label_names(load_model(f'local-dir:{source}'))
