"""Turn the original layouts of facial expression data sets into the folder tree that timm's train script reads.

    TARGET/<split>/<label name>/<file>    the images
    TARGET/class_map.txt                  label names in canonical order, for train.py --class-map
    TARGET/votes.csv                      crowd votes of each face, for train.py --label-votes, where there are any
    TARGET/dataset.json                   counts, what was dropped and why, and a checksum of the images

`readers` has a reader for each data set; this is the one writer.
"""
from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import numpy as np
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from ..errors import UserError
from ..util.files import file_sha256, replacing
from .readers import READERS, SPLITS, VOTE_COLUMNS

CLASS_MAP, DESCRIPTION, VOTES = 'class_map.txt', 'dataset.json', 'votes.csv'


def prepare_dataset(
        dataset: str, source: str | Path, target: str | Path, hard_link: bool = False) -> tuple[dict[str, Any], str]:
    """Write a data set as a folder tree for timm's train script.

    The target is whole or absent. Every image is decoded once, so that a damaged one is found before training.

    Args:
        dataset: One of `READERS`.
        source: Folder with the original files.
        target: Folder to write, absent or empty. To one that holds this very data, a missing votes.csv is added.
        hard_link: Link the image files; a later edit of one changes the original too, which copies avoid.

    Returns:
        The content of dataset.json, and what was done to the target, in words.

    Raises:
        UserError: When the source is incomplete or damaged, or the target holds something else.
        OSError: When a file is missing, or cannot be read, written or linked.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    if not source.is_dir():
        raise UserError(f'{source} is not a folder.')
    if source == target or source in target.parents:
        raise UserError(f'{target} lies inside the source {source}: choose a folder outside.')
    foreign = UserError(f'{target} already holds something else than this data: remove it or choose another folder.')
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not (target / DESCRIPTION).is_file():
        raise foreign
    faces = READERS[dataset](source)
    if not faces.samples:
        raise UserError(f'{source} holds no images of this data set.')
    digests: dict[str, str] = {}
    for sample in tqdm(faces.samples, desc='checking images', disable=None):
        if sample.path in digests:
            raise UserError(f'the source has two images for {sample.path}: rename or remove one.')
        content = sample.read()
        read_grey(io.BytesIO(content), sample.source if isinstance(sample.source, Path) else sample.path)
        digests[sample.path] = hashlib.sha256(content).hexdigest()
    splits = {}
    for split in SPLITS:
        counts = Counter(sample.label for sample in faces.samples if sample.split == split)
        dropped = dict(sorted(faces.dropped[split].items()))
        if counts or dropped:
            splits[split] = {'counts': {label: counts[label] for label in faces.label_names},
                             'total': counts.total(), 'dropped': dropped}
    description = {'name': faces.name, 'note': faces.note, 'label_names': list(faces.label_names), 'splits': splits,
                   'sha256': checksum(digests)}
    texts = {CLASS_MAP: '\n'.join(faces.label_names) + '\n',
             DESCRIPTION: json.dumps(description, indent=2, ensure_ascii=False) + '\n'}
    votes = sorted({(sample.name, *sample.votes) for sample in faces.samples if sample.votes})
    if votes:
        texts[VOTES] = ''.join(','.join(map(str, row)) + '\n' for row in [('file', *VOTE_COLUMNS), *votes])

    if not occupied:
        with building(target) as tree:
            for sample in tqdm(faces.samples, desc='writing images', disable=None):
                path = tree / sample.path
                path.parent.mkdir(parents=True, exist_ok=True)
                if hard_link and isinstance(sample.source, Path):
                    os.link(sample.source.resolve(), path)
                else:
                    path.write_bytes(sample.read())
            for name, text in texts.items():
                (tree / name).write_text(text, encoding='utf-8', newline='\n')
        missing = dataset == 'ferplus' and not votes
        return description, f'is ready, without {VOTES}: there is none in {source}' if missing else 'is ready'

    found = {path.relative_to(target).as_posix(): file_sha256(path)
             for path in target.rglob('*') if not path.is_dir()}
    expected = {**digests, **{name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}}
    add_votes = bool(votes) and VOTES not in found
    if add_votes or not votes:  # only one of the two was made with the votes at hand
        found.pop(VOTES, None)
        expected.pop(VOTES, None)
    if found != expected:
        raise foreign
    if not add_votes:
        return description, 'is already prepared'
    with replacing(target / VOTES) as path:
        path.write_text(texts[VOTES], encoding='utf-8', newline='\n')
    return description, f'was prepared before; {VOTES} was missing and is there now'


def read_grey(file: IO[bytes] | Path, name: str | Path, size: int = 1) -> np.ndarray:
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


def checksum(digests: Mapping[str, str]) -> str:
    """SHA-256 over the sorted paths of all images and their contents.

    It covers split, label, file name and content of every image. The same number comes, inside the tree, from
    `find . -mindepth 3 -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`.
    """
    total = hashlib.sha256()
    for path in sorted(digests, key=os.fsencode):
        total.update(os.fsencode(f'{digests[path]}  {path}\n'))
    return total.hexdigest()


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read the dataset.json that `prepare` wrote into a data folder.

    Raises:
        UserError: When there is none, or it is damaged.
    """
    try:
        content = json.loads((Path(folder) / DESCRIPTION).read_text(encoding='utf-8'))
        if isinstance(content['sha256'], str):
            return content
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f'{folder} has no {DESCRIPTION} that can be read: make the folder with timm-lfnsb prepare.')


def format_description(description: Mapping[str, Any]) -> str:
    """Format the content of dataset.json as text: what was read, a table of counts, and what was dropped."""
    splits = description['splits']
    rows: list[tuple[Any, ...]] = [
        (label, *(split['counts'][label] for split in splits.values())) for label in description['label_names']]
    rows.append(('total', *(split['total'] for split in splits.values())))
    lines = [f"{description['name']}: {description['note']}", tabulate(rows, ['', *splits], tablefmt='plain')]
    lines += [f'{name}: dropped {count} ({reason})'
              for name, split in splits.items() for reason, count in split['dropped'].items()]
    return '\n'.join([*lines, f"sha256 {description['sha256']}"])


def training_hint(target: Path, description: Mapping[str, Any]) -> str:
    """How timm's train script is to read a prepared folder."""
    splits = description['splits']
    held_out = next((split for split in ('validation', 'test') if split in splits), None)
    if held_out is None or 'train' not in splits:
        return 'There is no training split, or none to validate on: move some images there before you train.'
    # Without --val-split, timm takes the whole tree where a split 'validation' is missing.
    votes = f' --label-votes {target / VOTES}' if (target / VOTES).is_file() else ''
    return (f"train.py reads it with --data-dir {target} --class-map {target / CLASS_MAP} "
            f"--num-classes {len(description['label_names'])} --val-split {held_out}{votes}")
