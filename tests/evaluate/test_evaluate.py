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
from timm_lfnsb.evaluate.figures import confusion_figure, coverage_figure, reliability_figure
from timm_lfnsb.evaluate.metrics import compare_predictions, compute_coverage, compute_metrics
from timm_lfnsb.evaluate.predictions import Predictions, predict_folder
from timm_lfnsb.evaluate.report import evaluate_folder
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.models import loading
from timm_lfnsb.weights.names import weights_info

OTHER_NAMES = {
    'neutral': 'None-Expression', 'happiness': 'happy', 'sadness': 'Sad', 'surprise': 'surprised', 'fear': 'Fearful',
    'disgust': 'disgusted', 'anger': 'wild/ANGRY',  # the deeper folder sorts last
}
NAME = 'lfnsb.ferplus'
FAST = dict(workers=0, progress=False, device='cpu')


def make_tree(root, label_names=EXPRESSIONS_7, folders=None, split='test'):
    """Write colour noise, two images a folder, each different and none symmetric."""
    for i, name in enumerate(label_names):
        folder = root / split / (folders or {}).get(name, name)
        folder.mkdir(parents=True)
        for j in range(2):
            pixels = np.random.default_rng([i, j]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40)).save(folder / f'{name}{j}.png')
    return root


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp('data'))
    (root / 'dataset.json').write_text('{"sha256": "123"}')
    return root


@pytest.fixture(scope='module')
def model():
    return timm.create_model(NAME, pretrained=True).eval()


@pytest.fixture(scope='module')
def predictions(model, tree):
    return predict_folder(model, tree, **FAST)


def random_predictions(n=400, without=(), seed=0, skill=1.5):
    """Softmax outputs of a classifier that is better than chance."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([i for i, name in enumerate(EXPRESSIONS_8) if name not in without], n)
    logits = rng.standard_normal((n, 8))
    logits[np.arange(n), labels] += skill
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return Predictions([f'{i}.png' for i in range(n)], labels, probabilities.astype(np.float32), EXPRESSIONS_8)


def run(*args):
    return CliRunner().invoke(main, ['evaluate', *map(str, args), '--workers', '0'])


def test_probabilities_are_those_of_the_bare_model_one_image_at_a_time(model, tree, predictions):
    transform = create_transform(**resolve_model_data_config(model))
    flipped = predict_folder(model, tree, tta='hflip', **FAST)
    assert len(predictions.files) == 14 and predictions.probabilities.dtype == np.float32
    assert len(set(predictions.predicted)) > 1, 'this model answers everything alike'
    assert not np.allclose(flipped.probabilities, predictions.probabilities, atol=1e-3)
    for i, (file, label) in enumerate(zip(predictions.files, predictions.labels, strict=True)):
        image = transform(Image.open(tree / 'test' / file).convert('RGB'))
        with torch.no_grad():
            expected = model(torch.stack([image, image.flip(-1)])).softmax(1).numpy()
        assert np.allclose(predictions.probabilities[i], expected[0], atol=1e-5)
        assert np.allclose(flipped.probabilities[i], expected.mean(0), atol=1e-5)
        assert file.startswith(EXPRESSIONS_7[label] + '/')
    with pytest.raises(UserError, match='hflip'):
        predict_folder(model, tree, tta='vflip', **FAST)


def test_batch_size_workers_names_of_folders_and_order_of_outputs_do_not_matter(model, tree, predictions, tmp_path):
    make_tree(tmp_path, folders=OTHER_NAMES)
    names = EXPRESSIONS_8[3:] + EXPRESSIONS_8[:3]
    permuted = copy.deepcopy(model)
    permuted.pretrained_cfg['label_names'] = names
    for parameter in permuted.fc.parameters():
        parameter.data = parameter.data[[EXPRESSIONS_8.index(name) for name in names]]
    expected = compute_metrics(predictions)
    for other in (predict_folder(model, tree, batch_size=7, workers=1, progress=False, device='cpu'),
                  predict_folder(model, tmp_path, batch_size=1, **FAST), predict_folder(permuted, tree, **FAST)):
        metrics = compute_metrics(other)
        assert metrics['ece'] == pytest.approx(expected['ece'], rel=1e-5)
        assert metrics['per_class'] == expected['per_class']


def test_metrics_agree_with_scikit_learn_and_plain_counting():
    predictions = random_predictions(without=['contempt', 'fear'])
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
        else:
            assert entry['precision'] == pytest.approx(pairs[i, i] / predicted.count(i))
            assert entry['recall'] == pytest.approx(pairs[i, i] / labels.count(i))
            assert entry['f1'] == pytest.approx(2 * pairs[i, i] / (predicted.count(i) + labels.count(i)))
    json.dumps(metrics, allow_nan=False)
    confidence, ece = predictions.probabilities.max(1), 0.
    for i, row in enumerate(metrics['calibration']):
        inside = [j for j in range(400) if i / 15 < confidence[j] <= (i + 1) / 15]
        assert row['count'] == len(inside)
        ece += abs(sum(float(predictions.correct[j]) - float(confidence[j]) for j in inside)) / 400
    assert i == 14 and metrics['ece'] == pytest.approx(ece) and ece > 0.01


def wilson(hits, n):
    """Wilson's interval from its closed form."""
    z, p = 1.959963984540054, hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


