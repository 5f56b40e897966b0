"""Publish a timm folder, or weights of the package, on the Hugging Face Hub: checked first, then in one commit."""
from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

import timm
from huggingface_hub import HfApi, ModelCard
from timm.models import save_for_hf

from ..errors import UserError
from ..labels import model_label_names
from ..util.files import file_sha256
from ..version import __version__
from ..weights.fetch import describe_error
from ..weights.names import DEFAULT_ORG, HUB_REVISIONS, WEIGHTS_DIR, embedded_weights, hub_id
from .card import render_card, render_card_for_folder
from .ship import checked_info

# What may be published: neither pickles nor code, which readers of a repository might run, nor pictures of data.
_PUBLISHED = ('.safetensors', '.json', '.md', '.txt', '.yaml', '.yml', '.onnx', 'LICENSE', 'NOTICE')


class Push(NamedTuple):
    """What was published, or would be: names, sizes in bytes and SHA-256 of files; no `url`, no `commit` if dry."""
    repo_id: str
    files: list[tuple[str, int, str]]
    card: str
    has_metrics: bool
    url: str | None = None
    commit: str | None = None

    @property
    def pin_hint(self) -> str | None:
        """What to write down after publishing own weights: the commit that later versions check against."""
        org, _, name = self.repo_id.partition('/')
        if org == DEFAULT_ORG and name in HUB_REVISIONS and self.commit:
            return f"pin it in timm_lfnsb/weights/names.py: HUB_REVISIONS['{name}'] = '{self.commit}'"
        return None


def push(
        source: str, repo_id: str | None = None, private: bool = False, create_pr: bool = False, dry_run: bool = False,
        metrics: str | Path | None = None, license: str | None = None,
) -> Push:
    """Publish a folder or embedded weights on the Hub.

    Args:
        source: A timm folder (`timm-lfnsb pack`), or the name of embedded weights such as 'lfnsb.ferplus'.
        repo_id: 'ORG/NAME', made if it is not there; default for embedded weights: their own, see `hub_id`.
        private: Make the repository a private one.
        create_pr: Open a pull request instead of changing the branch 'main'.
        dry_run: Check everything that can be checked here, and contact nobody.
        metrics: The metrics.json that `timm-lfnsb evaluate` wrote of a folder's model, for a folder without README.md.
        license: Identifier of the weights' licence, for instance 'apache-2.0', for a folder without README.md.

    Raises:
        UserError: When the source is no complete, sound model folder, or the Hub does not take it.
    """
    if not repo_id and source not in embedded_weights():
        raise UserError(f'{source} needs a repository to go to: name one with --repo-id ORG/NAME.')
    repo_id = repo_id or hub_id(source)
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo_id):
        raise UserError(f"'{repo_id}' is no name of a Hub repository: it must be ORG/NAME.")
    with staged(source, repo_id, metrics, license) as folder:
        result = _check(folder, repo_id)
        if dry_run:
            return result
        api = HfApi(library_name='timm_lfnsb', library_version=__version__)
        try:
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.model_info(repo_id).private:
                raise UserError(f'{repo_id} is there and public: leave out --private, or make it private first.')
            message = f'Add {source if source in HUB_REVISIONS else "model"} (timm_lfnsb {__version__})'
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, create_pr=create_pr, commit_message=message)
        except UserError:
            raise
        except Exception as error:  # the client and its HTTP library each raise types of their own
            if 'Invalid metadata in README.md' in str(error):
                raise UserError(f"the Hub does not take the card: {' '.join(str(error).split())}") from error
            raise UserError(describe_error(error, repo_id)) from error
    return result._replace(url=(commit.pr_url if create_pr else None) or commit.commit_url, commit=commit.oid)


@contextmanager
def staged(
        source: str, repo_id: str, metrics: str | Path | None = None, license: str | None = None,
) -> Iterator[Path]:
    """A temporary folder with exactly the files to publish, removed at the end; raises UserError as `push` does."""
    with tempfile.TemporaryDirectory(prefix='timm-lfnsb-push-') as temporary:
        folder = Path(temporary)
        card, config_path = folder / 'README.md', folder / 'config.json'
        if Path(source).is_dir():
            _copy_folder(Path(source), folder)
        elif source in embedded_weights():
            info, embedded = checked_info(source), WEIGHTS_DIR / f'{source}.safetensors'
            model = timm.create_model(source, pretrained=True, pretrained_cfg_overlay={'file': str(embedded)})
            save_for_hf(model, str(folder), model_config={'label_names': info['label_names']}, safe_serialization=True)
            shutil.copyfile(embedded, folder / 'model.safetensors')  # the very file, whose SHA-256 readers check
            card.write_text(render_card(info, repo_id), encoding='utf-8')
        else:
            raise UserError(f'{source} is neither a folder nor the name of embedded weights '
                            f"({', '.join(embedded_weights())}).")
        if card.is_file() and (metrics or license):
            raise UserError(f'{source} has a card already: leave out --metrics and --license.')
        try:
            if not card.is_file():
                measured = json.loads(Path(metrics).read_text(encoding='utf-8')) if metrics else None
                card.write_text(render_card_for_folder(folder, repo_id, measured, license), encoding='utf-8')
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f'{metrics} is no metrics.json of timm-lfnsb evaluate.') from None
        with suppress(ValueError, AttributeError):  # timm says better what is wrong with it
            config = json.loads(config_path.read_text(encoding='utf-8'))
            # transformers passes the number of classes itself, and fails when it is there twice.
            config.get('model_args', {}).pop('num_classes', None)
            config_path.write_text(json.dumps(config, indent=2), encoding='utf-8')
        yield folder


def _copy_folder(source: Path, folder: Path) -> None:
    for path in sorted(source.glob('[!.]*')):
        if path.is_symlink() or not path.is_file() or (path.suffix or path.name) not in _PUBLISHED:
            raise UserError(f'{path.name} is not to be published, as pickles, code and pictures are not: move it away '
                            f"({', '.join(_PUBLISHED)} may stay).")
        shutil.copyfile(path, folder / path.name)
    if missing := {'config.json', 'model.safetensors'} - {path.name for path in folder.iterdir()}:
        raise UserError(f"{source} has no {' and no '.join(sorted(missing))}: timm-lfnsb pack makes such folders.")


def _check(folder: Path, repo_id: str) -> Push:
    """Check a folder as a reader of it would meet it, and what the Hub reads of its card."""
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        model_label_names(model)
    except Exception as error:  # configs and files can make timm raise nearly anything
        raise UserError(f"the folder does not load in timm: {shorten(str(error), 300, placeholder=' ...')}") from error
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f'model.safetensors has values that are not finite, in {name}: do not publish it.')
    text = (folder / 'README.md').read_text(encoding='utf-8')
    try:
        data = ModelCard(text, ignore_metadata_errors=False).data
    except Exception as error:  # YAML errors, and what huggingface_hub raises for a model-index it cannot read
        reason = shorten(str(error), 300, placeholder=' ...')
        raise UserError(f'README.md has no valid front matter: {reason}') from None
    if not data.get('license'):
        raise UserError(
            'README.md names no licence: add license: to its front matter, or give --license where it is generated.')
    files = [(path.name, path.stat().st_size, file_sha256(path)) for path in sorted(folder.iterdir())]
    return Push(repo_id, files, text, bool(data.get('eval_results')))
