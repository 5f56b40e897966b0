"""Turn the original layouts of facial expression data sets into the folder tree that timm's train script reads.

    TARGET/<split>/<label name>/<file>    the images
    TARGET/class_map.txt                  label names in canonical order, for train.py --class-map
    TARGET/dataset.json                   counts, what was dropped and why, and a checksum of it all

There is one reader for each data set, which lists the faces as samples, and one writer for all of them.
"""
from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from timm.data import is_img_extension
from tqdm import tqdm

from ..errors import UserError
from ..labels import EXPRESSIONS_7, EXPRESSIONS_8, canonical_name, match_labels

SPLITS = ('train', 'validation', 'test')

SPLIT_NAMES = {
    'train': 'train', 'training': 'train', 'train_set': 'train',
    'val': 'validation', 'valid': 'validation', 'validation': 'validation', 'val_set': 'validation',
    'test': 'test', 'testing': 'test', 'test_set': 'test',
}
"""Folder names for the three splits."""

FERPLUS_COLUMNS = (
    'neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt', 'unknown', 'NF',
)
"""The vote columns of FER+, in the order of fer2013new.csv."""

FER2013_USAGE = {'Training': 'train', 'PublicTest': 'validation', 'PrivateTest': 'test'}

RAFDB_LABELS = {
    1: 'surprise', 2: 'fear', 3: 'disgust', 4: 'happiness', 5: 'sadness', 6: 'anger', 7: 'neutral',
}
"""The numbering of RAF-DB's own label file."""

CLASS_MAP, DESCRIPTION = 'class_map.txt', 'dataset.json'


class PrepareError(RuntimeError):
    """A data set that cannot be prepared; the message is one sentence that names the file and what to do."""


@dataclass(frozen=True)
class Sample:
    """One labelled face.

    Attributes:
        split: One of `SPLITS`.
        label: Canonical label name.
        name: File name in the prepared tree, without folders.
        source: The image's file, or its encoded bytes where it comes out of an archive or a table.
    """

    split: str
    label: str
    name: str
    source: Path | bytes

    @property
    def path(self) -> str:
        """Path in the prepared tree, always with forward slashes."""
        return f'{self.split}/{self.label}/{self.name}'


@dataclass
class Faces:
    """What a reader found.

    Attributes:
        name: Name of the data set.
        label_names: Label names in canonical order.
        note: What was read, for the person who runs it and for dataset.json.
        samples: The faces that are kept.
        dropped: Number of faces left out, by split and reason.
    """

    name: str
    label_names: tuple[str, ...]
    note: str
    samples: list[Sample] = field(default_factory=list)
    dropped: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


# FER+


def read_ferplus(source: Path) -> Faces:
    """Read FER+ from train.zip, validation.zip and test.zip, or from the original csv files.

    The csv files are fer2013.csv (or icml_face_data.csv) and fer2013new.csv of https://github.com/microsoft/FERPlus.

    Raises:
        PrepareError: When neither layout is there, or a file is damaged or does not fit the others.
    """
    if any((source / f'{split}.zip').is_file() for split in SPLITS):
        return _read_ferplus_zips(source)
    pixels = next((path for name in ('fer2013.csv', 'icml_face_data.csv') if (path := source / name).is_file()), None)
    votes = source / 'fer2013new.csv'
    if pixels and votes.is_file():
        return _read_ferplus_csv(pixels, votes)
    raise PrepareError(
        f'{source} needs either train.zip, validation.zip and test.zip, or both fer2013.csv (or icml_face_data.csv) '
        'and fer2013new.csv.')


def _read_ferplus_zips(source: Path) -> Faces:
    # These were made by the rule of the csv reader below, so nothing is dropped a second time.
    faces = Faces('ferplus', EXPRESSIONS_8, 'zip files, one for each split, taken as they are')
    for split in SPLITS:
        path = source / f'{split}.zip'
        if not path.is_file():
            raise PrepareError(f'{path} is missing beside the zip files of the other splits.')
        for member, content in _zip_members(path):
            folder, label, name = _split_member(path, member)
            if folder != split:
                raise PrepareError(f'{path} holds {member}, which is not in the folder {split}/.')
            faces.samples.append(Sample(split, label, name, content))
    return faces


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    member = 'its directory'
    try:
        with zipfile.ZipFile(path) as archive:
            files = [info for info in archive.infolist() if not info.is_dir()]
            for info in tqdm(files, desc=f'reading {path.name}', disable=None):
                member = info.filename
                yield member, archive.read(info)
    # A wrong checksum is BadZipFile; RuntimeError is an encrypted member or an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise PrepareError(f'{path} is damaged at {member} ({error}): fetch it again.') from None