def test_intervals_agree_with_closed_forms():
    predictions = random_predictions()
    metrics = compute_metrics(predictions)
    assert metrics['accuracy_interval'] == pytest.approx(wilson(metrics['accuracy'] * 400, 400))
    anger = EXPRESSIONS_8.index('anger')
    true, guess = predictions.labels == anger, predictions.predicted == anger
    entry = metrics['per_class']['anger']
    assert entry['recall_interval'] == pytest.approx(wilson((true & guess).sum(), true.sum()))
    assert entry['precision_interval'] == pytest.approx(wilson((true & guess).sum(), guess.sum()))
    jaccard = wilson((true & guess).sum(), (true | guess).sum())
    assert entry['f1_interval'] == pytest.approx([2 * bound / (1 + bound) for bound in jaccard])
    rng = np.random.default_rng(1)  # of the balanced accuracy: a bootstrap within the classes
    groups = [predictions.correct[predictions.labels == i] for i in range(8)]
    means = [np.mean([rng.choice(group, len(group)).mean() for group in groups]) for _ in range(2000)]
    assert metrics['balanced_accuracy_interval'] == pytest.approx(np.percentile(means, (2.5, 97.5)), abs=0.01)
    places = [np.flatnonzero(predictions.labels == i) for i in range(8)]
    drawn = (np.concatenate([rng.choice(place, len(place)) for place in places]) for _ in range(500))
    scores = [f1_score(predictions.labels[i], predictions.predicted[i], average='macro') for i in drawn]
    assert metrics['macro_f1_interval'] == pytest.approx(np.percentile(scores, (2.5, 97.5)), abs=0.015)


def test_a_class_that_is_never_predicted_has_precision_zero():
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    metrics = compute_metrics(Predictions(['a', 'b'], np.array([0, 1]), probabilities, ('calm', 'cross')))
    cross = metrics['per_class']['cross']
    assert cross['precision'] == cross['recall'] == cross['f1'] == 0 and cross['precision_interval'] is None
    assert metrics['macro_f1'] == pytest.approx(1 / 3) and metrics['balanced_accuracy'] == 0.5


def test_comparison_agrees_with_a_binomial_sum_and_a_bootstrap_over_images():
    first = random_predictions(skill=2.)
    changed = (np.arange(400) % 5 == 0)[:, None]
    second = replace(first, probabilities=np.where(
        changed, random_predictions(skill=1.5, seed=1).probabilities, first.probabilities))
    comparison = compare_predictions(first, second)
    a, b = first.correct, second.correct
    n, only_second = sum(a != b), sum(b & ~a)
    assert 0 < only_second == comparison['only_second_right'] < comparison['only_first_right'] == sum(a & ~b)
    assert comparison['both_right'] + comparison['both_wrong'] + n == comparison['count'] == 400
    tail = sum(math.comb(n, k) for k in range(only_second + 1)) / 2 ** n
    assert comparison['p_value'] == pytest.approx(2 * tail)
    assert comparison['difference'] == pytest.approx(a.mean() - b.mean())
    rng = np.random.default_rng(1)
    draws = [rng.choice(a.astype(float) - b, 400).mean() for _ in range(2000)]
    assert comparison['difference_interval'] == pytest.approx(np.percentile(draws, (2.5, 97.5)), abs=0.01)


