"""Parts of a folder data set: a fixed stratified subset, and folds that keep near-identical images together.

Both write a tree of links that timm's train script and `evaluate` read like any other data folder.
"""
from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from tqdm import tqdm

COARSE, FINE, SHIFT = 12, 32, 2
"""Side of the thumbnails that are compared all with all and of those that confirm, and the shift tried, in pixels."""

COARSE_SIMILARITY, SIMILARITY = 0.87, 0.92
"""Correlation from which a pair is looked at more closely, and from which its images are near-identical.

Chosen on FER+, by eye: above 0.92 nearly all pairs are one photograph (cropped, brightened, compressed, watermarked or
mirrored anew), below 0.9 most are two people. A wrong pair costs nothing but that two faces share a fold.
"""

FOLD_METHOD = 1
"""To be raised where a change here gives other folds."""


class FoldError(ValueError):
    """A part that cannot be made; the message says what to do."""


@dataclass(frozen=True)
class LabelledFile:
    """An image of a folder data set: its path below the folder with forward slashes, and its label folder's name."""

    path: str
    label: str


def list_images(data_dir: Path, split: str | None = None) -> list[LabelledFile]:
    """The images that timm reads from a split of a data folder, or from all of its splits, sorted by path.

    Raises:
        FoldError: When there are none.
    """
    if split and not (data_dir / split).is_dir():
        raise FoldError(f"{data_dir} has no split folder '{split}'.")
    folders = [data_dir / split] if split else sorted(path for path in data_dir.iterdir() if path.is_dir())
    files = []
    for folder in folders:
        try:
            reader = create_dataset('', root=str(folder), search_split=False).reader
        except RuntimeError:
            if split:
                raise FoldError(f'{folder} has no images.') from None
            continue
        files += [Path(path) for path, _ in reader.samples]
    if not files:
        raise FoldError(f'{data_dir} has no images in SPLIT/LABEL folders.')
    images = [LabelledFile(file.relative_to(data_dir).as_posix(), file.parent.name) for file in files]
    return sorted(images, key=lambda image: image.path)


# A subset


def choose_subset(images: Sequence[LabelledFile], count: int, seed: int = 0) -> list[LabelledFile]:
    """Draw a fixed subset with the classes' shares: the same for the same images, count and seed.

    Each class gets its share of `count`, rounded so that the sum is exact (largest remainder), and at least one image.

    Raises:
        FoldError: When the count is smaller than the number of classes, or larger than the number of images.
    """
    classes: defaultdict[str, list[LabelledFile]] = defaultdict(list)
    for image in sorted(images, key=lambda image: image.path):
        classes[image.label].append(image)
    if not len(classes) <= count <= len(images):
        raise FoldError(f'a subset of {count} cannot be drawn from {len(images)} images of {len(classes)} classes.')
    exact = {label: count * len(members) / len(images) for label, members in classes.items()}
    sizes = {label: max(1, int(share)) for label, share in exact.items()}
    # Classes lifted to one image may have taken too many: then the best-served ones give some back.
    for _ in range(abs(count - sum(sizes.values()))):
        step = 1 if sum(sizes.values()) < count else -1
        movable = [label for label in sizes if step > 0 or sizes[label] > 1]
        label = max(movable, key=lambda label: (step * (exact[label] - sizes[label]), label))
        sizes[label] += step
    chosen = []
    for label in sorted(classes):
        order = np.random.default_rng([seed, len(classes[label])]).permutation(len(classes[label]))
        chosen += [classes[label][i] for i in order[:sizes[label]]]
    return sorted(chosen, key=lambda image: image.path)


