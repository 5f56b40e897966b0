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
from collections.abc import Callable
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

FER2013_USAGE = {'Training': 'train', 'PublicTest': 'validation', 'PrivateTest': 'test'}

RAFDB_LABELS = dict(enumerate(('surprise', 'fear', 'disgust', 'happiness', 'sadness', 'anger', 'neutral'), start=1))
"""The numbering of RAF-DB's own label file."""

PLAIN_PNG = r'[\w-]+\.png'  # names that cannot lead out of a folder


class Sample(NamedTuple):
    """One labelled face. `source` is the image's file, or its encoded bytes from an archive or a table."""
    split: str
    label: str
    name: str
    source: Path | bytes


@dataclass
class Faces:
    """The faces of a data set that are kept, how many are not, by split and reason, and the text of a votes.csv."""
    name: str
    label_names: tuple[str, ...]
    note: str
    samples: list[Sample] = field(default_factory=list)
    dropped: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    votes: str = ''


def read_ferplus(source: Path) -> Faces:
    """Read FER+ from train.zip, validation.zip and test.zip, and a votes.csv where there is one, or from the csv files.

    These are fer2013.csv (or icml_face_data.csv) and fer2013new.csv of https://github.com/microsoft/FERPlus.
    """
    votes_csv = source / 'fer2013new.csv'
    if not votes_csv.is_file() or (source / 'train.zip').is_file():
        return _read_ferplus_zips(source)
    pixels_csv = source / 'icml_face_data.csv'
    return _read_ferplus_csv(pixels_csv if pixels_csv.is_file() else source / 'fer2013.csv', votes_csv)


