"""Parts of a folder data set: a fixed stratified subset, and folds that keep near-identical images together.

Both write a tree of links that timm's train script and `evaluate` read like any other data folder. An image is named by
its path SPLIT/LABEL/FILE below the data folder, with forward slashes.
"""
from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from timm.data import create_dataset
from tqdm import tqdm

from ..errors import UserError
from ..util.files import write_json
from .prepare import building, read_grey

# Sides of the two thumbnails and shift in pixels, and the correlations to exceed. Chosen on FER+, by eye: above 0.92
# nearly all pairs are one photograph, below 0.9 most are two people. A wrong pair only makes two faces share a fold.
COARSE, FINE, SHIFT = 12, 32, 2
COARSE_SIMILARITY, SIMILARITY = 0.87, 0.92


def list_images(data_dir: Path, split: str | None = None) -> list[str]:
    """The images that timm reads from a split of a data folder, or from all of its splits, sorted.

    Raises:
        UserError: When there are none.
    """
    images = []
    for folder in filter(Path.is_dir, data_dir.glob(split or '*')):
        with suppress(RuntimeError):  # a folder without images
            samples = create_dataset('', root=str(folder), search_split=False).reader.samples
            images += [Path(path).relative_to(data_dir).as_posix() for path, _ in samples]
    if not images:
        raise UserError(f"{data_dir} has no images in {split or 'SPLIT'}/LABEL: make it with timm-lfnsb prepare.")
    return sorted(images)


def choose_subset(images: Sequence[str], count: int, seed: int = 0) -> list[str]:
    """Draw a subset with the classes' shares, at least one image each: the same for the same images, count and seed.

    Raises:
        UserError: When the count is below the number of classes, or above that of images.
    """
    classes: defaultdict[str, list[str]] = defaultdict(list)
    for image in sorted(images):
        classes[image.split('/')[-2]].append(image)
    if not len(classes) <= count <= len(images):
        raise UserError(f'a subset of {count} cannot be drawn from {len(images)} images of {len(classes)} classes.')
    sizes = dict.fromkeys(classes, 1)  # the rest goes, one by one, to the class that lacks most
    for _ in range(count - len(classes)):
        sizes[max(sizes, key=lambda label: (count * len(classes[label]) / len(images) - sizes[label], label))] += 1
    chosen = []
    for label, members in classes.items():
        order = np.random.default_rng([seed, len(members)]).permutation(len(members))
        chosen += [members[i] for i in order[:sizes[label]]]
    return sorted(chosen)


def write_subset(data_dir: Path, train_split: str, chosen: Sequence[str], target: Path) -> None:
    """Write a data folder of links whose training split is the chosen images and that is else like `data_dir`.

    Raises:
        UserError: When the target is there with other images.
    """
    if target.is_dir():
        if list_images(target, train_split) != list(chosen):
            raise UserError(f'{target} holds other images than this subset: remove it or choose another folder.')
        return
    with building(target) as tree:
        for image in chosen:
            _link(data_dir / image, tree / image)
        for path in data_dir.iterdir():
            if path.name != train_split:
                _link(path, tree / path.name)


def near_identical_groups(images: Sequence[np.ndarray]) -> np.ndarray:
    """Group numbers (N,) from 0 of N grey images, uint8 (H, W): near-identical ones, and those they link, share one.

    All pairs are compared by the correlation of small thumbnails, as they are and mirrored; similar ones shifted, too.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    total, inner = len(images), slice(SHIFT, FINE - SHIFT)
    coarse, fine = (
        np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX)) for image in images])
        for size in (COARSE, FINE))
    # Each image and, behind all, its mirror image; a constant one becomes zero: like nothing else.
    vectors = np.concatenate([coarse, coarse[:, :, ::-1]]).reshape(2 * total, -1).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-3)
    pairs = []
    step = max(1, 2 ** 24 // total)
    for start in tqdm(range(0, total, step), desc='comparing images', disable=None):
        similar = vectors[start:min(start + step, total)] @ vectors[start:].T > COARSE_SIMILARITY
        candidates = np.argwhere(similar) + start
        for first, second in candidates[candidates[:, 1] % total > candidates[:, 0]]:
            other = fine[second] if second < total else fine[second - total, :, ::-1]
            if cv2.matchTemplate(other, fine[first, inner, inner], cv2.TM_CCOEFF_NORMED).max() > SIMILARITY:
                pairs.append((first, second % total))
    rows, columns = np.reshape(pairs, (-1, 2)).T.astype(int)
    return connected_components(coo_array((np.ones(len(pairs)), (rows, columns)), (total, total)), directed=False)[1]


def write_folds(data_dir: Path, folds: int, target: Path, checksum: str) -> None:
    """Write the images of all splits as folds of links, and for each fold a data folder that holds it out.

        TARGET/fold-I/LABEL/SPLIT-FILE    the images, each once
        TARGET/run-I/train/fold-J         all folds but one
        TARGET/run-I/validation           that one
        TARGET/folds.json                 what was done

    Classes are alike in each fold, and near-identical images in one. A target with these very folds, told by the data's
    checksum, is left as it is.

    Raises:
        UserError: When the target holds other folds, an image cannot be read, or a class has too few images.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    identity = {'data': checksum, 'folds': folds}
    if target.is_dir():
        if identity.items() <= json.loads((target / 'folds.json').read_text(encoding='utf-8')).items():
            return
        raise UserError(f'{target} holds other folds: remove it or choose another folder.')
    images = list_images(data_dir)
    labels = [image.split('/')[-2] for image in images]
    groups = near_identical_groups([read_grey(data_dir / image, data_dir / image, FINE) for image in images])
    distinct = Counter(label for label, _ in set(zip(labels, groups.tolist(), strict=True)))
    scarce = ', '.join(f'{count} {label}' for label, count in sorted(distinct.items()) if count < folds)
    if scarce:
        raise UserError(f'{folds} folds are too many: there are only {scarce} images that are not near-identical.')
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    with building(target) as tree:
        for fold, (_, members) in enumerate(splitter.split(labels, labels, groups)):
            for split, label, name in (images[i].split('/') for i in members):
                _link(data_dir / split / label / name, tree / f'fold-{fold}' / label / f'{split}-{name}')
        for run in range(folds):
            for other in range(folds):
                part = 'validation' if other == run else f'train/fold-{other}'
                _link(Path('../' * part.count('/') + f'../fold-{other}'), tree / f'run-{run}' / part)
        groups_of_several = int((np.bincount(groups) > 1).sum())
        write_json(tree / 'folds.json', {**identity, 'images': len(images), 'near_identical_groups': groups_of_several})


def _link(source: Path, link: Path) -> None:
    """Make a symbolic link, with its folders, to a path that is absolute or relative to the link."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(source, target_is_directory=(link.parent / source).is_dir())
