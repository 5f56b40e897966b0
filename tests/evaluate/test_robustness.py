"""Robustness: what each perturbation does to pixels, and that the table counts what it says."""
from __future__ import annotations

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from timm_lfnsb.cli import main
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.evaluate.robustness import PERTURBATIONS, SKIN, measure_robustness, robustness_table


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60), dtype=np.uint8)
    return Image.fromarray(np.repeat(pixels[..., None], 3, axis=2))


def apply(name: str, image: Image.Image) -> np.ndarray:
    return np.asarray(PERTURBATIONS[name].function(image)).astype(int)


@pytest.mark.parametrize('mode', ['L', 'RGB'])
@pytest.mark.parametrize('name', PERTURBATIONS)
def test_mode_and_original_stay_and_nothing_is_random(name, mode, picture):
    image = picture.convert(mode)
    before = np.asarray(image).copy()
    changed = PERTURBATIONS[name].function(image)
    assert changed.mode == mode and changed.size == ((24, 24) if name == 'small' else image.size)
    assert (np.asarray(image) == before).all()
    assert (np.asarray(PERTURBATIONS[name].function(image)) == np.asarray(changed)).all()
    if changed.size == image.size and not (name == 'tint' and mode == 'L'):
        assert (np.asarray(changed) != before).any()
    assert pickle.loads(pickle.dumps(PERTURBATIONS[name].function))  # loaders on some systems send it to their workers


@pytest.mark.parametrize(('name', 'x', 'y'), [
    ('shift-left', -9, 0), ('shift-right', 9, 0), ('shift-up', 0, -6), ('shift-down', 0, 6)])
def test_shift_moves_15_percent_and_repeats_the_border(name, x, y, picture):
    pixels = np.asarray(picture)
    rows, columns = np.clip(np.arange(40) - y, 0, 39), np.clip(np.arange(60) - x, 0, 59)
    assert (apply(name, picture) == pixels[rows][:, columns]).all()


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


def test_blur_has_the_width_it_says_and_grows_with_the_image():
    edge = np.zeros((48, 48), np.uint8)
    edge[:, 24:] = 255
    for times in (1, 4):
        image = Image.fromarray(np.kron(edge, np.ones((times, times), np.uint8)))
        density = np.diff(apply('blur', image)[10]) / 255
        places = np.arange(len(density)) - (np.arange(len(density)) * density).sum()
        assert np.sqrt((density * places ** 2).sum()) == pytest.approx(times, rel=0.15)


def test_light_jpeg_and_flip(picture):
    pixels = np.asarray(picture).astype(int)
    assert np.abs(apply('brighter', picture) - np.minimum(1.3 * pixels, 255)).max() <= 1
    assert np.abs(apply('darker', picture) - 0.7 * pixels).max() <= 1
    assert (apply('hflip', picture) == pixels[:, ::-1]).all()
    smooth = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    assert 0 < np.abs(apply('jpeg30', smooth) - np.asarray(smooth)).mean() < 6
    assert np.abs(apply('jpeg30', picture) - pixels).mean() > 20


def test_tint_keeps_the_luminance_and_passes_through_the_skin_tone():
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    image = Image.fromarray(grey).convert('RGB')
    tinted = apply('tint', image)
    luminance = tinted @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luminance - grey).max() < 2
    assert np.abs(tinted[0] - np.array(SKIN)).sum(axis=1).min() <= 2
    assert (tinted[0, 0] == 0).all() and (tinted[0, 255] == 255).all()
    assert (tinted[0, 100:200, 0] > tinted[0, 100:200, 2] + 30).all()


class ByBrightness(nn.Module):
    """Four classes by the mean of the image, in steps of 50 grey values, and a little by its left edge."""

    def __init__(self):
        super().__init__()
        self.num_classes = 4
        self.pretrained_cfg = dict(
            label_names=('anger', 'happiness', 'neutral', 'sadness'), input_size=(3, 48, 48), mean=(0, 0, 0),
            std=(1, 1, 1), crop_pct=1.0, interpolation='bilinear')
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x)
        middles = (torch.arange(4) * 50 + 30) / 255
        return -1000 * (x.mean((1, 2, 3))[:, None] - middles) ** 2


def test_the_rows_count_what_they_say(face_folder):
    model = ByBrightness()
    clean = predict_folder(model, face_folder, split='validation', workers=0, progress=False)
    measured = measure_robustness(
        model, face_folder, 'validation', ('hflip', 'darker'), workers=0, progress=False)
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


def test_the_network_sees_the_perturbed_image_in_workers_too(face_folder):
    model = ByBrightness()
    for workers, function in ((0, None), (1, PERTURBATIONS['hflip'].function)):
        predict_folder(model, face_folder, 'validation', workers=workers, progress=False, perturb=function)
    torch.testing.assert_close(model.seen[1], model.seen[0].flip(-1), rtol=0, atol=0)
    assert not multiprocessing.active_children()


def test_on_the_command_line(face_folder, tmp_path):
    arguments = ['weights', 'robustness', 'lfnsb.ferplus', '--data-dir', str(face_folder), '--split', 'validation',
                 '--workers', '0', '--only', 'small']
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and '| 24x24 pixels ' in result.output and 'mirrored' not in result.output
