"""Evaluation: the figures against plain recomputation, names in any order, and one sentence for what goes wrong."""
from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate.figures import confusion_figure, reliability_figure
from timm_lfnsb.evaluate.metrics import compare_predictions, compute_metrics
from timm_lfnsb.evaluate.predictions import Predictions, predict_folder
from timm_lfnsb.evaluate.report import evaluate_folder
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8

OTHER_NAMES = {
    'neutral': 'None-Expression', 'happiness': 'happy', 'sadness': 'Sad', 'surprise': 'surprised', 'fear': 'Fearful',
    'disgust': 'disgusted', 'anger': 'wild/ANGRY',  # the deeper folder sorts last
}
FAST = dict(workers=0, progress=False, device='cpu')


def make_tree(root, label_names=EXPRESSIONS_7, folders=None, per_class=3, split='test'):
    """Write colour noise, each image different and none symmetric, one folder a class."""
    for name in label_names:
        folder = root / split / (folders or {}).get(name, name)
        folder.mkdir(parents=True)
        for j in range(per_class):
            pixels = np.random.default_rng([EXPRESSIONS_8.index(name), j]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(folder / f'{name}{j}.png')
    return root


def make_model(label_names):
    torch.manual_seed(0)
    model = timm.create_model('lfnsb', num_classes=len(label_names), pretrained_cfg_overlay=dict(
        label_names=tuple(label_names), num_classes=len(label_names), input_size=(3, 32, 32)))
    # An untrained network gives nearly the same answer to everything: fit its statistics, and spread the logits.
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model(torch.nn.functional.interpolate(torch.randn(32, 3, 6, 6), 32))
        model.eval()
        logits = model(torch.nn.functional.interpolate(torch.randn(32, 3, 6, 6), 32))
        scale = 1.5 / logits.std(0).mean()
        model.fc.weight.mul_(scale)
        model.fc.bias.sub_(logits.mean(0)).mul_(scale)
    return model


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def model():
    return make_model(EXPRESSIONS_7)


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp('model')
    save_for_hf(model, folder, safe_serialization=True, model_config=dict(label_names=list(EXPRESSIONS_7)))
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def predictions(model, tree):
    return predict_folder(model, tree, **FAST)


def random_predictions(n=400, label_names=EXPRESSIONS_8, without=(), seed=0, skill=1.5):
    """Softmax outputs of a classifier that is better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([i for i, name in enumerate(label_names) if name not in without], n)
    logits = rng.standard_normal((n, len(label_names)))
    logits[np.arange(n), labels] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions(
        [f'{i}.png' for i in range(n)], labels, probabilities.astype(np.float32), label_names)


def run(*args):
    return CliRunner().invoke(main, ['evaluate', *map(str, args)])


def close(a, b):
    """Equal up to the last bits of sums in another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7) if isinstance(a, float) and isinstance(b, float) else a == b


# Predictions

def test_probabilities_are_those_of_the_bare_model_one_image_at_a_time(model, tree, predictions):
    transform = create_transform(**resolve_model_data_config(model))
    assert len(predictions.files) == 21 and predictions.probabilities.dtype == np.float32
    assert len(set(predictions.predicted)) > 2, 'the fixture must not answer everything alike'
    for file, label, probabilities in zip(
            predictions.files, predictions.labels, predictions.probabilities, strict=True):
        image = transform(Image.open(tree / 'test' / file).convert('RGB'))
        with torch.no_grad():
            expected = model(image[None]).softmax(1)[0].numpy()
        assert np.allclose(probabilities, expected, atol=1e-5)
        assert file.startswith(EXPRESSIONS_7[label] + '/')


def test_batch_size_workers_and_names_of_folders_do_not_matter(model, tree, predictions, tmp_path):
    make_tree(tmp_path, folders=OTHER_NAMES)
    other = predict_folder(model, tree, batch_size=7, workers=1, progress=False, device='cpu')
    renamed = predict_folder(model, tmp_path, batch_size=1, **FAST)
    assert list(other.files) == list(predictions.files) and np.array_equal(other.labels, predictions.labels)
    assert np.allclose(other.probabilities, predictions.probabilities, atol=1e-5)
    assert {file.rsplit('/', 1)[0] for file in renamed.files} == set(OTHER_NAMES.values())
    assert list(renamed.labels) != list(predictions.labels), 'the folders should sort in another order'
    assert close(compute_metrics(renamed), compute_metrics(predictions))