def write_subset(data_dir: Path, train_split: str, chosen: Sequence[LabelledFile], target: Path) -> None:
    """Write a data folder of links whose training split is the chosen images and that is else like `data_dir`.

    Raises:
        FoldError: When the target is there with other images.
    """
    if target.is_dir():
        if [image.path for image in list_images(target, train_split)] != [image.path for image in chosen]:
            raise FoldError(f'{target} holds other images than this subset: remove it or choose another folder.')
        return
    with _building(target) as tree:
        for image in chosen:
            _link(data_dir / image.path, tree / image.path)
        for path in data_dir.iterdir():
            if path.name != train_split:
                _link(path, tree / path.name)


# Folds


def near_identical_groups(
        images: Sequence[np.ndarray],
        similarity: float = SIMILARITY,
        progress: bool = False,
) -> np.ndarray:
    """Number the images so that near-identical ones, and those linked by others, get one number.

    Similarity is Pearson's correlation of grey values, which ignores brightness and contrast. All pairs are compared at
    12x12, where a shift by a pixel of a 48 px face hardly shows; those that correlate by over 0.87 again at 32x32,
    shifted by up to two pixels in each direction, as they are and mirrored. 32,000 faces take about 20 seconds on one
    core.

    Args:
        images: Grey images of any size, uint8 (H, W).
        similarity: Correlation from which two images belong together.
        progress: Show a progress bar on stderr.

    Returns:
        Group numbers (N,), from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    total = len(images)
    coarse = _normalise(np.stack([_thumbnail(image, COARSE) for image in images]).astype(np.float32))
    mirrored = coarse[:, :, ::-1].reshape(total, -1)
    coarse = coarse.reshape(total, -1)
    fine = np.stack([_thumbnail(image, FINE) for image in images])
    pairs = []
    step = max(1, 2 ** 25 // total)
    for start in tqdm(range(0, total, step), desc='comparing images', disable=None if progress else True):
        for others, mirror in ((coarse, False), (mirrored, True)):
            first, second = np.nonzero(coarse[start:start + step] @ others[start:].T > COARSE_SIMILARITY)
            keep = second > first
            first, second = first[keep] + start, second[keep] + start
            found = _correlation(fine, first, second, mirror) > similarity
            pairs.append(np.stack([first[found], second[found]]))
    first, second = np.concatenate(pairs, axis=1)
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(total, total))
    return connected_components(graph, directed=False)[1]


def _thumbnail(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def _normalise(images: np.ndarray) -> np.ndarray:
    """Subtract each image's (N, H, W) mean and divide by its norm; a constant image becomes zero: like nothing else."""
    images = images - images.mean(axis=(1, 2), keepdims=True)
    return images / np.maximum(np.linalg.norm(images, axis=(1, 2), keepdims=True), 1e-3)


def _correlation(images: np.ndarray, first: np.ndarray, second: np.ndarray, mirror: bool) -> np.ndarray:
    """The best correlation of each pair over small shifts (P,), images uint8 (N, S, S)."""
    best = np.full(len(first), -1, np.float32)
    inner = slice(SHIFT, images.shape[1] - SHIFT)
    for start in range(0, len(first), 4096):
        part = slice(start, start + 4096)
        a = _normalise(images[first[part], inner, inner].astype(np.float32))
        b = images[second[part]]
        b = b[:, :, ::-1] if mirror else b
        for dy in range(2 * SHIFT + 1):
            for dx in range(2 * SHIFT + 1):
                shifted = b[:, dy:dy + a.shape[1], dx:dx + a.shape[2]].astype(np.float32)
                best[part] = np.maximum(best[part], (a * _normalise(shifted)).sum(axis=(1, 2)))
    return best


