"""`timm-lfnsb rebalance`: the prior leaves the bias, a temperature enters the classifier, and nothing else changes."""
from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from timm_lfnsb.checkpoints.pack import write_folder
from timm_lfnsb.checkpoints.rebalance import STRENGTHS, choose_strength
from timm_lfnsb.cli import main
from timm_lfnsb.evaluate.predictions import Predictions, predict_folder

LABELS = ('happiness', 'fear', 'contempt')
COUNTS = {'contempt': 10, 'fear': 90, 'happiness': 900}  # in the order of folders, not of the outputs


@pytest.fixture
def folders(tmp_path):
    """A network of three classes at 32 px that leans to the first one, and noise of which it is mostly right."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3, pretrained_cfg_overlay={'input_size': (3, 32, 32)})
    with torch.no_grad():
        model.fc.weight.mul_(300)
        model.fc.bias.copy_(torch.tensor([1., 0., -1.]))
    write_folder(model, tmp_path / 'model', LABELS, {}, softmax_temperature=0.8)
    rng, data = np.random.default_rng(0), tmp_path / 'data'
    pictures = rng.integers(0, 256, (30, 8, 8), dtype=np.uint8)
    for label in LABELS:
        (data / 'validation' / label).mkdir(parents=True)
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(data / 'validation' / label / f'{i}.png')
    (data / 'dataset.json').write_text(json.dumps({'sha256': 'abc', 'splits': {'train': {'counts': COUNTS}}}))
    # Four of five get the label to which the network leans more than it does elsewhere.
    predicted = predict_folder(f'local-dir:{tmp_path / "model"}', data, 'validation', workers=0, progress=False)
    rows = np.log(predicted.probabilities)
    logits = {file.split('/')[1]: row for file, row in zip(predicted.files, rows, strict=True)}
    mean, std = np.mean([*logits.values()], axis=0), np.std([*logits.values()], axis=0)
    for i in range(30):
        true = LABELS[(((logits[f'{i}.png'] - mean) / std).argmax() + (i % 5 == 0)) % 3]
        for label in LABELS:
            if label != true:
                (data / 'validation' / label / f'{i}.png').unlink()
    assert all(any((data / 'validation' / label).iterdir()) for label in LABELS)
    return tmp_path / 'model', data


def invoke(model, out, data, *more):
    return CliRunner().invoke(main, ['rebalance', str(model), str(out), '--data-dir', str(data), *more])


def test_the_classifier_alone_changes(folders, tmp_path):
    model, data = folders
    result = invoke(model, tmp_path / 'out', data, '--cost', '1')
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    found = config.pop('prior_correction')
    plain = json.loads((model / 'config.json').read_text())
    assert plain.pop('softmax_temperature') == 0.8 and config.pop('softmax_temperature') == 1 and config == plain
    before, after = load_file(model / 'model.safetensors'), load_file(tmp_path / 'out' / 'model.safetensors')
    expected = [
        bias - found['tau'] * math.log(COUNTS[name] / 1000) for bias, name in zip((1, 0, -1), LABELS, strict=True)]
    temperature = found['temperature']
    assert found['tau'] > 0 and abs(temperature - 1) > 0.1  # else much would go untested
    np.testing.assert_allclose(after.pop('fc.bias').numpy(), np.array(expected) / temperature, rtol=1e-6)
    np.testing.assert_allclose(after.pop('fc.weight'), before.pop('fc.weight').numpy() / temperature, rtol=1e-6)
    del before['fc.bias']
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    measured = predict_folder(f'local-dir:{tmp_path / "out"}', data, 'validation', workers=0, progress=False)
    assert measured.correct.mean() == pytest.approx(found['accuracy'][1])
    likelihoods = [np.log(of[np.arange(len(of)), measured.labels]).mean() for of in (
        measured.probabilities ** power / (measured.probabilities ** power).sum(1, keepdims=True)
        for power in (1, 1.01, 0.99))]  # powers of probabilities are quotients of logits
    assert likelihoods[0] == max(likelihoods)
    assert f"tau {found['tau']:.2f}; on validation accuracy {found['accuracy'][0]:.3f} -> " in result.output
    assert 'was rebalanced before' in invoke(tmp_path / 'out', tmp_path / 'again', data).output


@pytest.mark.parametrize('cost', [0.03, 0.2])
def test_the_strength_is_the_best_that_the_cost_allows(cost):
    rng = np.random.default_rng(3)
    prior = np.array([0.9, 0.09, 0.01])
    labels = rng.choice(3, 400, p=prior)
    logits = np.log(prior) + rng.normal(size=(400, 3)) + 1.5 * np.eye(3)[labels]
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    found = choose_strength(
        Predictions([str(i) for i in range(400)], labels, probabilities, LABELS), np.log(prior), cost)

    rows = []
    for tau in STRENGTHS:
        hits, counts = [0, 0, 0], [0, 0, 0]
        for label, row in zip(labels, logits, strict=True):
            scores = [z - tau * math.log(p) for z, p in zip(row, prior, strict=True)]
            counts[label] += 1
            hits[label] += scores.index(max(scores)) == label
        rows.append((sum(hits) / 400, sum(h / c for h, c in zip(hits, counts, strict=True)) / 3, float(tau)))
    best = max((row for row in rows if row[0] >= rows[0][0] - cost), key=lambda row: (row[1], -row[2]))
    assert found['tau'] == best[2] > 0
    np.testing.assert_allclose(found['accuracy'], [rows[0][0], best[0]])
    np.testing.assert_allclose(found['balanced_accuracy'], [rows[0][1], best[1]])


@pytest.mark.parametrize(('change', 'reason'), [
    ('occupied', 'is there already'), ('classifier', 'no bias for each class'),
    ('right', 'no temperature'), ('counts', 'a class without images'), ('split', 'has no training split'),
    ('description', 'make the folder with timm-lfnsb prepare')])
def test_what_cannot_be_rebalanced(change, reason, folders, tmp_path):
    model, data = folders
    out = tmp_path / 'out'
    if change == 'occupied':
        shutil.copytree(model, out)
    elif change == 'classifier':
        config = json.loads((model / 'config.json').read_text())
        config['pretrained_cfg']['classifier'] = 'head.fc'
        (model / 'config.json').write_text(json.dumps(config))
    elif change == 'right':
        for i in range(0, 30, 5):
            [file] = (data / 'validation').glob(f'*/{i}.png')
            file.unlink()
        for label in LABELS[1:]:
            shutil.rmtree(data / 'validation' / label)
    elif change == 'counts':
        (data / 'dataset.json').write_text(
            json.dumps({'sha256': 'abc', 'splits': {'train': {'counts': {**COUNTS, 'fear': 0}}}}))
    elif change == 'split':
        (data / 'dataset.json').write_text(json.dumps({'sha256': 'abc', 'splits': {'validation': {'counts': COUNTS}}}))
    else:
        (data / 'dataset.json').unlink()
    result = invoke(model, out, data)
    assert result.exit_code == 1 and reason in result.output and 'Traceback' not in result.output
    assert change == 'occupied' or not out.exists()