def _split_member(archive: Path, member: str) -> tuple[str, str, str]:
    """Take split/label/file.png apart; anything else, above all a path that leaves the tree, is refused."""
    parts = member.split('/')
    if len(parts) != 3 or not _is_plain_png(parts[2]):
        raise PrepareError(f'{archive} holds {member!r} where split/label/file.png is expected.')
    label = canonical_name(parts[1])
    if label not in EXPRESSIONS_8:
        raise PrepareError(
            f"{archive} holds {member}, whose label '{parts[1]}' is none of {', '.join(EXPRESSIONS_8)}.")
    return parts[0], label, parts[2]


def _is_plain_png(name: str) -> bool:
    return re.fullmatch(r'[\w-]+\.png', name) is not None


def _read_ferplus_csv(pixels_csv: Path, votes_csv: Path) -> Faces:
    faces = Faces('ferplus', EXPRESSIONS_8, f'{pixels_csv.name} with the votes of {votes_csv.name}')
    kept: dict[str, list[tuple[str, str, bytes]]] = {split: [] for split in SPLITS}
    names: set[str] = set()
    rows = zip_longest(
        _csv_rows(pixels_csv, ('pixels', 'Usage')),
        _csv_rows(votes_csv, ('Usage', 'Image name', *FERPLUS_COLUMNS)),
    )
    for line, (face, row) in enumerate(tqdm(rows, desc='reading csv', unit=' rows', disable=None), start=2):
        if face is None or row is None:
            short, long = (pixels_csv, votes_csv) if face is None else (votes_csv, pixels_csv)
            raise PrepareError(f'{short} ends before line {line} while {long.name} goes on: one of the two is cut off.')
        if face['Usage'] != row['Usage'] or face['Usage'] not in FER2013_USAGE:
            raise PrepareError(
                f"line {line} is for '{face['Usage']}' in {pixels_csv} and for '{row['Usage']}' in {votes_csv.name}; "
                f"both must say the same of {', '.join(FER2013_USAGE)}.")
        split = FER2013_USAGE[face['Usage']]
        try:
            label = top_vote([int(row[column]) for column in FERPLUS_COLUMNS])
        except ValueError:
            raise PrepareError(f'{votes_csv}, line {line}: a vote is not a number.') from None
        if label is None:
            faces.dropped[split]['tie for most votes'] += 1
        elif label == 'unknown':
            faces.dropped[split]['most votes for unknown'] += 1
        elif label == 'NF':
            faces.dropped[split]['most votes for not a face'] += 1
        elif not _is_plain_png(row['Image name']):
            raise PrepareError(
                f"{votes_csv}, line {line}: '{row['Image name']}' is not a file name like fer0000000.png.")
        elif row['Image name'] in names:  # true of four names in the published file
            faces.dropped[split]['image name listed twice'] += 1
        else:
            names.add(row['Image name'])
            kept[split].append((row['Image name'], label, _pixels(face['pixels'], pixels_csv, line)))

    seen: set[bytes] = set()
    for split in ('test', 'validation', 'train'):  # a face in two splits stays in the one that measures
        for name, label, pixels in kept[split]:
            if pixels in seen:
                faces.dropped[split]['exact duplicate of a kept image'] += 1
                continue
            seen.add(pixels)
            png = io.BytesIO()
            Image.frombytes('L', (48, 48), pixels).save(png, format='png')
            faces.samples.append(Sample(split, label, name, png.getvalue()))
    return faces


def top_vote(votes: Sequence[int]) -> str | None:
    """Column with the single highest number of votes, or None for a tie.

    Args:
        votes: Ten counts in the order of `FERPLUS_COLUMNS`.
    """
    most = max(votes)
    return FERPLUS_COLUMNS[votes.index(most)] if votes.count(most) == 1 else None


def _pixels(text: str, path: Path, line: int) -> bytes:
    try:
        pixels = bytes(map(int, text.split()))
    except ValueError:
        pixels = b''
    if len(pixels) != 48 * 48:
        raise PrepareError(f'{path}, line {line}: the pixels are not 48 x 48 numbers from 0 to 255.')
    return pixels


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            rows = csv.reader(file, strict=True)
            header = [name.strip() for name in next(rows, [])]  # icml_face_data.csv writes ' pixels'
            missing = [column for column in columns if column not in header]
            if missing:
                raise PrepareError(f"{path} has no column {' or '.join(missing)}.")
            for row in rows:
                if not row:  # an empty line
                    continue
                if len(row) != len(header):
                    raise PrepareError(
                        f'{path}, line {rows.line_num}: {len(row)} values where the header names {len(header)}.')
                yield {name: value.strip() for name, value in zip(header, row, strict=True)}
    except (csv.Error, UnicodeDecodeError) as error:
        raise PrepareError(f'{path} cannot be read as csv ({error}): fetch it again.') from None