def test_the_order_of_the_outputs_does_not_matter(model, tree, predictions):
    names = EXPRESSIONS_7[3:] + EXPRESSIONS_7[:3]
    permuted = copy.deepcopy(model)
    permuted.pretrained_cfg['label_names'] = names
    for parameter in permuted.fc.parameters():
        parameter.data = parameter.data[[EXPRESSIONS_7.index(name) for name in names]]
    metrics, expected = compute_metrics(predict_folder(permuted, tree, **FAST)), compute_metrics(predictions)
    assert metrics['per_class'].keys() == set(names)
    for key in 'accuracy', 'balanced_accuracy', 'macro_f1', 'ece', 'per_class':
        assert close(metrics[key], expected[key]), key


def test_tta_is_the_mean_over_the_mirror_image(model, tree, predictions):
    transform = create_transform(**resolve_model_data_config(model))
    flipped = predict_folder(model, tree, tta='hflip', **FAST)
    assert not np.allclose(flipped.probabilities, predictions.probabilities, atol=1e-3)
    image = transform(Image.open(tree / 'test' / flipped.files[0]))
    with torch.no_grad():
        both = model(torch.stack([image, image.flip(-1)])).softmax(1).mean(0).numpy()
    assert np.allclose(flipped.probabilities[0], both, atol=1e-5)
    with pytest.raises(UserError, match='hflip'):
        predict_folder(model, tree, tta='vflip', **FAST)


# Metrics

def test_metrics_agree_with_scikit_learn_and_plain_counting():
    predictions = random_predictions(label_names=EXPRESSIONS_8, without=['contempt', 'fear'])
    metrics = compute_metrics(predictions)
    labels, predicted = list(predictions.labels), list(predictions.probabilities.argmax(1))
    assert metrics['count'] == 400 and metrics['absent'] == ['fear', 'contempt']
    assert metrics['accuracy'] == accuracy_score(labels, predicted)
    with pytest.warns(UserWarning, match='y_pred contains classes not in y_true'):
        assert metrics['balanced_accuracy'] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert metrics['macro_f1'] == pytest.approx(
        f1_score(labels, predicted, average='macro', labels=sorted(set(labels))))
    for i, name in enumerate(EXPRESSIONS_8):
        entry, pairs = metrics['per_class'][name], Counter(zip(labels, predicted, strict=True))
        assert entry['count'] == labels.count(i) and metrics['confusion'][i] == [pairs[i, j] for j in range(8)]
        if name in metrics['absent']:
            assert predicted.count(i) and entry['precision'] is entry['recall_interval'] is None
            continue
        assert entry['precision'] == pytest.approx(pairs[i, i] / predicted.count(i))
        assert entry['recall'] == pytest.approx(pairs[i, i] / labels.count(i))
        assert entry['f1'] == pytest.approx(2 * pairs[i, i] / (predicted.count(i) + labels.count(i)))
        for key in 'precision', 'recall', 'f1':
            low, high = entry[f'{key}_interval']
            assert 0 <= low < entry[key] < high <= 1
    json.dumps(metrics, allow_nan=False)


def wilson(hits, n):
    """Wilson's interval from its closed form."""
    z, p = 1.959963984540054, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def test_intervals_agree_with_closed_forms():
    predictions = random_predictions(label_names=EXPRESSIONS_7)
    metrics = compute_metrics(predictions)
    assert metrics['accuracy_interval'] == pytest.approx(wilson(metrics['accuracy'] * 400, 400))
    anger = EXPRESSIONS_7.index('anger')
    true, guess = predictions.labels == anger, predictions.predicted == anger
    entry = metrics['per_class']['anger']
    assert entry['recall_interval'] == pytest.approx(wilson((true & guess).sum(), true.sum()))
    assert entry['precision_interval'] == pytest.approx(wilson((true & guess).sum(), guess.sum()))
    jaccard = wilson((true & guess).sum(), (true | guess).sum())
    assert entry['f1_interval'] == pytest.approx([2 * bound / (1 + bound) for bound in jaccard])
    rng = np.random.default_rng(1)  # of the balanced accuracy: a bootstrap within the classes
    groups = [predictions.correct[predictions.labels == i] for i in range(7)]
    means = [np.mean([rng.choice(group, len(group)).mean() for group in groups]) for _ in range(2000)]
    assert metrics['balanced_accuracy_interval'] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.01)


