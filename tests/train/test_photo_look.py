"""The look of photographs: what it may change, what it must leave, and that the launcher puts it first."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from support.train_script import CPU, standin
from timm.data import create_dataset, create_loader

from timm_lfnsb.train.photo_look import PhotoLook, prepend_transform


def picture(width: int, height: int, mode: str = 'RGB') -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((40 + 150 * ((x // 4 + y // 4) % 2)).astype(np.uint8)).convert(mode)


@pytest.mark.parametrize('size, mode', [((48, 48), 'L'), ((48, 48), 'RGB'), ((112, 80), 'RGB'), ((20, 24), 'L')])
def test_size_and_mode_stay_and_the_seed_repeats(size, mode):
    look, image = PhotoLook(1.), picture(*size, mode)
    changed = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        result = look(image)
        assert result.size == size and result.mode == mode
        changed.append(np.asarray(result))
    assert (changed[0] == changed[1]).all() and (changed[0] != changed[2]).any()
    assert (changed[0] != np.asarray(image)).any()
    assert np.asarray(PhotoLook(1.)(Image.new(mode, size, 'white'))).min() > 200  # no dark corners


def test_each_change_takes_place_about_as_often_as_asked():
    image = picture(32, 32)
    assert all(PhotoLook(0.)(image) is image for _ in range(20))
    unchanged = sum(np.array_equal(PhotoLook(0.3)(image), image) for _ in range(300)) / 300
    assert unchanged == pytest.approx(0.7 ** 5, abs=0.07)


@pytest.mark.parametrize('sizes', [None, [32, 48]])
def test_it_comes_before_timms_own_transforms(sizes, face_folder):
    seen = []
    dataset = create_dataset('', root=str(face_folder), split='train', is_training=True)
    loader = create_loader(
        dataset, (3, 32, 32), 6, is_training=True, num_workers=0, device=CPU, input_size_choices=sizes)
    prepend_transform(loader.dataset, lambda image: seen.append(image.size) or image)
    images, _ = next(iter(loader))
    assert images.shape[1:] in ((3, 32, 32), (3, 48, 48)) and set(seen) == {(48, 48)} and len(seen) >= len(images)


def test_the_launcher_gives_it_to_training_images_alone(face_folder, tmp_path):
    validation, training = standin(tmp_path, '--data-dir', face_folder, '--photo-look')['transforms']
    assert training[0] == 'PhotoLook' and 'PhotoLook' not in validation