# RAF-DB


def read_rafdb(source: Path) -> Faces:
    """Read RAF-DB: EmoLabel/list_patition_label.txt and Image/aligned, in `source` or in its folder basic.

    Raises:
        PrepareError: When the list or an image of it is missing, or a line of the list is damaged.
    """
    root = source / 'basic' if (source / 'basic').is_dir() else source
    label_file = root / 'EmoLabel' / 'list_patition_label.txt'  # the data set's own spelling
    if not label_file.is_file():
        raise PrepareError(f'{label_file} is missing: give the folder that holds EmoLabel and Image.')
    faces = Faces('rafdb', EXPRESSIONS_7, 'aligned images of the basic set')
    try:
        lines = label_file.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise PrepareError(f'{label_file} cannot be read as text ({error}).') from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r'((train|test)_\w+)\.jpg\s+([1-7])', line.strip())
        if match is None:
            raise PrepareError(f"{label_file}, line {number}: {line!r} is not like 'train_00001.jpg 5'.")
        stem, split, label = match.groups()
        image = root / 'Image' / 'aligned' / f'{stem}_aligned.jpg'
        if not image.is_file():
            raise PrepareError(f'{image} is missing, though {label_file.name} lists it: unpack aligned.zip first.')
        faces.samples.append(Sample(split, RAFDB_LABELS[int(label)], image.name, image))
    return faces


# AffectNet


def read_affectnet(source: Path, label_names: tuple[str, ...] = EXPRESSIONS_8) -> Faces:
    """Read AffectNet: images/<id>.jpg and annotations/<id>_exp.npy in train_set and val_set.

    Its numbering is the canonical one. What is not among `label_names` is dropped: contempt from the seven-class set,
    and from both the classes from 8 on (none, uncertain, no face).

    Raises:
        PrepareError: When a folder, image or annotation is missing, or an annotation is damaged.
    """
    faces = Faces(f'affectnet{len(label_names)}', label_names, 'images by their _exp.npy annotations')
    for folder in ('train_set', 'val_set'):
        split = SPLIT_NAMES[folder]
        images, annotations = source / folder / 'images', source / folder / 'annotations'
        for path in (images, annotations):
            if not path.is_dir():
                raise PrepareError(f'the folder {path} is missing.')
        # Both lists, so that an image without an annotation is noticed as well as the reverse.
        ids = {path.stem for path in images.glob('*.jpg')}
        ids |= {path.name.removesuffix('_exp.npy') for path in annotations.glob('*_exp.npy')}
        for face_id in tqdm(sorted(ids), desc=f'reading {folder}', disable=None):
            image, annotation = images / f'{face_id}.jpg', annotations / f'{face_id}_exp.npy'
            for path, other in ((annotation, image), (image, annotation)):
                if not path.is_file():
                    raise PrepareError(f'{path} is missing beside {other.name}.')
            number = _read_expression(annotation)
            if number < len(label_names):
                faces.samples.append(Sample(split, label_names[number], image.name, image))
            elif number < len(EXPRESSIONS_8):
                faces.dropped[split][f'{EXPRESSIONS_8[number]} (not among the {len(label_names)} classes)'] += 1
            else:
                faces.dropped[split]['no expression (class 8 or higher)'] += 1
    return faces


def read_affectnet7(source: Path) -> Faces:
    """Read AffectNet without contempt, see `read_affectnet`."""
    return read_affectnet(source, EXPRESSIONS_7)


def _read_expression(path: Path) -> int:
    try:
        with path.open('rb') as file:
            value = float(np.lib.format.read_array(file, allow_pickle=False).item())  # some files hold the text '3'
        if value < 0 or not value.is_integer():
            raise ValueError
    except (ValueError, TypeError, EOFError):
        raise PrepareError(f'{path} is damaged: it should hold one class number.') from None
    return int(value)


# Any other folder tree