def test_a_class_that_is_never_predicted_has_precision_zero():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    metrics = compute_metrics(Predictions(['a', 'b'], np.array([0, 1]), probabilities, ('calm', 'cross')))
    cross = metrics['per_class']['cross']
    assert cross['precision'] == cross['recall'] == cross['f1'] == 0
    assert cross['precision_interval'] is None and cross['recall_interval'][0] == pytest.approx(0)
    assert metrics['macro_f1'] == pytest.approx(1 / 3) and metrics['balanced_accuracy'] == 0.5
    sure = compute_metrics(Predictions(['a'], np.array([1]), np.array([[0, 1]], np.float32), ('calm', 'cross')))
    assert sure['calibration'][-1]['count'] == 1 and sure['ece'] == 0


def test_ece_agrees_with_a_loop():
    predictions = random_predictions(label_names=EXPRESSIONS_7)
    metrics, confidence, ece = compute_metrics(predictions), predictions.probabilities.max(1), 0.
    for i, row in enumerate(metrics['calibration']):
        inside = [j for j in range(400) if i / 15 < confidence[j] <= (i + 1) / 15]
        assert row['count'] == len(inside)
        ece += abs(sum(float(predictions.correct[j]) - float(confidence[j]) for j in inside)) / 400
    assert i == 14 and metrics['ece'] == pytest.approx(ece) and ece > 0.01


def test_metrics_need_images_and_a_comparison_the_same():
    with pytest.raises(UserError, match='no predictions'):
        compute_metrics(Predictions([], np.zeros(0, int), np.zeros((0, 7), np.float32), EXPRESSIONS_7))
    with pytest.raises(UserError, match='different images'):
        compare_predictions(random_predictions(n=10), random_predictions(n=11))


# Comparison

def test_comparison_agrees_with_a_binomial_sum_and_a_bootstrap_over_images():
    first = random_predictions(skill=2.)
    changed = (np.arange(400) % 5 == 0)[:, None]
    second = replace(first, probabilities=np.where(
        changed, random_predictions(skill=1.5, seed=1).probabilities, first.probabilities))
    comparison = compare_predictions(first, second)
    a, b = first.correct, second.correct
    only_first, only_second = sum(a & ~b), sum(b & ~a)
    n = only_first + only_second
    assert 0 < only_second < only_first
    assert comparison['only_first_right'] == only_first and comparison['only_second_right'] == only_second
    assert comparison['both_right'] + comparison['both_wrong'] + n == comparison['count'] == 400
    tail = sum(math.comb(n, k) for k in range(only_second + 1)) / 2 ** n
    assert comparison['p_value'] == pytest.approx(2 * tail)
    assert comparison['difference'] == pytest.approx(a.mean() - b.mean())
    rng = np.random.default_rng(1)
    draws = [rng.choice(a.astype(float) - b, 400).mean() for _ in range(2000)]
    assert comparison['difference_interval'] == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.01)


# The command

