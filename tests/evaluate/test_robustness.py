"""Robustness: what each perturbation does to pixels, and that the table counts what it says."""
from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from timm_lfnsb.cli import main
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.evaluate.robustness import PERTURBATIONS, measure_robustness, robustness_table

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (40, 60), dtype=np.uint8)).convert('RGB')


def apply(name: str, image: Image.Image) -> np.ndarray:
    return np.asarray(PERTURBATIONS[name][1](image)).astype(int)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', PERTURBATIONS)
def test_mode_and_original_stay_and_nothing_is_random(name, mode):
    image = PICTURE.convert(mode)
    before = np.asarray(image).copy()
    function = pickle.loads(pickle.dumps(PERTURBATIONS[name][1]))  # loaders on some systems send it to their workers
    changed = function(image)
    assert changed.mode == mode and changed.size == ((24, 24) if name == 'small' else image.size)
    assert (np.asarray(image) == before).all() and (np.asarray(function(image)) == np.asarray(changed)).all()
    assert (name, mode) == ('tint', 'L') or not np.array_equal(np.asarray(changed), before)


@pytest.mark.parametrize(('name', 'x', 'y'), [
    ('shift-left', -9, 0), ('shift-right', 9, 0), ('shift-up', 0, -6), ('shift-down', 0, 6)])
def test_shift_moves_15_percent_and_repeats_the_border(name, x, y):
    rows, columns = np.clip(np.arange(40) - y, 0, 39), np.clip(np.arange(60) - x, 0, 59)
    assert (apply(name, PICTURE) == np.asarray(PICTURE)[rows][:, columns]).all()


@pytest.mark.parametrize(('name', 'sign'), [('rotate+10', 1), ('rotate-10', -1)])
def test_rotation_is_by_10_degrees_about_the_middle(name, sign):
    pixels = np.zeros((101, 101), np.uint8)
    pixels[48:53, 88:93] = 255  # a spot 40 pixels right of the middle
    turned = apply(name, Image.fromarray(pixels))
    y, x = (float((axis * turned).sum() / turned.sum()) - 50 for axis in np.mgrid[:101, :101])
    # On screens y grows downwards: counter-clockwise lifts the spot.
    assert np.degrees(np.arctan2(-y, x)) == pytest.approx(sign * 10, abs=0.5)
    assert np.hypot(x, y) == pytest.approx(40, abs=0.5)
    assert (apply(name, Image.new('L', (48, 48), 200)) == 200).all()  # no black corners


def test_blur_light_jpeg_and_flip():
    edge = np.zeros((48, 48), np.uint8)
    edge[:, 24:] = 255
    for times in (1, 4):  # grows with the image
        density = np.diff(apply('blur', Image.fromarray(np.kron(edge, np.ones((times, times), np.uint8))))[10]) / 255
        places = np.arange(len(density)) - (np.arange(len(density)) * density).sum()
        assert np.sqrt((density * places ** 2).sum()) == pytest.approx(times, rel=0.15)
    pixels = np.asarray(PICTURE).astype(int)
    assert np.abs(apply('brighter', PICTURE) - np.minimum(1.3 * pixels, 255)).max() <= 1
    assert np.abs(apply('darker', PICTURE) - 0.7 * pixels).max() <= 1
    assert (apply('hflip', PICTURE) == pixels[:, ::-1]).all()
    assert np.abs(apply('jpeg30', PICTURE) - pixels).mean() > 20


def test_tint_keeps_the_luminance_and_is_warm():
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    tinted = apply('tint', Image.fromarray(grey).convert('RGB'))
    assert np.abs(tinted @ np.array([0.299, 0.587, 0.114]) - grey).max() < 2
    assert (tinted[0, 100:200, 0] > tinted[0, 100:200, 2] + 30).all()


class ByBrightness(nn.Module):
    """Four classes by the mean of the image, in steps of 50 grey values."""

    num_classes = 4
    pretrained_cfg = dict(label_names=('anger', 'happiness', 'neutral', 'sadness'), input_size=(3, 48, 48),
                          mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, interpolation='bilinear')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return -1000 * (x.mean((1, 2, 3))[:, None] - (torch.arange(4) * 50 + 30) / 255) ** 2


def test_the_rows_count_what_they_say(face_folder):
    model, options = ByBrightness(), dict(workers=0, progress=False)
    clean = predict_folder(model, face_folder, split='validation', **options)
    seen = model.seen
    predict_folder(model, face_folder, 'validation', workers=1, progress=False, perturb=PERTURBATIONS['hflip'][1])
    torch.testing.assert_close(model.seen, seen.flip(-1), rtol=0, atol=0)

    measured = measure_robustness(model, face_folder, 'validation', ('hflip', 'darker'), **options)
    assert (measured['split'], measured['count'], measured['clean_accuracy']) == ('validation', 24, 1)
    assert measured['rows']['hflip']['accuracy'] == 1 and measured['rows']['hflip']['difference'] == 0
    images = [np.asarray(Image.open(face_folder / 'validation' / file)) for file in clean.files]
    right = [np.abs(image.mean() * 0.7 - (np.arange(4) * 50 + 30)).argmin() == label
             for image, label in zip(images, clean.labels, strict=True)]
    row = measured['rows']['darker']
    assert 0 < row['accuracy'] < 1 and [row['accuracy'], row['agreement']] == pytest.approx([np.mean(right)] * 2)
    assert row['difference'] == pytest.approx(row['accuracy'] - 1)
    assert row['difference_interval'][0] <= row['difference'] <= row['difference_interval'][1] <= 0
    assert row['accuracy_interval'][0] < row['accuracy'] < row['accuracy_interval'][1]
    table = robustness_table(measured).splitlines()
    assert len(table) == 5 and 'as they are' in table[2] and '100.0 ' in table[2] and row['what'] in table[4]


def test_on_the_command_line(face_folder):
    command = f'weights robustness lfnsb.ferplus --data-dir {face_folder} --split validation --workers 0 --only small'
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 0 and '| 24x24 pixels ' in result.output and 'mirrored' not in result.output
