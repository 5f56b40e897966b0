"""Subsets and folds of a data folder."""
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from timm_lfnsb.data.subsets import choose_subset, list_images, near_identical_groups, write_folds, write_subset
from timm_lfnsb.errors import UserError

LABELS = ('neutral', 'happiness', 'sadness', 'anger')


def label_of(image: str) -> str:
    return image.split('/')[-2]


def numbered(**counts: int) -> list[str]:
    return [f'train/{label}/{i}.png' for label, n in counts.items() for i in range(n)]


def test_subset_is_stratified_exact_and_fixed_and_has_every_class():
    images = numbered(neutral=9093, happiness=7183, fear=571, disgust=142, contempt=148)
    chosen = choose_subset(images, 2500)
    assert chosen == choose_subset(images[::-1], 2500) and len(set(chosen)) == 2500
    counts = Counter(map(label_of, chosen))
    for label, total in Counter(map(label_of, images)).items():
        assert abs(counts[label] - 2500 * total / len(images)) < 1
    assert choose_subset(images, 2500, seed=1) != chosen
    few = numbered(neutral=9093, happiness=7183, fear=3, disgust=1)
    for count in (4, 5, 10):
        assert len(choose_subset(few, count)) == count and len(set(map(label_of, choose_subset(few, count)))) == 4
    for wrong in (3, len(few) + 1):
        with pytest.raises(UserError, match='4 classes'):
            choose_subset(few, wrong)


def test_a_written_subset_is_like_the_data_and_never_overwritten(face_folder, tmp_path):
    chosen, target = choose_subset(list_images(face_folder, 'train'), 8), tmp_path / 'subset'
    write_subset(face_folder, 'train', chosen, target)
    write_subset(face_folder, 'train', chosen, target)
    assert list_images(target, 'train') == chosen and (target / 'class_map.txt').is_file()
    assert list_images(target, 'validation') == list_images(face_folder, 'validation')
    with pytest.raises(UserError, match='other images'):
        write_subset(face_folder, 'train', chosen[1:], target)


def smooth_faces(count: int) -> list[np.ndarray]:
    """Smooth random pictures of 48 px, unlike each other."""
    rng = np.random.default_rng(0)
    small = (Image.fromarray(rng.integers(40, 200, (9, 9)).astype(np.uint8)) for _ in range(count))
    return [np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC)) for image in small]


def copies(image: np.ndarray) -> list[np.ndarray]:
    noise = np.random.default_rng(1).normal(0, 6, image.shape)
    bright, noisy = (np.clip(values, 0, 255).astype(np.uint8) for values in (1.2 * image + 15., image + noise))
    return [bright, np.roll(image, 1, axis=1), np.roll(image, (1, 1), axis=(0, 1)), noisy, image[:, ::-1].copy(),
            np.asarray(Image.fromarray(image).resize((100, 100)))]


def test_near_identical_images_are_found():
    images = smooth_faces(30)
    groups = near_identical_groups([*images, *copies(images[3]), *copies(images[20])[:2]])
    assert set(groups[30:36]) == {groups[3]} and set(groups[36:]) == {groups[20]}
    assert len(set(groups)) == 30 == len(set(groups[:30]))
    flat = [np.full((48, 48), value, np.uint8) for value in (0, 100, 255)]
    assert len(set(near_identical_groups(flat))) == 3  # no picture, nothing to compare


def test_a_chain_of_near_identical_images_is_one_group():
    # Two pictures without correlation, mixed so that neighbours correlate by cos(20 degrees) = 0.94.
    first, second = ((image - image.mean()) / image.std() for image in smooth_faces(2))
    second = second - (first * second).mean() * first
    mixed = [(128 + 25 * (np.cos(angle) * first + np.sin(angle) * second / second.std())).astype(np.uint8)
             for angle in np.deg2rad([0, 20, 40, 60])]
    assert len(set(near_identical_groups([mixed[0], mixed[3]]))) == 2
    assert len(set(near_identical_groups([mixed[i] for i in (0, 3, 1, 2)]))) == 1


@pytest.fixture
def fold_data(tmp_path) -> Path:
    """Three splits, four classes of 12 images; one picture has near-identical copies in all splits."""
    root, images = tmp_path / 'data', smooth_faces(48)
    splits = {'train': 6, 'validation': 3, 'test': 3}
    for split, count in splits.items():
        for label in LABELS:
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(images.pop()).save(root / split / label / f'{i}.png')
    original = np.asarray(Image.open(root / 'train' / 'anger' / '0.png'))
    for split, copy in zip(splits, copies(original), strict=False):
        Image.fromarray(copy).save(root / split / 'anger' / 'copy.png')
    return root


def test_folds_cover_every_image_once(fold_data, tmp_path):
    target = tmp_path / 'folds'
    write_folds(fold_data, 3, target, 'sum')
    description = (target / 'folds.json').read_text()
    assert json.loads(description) == {'data': 'sum', 'folds': 3, 'images': 51, 'near_identical_groups': 1}
    everything = Counter(path.read_bytes() for path in fold_data.glob('*/*/*.png'))
    for i in range(3):
        # As timm's train script reads them.
        train, held_out = ([Path(path) for path, _ in timm.data.create_dataset(
            '', root=str(target / f'run-{i}'), split=split).reader.samples] for split in ('train', 'validation'))
        contents = [Counter(path.read_bytes() for path in part) for part in (train, held_out)]
        assert contents[0] + contents[1] == everything and not contents[0] & contents[1]
        counts = Counter(path.parent.name for path in held_out)
        assert all(3 <= counts[label] <= 6 for label in LABELS)
    copied = [path for path in target.glob('fold-*/anger/*') if 'copy' in path.name or path.name == 'train-0.png']
    assert len(copied) == 4 and len({path.parent.parent for path in copied}) == 1

    for folder in (target, tmp_path / 'again'):
        write_folds(fold_data, 3, folder, 'sum')
        assert sorted(path.relative_to(folder) for path in folder.glob('fold-*/*/*')) == sorted(
            path.relative_to(target) for path in target.glob('fold-*/*/*'))
    with pytest.raises(UserError, match='other folds'):
        write_folds(fold_data, 3, target, 'other')


def test_what_cannot_be_dealt_out_is_named(fold_data, tmp_path):
    with pytest.raises(UserError, match='13 folds are too many: there are only 12 anger, 12 happiness'):
        write_folds(fold_data, 13, tmp_path / 'folds', 'sum')  # of 15 images of anger, 4 are one picture
    (fold_data / 'test' / 'anger' / '0.png').write_bytes(b'no image')
    with pytest.raises(UserError, match=r'0\.png is not a readable image'):
        write_folds(fold_data, 3, tmp_path / 'folds', 'sum')
    assert not (tmp_path / 'folds').exists()
