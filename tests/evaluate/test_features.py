"""Features of a folder, distances between classes, tests over seeds and images: recomputed, and at their edges."""
from __future__ import annotations

import itertools
import math
from unittest import mock

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from timm_lfnsb.evaluate.comparison import compare_with_baseline, holm
from timm_lfnsb.evaluate.features import class_distances, predict_features, project
from timm_lfnsb.evaluate.figures import distances_figure, features_figure
from timm_lfnsb.evaluate.predictions import predict_folder

LABELS = ('neutral', 'happiness', 'sadness', 'anger')


@pytest.mark.parametrize('name, size, average', [
    ('mobilefacenet', 32, lambda maps: maps.mean(dim=(2, 3))),
    ('test_vit', 160, lambda tokens: tokens[:, 1:].mean(dim=1)),  # without the class token
])
def test_features_are_averaged_maps_and_predictions_the_same(name, size, average, face_folder):
    model = timm.create_model(name, num_classes=4, img_size=size).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, size, size), label_names=LABELS)
    options = dict(split='validation', workers=0, batch_size=10, progress=False)
    maps = []
    with mock.patch.object(model, 'forward_head', lambda x, head=model.forward_head: maps.append(x) or head(x)):
        plain = predict_folder(model, face_folder, **options)
    predictions, features = predict_features(model, face_folder, **options)
    np.testing.assert_array_equal(predictions.probabilities, plain.probabilities)
    np.testing.assert_allclose(features, average(torch.cat(maps)), rtol=1e-5, atol=1e-6)
    assert predictions.files == plain.files and features.dtype == np.float32
    assert 'forward_features' not in vars(model)  # left as it was


def cosine_distance(a, b):
    return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def test_class_distances_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(1, 2, (30, 5)), np.array([0] * 20 + [2] * 7 + [3] * 3)  # class 1 is empty
    means = {c: features[labels == c].mean(axis=0) for c in (0, 2, 3)}
    overall = features.mean(axis=0)
    spread = sum(math.dist(x, overall) for x in features) / 30
    found = class_distances(features, labels)
    for name, distance in (('cosine', cosine_distance), ('euclidean', lambda a, b: math.dist(a, b) / spread)):
        intra = [np.mean([distance(x, means[c]) for x in features[labels == c]]) for c in means]
        inter = [distance(means[a], means[b]) for a, b in itertools.combinations(means, 2)]
        assert found[f'{name}_intra'] == pytest.approx(np.mean(intra))
        assert found[f'{name}_inter'] == pytest.approx(np.mean(inter))
    # In units of their own spread, the size of the features does not matter.
    assert class_distances(1000 * features, labels) == pytest.approx(found)
    collapsed = class_distances(np.ones((4, 3), np.float32), np.array([0, 0, 1, 1]))
    assert collapsed == pytest.approx(dict.fromkeys(collapsed, 0), abs=1e-6)


def test_projection_is_the_same_each_time():
    features = np.random.default_rng(1).normal(size=(12, 6)).astype(np.float32)
    features[6:] += 30
    points = project(features)
    assert points.shape == (12, 2) and np.isfinite(points).all()
    np.testing.assert_array_equal(points, project(features))
    nearest = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(12)
    assert all((i < 6) == (j < 6) for i, j in enumerate(nearest.argmin(axis=1)))


def test_comparison_is_the_paired_t_test_over_seeds_and_over_images():
    rng = np.random.default_rng(2)
    baseline = rng.random((4, 200)) < 0.6
    others = {'better': rng.random((4, 200)) < 0.8, 'alike': rng.random((4, 200)) < 0.6, 'same': baseline}
    found = compare_with_baseline(baseline, others)
    for name in ('better', 'alike'):
        for key, axis in (('p_seeds', 1), ('p_images', 0)):
            differences = others[name].mean(axis=axis) - baseline.mean(axis=axis)
            t = differences.mean() / (differences.std(ddof=1) / math.sqrt(len(differences)))
            assert found[name][key] == pytest.approx(2 * stats.t.sf(abs(t), len(differences) - 1))
        assert found[name]['difference'] == pytest.approx(others[name].mean() - baseline.mean())
    assert found['better']['p_images_holm'] == pytest.approx(3 * found['better']['p_images'])
    assert found['same']['p_seeds'] == found['same']['p_images'] == found['same']['p_images_holm'] == 1


@pytest.mark.parametrize('seeds', [1, 3])
def test_one_seed_or_a_constant_difference_have_no_test_over_seeds(seeds):
    baseline = np.zeros((seeds, 10), bool)
    baseline[:, :4] = True
    other = baseline.copy()
    other[:, 4:6] = True  # two images more, with each seed
    result = compare_with_baseline(baseline, {'other': other})['other']
    assert result['difference'] == pytest.approx(0.2) and result['seeds'] == seeds
    assert result['p_seeds'] is None and result['p_seeds_holm'] is None
    assert result['p_images'] == pytest.approx(stats.ttest_1samp([0] * 8 + [1] * 2, 0).pvalue)


@pytest.mark.parametrize('values, corrected', [
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # the worked example of textbooks
    ([0.5, 0.9], [1, 1]), ([0.2], [0.2]), ([], []),
])
def test_holm(values, corrected):
    assert holm(values) == pytest.approx(corrected)


def test_figures_have_a_panel_for_each_loss_and_a_bar_for_each_distance():
    labels = torch.arange(24).numpy() % 3
    points = np.random.default_rng(0).normal(size=(24, 2))
    figure = features_figure({f'loss {i}': points for i in range(5)}, labels, ['a', 'b', 'c'])
    drawn = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == [f'loss {i}' for i in range(5)]
    np.testing.assert_allclose(drawn[4].collections[1].get_offsets(), points[labels == 1])

    values = [dict(cosine_intra=0.1, cosine_inter=0.5, euclidean_intra=0.6, euclidean_inter=v) for v in (1.2, 1.4)]
    figure = distances_figure({'cross entropy': values, 'center': values[:1]})
    assert [bar.get_width() for bar in figure.axes[1].patches] == pytest.approx([0.6, 0.6, 1.3, 1.2])
