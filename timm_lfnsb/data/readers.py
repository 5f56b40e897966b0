"""Readers of the original layouts of facial expression data sets: each lists the faces of one, and what it drops.

Each raises UserError, or OSError, where files are missing, damaged or do not fit each other.
"""
from __future__ import annotations

import csv
import io
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

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
    'test': 'test', 'testing': 'test', 'test_set': 'test'}

FERPLUS_COLUMNS = (
    'neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt', 'unknown', 'NF')
"""The vote columns of FER+, in the order of fer2013new.csv."""

VOTE_COLUMNS = (*EXPRESSIONS_8, 'unknown', 'not_a_face')
"""The vote columns of a votes.csv, of a prepared folder or beside the zip files."""

FER2013_USAGE = {'Training': 'train', 'PublicTest': 'validation', 'PrivateTest': 'test'}

RAFDB_LABELS = dict(enumerate(('surprise', 'fear', 'disgust', 'happiness', 'sadness', 'anger', 'neutral'), start=1))
"""The numbering of RAF-DB's own label file."""

PLAIN_PNG = r'[\w-]+\.png'
"""Names that cannot lead out of a folder."""


class Sample(NamedTuple):
    """One labelled face. `source` is the image's file, or its encoded bytes from an archive or a table."""

    split: str
    label: str
    name: str
    source: Path | bytes
    votes: Sequence[int] = ()  # in the order of VOTE_COLUMNS

    @property
    def path(self) -> str:
        """Path in the prepared tree, always with forward slashes."""
        return f'{self.split}/{self.label}/{self.name}'

    def read(self) -> bytes:
        """The encoded image."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass
class Faces:
    """The faces of a data set that are kept, and how many are not, by split and reason."""

    name: str
    label_names: tuple[str, ...]
    note: str = ''
    samples: list[Sample] = field(default_factory=list)
    dropped: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def read_ferplus(source: Path) -> Faces:
    """Read FER+ from train.zip, validation.zip and test.zip, and a votes.csv where there is one, or from the csv files.

    These are fer2013.csv (or icml_face_data.csv) and fer2013new.csv of https://github.com/microsoft/FERPlus.
    """
    if any((source / f'{split}.zip').is_file() for split in SPLITS):
        return _read_ferplus_zips(source)
    pixels = next((path for name in ('fer2013.csv', 'icml_face_data.csv') if (path := source / name).is_file()), None)
    votes = source / 'fer2013new.csv'
    if pixels and votes.is_file():
        return _read_ferplus_csv(pixels, votes)
    raise UserError(f'{source} needs either train.zip, validation.zip and test.zip, or both fer2013.csv (or '
                    'icml_face_data.csv) and fer2013new.csv.')


def _read_ferplus_zips(source: Path) -> Faces:
    # These were made by the rule of the csv reader below, so nothing is dropped a second time.
    faces = Faces('ferplus', EXPRESSIONS_8, 'zip files, one for each split, taken as they are')
    votes_csv, votes = source / 'votes.csv', {}
    if votes_csv.is_file():
        votes = {row['file']: counts for row, counts in _csv_rows(votes_csv, ['file'], VOTE_COLUMNS)}
    for split in SPLITS:
        path = source / f'{split}.zip'
        try:
            with zipfile.ZipFile(path) as archive:
                files = [info for info in archive.infolist() if not info.is_dir()]
                contents = {info.filename: archive.read(info) for info in tqdm(files, desc=path.name, disable=None)}
        # A wrong checksum is BadZipFile; RuntimeError is an encrypted member or an unknown compression.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise UserError(f'{path} is damaged ({error}): fetch it again.') from None
        for member, content in contents.items():
            match = re.fullmatch(f'{split}/([^/]+)/({PLAIN_PNG})', member)
            if match is None or canonical_name(match[1]) not in EXPRESSIONS_8:
                raise UserError(f'{path} holds {member!r}, which is not {split}/LABEL/FILE.png with one of the labels '
                                f'{", ".join(EXPRESSIONS_8)}.')
            label, name = canonical_name(match[1]), match[2]
            if votes_csv.is_file() and name not in votes:
                raise UserError(f'{votes_csv} has no line for {name}: it is cut off, or of other faces.')
            faces.samples.append(Sample(split, label, name, content, votes.get(name, ())))
    return faces


def _read_ferplus_csv(pixels_csv: Path, votes_csv: Path) -> Faces:
    faces = Faces('ferplus', EXPRESSIONS_8, f'{pixels_csv.name} with the votes of {votes_csv.name}')
    found: dict[str, tuple[str, str, bytes, list[int]]] = {}
    nothing: tuple[dict[str, str], list[int]] = ({}, [])
    rows = zip_longest(
        _csv_rows(pixels_csv, ['pixels', 'Usage']),
        _csv_rows(votes_csv, ['Usage', 'Image name'], [*EXPRESSIONS_8, 'unknown', 'NF']), fillvalue=nothing)
    for line, ((face, _), (row, votes)) in enumerate(tqdm(rows, desc='reading csv', unit=' rows', disable=None), 2):
        split = FER2013_USAGE.get(row.get('Usage', ''))
        if split is None or face.get('Usage') != row['Usage']:
            raise UserError(f'{pixels_csv} and {votes_csv.name} do not fit each other from line {line} on: one is cut '
                            f'off, or their rows are not for the same of {", ".join(FER2013_USAGE)}.')
        name, label = row['Image name'], VOTE_COLUMNS[votes.index(max(votes))]
        if votes.count(max(votes)) > 1:
            faces.dropped[split]['tie for most votes'] += 1
        elif label not in EXPRESSIONS_8:
            faces.dropped[split][f"most votes for {label.replace('_', ' ')}"] += 1
        elif not re.fullmatch(PLAIN_PNG, name):
            raise UserError(f"{votes_csv}, line {line}: '{name}' is not a file name like fer0000000.png.")
        elif name in found:  # true of four names in the published file
            faces.dropped[split]['image name listed twice'] += 1
        else:
            try:
                pixels = bytes(map(int, face['pixels'].split()))
            except ValueError:
                pixels = b''
            if len(pixels) != 48 * 48:
                raise UserError(f'{pixels_csv}, line {line}: the pixels are not 48 x 48 numbers from 0 to 255.')
            found[name] = split, label, pixels, votes

    seen: set[bytes] = set()
    # Test first: a face in two splits stays in the one that measures.
    for name, (split, label, pixels, votes) in sorted(
            found.items(), key=lambda item: SPLITS.index(item[1][0]), reverse=True):
        if pixels in seen:
            faces.dropped[split]['exact duplicate of a kept image'] += 1
            continue
        seen.add(pixels)
        png = io.BytesIO()
        Image.frombytes('L', (48, 48), pixels).save(png, format='png')
        faces.samples.append(Sample(split, label, name, png.getvalue(), votes))
    return faces


def _csv_rows(path: Path, columns: Sequence[str], votes: Sequence[str] = ()) -> Iterator[
        tuple[dict[str, str], list[int]]]:
    """The rows of a csv file that must have these columns, each with the numbers in the columns of votes."""
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            rows = csv.DictReader(file, strict=True, skipinitialspace=True)  # icml_face_data.csv writes ' pixels'
            missing = [column for column in (*columns, *votes) if column not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {' or '.join(missing)}.")
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f'{path}, line {rows.line_num}: there are not as many values as columns.')
                if not all(row[column].strip().isdecimal() for column in votes):
                    raise UserError(f'{path}, line {rows.line_num}: a vote is not a number.')
                yield row, [int(row[column]) for column in votes]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read as csv ({error}): fetch it again.') from None


def read_rafdb(source: Path) -> Faces:
    """Read RAF-DB: EmoLabel/list_patition_label.txt and Image/aligned, in `source` or in its folder basic."""
    root = source / 'basic' if (source / 'basic').is_dir() else source
    label_file = root / 'EmoLabel' / 'list_patition_label.txt'  # the data set's own spelling
    if not label_file.is_file():
        raise UserError(f'{label_file} is missing: give the folder that holds EmoLabel and Image.')
    faces = Faces('rafdb', EXPRESSIONS_7, 'aligned images of the basic set')
    lines = label_file.read_text(encoding='utf-8-sig', errors='replace').strip().splitlines()
    for number, line in enumerate(lines, start=1):
        match = re.fullmatch(r'((train|test)_\w+)\.jpg\s+([1-7])\s*', line)
        if match is None:
            raise UserError(f"{label_file}, line {number}: {line!r} is not like 'train_00001.jpg 5'.")
        stem, split, label = match.groups()
        image = root / 'Image' / 'aligned' / f'{stem}_aligned.jpg'
        faces.samples.append(Sample(split, RAFDB_LABELS[int(label)], image.name, image))
    return faces


def read_affectnet(source: Path, label_names: tuple[str, ...]) -> Faces:
    """Read AffectNet: images/<id>.jpg and annotations/<id>_exp.npy in train_set and val_set.

    Its numbering is the canonical one. What is not among `label_names` is dropped: contempt from the seven-class set,
    and from both the classes from 8 on (none, uncertain, no face).
    """
    faces = Faces(f'affectnet{len(label_names)}', label_names, 'images by their _exp.npy annotations')
    for folder, split in (('train_set', 'train'), ('val_set', 'validation')):
        images = {path.stem: path for path in (source / folder / 'images').glob('*.jpg')}
        annotations = {path.name.removesuffix('_exp.npy'): path
                       for path in (source / folder / 'annotations').glob('*_exp.npy')}
        if not images or images.keys() != annotations.keys():
            alone = min(images.keys() ^ annotations.keys(), default='')
            raise UserError(f'{source / folder} needs images/ID.jpg and annotations/ID_exp.npy of the same faces; '
                            f'{f"of {alone} one is missing" if alone else "there are none"}.')
        for face_id, image in tqdm(sorted(images.items()), desc=f'reading {folder}', disable=None):
            try:
                value = float(np.load(annotations[face_id], allow_pickle=False).item())  # some hold the text '3'
                if value < 0 or not value.is_integer():
                    raise ValueError
            except (ValueError, TypeError, EOFError, AttributeError):
                raise UserError(f'{annotations[face_id]} is damaged: it should hold one class number.') from None
            label = EXPRESSIONS_8[int(value)] if value < 8 else None
            if label in label_names:
                faces.samples.append(Sample(split, label, image.name, image))
            else:
                faces.dropped[split][f'{label} (not among the {len(label_names)} classes)' if label
                                     else 'no expression (class 8 or higher)'] += 1
    return faces


def read_folder(source: Path) -> Faces:
    """Read a tree split/label/image, or label/image, whose label folders carry any known name of an expression.

    Without split folders all images go to the split train. The classes are the seven, or all eight where there is a
    folder for contempt.
    """
    folders = _subfolders(source)
    splits = {split: folder for folder in folders if (split := SPLIT_NAMES.get(folder.name.lower()))}
    if splits and len(splits) < len(folders):
        raise UserError(f'{source} holds folders that are no split beside folders that are, or two folders of one '
                        f'split ({", ".join(folder.name for folder in folders)}): move or merge them.')
    splits = splits or {'train': source}
    found = {canonical_name(folder.name) for parent in splits.values() for folder in _subfolders(parent)}
    faces = Faces('folder', EXPRESSIONS_8 if 'contempt' in found else EXPRESSIONS_7)
    notes = []
    for split, parent in sorted(splits.items(), key=lambda item: SPLITS.index(item[0])):
        folders = _subfolders(parent)
        indices = match_labels([folder.name for folder in folders], faces.label_names)
        labels = {name: faces.label_names[index] for name, index in indices.items()}
        for path in (path for folder in folders for path in sorted(folder.iterdir())):
            if path.is_dir():
                raise UserError(f'{path} is a folder inside a label folder: move its images one level up.')
            if is_img_extension(path.suffix.lower()):
                faces.samples.append(Sample(split, labels[path.parent.name], path.name, path))
            else:
                faces.dropped[split]['not a png or jpg file'] += 1
        origin = 'no split folders' if parent == source else parent.name
        notes.append(f"{split} ({origin}): {', '.join(f'{name} as {label}' for name, label in labels.items())}")
    faces.note = '; '.join(notes)
    return faces


def _subfolders(folder: Path) -> list[Path]:
    # Hidden folders and __MACOSX are what file managers leave behind.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(('.', '__')))


READERS: dict[str, Callable[[Path], Faces]] = {
    'ferplus': read_ferplus,
    'rafdb': read_rafdb,
    'affectnet7': partial(read_affectnet, label_names=EXPRESSIONS_7),
    'affectnet8': partial(read_affectnet, label_names=EXPRESSIONS_8),
    'folder': read_folder,
}