def read_folder(source: Path) -> Faces:
    """Read a tree split/label/image, or label/image, whose label folders carry any known name of an expression.

    Without split folders all images go to the split train. The classes are the seven, or all eight where there is a
    folder for contempt.

    Raises:
        PrepareError: When a folder name is unknown, or two of them mean the same.
    """
    top = _subfolders(source)
    split_folders: dict[str, Path] = {}
    for folder in top:
        split = SPLIT_NAMES.get(folder.name.lower())
        if split in split_folders:
            raise PrepareError(f'{folder} and {split_folders[split]} are both the split {split}: merge them.')
        if split:
            split_folders[split] = folder
    others = [folder.name for folder in top if folder not in split_folders.values()]
    if split_folders and others:
        raise PrepareError(
            f'{source} holds folders that are no split ({", ".join(others)}) beside folders that are '
            f'({", ".join(folder.name for folder in split_folders.values())}): move the former elsewhere.')
    split_folders = split_folders or {'train': source}

    label_folders = {split: _subfolders(folder) for split, folder in split_folders.items()}
    found = {canonical_name(folder.name) for folders in label_folders.values() for folder in folders}
    label_names = EXPRESSIONS_8 if 'contempt' in found else EXPRESSIONS_7
    faces = Faces('folder', label_names, '')
    notes = []
    for split in (split for split in SPLITS if split in label_folders):
        folders = label_folders[split]
        try:
            indices = match_labels([folder.name for folder in folders], label_names)
        except ValueError as error:
            raise PrepareError(f'{split_folders[split]}: {error}') from None
        for folder in folders:
            label = label_names[indices[folder.name]]
            for path in sorted(folder.iterdir()):
                if path.is_dir():
                    raise PrepareError(f'{path} is a folder inside a label folder: move its images one level up.')
                if is_img_extension(path.suffix.lower()):
                    faces.samples.append(Sample(split, label, path.name, path))
                else:
                    faces.dropped[split]['not a png or jpg file'] += 1
        names = ', '.join(f'{folder.name} as {label_names[indices[folder.name]]}' for folder in folders)
        origin = 'no split folders' if split_folders[split] == source else split_folders[split].name
        notes.append(f'{split} ({origin}): {names}')
    faces.note = '; '.join(notes)
    return faces


def _subfolders(folder: Path) -> list[Path]:
    # Hidden folders and __MACOSX are what file managers leave behind.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(('.', '__')))


READERS: dict[str, Callable[[Path], Faces]] = {
    'ferplus': read_ferplus,
    'rafdb': read_rafdb,
    'affectnet7': read_affectnet7,
    'affectnet8': read_affectnet,
    'folder': read_folder,
}


# The writer


