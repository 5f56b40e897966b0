"""The weights inside the package: they load as timm promises, and they are what their JSON says."""
from __future__ import annotations

import argparse
import copy
import json
import re
import zipfile
from functools import reduce

import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file
from support import ROOT

from timm_lfnsb.checkpoints import rebalance
from timm_lfnsb.cli import main
from timm_lfnsb.evaluate import calibration
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.evaluate.robustness import PERTURBATIONS
from timm_lfnsb.hub import card, ship
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.util.files import file_sha256
from timm_lfnsb.weights import names
from timm_lfnsb.weights.names import WEIGHTS_DIR, embedded_weights, weights_info

NAMES = embedded_weights()
NAME = 'lfnsb.ferplus'


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_loads(name):
    model = timm.create_model(name, pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == name.split('.', 1)[1]
    assert list(model.pretrained_cfg['label_names']) == weights_info(name)['label_names'] == list(EXPRESSIONS_8)
    assert list(model.pretrained_cfg['input_size']) == weights_info(name)['input_size']
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        assert model(images).abs().max() < 100
        fine_tune = timm.create_model(name, pretrained=True, num_classes=5).eval()
        assert fine_tune(images).shape == (2, 5)
        torch.testing.assert_close(fine_tune.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize('name', NAMES)
def test_json_describes_the_file(name):
    info = ship.checked_info(name)
    for split in ship.SPLITS:
        metrics, confusion = info['metrics'][split], np.array(info['metrics'][split]['confusion'])
        assert metrics['count'] == confusion.sum() == sum(c['count'] for c in metrics['per_class'].values())
        assert metrics['accuracy'] == pytest.approx(confusion.trace() / confusion.sum())
    assert re.fullmatch('[0-9a-f]{40}', info['commit']) and info['data']['sha256']
    assert all(run['curve'] and 'recipe' in run and 'seed' in run['settings'] for run in info['runs'])
    assert list(info['robustness']['rows']) == list(PERTURBATIONS)
    assert info['robustness']['clean_accuracy'] == pytest.approx(info['metrics']['test']['accuracy'], abs=0.002)
    # Their classifiers were divided by the temperature that was fitted, so that no other is left to apply.
    assert info['temperature'] == pytest.approx(1, abs=0.01) and info['calibration']['ece'] < 0.05
    assert '/' not in json.dumps([run['settings'] for run in info['runs']])  # no path of a machine
    correction = info['prior_correction']
    for key in ('accuracy', 'balanced_accuracy'):
        assert info['metrics']['validation'][key] == pytest.approx(correction[key][1], abs=1e-3)
    before, after = correction['accuracy']
    assert before - after <= correction['cost'] and correction['tau'] > 0


@pytest.mark.parametrize('name', [name for name in NAMES if 'base' in weights_info(name)])
def test_rebalanced_file_is_its_base_but_for_the_classifier(name):
    info = weights_info(name)
    ours, base = (load_file(WEIGHTS_DIR / f'{stem}.safetensors') for stem in (name, info['base']))
    counts = np.array([info['data']['splits']['train']['counts'][label] for label in info['label_names']])
    correction = info['prior_correction']
    expected = base['fc.bias'] - torch.tensor(correction['tau'] * np.log(counts / counts.sum()), dtype=torch.float32)
    torch.testing.assert_close(ours.pop('fc.bias'), expected / correction['temperature'])
    torch.testing.assert_close(ours.pop('fc.weight'), base['fc.weight'] / correction['temperature'])
    assert ours.keys() | {'fc.bias', 'fc.weight'} == base.keys()
    assert all(tensor.equal(base[key]) for key, tensor in ours.items())
    assert info['input_size'] == weights_info(info['base'])['input_size']
    rare, found = ([weights_info(of)['metrics']['test']['per_class'][label]['recall'] for label in ('fear', 'disgust')]
                   for of in (info['base'], name))
    assert all(after > before for before, after in zip(rare, found, strict=True))


def test_readme_and_list_show_what_the_json_says():
    def cells(text):
        return [[cell.strip() for cell in line.split('|')] for line in text.splitlines() if line.startswith('| `')]

    listed = CliRunner().invoke(main, ['weights', 'list']).output
    for name in NAMES:
        test = weights_info(name)['metrics']['test']
        assert re.search(rf"\| `{name}` +\| {test['accuracy']:.3f} \[.* \| {test['macro_f1']:.3f} ", listed)
    section = re.search(r'<!-- weights -->(.*?)<!-- /weights -->', (ROOT / 'README.md').read_text(), re.S)[1]
    assert cells(section) == cells(listed)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A copy of the embedded weights that tests may change, with one row of the robustness table."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    state = load_file(WEIGHTS_DIR / f'{NAME}.safetensors')
    save_file({**state, 'fc.weight': state['fc.weight'].half()}, folder / f'{NAME}.safetensors')  # as a run is shipped
    info = weights_info(NAME)
    info['sha256'] = file_sha256(folder / f'{NAME}.safetensors')
    info['robustness']['rows'] = {'jpeg30': info['robustness']['rows']['jpeg30']}
    info |= {'half_precision_changes': 3}  # as of a run that was never rebalanced
    info.pop('prior_correction', None)
    (folder / f'{NAME}.json').write_text(json.dumps(info))
    for module in (ship, names, card):
        monkeypatch.setattr(module, 'WEIGHTS_DIR', folder)
    return folder


def shifted(info: dict, path: str, by: float) -> dict:
    """What measuring would give if one figure had changed."""
    measured = {key: copy.deepcopy(info[key]) for key in ('metrics', 'temperature', 'calibration', 'robustness')}
    *parents, key = path.split('/')
    reduce(dict.__getitem__, parents, measured)[key] += by
    return measured


@pytest.mark.parametrize(('path', 'passes', 'fails'), [
    ('metrics/test/accuracy', 0.0019, -0.0021), ('metrics/test/accuracy', 0, float('nan')),
    ('temperature', 0.019, 0.021), ('calibration/ece_scaled', 0.0049, 0.0051)])
def test_verify_notices_other_figures(path, passes, fails, shelf, monkeypatch, tmp_path):
    info = weights_info(NAME)

    def verify(by, rows, *more):
        def measure(name, data_dir, asked):
            assert asked == rows
            return shifted(info, path, by)

        monkeypatch.setattr(ship, 'measure', measure)
        result = CliRunner().invoke(main, ['weights', 'verify', NAME, '--data-dir', str(tmp_path), *more])
        return result.exit_code, result.output

    status, output = verify(passes, ['jpeg30'])
    stored = info['metrics']['test']['accuracy']
    measured = stored + (passes if path == 'metrics/test/accuracy' else 0)
    assert status == 0 and f'{NAME} on test accuracy {measured:.4f} (JSON {stored:.4f})\n' in output
    status, output = verify(fails, [], '--no-robustness')
    assert status == 1 and 'preprocessing changed' in output and output.count('(JSON ') == 1


def test_measure_puts_everything_but_the_metrics_into_the_json(shelf, monkeypatch, tmp_path):
    path, info = shelf / f'{NAME}.json', weights_info(NAME)
    full = shifted(info, 'metrics/test/accuracy', 0.001)
    bare = {key: value for key, value in info.items() if key not in ('temperature', 'calibration', 'robustness')}
    path.write_text(json.dumps(bare))

    def measure(*more, measured=full):
        monkeypatch.setattr(ship, 'measure', lambda *_: copy.deepcopy(measured))
        return CliRunner().invoke(main, ['weights', 'measure', NAME, '--data-dir', str(tmp_path), *more])

    (tmp_path / 'dataset.json').write_text('{"sha256": "other"}')
    assert f'is not the data of {NAME}' in measure().output
    (tmp_path / 'dataset.json').write_text(json.dumps(info['data']))
    assert 'find out why first' in measure(measured=shifted(full, 'metrics/test/accuracy', 0.005)).output
    assert weights_info(NAME) == bare

    result = measure()
    assert result.exit_code == 0 and f"temperature {full['temperature']:.3f}" in result.output
    assert 'JPEG of quality 30' in result.output and weights_info(NAME) == info

    with open(shelf / f'{NAME}.safetensors', 'r+b') as file:
        file.write(b'x')
    assert 'is not the file its JSON describes' in measure().output
    assert measure('--replace').exit_code == 0
    assert weights_info(NAME)['metrics'] == full['metrics'] and ship.checked_info(NAME)['sha256'] != info['sha256']


def make_run(folder, data, model, **settings):
    """A run of train.py that has just begun, and noise in folders of eight labels."""
    rng = np.random.default_rng(1)
    for split in ship.SPLITS:
        for label in EXPRESSIONS_8:
            (data / split / label).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(rng.integers(0, 256, (48, 48), dtype=np.uint8)).save(data / split / label / f'{i}.png')
    train = {'counts': dict.fromkeys(EXPRESSIONS_8, 3), 'total': 24}
    (data / 'dataset.json').write_text(json.dumps({'name': 'noise', 'sha256': 'abc', 'splits': {'train': train}}))
    (data / 'map.txt').write_text('\n'.join(EXPRESSIONS_8))
    settings |= dict(model=model, num_classes=8, class_map=str(data / 'map.txt'), data_dir=str(data), epochs=1)
    size = (3, settings['img_size'], settings['img_size'])
    weights = timm.create_model(model, num_classes=8, pretrained_cfg_overlay=dict(input_size=size)).state_dict()
    folder.mkdir()
    torch.save({'args': argparse.Namespace(**settings), 'state_dict': weights, 'state_dict_ema': weights, 'epoch': 0,
                'metric': 40.}, folder / 'model_best.pth.tar')
    (folder / 'summary.csv').write_text('epoch,train_loss,eval_loss,eval_top1,lr\n0,2.0,1.5,40.0,0.1\n')


def test_ship_stores_a_run_with_everything_the_json_must_hold(shelf, tmp_path, monkeypatch):
    name, arch, size, data, run = 'lfn_small.noise_64', 'lfn_small', 64, tmp_path / 'data', tmp_path / 'run'
    make_run(run, data, arch, img_size=size, seed=7, kd_model_name=f'local-dir:{tmp_path}/teacher')
    monkeypatch.setattr(calibration, 'fit_temperature', lambda _: 2.)

    def invoke(name, *more):
        return CliRunner().invoke(main, [
            'weights', 'ship', name, str(run), '--data-dir', str(data), '--note', 'By dice.', '--no-robustness', *more])

    assert f'trained {arch}, not mfn' in invoke('mfn.noise').output and len(list(shelf.iterdir())) == 2
    result = invoke(name, '--after', NAME)
    assert result.exit_code == 0 and f'`{name}`' in result.output, result.output
    assert sorted(p.suffix for p in shelf.iterdir()) == ['.json', '.json', '.safetensors', '.safetensors']
    info = ship.checked_info(name)
    assert info['data']['sha256'] == 'abc' and info['notes'] == ['By dice.'] and info['ema']
    assert info['input_size'] == [3, size, size] and 'robustness' not in info
    assert info['temperature'] == 2 and info['calibration']['fitted_on'] == 'validation'
    *earlier, described = info['runs']
    assert earlier == weights_info(NAME)['runs']
    assert described['settings']['seed'] == 7 and described['curve'][0]['eval_top1'] == 40
    assert described['recipe'] is None and described['settings']['kd_model_name'] == 'local-dir:teacher'
    assert str(tmp_path) not in json.dumps(info)
    stored = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay={
        'file': str(shelf / f'{name}.safetensors'), 'input_size': (3, size, size)}).eval()
    direct = predict_folder(stored, data, workers=0, progress=False)
    assert direct.correct.mean() == pytest.approx(info['metrics']['test']['accuracy'])
    assert f'3x{size}x{size}' in card.render_card(info)


def test_rebalanced_weights_are_the_base_with_another_classifier(shelf, tmp_path, monkeypatch):
    data, name = tmp_path / 'data', 'lfnsb.noise_balanced'
    make_run(tmp_path / 'run', data, 'lfnsb', img_size=112)
    description = json.loads((data / 'dataset.json').read_text())
    description['splits']['train']['counts']['contempt'] = 1
    (data / 'dataset.json').write_text(json.dumps(description))
    monkeypatch.setattr(calibration, 'fit_temperature', lambda _: 2.)
    monkeypatch.setattr(rebalance, 'choose_strength', lambda *arguments: {
        'tau': 0.5, 'cost': arguments[-1], 'accuracy': [0.8, 0.79], 'balanced_accuracy': [0.5, 0.6]})

    def rebalanced(*names):
        return CliRunner().invoke(main, ['weights', 'rebalance', *names, '--data-dir', str(data), '--no-robustness'])

    result = rebalanced(name, NAME, '--note', 'By dice.')
    assert result.exit_code == 0 and f'`{name}`' in result.output, result.output
    info, base = ship.checked_info(name), ship.checked_info(NAME)
    assert info['model'] == name and info['base'] == NAME and info['notes'] == [*base['notes'], 'By dice.']
    assert 'robustness' in base and 'robustness' not in info  # another network's
    assert info['runs'] == base['runs'] and info['metrics']['test']['count'] == 24 and info['sha256'] != base['sha256']
    before, after = (load_file(shelf / f'{weights}.safetensors') for weights in (NAME, name))
    shares = torch.tensor([3.] * 7 + [1.]) / 22
    torch.testing.assert_close(after['fc.bias'], (before['fc.bias'] - 0.5 * shares.log()) / 2)
    torch.testing.assert_close(after['fc.weight'], before['fc.weight'].float() / 2)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {'fc.bias', 'fc.weight'}
    kept = before.keys() - {'fc.bias', 'fc.weight'}
    assert {key: before[key].dtype for key in kept} == {key: after[key].dtype for key in kept}
    assert after['fc.weight'].dtype == torch.float32  # another rounding could move a label
    text = ' '.join(card.render_card(info).split())
    assert f'is that of `{NAME}`' in text and 'From that 0.5 times the logarithm' in text
    assert 'cost at most 0.03 of' in text and 'rises from 0.500 to 0.600' in text and 'labels against full' not in text
    assert 'are then divided by 2.000' in text

    result = rebalanced(NAME, NAME, '--cost', '0.01')  # in its own place
    assert result.exit_code == 0, result.output
    own = ship.checked_info(NAME)
    assert own['sha256'] == info['sha256'] and 'base' not in own and own['prior_correction']['cost'] == 0.01
    assert "From the classifier's bias 0.5 times the logarithm" in ' '.join(card.render_card(own).split())
    result = rebalanced(NAME, NAME)
    assert result.exit_code == 1 and 'was rebalanced before' in result.output
    assert ship.checked_info(NAME) == own


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)  # each on its own, for a slow machine takes minutes over one
def test_the_stored_figures_are_measured_again(name, ferplus_source, tmp_path):
    for split in ship.SPLITS:
        with zipfile.ZipFile(ferplus_source / f'{split}.zip') as archive:
            archive.extractall(tmp_path)
    # Every row of every weight would take a quarter of an hour.
    lines = ship.verify(name, tmp_path, ('hflip',) if name == NAME else ())
    assert f'{name} hflip' in lines[-1] if name == NAME else f'{name} calibration' in lines[-1]