def _read_ferplus_zips(source: Path) -> Faces:
    # These were made by the rule of the csv reader below, so nothing is dropped a second time.
    faces = Faces('ferplus', EXPRESSIONS_8, 'zip files, one for each split, taken as they are')
    if (source / 'votes.csv').is_file():
        faces.votes = (source / 'votes.csv').read_text(encoding='utf-8')
    for split in SPLITS:
        path, contents = source / f'{split}.zip', {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in tqdm(archive.namelist(), desc=path.name, disable=None):
                    contents[member] = archive.read(member)
        # A wrong checksum is BadZipFile; RuntimeError is an encrypted member or an unknown compression.
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
            raise UserError(f'{path} is damaged ({error}): fetch it again.') from None
        for member in (member for member in contents if not member.endswith('/')):
            match = re.fullmatch(f'{split}/([^/]+)/({PLAIN_PNG})', member)
            if match is None or canonical_name(match[1]) not in EXPRESSIONS_8:
                raise UserError(f'{path} holds {member!r}, which is not {split}/LABEL/FILE.png with one of the labels '
                                f'{", ".join(EXPRESSIONS_8)}.')
            faces.samples.append(Sample(split, canonical_name(match[1]), match[2], contents[member]))
    return faces


def _read_ferplus_csv(pixels_csv: Path, votes_csv: Path) -> Faces:
    faces = Faces('ferplus', EXPRESSIONS_8, f'{pixels_csv.name} with the votes of {votes_csv.name}')
    found: dict[str, tuple[Sample, list[int]]] = {}
    with (pixels_csv.open(newline='', encoding='utf-8-sig') as first,
          votes_csv.open(newline='', encoding='utf-8-sig') as second):
        # icml_face_data.csv writes ' pixels'.
        readers = [csv.DictReader(file, strict=True, skipinitialspace=True) for file in (first, second)]
        try:
            for face, row in tqdm(zip_longest(*readers, fillvalue={}), desc='reading csv', unit=' rows', disable=None):
                votes, name = [int(row[column]) for column in FERPLUS_COLUMNS], row['Image name']
                split, label = FER2013_USAGE[row['Usage']], FERPLUS_COLUMNS[votes.index(max(votes))]
                pixels = np.array(face['pixels'].split(), dtype=int).reshape(48, 48)
                if face['Usage'] != row['Usage'] or pixels.min() < 0 or pixels.max() > 255:
                    raise ValueError('other faces, or pixels above 255')
                if votes.count(max(votes)) > 1:
                    faces.dropped[split]['tie for most votes'] += 1
                elif label not in EXPRESSIONS_8:
                    faces.dropped[split][f"most votes for {label.replace('NF', 'not a face')}"] += 1
                elif name in found:  # true of four names in the published file
                    faces.dropped[split]['image name listed twice'] += 1
                elif not re.fullmatch(PLAIN_PNG, name):
                    raise ValueError(f'{name!r} is not a file name')
                else:
                    png = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(png, format='png')
                    found[name] = Sample(split, label, name, png.getvalue()), votes
        except (csv.Error, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f'{pixels_csv} and {votes_csv.name} do not fit each other, or are damaged, at line '
                            f'{readers[0].line_num} ({error!r}): fetch them again.') from None

    seen: set[bytes | Path] = set()
    rows: list[tuple[object, ...]] = [('file', *FERPLUS_COLUMNS)]
    # Test first: a face in two splits stays in the one that measures.
    for sample, votes in sorted(found.values(), key=lambda item: SPLITS.index(item[0].split), reverse=True):
        if sample.source in seen:
            faces.dropped[sample.split]['exact duplicate of a kept image'] += 1
            continue
        seen.add(sample.source)
        faces.samples.append(sample)
        rows.append((sample.name, *votes))
    faces.votes = ''.join(','.join(map(str, row)) + '\n' for row in rows)
    return faces


def read_rafdb(source: Path) -> Faces:
    """Read RAF-DB: EmoLabel/list_patition_label.txt and Image/aligned, in `source` or in its folder basic."""
    root = source / 'basic' if (source / 'basic').is_dir() else source
    label_file = root / 'EmoLabel' / 'list_patition_label.txt'  # the data set's own spelling
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

    Its numbering is the canonical one. Classes beyond `label_names` are dropped: none, uncertain, no face, contempt.
    """
    faces = Faces(f'affectnet{len(label_names)}', label_names, 'images by their _exp.npy annotations')
    for folder, split in (('train_set', 'train'), ('val_set', 'validation')):
        images, annotations = source / folder / 'images', source / folder / 'annotations'
        # Of each face that has one of the two files: opening the other says which is missing.
        ids = {path.stem for path in images.glob('*.jpg')} | {
            path.name.removesuffix('_exp.npy') for path in annotations.glob('*_exp.npy')}
        for face_id in tqdm(sorted(ids), desc=f'reading {folder}', disable=None):
            annotation, image = annotations / f'{face_id}_exp.npy', images / f'{face_id}.jpg'
            try:
                number = int(np.load(annotation, allow_pickle=False).item())  # some hold the text '3'
            except (ValueError, TypeError, EOFError, OverflowError):
                raise UserError(f'{annotation} is damaged: it should hold one class number.') from None
            if 0 <= number < len(label_names):
                faces.samples.append(Sample(split, label_names[number], image.name, image))
            else:
                faces.dropped[split][f'class {number}, not among the {len(label_names)}'] += 1
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
    label_names = EXPRESSIONS_8 if 'contempt' in found else EXPRESSIONS_7
    faces = Faces('folder', label_names, 'label folders by their names')
    for split, parent in splits.items():
        indices = match_labels([folder.name for folder in _subfolders(parent)], label_names)
        for path in (path for name in indices for path in sorted((parent / name).iterdir())):
            if path.is_dir():
                raise UserError(f'{path} is a folder inside a label folder: move its images one level up.')
            if is_img_extension(path.suffix.lower()):
                faces.samples.append(Sample(split, label_names[indices[path.parent.name]], path.name, path))
            else:
                faces.dropped[split]['not a png or jpg file'] += 1
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