def test_command_writes_the_whole_report(tree, predictions, tmp_path, monkeypatch):
    temperature = 0.55  # the classifiers of the embedded weights need none any more
    monkeypatch.setattr(loading, 'weights_info', lambda name: {**weights_info(name), 'temperature': temperature})
    (tmp_path / 'metrics.json').write_text('old')
    result = run('--model', NAME, '--data-dir', tree, '--out', tmp_path)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        'confusion.png', 'coverage.png', 'metrics.json', 'predictions.csv', 'reliability.png']
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics['confusion'] == compute_metrics(predictions)['confusion']
    assert metrics['model'] == NAME and metrics['split'] == 'test' and metrics['label_names'] == list(EXPRESSIONS_8)
    assert metrics['image_size'] == [112, 112] and metrics['tta'] is None and metrics['data_checksum'] == '123'
    assert metrics['preprocessing']['crop_mode'] == 'squash' and metrics['versions']['timm'] == timm.__version__
    with open(tmp_path / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['file', 'label', 'prediction', *EXPRESSIONS_8] and len(rows) == 14
    calibrated = predictions.probabilities ** (1 / temperature)
    calibrated /= calibrated.sum(axis=1, keepdims=True)
    for row, probabilities in zip(rows, calibrated, strict=True):
        assert row['file'].startswith(row['label'] + '/')
        assert row['prediction'] == max(EXPRESSIONS_8, key=lambda name: float(row[name]))
        assert np.allclose([float(row[name]) for name in EXPRESSIONS_8], probabilities, atol=1e-4)
    assert (metrics['temperature'], metrics['calibrated']) == (temperature, True)
    assert metrics['ece'] == pytest.approx(compute_metrics(replace(predictions, probabilities=calibrated))['ece'])
    assert metrics['ece_plain'] == pytest.approx(compute_metrics(predictions)['ece']) != metrics['ece']
    assert metrics['coverage'][-1]['accuracy'] == metrics['accuracy']
    assert f"the model's temperature {temperature:.3f}" in result.stdout
    assert all(f'\n{name} ' in result.stdout for name in EXPRESSIONS_8)
    assert re.search(r'contempt +0 +absent', result.stdout) and 'nan' not in result.stdout.lower()
    assert f"{100 * metrics['accuracy']:.1f}" in result.stdout and '14/14' in result.stderr


def test_several_models_in_one_table(face_folder, peers, tmp_path):
    (tmp_path / 'groups.csv').write_text('image,number\n' + ''.join(
        f'{file.parent.name}/{file.name},{file.stem[-1]}\n' for file in (face_folder / 'validation').glob('*/*')))
    options = ['--data-dir', face_folder, '--split', 'validation', '--common-classes', '--groups', 'groups.csv']
    names = ['peers:more', 'peers:right', 'peers:fewer']
    result = run('--model', names[0], '--model', names[1], '--compare', names[2], '--seconds', 0.01, *options,
                 '--out', tmp_path / 'out')
    assert result.exit_code == 0, result.output
    comparison = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    folders = [tmp_path / 'out', tmp_path / 'out' / '2-peers-right', tmp_path / 'out' / '3-peers-fewer']
    all_metrics = [json.loads((folder / 'metrics.json').read_text()) for folder in folders]
    assert [metrics['left_out'] for metrics in all_metrics] == [
        {'images': {'anger': 6}, 'outputs': outputs} for outputs in (['angry', 'Contempt'], ['angry'], [])]
    for row, metrics, name in zip(comparison['models'], all_metrics, names, strict=True):
        assert row['model'] == name and row['count'] == 18 and row == metrics
        assert row['macro_f1_interval'] and set(row['groups']['number']['groups']) == set('012345')
    moody = all_metrics[0]['accuracy']
    assert 0 < moody < 1 == all_metrics[1]['accuracy'] == all_metrics[2]['accuracy']
    pairs = {(pair['first'], pair['second']): pair for pair in comparison['pairs']}
    assert list(pairs) == [(names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    wrong = round(18 * (1 - moody))
    first, second, third = pairs.values()
    assert (first['only_first_right'], first['only_second_right']) == (0, wrong) and third['p_holm'] == 1
    assert first['p_value'] == pytest.approx(2 / 2 ** wrong) == pytest.approx(second['p_holm'] / 3)
    assert [row['median'] > 0 for row in comparison['latency']['ms']] == [True] * 3

    text = (tmp_path / 'out' / 'compare.md').read_text()
    assert text.strip() in result.stdout
    assert f"| {names[0]} " in text and f"{100 * moody:.1f} [" in text and 'Images left out: 6 of anger' in text
    assert 'peers:more, answers left out: angry, Contempt' in text and 'largest gap' in text
    models = [part for name in names for part in ('--model', name)]
    again = run(*models, *options, '--seconds', 0, '--out', tmp_path / 'b')
    assert json.loads((tmp_path / 'b' / 'compare.json').read_text()) == {
        key: value for key, value in comparison.items() if key != 'latency'}, again.output


@pytest.mark.parametrize('arguments, message', [
    (['--compare', 'peers:fewer'], "peers:fewer does not fit: unknown class name(s) 'anger'"),
    (['--groups', 'peers.py'], 'peers.py must begin with a line of different column names'),
    (['--model', 'peers:no_such'], 'cannot load the model peers:no_such'),
])
def test_nothing_is_run_or_written_where_something_does_not_fit(face_folder, peers, tmp_path, arguments, message):
    result = run('--model', 'peers:failing', *arguments, '--data-dir', face_folder, '--split', 'validation',
                 '--out', tmp_path / 'out')
    assert result.exit_code == 1 and f'Error: {message}' in result.output and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('known, plain, words', [
    (0.5, False, "with the model's temperature 0.500"), (0.5, True, 'probabilities are plain softmax\n'),
    (None, False, 'plain softmax: no temperature comes with the model')])
def test_plain_softmax_where_it_is_asked_for_or_no_temperature_is_known(known, plain, words, tree, tmp_path):
    save_for_hf(timm.create_model('test_resnet', num_classes=8), tmp_path / 'model', safe_serialization=True,
                model_config={'label_names': list(EXPRESSIONS_8), **({'softmax_temperature': known} if known else {})})
    result = run('--model', f'local-dir:{tmp_path / "model"}', '--data-dir', tree, '--out', tmp_path / 'out',
                 *(['--no-calibration'] if plain else []))
    metrics = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    calibrated = known is not None and not plain
    assert result.exit_code == 0 and words in result.stdout
    assert (metrics['ece'] != metrics['ece_plain']) == calibrated
    assert (metrics['temperature'], metrics['calibrated']) == (known, calibrated)


def test_accuracy_over_coverage_agrees_with_plain_counting():
    predictions = random_predictions()
    sure, right = predictions.probabilities.max(axis=1), predictions.correct
    coverage = compute_coverage(predictions)
    assert [row['count'] for row in coverage] == list(range(20, 401, 20))
    for row in coverage:
        answered = [bool(right[i]) for i in range(400) if sure[i] >= row['threshold']]
        assert row['count'] == len(answered) and row['coverage'] == pytest.approx(len(answered) / 400)
        assert row['accuracy'] == sum(answered) / len(answered)
        assert row['accuracy_interval'] == pytest.approx(wilson(sum(answered), len(answered)))
    assert coverage[0]['accuracy'] > coverage[-1]['accuracy'] == right.mean()
    # Images that are equally sure belong together; less than 20 images give fewer rows.
    tied = replace(predictions, probabilities=np.full((400, 8), 1 / 8))
    assert [row['count'] for row in compute_coverage(tied)] == [400]
    few = Predictions(['a', 'b'], np.array([0, 0]), np.array([[0.9, 0.1], [0.3, 0.7]]), ('calm', 'cross'))
    assert [(row['count'], row['accuracy'], row['threshold']) for row in compute_coverage(few)] == [
        (1, 1, 0.9), (2, 0.5, 0.7)]
    coverage_figure(compute_coverage(few)).savefig(io.BytesIO(), format='png')


def test_every_image_format_counts_and_unknown_folders_are_refused(model, tmp_path):
    make_tree(tmp_path)
    Image.new('L', (30, 50)).save(tmp_path / 'test' / 'anger' / 'grey.BMP')
    Image.new('RGBA', (30, 50)).save(tmp_path / 'test' / 'anger' / 'alpha.webp')
    (tmp_path / 'test' / 'anger' / 'notes.txt').write_text('not an image')
    assert len(predict_folder(model, tmp_path, **FAST).files) == 16
    make_tree(tmp_path, ['boredom'])
    with pytest.raises(UserError, match=f"unknown .*'boredom'.*anger, boredom.*{', '.join(EXPRESSIONS_8)}"):
        predict_folder(model, tmp_path, **FAST)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_named(tmp_path, workers):
    make_tree(tmp_path / 'data')
    broken = tmp_path / 'data' / 'test' / 'fear' / 'fear1.png'
    broken.write_bytes(broken.read_bytes()[:600])
    with pytest.raises(UserError, match=f'^cannot read the image {broken}'):
        evaluate_folder(NAME, tmp_path / 'data', tmp_path / 'out', **{**FAST, 'workers': workers})
    assert not list((tmp_path / 'out').iterdir())


def test_images_in_the_wrong_place_are_refused(model, tree, tmp_path):
    for folder, split, message in ((tree, 'val', r'val.LABEL; folders in .*: test\.'), (tmp_path, 'test', 'none')):
        with pytest.raises(UserError, match=f'there are no images in .*{message}'):
            predict_folder(model, folder, split, **FAST)


def test_broken_weights_are_refused(model, tree):
    broken = copy.deepcopy(model)
    torch.nn.init.constant_(broken.fc.bias, float('nan'))
    with pytest.raises(UserError, match='not finite'):
        predict_folder(broken, tree, **FAST)


@pytest.mark.parametrize('package, command', [
    ('scipy', 'evaluate --model lfnsb --out new'), ('matplotlib', 'weights robustness lfnsb.ferplus'),
    ('sklearn', 'weights verify'), ('scipy', 'reproduce show'), ('sklearn', 'reproduce table9 --out new --dry-run'),
])
def test_a_missing_extra_is_named(tree, monkeypatch, package, command):
    for name in [name for name in sys.modules if name.startswith(('timm_lfnsb.evaluate', 'timm_lfnsb.experiments'))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    data = [] if command == 'reproduce show' else ['--data-dir', str(tree)]
    result = CliRunner().invoke(main, [*command.split(), *data])
    assert (result.exit_code, result.output) == (
        1, f'Error: measuring a model needs {package}: pip install "timm-lfnsb[eval]" brings it.\n')


def test_figures_show_names_and_percentages():
    metrics = compute_metrics(random_predictions(without=['fear']))
    counts = 100 * np.array(metrics['confusion'])  # long labels: thousands of images
    confusion = confusion_figure(counts, EXPRESSIONS_8)
    reliability = reliability_figure(metrics['calibration'], metrics['ece'])
    coverage = coverage_figure(compute_coverage(random_predictions()))
    for figure in (confusion, reliability, coverage):
        figure.savefig(io.BytesIO(), format='png')
        left, bottom, right, top = figure.get_tightbbox().extents
        width, height = figure.get_size_inches()
        assert 0 <= left < right <= width and 0 <= bottom < top <= height, 'something is cut off'

    axes = confusion.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        f'{name} ({sum(row)})' for name, row in zip(EXPRESSIONS_8, counts, strict=True)]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    row = metrics['confusion'][0]
    assert [texts[i, 0] for i in range(len(row))] == [f'{100 * value / sum(row):.1f}' for value in row]

    axes = reliability.axes[0]
    assert f"{100 * metrics['ece']:.1f} %" in axes.get_title()
    assert sum(int(text.get_text()) for text in axes.texts) == 400