def test_command_writes_the_whole_report(saved, tree, predictions, tmp_path):
    result = run('--model', saved, '--data-dir', tree, '--out', tmp_path / 'out', '--workers', 0, '--compare', saved)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == [
        'compare.json', 'confusion.png', 'metrics.json', 'predictions.csv', 'reliability.png']

    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    expected = compute_metrics(predictions)
    assert all(close(metrics[key], expected[key]) for key in expected)
    assert metrics['model'] == saved and metrics['split'] == 'test' and metrics['label_names'] == list(EXPRESSIONS_7)
    assert metrics['image_size'] == [32, 32] and metrics['tta'] is None and metrics['data_checksum'] is None
    assert metrics['preprocessing']['crop_mode'] == 'squash' and metrics['versions']['timm'] == timm.__version__

    with open(tmp_path / 'out' / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['file', 'label', 'prediction', *EXPRESSIONS_7] and len(rows) == 21
    assert sum(row['label'] == row['prediction'] for row in rows) / 21 == pytest.approx(metrics['accuracy'])
    for row, probabilities in zip(rows, predictions.probabilities, strict=True):
        assert row['file'].startswith(row['label'] + '/')
        assert row['prediction'] == max(EXPRESSIONS_7, key=lambda name: float(row[name]))
        assert np.allclose([float(row[name]) for name in EXPRESSIONS_7], probabilities, atol=1e-5)

    comparison = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert comparison['p_value'] == 1 and comparison['difference'] == 0
    assert comparison['difference_interval'] == [0, 0]
    for name in EXPRESSIONS_7:
        assert f'\n{name} ' in result.stdout
    assert f"{100 * metrics['accuracy']:.1f}" in result.stdout and 'p = 1' in result.stdout
    assert '21/21' in result.stderr


def test_missing_class_checksum_and_tta_are_reported(saved, tmp_path):
    make_tree(tmp_path / 'original', EXPRESSIONS_7[1:], split='validation')
    prepared = CliRunner().invoke(main, ['prepare', 'folder', str(tmp_path / 'original'), str(tmp_path / 'data')])
    assert prepared.exit_code == 0, prepared.output
    result = run('--model', saved, '--data-dir', tmp_path / 'data', '--out', tmp_path / 'out', '--split', 'validation',
                 '--tta', 'hflip', '--workers', 0)
    assert result.exit_code == 0, result.output
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert metrics['data_checksum'] and metrics['data_checksum'] in prepared.output
    assert metrics['tta'] == 'hflip' and metrics['absent'] == ['neutral']
    assert metrics['per_class']['neutral'] == {
        'count': 0, **dict.fromkeys(key + end for key in ('precision', 'recall', 'f1') for end in ('', '_interval'))}
    assert re.search(r'neutral +0 +absent', result.stdout) and 'nan' not in result.stdout.lower()
    assert not (tmp_path / 'out' / 'compare.json').exists()

    (tmp_path / 'data' / 'dataset.json').write_text('[')
    with pytest.raises(UserError, match=r'dataset\.json'):
        evaluate_folder(saved, tmp_path / 'data', tmp_path / 'out', 'validation', **FAST)


def test_folders_that_the_model_does_not_know_are_refused(model, saved, tmp_path):
    make_tree(tmp_path / 'eight', ['contempt', 'anger'])
    save_for_hf(make_model(EXPRESSIONS_8), tmp_path / 'model', safe_serialization=True)
    with pytest.raises(UserError, match=f"^{saved}: unknown .*'contempt'.*anger, contempt.*{', '.join(EXPRESSIONS_7)}"):
        evaluate_folder(f"local-dir:{tmp_path / 'model'}", tmp_path / 'eight', tmp_path / 'out', compare=saved, **FAST)
    assert not list((tmp_path / 'out').iterdir())
    make_tree(tmp_path / 'nested', folders={'anger': 'anger/person1'})
    with pytest.raises(UserError, match="'person1'"):
        predict_folder(model, tmp_path / 'nested', **FAST)


def test_every_image_format_counts(model, tmp_path):
    make_tree(tmp_path)
    Image.new('L', (30, 50)).save(tmp_path / 'test' / 'anger' / 'grey.BMP')
    Image.new('RGBA', (30, 50)).save(tmp_path / 'test' / 'anger' / 'alpha.webp')
    (tmp_path / 'test' / 'anger' / 'notes.txt').write_text('not an image')
    assert len(predict_folder(model, tmp_path, **FAST).files) == 23


@pytest.mark.parametrize('workers, length', [(0, 0), (0, 600), (1, 600)])
def test_an_unreadable_image_is_named(saved, tmp_path, workers, length):
    make_tree(tmp_path / 'data')
    broken = tmp_path / 'data' / 'test' / 'fear' / 'fear1.png'
    broken.write_bytes(broken.read_bytes()[:length])
    result = run('--model', saved, '--data-dir', tmp_path / 'data', '--out', tmp_path / 'out', '--workers', workers)
    assert result.exit_code == 1 and f'\nError: cannot read the image {broken}' in result.stderr
    assert 'Traceback' not in result.output and not list((tmp_path / 'out').iterdir())


def test_images_in_the_wrong_place_are_refused(model, tree, tmp_path):
    (tmp_path / 'test' / 'anger').mkdir(parents=True)
    for folder, split, message in ((tree, 'val', "'val'; folders there: test"), (tmp_path, 'test', 'no images'),
                                   (tmp_path / 'no', 'test', 'no data folder')):
        with pytest.raises(UserError, match=message):
            predict_folder(model, folder, split, **FAST)
    Image.new('RGB', (9, 9)).save(tmp_path / 'test' / 'loose.png')
    with pytest.raises(UserError, match='outside of the label folders'):
        predict_folder(model, tmp_path, **FAST)


@pytest.mark.parametrize('names, message', [
    (EXPRESSIONS_8, '7 classes'), (['anger', *EXPRESSIONS_7[:5], 'angry'], '7 classes'), (None, 'no label_names'),
    (EXPRESSIONS_7, 'not finite')])
def test_models_with_unusable_label_names_or_weights_are_refused(model, tree, names, message):
    unusable = copy.deepcopy(model)
    unusable.pretrained_cfg['label_names'] = names
    torch.nn.init.constant_(unusable.fc.bias, float('nan'))
    with pytest.raises(UserError, match=message):
        predict_folder(unusable, tree, **FAST)


def test_a_failed_write_leaves_the_old_report(saved, tree, tmp_path, monkeypatch):
    (tmp_path / 'metrics.json').write_text('old')
    monkeypatch.setattr(json, 'dumps', lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_folder(saved, tree, tmp_path, **FAST)
    assert (tmp_path / 'metrics.json').read_text() == 'old'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


@pytest.mark.parametrize('package, command', [
    ('sklearn', 'evaluate --model lfnsb --out new'), ('scipy', 'evaluate --model lfnsb --out new'),
    ('matplotlib', 'weights robustness lfnsb.ferplus'), ('sklearn', 'weights verify'), ('scipy', 'reproduce show'),
    ('sklearn', 'reproduce table2 --out new'), ('matplotlib', 'reproduce table9 --out new --dry-run'),
])
def test_a_missing_extra_is_named(tree, monkeypatch, package, command):
    for name in [name for name in sys.modules if name.startswith(('timm_lfnsb.evaluate', 'timm_lfnsb.experiments'))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    data = [] if command == 'reproduce show' else ['--data-dir', str(tree)]
    result = CliRunner().invoke(main, [*command.split(), *data])
    assert (result.exit_code, result.output) == (
        1, f'Error: measuring a model needs {package}: pip install "timm-lfnsb[eval]" brings it.\n')


# Figures

def test_figures_show_names_and_percentages():
    label_names = EXPRESSIONS_8
    metrics = compute_metrics(random_predictions(label_names=label_names, without=['fear']))
    confusion = confusion_figure(metrics['confusion'], label_names)
    reliability = reliability_figure(metrics['calibration'], metrics['ece'])
    for figure in (confusion, reliability):
        figure.savefig(io.BytesIO(), format='png')
        left, bottom, right, top = figure.get_tightbbox().extents
        width, height = figure.get_size_inches()
        assert 0 <= left < right <= width and 0 <= bottom < top <= height, 'something is cut off'

    axes = confusion.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == list(label_names)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        f'{name} ({sum(row)})' for name, row in zip(label_names, metrics['confusion'], strict=True)]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert 'no images' in texts.values() and 'nan' not in texts.values()
    row = metrics['confusion'][0]
    assert [texts[i, 0] for i in range(len(row))] == [f'{100 * value / sum(row):.1f}' for value in row]

    upper, lower = reliability.axes
    assert f"{100 * metrics['ece']:.1f} %" in upper.get_title()
    assert sum(int(text.get_text()) for text in lower.texts) == 400