def assign_folds(labels: Sequence[str], groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Deal the images out to folds (N,), classes alike in each, no group in two of them.

    Raises:
        FoldError: When a fold would be without images of a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    names, indices = np.unique(np.asarray(labels), return_inverse=True)
    per_class = {
        str(name): len(np.unique(np.asarray(groups)[indices == i])) for i, name in enumerate(names)}
    scarce = {name: count for name, count in per_class.items() if count < folds}
    if scarce:
        raise FoldError(
            f'{folds} folds are too many: there are only ' + ', '.join(f'{n} {name}' for name, n in scarce.items())
            + ' images that are not near-identical.')
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    assigned = np.full(len(indices), -1)
    for fold, (_, members) in enumerate(splitter.split(np.zeros(len(indices)), indices, groups)):
        assigned[members] = fold
    return assigned


def write_folds(data_dir: Path, folds: int, target: Path, checksum: str, seed: int = 0) -> dict[str, Any]:
    """Write the images of all splits as folds of links, and for each fold a data folder that holds it out.

        TARGET/fold-I/LABEL/SPLIT-FILE    the images, each once
        TARGET/run-I/train/fold-J         all folds but one
        TARGET/run-I/validation           that one
        TARGET/folds.json                 what was done

    Args:
        data_dir: Folder SPLIT/LABEL/FILE.
        folds: Number of folds.
        target: Folder to write; one with these very folds is left as it is.
        checksum: The data's, to tell other folds apart.
        seed: Of the draw.

    Returns:
        The content of folds.json.

    Raises:
        FoldError: When the target holds other folds, an image cannot be read, or a class has too few images.
    """
    identity = {'data': checksum, 'folds': folds, 'seed': seed, 'method': FOLD_METHOD}
    if target.is_dir():
        description = json.loads((target / 'folds.json').read_text(encoding='utf-8'))
        if {key: description.get(key) for key in identity} != identity:
            raise FoldError(f'{target} holds other folds: remove it or choose another folder.')
        return description
    images = list_images(data_dir)
    pixels = [_read_grey(data_dir / image.path) for image in tqdm(images, desc='reading images', disable=None)]
    groups = near_identical_groups(pixels, progress=True)
    assigned = assign_folds([image.label for image in images], groups, folds, seed)
    sizes = np.bincount(groups)
    description = {
        **identity,
        'images': len(images),
        'near_identical_groups': int((sizes > 1).sum()),
        'images_in_them': int(sizes[sizes > 1].sum()),
        'largest_group': int(sizes.max()),
        'counts': [
            dict(sorted(Counter(
                image.label for image, own in zip(images, assigned, strict=True) if own == fold).items()))
            for fold in range(folds)],
    }
    with _building(target) as tree:
        for image, fold in zip(images, assigned, strict=True):
            parts = PurePath(image.path).parts
            _link(data_dir / image.path, tree / f'fold-{fold}' / image.label / '-'.join([*parts[:-2], parts[-1]]))
        for run in range(folds):
            _link(Path('..') / f'fold-{run}', tree / f'run-{run}' / 'validation')
            for other in range(folds):
                if other != run:
                    _link(Path('..') / '..' / f'fold-{other}', tree / f'run-{run}' / 'train' / f'fold-{other}')
        (tree / 'folds.json').write_text(json.dumps(description, indent=1) + '\n', encoding='utf-8')
    return description


def _read_grey(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image.draft('L', (FINE, FINE))  # a JPEG is decoded no larger than needed
            return np.asarray(image.convert('L'))
    except Exception as error:  # decoders raise whatever they please
        raise FoldError(f'{path} is not a readable image ({type(error).__name__}).') from None


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside the target, and rename it to the target once everything is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f'.{target.name}-', dir=target.parent) as temporary:
        tree = Path(temporary) / target.name
        tree.mkdir()
        yield tree
        tree.rename(target)


def _link(source: Path, link: Path) -> None:
    """Make a symbolic link, or a copy where the system allows none; a relative source is relative to the link."""
    link.parent.mkdir(parents=True, exist_ok=True)
    origin = link.parent / source
    try:
        os.symlink(source if not source.is_absolute() else source.resolve(), link, target_is_directory=origin.is_dir())
    except OSError:
        if origin.is_dir():
            shutil.copytree(origin, link)
        else:
            shutil.copy2(origin, link)