def prepare_dataset(
        dataset: str,
        source: str | Path,
        target: str | Path,
        hard_link: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Write a data set as a folder tree for timm's train script.

    The tree is built in a temporary folder beside the target and renamed at the end, so the target is whole or absent.
    Every image is decoded once: a damaged one is found here and not in the middle of a training run.

    Args:
        dataset: One of `READERS`.
        source: Folder with the original files; it is only read.
        target: Folder to write, absent or empty. One that holds this very data set is left as it is.
        hard_link: Link the image files instead of copying them. Copies are the default because an edit of a linked
            image changes the original too.

    Returns:
        The content of dataset.json, and whether the target already held it.

    Raises:
        PrepareError: When the source is incomplete or damaged, or the target holds something else.
    """
    source, target = Path(source).resolve(), Path(target).resolve()
    try:
        return _prepare(READERS[dataset], source, target, hard_link)
    except OSError as error:
        raise PrepareError(f'{error.filename or target}: {error.strerror or error}.') from None


def _prepare(
        reader: Callable[[Path], Faces],
        source: Path,
        target: Path,
        hard_link: bool,
) -> tuple[dict[str, Any], bool]:
    if not source.is_dir():
        raise PrepareError(f'{source} is not a folder.')
    if source == target or source in target.parents:
        raise PrepareError(f'{target} lies inside the source {source}: choose a folder outside.')
    foreign = PrepareError(f'{target} already holds something else than this data: remove it or choose another folder.')
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not (target / DESCRIPTION).is_file():
        raise foreign

    faces = reader(source)
    if not faces.samples:
        raise PrepareError(f'{source} holds no images of this data set.')
    if occupied:
        description = _describe(faces, _store(faces.samples))
        if not _is_finished(target, description):
            raise foreign
        return description, True

    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{target.name}-', dir=target.parent) as temporary:
        tree = Path(temporary) / target.name
        description = _describe(faces, _store(faces.samples, tree, hard_link))
        for name, text in _texts(description).items():
            (tree / name).write_text(text, encoding='utf-8', newline='\n')
        if target.is_dir():
            target.rmdir()  # empty, see above; Windows does not rename over it
        tree.rename(target)
    return description, False


def _store(samples: Sequence[Sample], tree: Path | None = None, hard_link: bool = False) -> dict[str, str]:
    """Check and hash the images, and write them where a tree is given; returns the SHA-256 of each path."""
    digests: dict[str, str] = {}
    for sample in tqdm(samples, desc='writing images' if tree else 'comparing images', disable=None):
        if sample.path in digests:
            raise PrepareError(f'the source has two images for {sample.path}: rename or remove one.')
        content = sample.source if isinstance(sample.source, bytes) else sample.source.read_bytes()
        _check_image(content, sample)
        digests[sample.path] = hashlib.sha256(content).hexdigest()
        if tree is None:
            continue
        path = tree / sample.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if hard_link and isinstance(sample.source, Path):
            try:
                os.link(sample.source.resolve(), path)
            except OSError as error:
                raise PrepareError(
                    f'{sample.source} cannot be hard-linked into {tree.parent.parent} ({error.strerror}): leave '
                    '--hard-link out to copy.') from None
        else:
            path.write_bytes(content)
    return digests


def _check_image(content: bytes, sample: Sample) -> None:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.draft('L', (1, 1))  # the quickest decoding of a JPEG that still reads all of it
            image.load()
    except Exception as error:  # decoders raise whatever they please
        name = sample.source if isinstance(sample.source, Path) else sample.path
        raise PrepareError(f'{name} is not a readable image ({type(error).__name__}).') from None


def read_description(folder: str | Path) -> dict[str, Any]:
    """Read the dataset.json that `prepare` wrote into a data folder.

    Returns:
        Its content; `sha256` is there, `name`, `note`, `label_names` and `splits` are where `prepare` wrote it.

    Raises:
        UserError: When there is none, or it is damaged.
    """
    path = Path(folder) / DESCRIPTION
    if not path.is_file():
        raise UserError(f'{folder} has no {DESCRIPTION}: make the folder with timm-lfnsb prepare.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        if not isinstance(content['sha256'], str):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged: make the folder again with timm-lfnsb prepare.') from None
    return content


def _describe(faces: Faces, digests: Mapping[str, str]) -> dict[str, Any]:
    counts = Counter((sample.split, sample.label) for sample in faces.samples)
    present = {split for split, _ in counts} | set(faces.dropped)
    return {
        'name': faces.name,
        'note': faces.note,
        'label_names': list(faces.label_names),
        'splits': {
            split: {
                'counts': {label: counts[split, label] for label in faces.label_names},
                'total': sum(counts[split, label] for label in faces.label_names),
                'dropped': dict(sorted(faces.dropped[split].items())),
            }
            for split in SPLITS if split in present
        },
        'sha256': checksum(digests),
    }


def checksum(digests: Mapping[str, str]) -> str:
    """SHA-256 over the sorted paths of all images and their contents.

    It covers split, label, file name and content of every image. The same number comes, inside the tree, from
    `find . -mindepth 3 -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`.

    Args:
        digests: Hexadecimal SHA-256 of each file by its path split/label/name.
    """
    total = hashlib.sha256()
    for path in sorted(digests, key=os.fsencode):
        total.update(os.fsencode(f'{digests[path]}  {path}\n'))
    return total.hexdigest()


def _texts(description: Mapping[str, Any]) -> dict[str, str]:
    return {
        CLASS_MAP: '\n'.join(description['label_names']) + '\n',
        DESCRIPTION: json.dumps(description, indent=2, ensure_ascii=False) + '\n',
    }


def _is_finished(target: Path, description: Mapping[str, Any]) -> bool:
    texts = _texts(description)
    files = {path.relative_to(target).as_posix(): path for path in target.rglob('*') if not path.is_dir()}
    for name, text in texts.items():
        if name not in files or files.pop(name).read_bytes() != text.encode():
            return False
    return checksum({name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}) \
        == description['sha256']


def format_description(description: Mapping[str, Any]) -> str:
    """Format the content of dataset.json as text: what was read, a table of counts, and what was dropped."""
    splits = description['splits']
    rows = [('', *splits)]
    rows += [(label, *(str(split['counts'][label]) for split in splits.values()))
             for label in description['label_names']]
    rows.append(('total', *(str(split['total']) for split in splits.values())))
    lines = [f"{description['name']}: {description['note']}"]
    lines += [f'{row[0]:<10}' + ''.join(f'{value:>12}' for value in row[1:]) for row in rows]
    lines += [f'{name}: dropped {count} ({reason})'
              for name, split in splits.items() for reason, count in split['dropped'].items()]
    return '\n'.join([*lines, f"sha256 {description['sha256']}"])
