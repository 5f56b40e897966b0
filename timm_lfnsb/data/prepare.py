"""Turn the original layouts of facial expression data sets into the folder tree that timm's train script reads.

    TARGET/<split>/<label name>/<file>    the images
    TARGET/class_map.txt                  label names in canonical order, for train.py --class-map
    TARGET/votes.csv                      crowd votes of each face, for train.py --label-votes, where there are any
    TARGET/dataset.json                   counts, what was dropped and why, and a checksum of the images
"""
from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from ..errors import UserError
from ..util.files import file_sha256
from .readers import READERS, SPLITS, Faces

CLASS_MAP, DESCRIPTION, VOTES = 'class_map.txt', 'dataset.json', 'votes.csv'


def prepare_dataset(
        dataset: str, source: str | Path, target: str | Path, hard_link: bool = False) -> tuple[dict[str, Any], str]:
    """Write a data set as a folder tree for timm's train script.

    The target is whole or absent. Every image is decoded once, so that a damaged one is found before training.

    Args:
        dataset: One of `READERS`.
        source: Folder with the original files.
        target: Folder to write, absent or empty. One that holds what would be written stays as it is.
        hard_link: Link the image files; a later edit of one changes the original too, which copies avoid.

    Returns:
        The content of dataset.json, and what was done to the target, in words.

    Raises:
        UserError: When the source is incomplete or damaged, or the target holds something else.
        OSError: When a file is missing, or cannot be read, written or linked.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if source == target or source in target.parents:
        raise UserError(f'{target} lies inside the source {source}: choose a folder outside.')
    faces = READERS[dataset](source)
    if not faces.samples:
        raise UserError(f'{source} holds no images of this data set.')
    if not target.exists() or not any(target.iterdir()):
        with building(target) as tree:
            return _write(faces, tree, hard_link), 'is ready'
    with TemporaryDirectory(dir=target.parent) as temporary:
        description = _write(faces, Path(temporary), hard_link)
        there, expected = ({path.name for path in folder.iterdir()} for folder in (target, Path(temporary)))
        if there != expected or checksum(target) != description['sha256']:
            raise UserError(f'{target} holds something else than this data: remove it or choose another folder.')
    return description, 'is already prepared'


def _write(faces: Faces, tree: Path, hard_link: bool) -> dict[str, Any]:
    for sample in tqdm(faces.samples, desc='writing images', disable=None):
        path = tree / sample.split / sample.label / sample.name
        if path.exists():
            raise UserError(f'the source has two images for {path.relative_to(tree)}: rename or remove one.')
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(sample.source, bytes):
            path.write_bytes(sample.source)
        else:
            (os.link if hard_link else shutil.copyfile)(sample.source.resolve(), path)
        read_grey(path, sample.name if isinstance(sample.source, bytes) else sample.source)
    splits = {}
    for split in SPLITS:
        counts = Counter(sample.label for sample in faces.samples if sample.split == split)
        dropped = dict(sorted(faces.dropped[split].items()))
        if counts or dropped:
            splits[split] = {'counts': {label: counts[label] for label in faces.label_names},
                             'total': counts.total(), 'dropped': dropped}
    description = {'name': faces.name, 'note': faces.note, 'label_names': list(faces.label_names), 'splits': splits,
                   'sha256': checksum(tree)}
    texts = {CLASS_MAP: '\n'.join(faces.label_names) + '\n', VOTES: faces.votes,
             DESCRIPTION: json.dumps(description, indent=2, ensure_ascii=False) + '\n'}
    for name, text in texts.items():
        if text:
            (tree / name).write_text(text, encoding='utf-8', newline='\n')
    return description


def read_grey(file: Path, name: str | Path, size: int = 1) -> np.ndarray:
    """Decode all of an image to grey values (H, W), uint8; a JPEG may come smaller, but with sides of `size` or more.

    Raises:
        UserError: When the image called `name` cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            image.draft('L', (size, size))  # the quickest way through a JPEG
            return np.asarray(image.convert('L'))
    except Exception as error:  # decoders raise whatever they please
        raise UserError(f'{name} is not a readable image ({type(error).__name__}).') from None


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Give a folder to fill beside the target, and rename it to the target, absent or empty, when all is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{target.name}-', dir=target.parent) as temporary:
        tree = Path(temporary) / target.name
        tree.mkdir()
        yield tree
        if target.is_dir():
            target.rmdir()  # Windows does not rename over it
        tree.rename(target)


def checksum(tree: Path) -> str:
    """SHA-256 over the sorted paths of all images of a prepared folder and their contents.

    It covers split, label, file name and content of every image. The same number comes, inside the tree, from
    `find . -mindepth 3 -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`.
    """
    digests = {path.relative_to(tree).as_posix(): file_sha256(path) for path in tree.glob('*/*/*')}
    lines = ''.join(f'{digests[path]}  {path}\n' for path in sorted(digests, key=os.fsencode))
    return hashlib.sha256(os.fsencode(lines)).hexdigest()


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read the dataset.json that `prepare` wrote into a data folder.

    Raises:
        UserError: When there is none, or it is damaged.
    """
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((Path(folder) / DESCRIPTION).read_text(encoding='utf-8'))
        if isinstance(content['sha256'], str):
            return content
    raise UserError(f'{folder} has no {DESCRIPTION} that can be read: make the folder with timm-lfnsb prepare.')


def format_description(description: Mapping[str, Any], target: Path) -> str:
    """Text about a prepared folder: table of counts, what was dropped, and how timm's train script reads it."""
    names, splits = description['label_names'], description['splits']
    columns = {name: [*split['counts'].values(), split['total']] for name, split in splits.items()}
    lines = [f"{description['name']}: {description['note']}",
             tabulate({'': [*names, 'total'], **columns}, headers='keys', tablefmt='plain')]
    lines += [f'{name}: dropped {count} ({reason})'
              for name, split in splits.items() for reason, count in split['dropped'].items()]
    # Without --val-split, timm takes the whole tree where a split 'validation' is missing.
    held_out = next((split for split in ('validation', 'test') if split in splits), None)
    if held_out is None or 'train' not in splits:
        hint = 'There is no training split, or none to validate on: move some images there before you train.'
    else:
        votes = f' --label-votes {target / VOTES}' if (target / VOTES).is_file() else ''
        hint = (f'train.py reads it with --data-dir {target} --class-map {target / CLASS_MAP} '
                f'--num-classes {len(names)} --val-split {held_out}{votes}')
    return '\n'.join([*lines, f"sha256 {description['sha256']}", hint])
