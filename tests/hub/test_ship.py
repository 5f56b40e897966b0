"""The weights inside the package: they load as timm promises, and they are what their JSON says."""
from __future__ import annotations

import argparse
import copy
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from support import ROOT

from timm_lfnsb.cli import main
from timm_lfnsb.evaluate import calibration
from timm_lfnsb.evaluate.predictions import EvaluationError, Predictions, compute_metrics, predict_folder
from timm_lfnsb.evaluate.robustness import PERTURBATIONS
from timm_lfnsb.hub import ship as release
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.models.networks import default_cfgs
from timm_lfnsb.recipes import recipe_names, recipe_path
from timm_lfnsb.train import history as runs
from timm_lfnsb.weights import names
from timm_lfnsb.weights.names import WEIGHTS_DIR

NAMES = release.embedded_weights()


def test_there_are_weights_and_only_true_tags():
    assert 'lfnsb.ferplus' in NAMES
    tags = {f'{arch}.{tag}' for arch, cfg in default_cfgs.items() for tag, c in cfg.cfgs.items() if c.has_weights}
    assert tags == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_loads_without_a_network(name, monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, 'connect', lambda *_: pytest.fail('network used'))
    arch = name.split('.')[0]
    model = timm.create_model(arch, pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == name.split('.', 1)[1]
    assert tuple(model.pretrained_cfg['label_names']) == EXPRESSIONS_8 and model.num_classes == 8
    stored = release.weights_info(name)
    assert stored['label_names'] == list(EXPRESSIONS_8)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        logits = model(images)
        assert logits.isfinite().all() and logits.abs().max() < 100
        embedding = timm.create_model(arch, pretrained=True, num_classes=0).eval()(images)
        torch.testing.assert_close(embedding, model.forward_head(model.forward_features(images), pre_logits=True))
        fine_tune = timm.create_model(arch, pretrained=True, num_classes=5).eval()
        assert fine_tune(images).shape == (2, 5)
        torch.testing.assert_close(fine_tune.forward_features(images), model.forward_features(images))
        grey = timm.create_model(arch, pretrained=True, in_chans=1).eval()
        # timm sums the kernels of the channels, so a grey image replicated gives the same map
        one = torch.randn(2, 1, 112, 112)
        torch.testing.assert_close(grey(one), model(one.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)
        maps = timm.create_model(arch, pretrained=True, features_only=True).eval()(images)
        torch.testing.assert_close(maps[-1], model.forward_features(images))


@pytest.mark.parametrize('name', NAMES)
def test_json_describes_the_file(name):
    info = release.weights_info(name)
    assert release.sha256(WEIGHTS_DIR / f'{name}.safetensors') == info['sha256']
    for split in release.SPLITS:
        metrics = info['metrics'][split]
        total = sum(c['count'] for c in metrics['per_class'].values())
        right = sum(metrics['confusion'][i][i] for i in range(8))
        assert metrics['count'] == total == sum(map(sum, metrics['confusion']))
        assert metrics['accuracy'] == pytest.approx(right / total)
    assert re.fullmatch('[0-9a-f]{40}', info['commit']) and info['data']['sha256']
    assert all(run['curve'] and run['settings'] and 'recipe' in run and 'seed' in run['settings']
               for run in info['runs'])
    assert list(info['robustness']['rows']) == list(PERTURBATIONS)
    assert info['robustness']['clean_accuracy'] == pytest.approx(info['metrics']['test']['accuracy'], abs=0.002)
    for row in info['robustness']['rows'].values():
        assert row['difference'] == pytest.approx(row['accuracy'] - info['robustness']['clean_accuracy'])
        assert 1 - row['agreement'] >= abs(row['difference']) - 1e-9  # labels must change for accuracy to
    # The likelihood is what a temperature is fitted by; the calibration error may go either way.
    assert 0.3 < info['temperature'] < 3 and info['calibration']['nll_scaled'] < info['calibration']['nll']
    assert info['calibration']['ece'] == pytest.approx(info['metrics']['test']['ece'], abs=0.005)
    assert '/' not in json.dumps([run['settings'] for run in info['runs']])  # no path of a machine


def test_readme_shows_what_the_json_says():
    readme = (ROOT / 'README.md').read_text()
    section = re.search(r'<!-- weights -->\n(.*?)<!-- /weights -->', readme, re.S)[1]
    assert section.strip().startswith(release.weights_table())


def test_list_and_verify_on_the_command_line(tmp_path):
    result = CliRunner().invoke(main, ['weights', 'list'])
    assert result.exit_code == 0 and 'lfnsb.ferplus' in result.output
    result = CliRunner().invoke(main, ['weights', 'verify', 'nonsense', '--data-dir', str(tmp_path)])
    assert result.exit_code == 1 and "no embedded weights 'nonsense'" in result.output
    result = CliRunner().invoke(main, ['weights', 'verify', '--data-dir', str(tmp_path)])
    assert result.exit_code == 1 and result.output.startswith('Error: ')


def shifted(info: dict, what: str, by: float) -> dict:
    """What measuring would give if one figure had changed."""
    measured = {key: copy.deepcopy(info[key]) for key in ('metrics', 'temperature', 'calibration', 'robustness')}
    if what == 'accuracy':
        measured['metrics']['test']['accuracy'] += by
    elif what == 'balanced_accuracy':
        measured['metrics']['validation']['balanced_accuracy'] += by
    elif what == 'temperature':
        measured['temperature'] += by
    elif what == 'robustness':
        measured['robustness']['rows']['jpeg30']['accuracy'] += by
    elif what == 'ece':
        measured['calibration']['ece_scaled'] += by
    return measured


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A copy of the embedded weights that tests may change, and a JSON that has every field."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    shutil.copyfile(WEIGHTS_DIR / 'lfnsb.ferplus.safetensors', folder / 'lfnsb.ferplus.safetensors')
    info = release.weights_info('lfnsb.ferplus')
    info |= {
        'temperature': 0.85,
        'calibration': {'fitted_on': 'validation', 'measured_on': 'test', 'ece': 0.05, 'ece_scaled': 0.02, 'nll': 0.7,
                        'nll_scaled': 0.6},
        'robustness': {'split': 'test', 'count': 3355, 'clean_accuracy': 0.78, 'rows': {'jpeg30': {
            'what': 'JPEG', 'accuracy': 0.7, 'accuracy_interval': [0.6, 0.8], 'difference': -0.08,
            'difference_interval': [-0.1, -0.06], 'agreement': 0.8}}},
    }
    (folder / 'lfnsb.ferplus.json').write_text(json.dumps(info))
    monkeypatch.setattr(release, 'WEIGHTS_DIR', folder)
    monkeypatch.setattr(names, 'WEIGHTS_DIR', folder)
    return folder


@pytest.mark.parametrize(('what', 'passes', 'fails'), [
    ('accuracy', 0.0019, -0.0021), ('balanced_accuracy', -0.0019, 0.0021), ('robustness', 0.0019, -0.0021),
    ('temperature', 0.019, 0.021), ('ece', 0.0049, 0.0051), ('accuracy', 0, float('nan'))])
def test_verify_notices_other_figures(what, passes, fails, shelf, monkeypatch, tmp_path):
    info = release.weights_info('lfnsb.ferplus')
    monkeypatch.setattr(release, 'measure', lambda *_: shifted(info, what, passes))
    lines = release.verify('lfnsb.ferplus', tmp_path)
    assert [line.split()[:3] for line in lines] == [
        ['lfnsb.ferplus', 'on', 'validation:'], ['lfnsb.ferplus', 'on', 'test:'],
        ['lfnsb.ferplus', 'temperature', f'{info["temperature"] + (passes if what == "temperature" else 0):.3f}'],
        ['lfnsb.ferplus', 'jpeg30:', 'accuracy']]
    monkeypatch.setattr(release, 'measure', lambda *_: shifted(info, what, fails))
    with pytest.raises(release.ReleaseError, match='its JSON says'):
        release.verify('lfnsb.ferplus', tmp_path)


def test_verify_measures_no_rows_where_none_are_asked_for_and_says_what_is_missing(shelf, monkeypatch, tmp_path):
    asked = []
    info = release.weights_info('lfnsb.ferplus')

    def measure(name, data_dir, rows):
        asked.append(list(rows))
        return {'metrics': info['metrics']}

    monkeypatch.setattr(release, 'measure', measure)
    release.verify('lfnsb.ferplus', tmp_path)
    release.verify('lfnsb.ferplus', tmp_path, ())
    del info['temperature'], info['robustness']
    (shelf / 'lfnsb.ferplus.json').write_text(json.dumps(info))
    lines = release.verify('lfnsb.ferplus', tmp_path)
    assert asked == [['jpeg30'], [], []]
    assert lines[-2:] == [f'lfnsb.ferplus {key}: not in its JSON, see timm-lfnsb weights measure'
                          for key in ('temperature', 'robustness')]


def test_verify_notices_another_file(shelf, tmp_path):
    with open(shelf / 'lfnsb.ferplus.safetensors', 'r+b') as file:
        file.seek(-1, 2)
        file.write(b'x')
    with pytest.raises(release.ReleaseError, match='is not the file its JSON describes'):
        release.verify('lfnsb.ferplus', tmp_path)


def test_measure_puts_everything_but_the_metrics_into_the_json(shelf, monkeypatch, tmp_path):
    path = shelf / 'lfnsb.ferplus.json'
    info = release.weights_info('lfnsb.ferplus')
    recipes = [run.pop('recipe') for run in info['runs']]
    full = shifted(info, 'accuracy', 0.001)
    for key in ('temperature', 'calibration', 'robustness'):
        del info[key]
    path.write_text(json.dumps(info))
    before = path.read_text()
    arguments = ['weights', 'measure', 'lfnsb.ferplus', '--data-dir', str(tmp_path)]

    def invoke(*more, measured=full):
        def measure(*_):
            if isinstance(measured, Exception):
                raise measured
            return copy.deepcopy(measured)
        monkeypatch.setattr(release, 'measure', measure)
        return CliRunner().invoke(main, [*arguments, *more])

    result = invoke()
    assert result.exit_code == 1 and 'has no dataset.json' in result.output
    (tmp_path / 'dataset.json').write_text('{"sha256": "other"}')
    result = invoke()
    assert result.exit_code == 1 and 'is not the data of lfnsb.ferplus' in result.output
    (tmp_path / 'dataset.json').write_text(json.dumps(info['data']))
    for broken, message in ((shifted({**info, **full}, 'accuracy', 0.005), 'find out why first'),
                            (ValueError('interrupted'), 'interrupted'), (OSError('disk full'), 'disk full')):
        result = invoke(measured=broken)
        assert result.exit_code == 1 and message in result.output and 'Traceback' not in result.output
    assert path.read_text() == before and len(list(shelf.iterdir())) == 2

    result = invoke()
    assert result.exit_code == 0 and 'temperature 0.850' in result.output and '| JPEG | 70.0' in result.output
    after = release.weights_info('lfnsb.ferplus')
    assert after['metrics'] == info['metrics']
    assert after['temperature'] == 0.85 and after['robustness'] == full['robustness']
    assert [run['recipe'] for run in after['runs']] == recipes
    assert recipes[:3] == ['ferplus-cpu', 'ferplus-cpu-112', 'ferplus-cpu-last']
    assert sorted(p.name for p in shelf.iterdir()) == ['lfnsb.ferplus.json', 'lfnsb.ferplus.safetensors']

    with open(shelf / 'lfnsb.ferplus.safetensors', 'r+b') as file:
        file.write(b'x')
    assert 'is not the file' in invoke().output
    assert invoke('--replace').exit_code == 0
    after = release.weights_info('lfnsb.ferplus')
    assert after['metrics'] == full['metrics']
    assert after['sha256'] == release.sha256(shelf / 'lfnsb.ferplus.safetensors') != info['sha256']


def test_measure_does_not_describe_a_file_that_was_exchanged_meanwhile(shelf, monkeypatch, tmp_path):
    info = release.weights_info('lfnsb.ferplus')
    (tmp_path / 'dataset.json').write_text(json.dumps(info['data']))

    def measure(*_):
        (shelf / 'lfnsb.ferplus.safetensors').write_bytes(b'new')
        return shifted(info, 'nothing', 0)

    monkeypatch.setattr(release, 'measure', measure)
    with pytest.raises(release.ReleaseError, match='was replaced while'):
        release.remeasure('lfnsb.ferplus', tmp_path, replace=True)
    assert release.weights_info('lfnsb.ferplus') == info


def make_data(folder, splits=('validation', 'test')):
    """Eight labels, three noisy images each, as `prepare` leaves them: no real face in it."""
    rng = np.random.default_rng(1)
    for split in splits:
        for label in EXPRESSIONS_8:
            (folder / split / label).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 256, (48, 48), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f'{i}.png')
    train = {'counts': dict.fromkeys(EXPRESSIONS_8, 3), 'total': 24}
    (folder / 'dataset.json').write_text(json.dumps({'name': 'noise', 'sha256': 'abc', 'splits': {'train': train}}))


def make_run(folder, settings, state_dict, summary='epoch,train_loss,eval_loss,eval_top1,lr\n0,2.0,1.5,40.0,0.1\n'):
    folder.mkdir(parents=True)
    torch.save({'args': argparse.Namespace(**settings), 'state_dict': state_dict, 'state_dict_ema': state_dict,
                'epoch': 0, 'metric': 40.}, folder / 'model_best.pth.tar')
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))
    (folder / 'summary.csv').write_text(summary)


def test_ship_stores_a_run_with_everything_the_json_must_hold(shelf, tmp_path, monkeypatch):
    data, run = tmp_path / 'data', tmp_path / 'output' / 'run'
    make_data(data)
    (tmp_path / 'map.txt').write_text('\n'.join(EXPRESSIONS_8))
    settings = dict(model='lfnsb', num_classes=8, class_map=str(tmp_path / 'map.txt'), data_dir=str(data), epochs=1,
                    seed=7, model_ema=True, kd_model_name=f'local-dir:{tmp_path}/teacher')
    make_run(run, settings, timm.create_model('lfnsb', pretrained=True).state_dict())
    arguments = ['weights', 'ship', 'lfnsb.noise', str(run), '--data-dir', str(data), '--note', 'Chosen by dice.']
    result = CliRunner().invoke(main, [*arguments, '--after', 'lfnsb.nowhere'])
    assert result.exit_code == 1 and "no embedded weights 'lfnsb.nowhere'" in result.output
    arguments += ['--after', 'lfnsb.ferplus']

    def unfit(_):
        raise EvaluationError('no temperature fits')

    monkeypatch.setattr(calibration, 'fit_temperature', unfit)
    result = CliRunner().invoke(main, [*arguments, '--no-robustness'])
    assert result.exit_code == 1 and 'no temperature fits' in result.output
    assert len(list(shelf.iterdir())) == 2
    monkeypatch.setattr(calibration, 'fit_temperature', lambda _: 2.)
    monkeypatch.setattr(release, 'PERTURBATIONS', {'hflip': release.PERTURBATIONS['hflip']})
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert sorted(p.suffix for p in shelf.iterdir()) == ['.json', '.json', '.safetensors', '.safetensors']
    info = release.weights_info('lfnsb.noise')
    assert info['sha256'] == release.sha256(shelf / 'lfnsb.noise.safetensors')
    assert info['data']['sha256'] == 'abc' and info['notes'] == ['Chosen by dice.'] and info['ema']
    assert info['temperature'] == 2 and info['calibration']['fitted_on'] == 'validation'
    assert 'temperature' not in info['calibration'] and info['robustness']['rows'].keys() == {'hflip'}
    assert info['measured_with'].keys() >= {'torch', 'timm', 'pillow'}
    *earlier, described = info['runs']
    assert earlier == release.weights_info('lfnsb.ferplus')['runs']
    assert described['settings']['seed'] == 7 and described['curve'][0]['eval_top1'] == 40
    assert described['recipe'] is None and described['settings']['kd_model_name'] == 'local-dir:teacher'
    assert str(tmp_path) not in json.dumps(info)
    assert info['metrics']['test']['count'] == 24 and set(info['metrics']) == {'validation', 'test'}
    stored = timm.create_model('lfnsb', pretrained=True, pretrained_cfg_overlay={
        'file': str(shelf / 'lfnsb.noise.safetensors')}).eval()
    direct = predict_folder(stored, data, workers=0, progress=False)
    assert direct.correct.mean() == pytest.approx(info['metrics']['test']['accuracy'])


# --- calibration ------------------------------------------------------------------------------------------------------

def make_predictions(temperature: float, count: int = 20000) -> Predictions:
    """Labels drawn from a softmax, and the same logits at another temperature as the model's answer."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((count, 8))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    given = torch.from_numpy(logits * temperature).softmax(dim=1).numpy().astype(np.float32)
    return Predictions([''] * count, labels, given, EXPRESSIONS_8)


@pytest.mark.parametrize('temperature', [0.5, 1, 3])
def test_the_temperature_of_drawn_labels_is_found(temperature):
    predictions = make_predictions(temperature)
    found = calibration.fit_temperature(predictions)
    assert found == pytest.approx(temperature, rel=0.02)
    logits = torch.from_numpy(predictions.probabilities.astype(np.float64)).log()
    labels = torch.from_numpy(predictions.labels)
    losses = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in (found * 0.98, found, found * 1.02)]
    assert losses[1] == min(losses)  # torch's own loss agrees that it is the minimum
    scaled = calibration.scale(predictions, found)
    assert losses[1] == pytest.approx(calibration.negative_log_likelihood(scaled))
    torch.testing.assert_close(torch.from_numpy(scaled.probabilities), (logits / found).softmax(dim=1))
    assert (scaled.predicted == predictions.predicted).all()


def test_calibration_is_fitted_on_validation_and_measured_on_test():
    validation, test = make_predictions(3), make_predictions(2)
    measured = calibration.measure_calibration(validation, test)
    assert measured['temperature'] == pytest.approx(3, rel=0.02)
    assert measured['ece'] == pytest.approx(compute_metrics(test)['ece'])
    assert measured['ece_scaled'] > 0.03  # the test split would have wanted 2
    own = calibration.measure_calibration(test, test)
    assert own['ece_scaled'] < 0.02 < own['ece'] and own['nll_scaled'] < own['nll']


def test_probabilities_of_zero_do_not_break_the_temperature():
    probabilities = np.eye(8, dtype=np.float32)[[0, 1, 2, 3] * 25]
    labels = np.array([0, 1, 2, 4] * 25)
    temperature = calibration.fit_temperature(Predictions([''] * 100, labels, probabilities, EXPRESSIONS_8))
    # The best e = exp(log(smallest float32) / T) gives a quarter of the probability to the seven other classes.
    assert np.exp(np.log(np.finfo(np.float32).tiny) / temperature) == pytest.approx(1 / 21, rel=0.01)
    for label in (0, 1):  # all right, all wrong
        with pytest.raises(EvaluationError, match=r'no temperature between 0\.05 and 100'):
            calibration.fit_temperature(Predictions(
                [''] * 100, np.full(100, label), probabilities[:1].repeat(100, 0), EXPRESSIONS_8))


# --- runs -------------------------------------------------------------------------------------------------------------

def recipe_settings(name, **changes):
    return {**yaml.safe_load(recipe_path(name).read_text()), 'data_dir': '/somewhere', 'experiment': 'mine',
            'mixup': 0.0, 'aa': None, **changes}


def test_runs_of_a_resumed_run_and_one_that_has_just_begun(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'args.yaml').write_text(yaml.safe_dump(recipe_settings('ferplus-cpu', epochs=5, workers=9)))
    header = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
    (tmp_path / 'a' / 'summary.csv').write_text(
        header + '0,2.0,1.9,40.0,80,0.1\n1,1.8,1.7,50.0,81,0.1\n'
        + header + '1,1.7,1.6,55.5,82,0.1\n2,1.5,1.5,53.0,83,0.1\n')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'args.yaml').write_text('{model: resnet18, lr: null, lr_base: 0.1, lr_base_size: 256, opt: sgd}')
    run = runs.read_run(tmp_path / 'a')
    assert [row['eval_top1'] for row in run['curve']] == [40, 55.5, 53]
    assert run['recipe'] == 'ferplus-cpu' and run['overrides'] == {'epochs': 5}
    assert 'data_dir' not in run['settings'] and 'mixup' not in run['settings']
    result = CliRunner().invoke(main, ['weights', 'runs', str(tmp_path)])
    assert result.exit_code == 0
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in result.output.splitlines()]
    first, second = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert first['run'] == 'a' and first['recipe'] == 'ferplus-cpu but epochs 5' and first['epochs'] == '3 of 5'
    assert first['best validation'] == '55.5 (epoch 1)' and first['validation curve'] == '40.0 55.5 53.0'
    assert first['last train loss'] == '1.500' and first['size'] == '56' and 'alpha 0.1' in first['loss']
    assert second['best validation'] == '-' and second['epochs'].startswith('0') and second['model'] == 'resnet18'
    assert 'lr 0.1 a batch of 256' in second['optimiser'] and second['loss'] == 'CE'


def test_runs_without_folders_are_those_of_the_embedded_weights():
    result = CliRunner().invoke(main, ['weights', 'runs'])
    assert result.exit_code == 0
    distinct = {json.dumps(run, sort_keys=True) for name in NAMES for run in release.weights_info(name)['runs']}
    assert len(result.output.splitlines()) == 2 + len(distinct)
    [line] = [line for line in result.output.splitlines() if '| ferplus-cpu-last |' in line]
    assert 'lfn_small.ferplus, 3 of ' in line and 'lfnsb.ferplus, 3 of ' in line  # both have it behind them


@pytest.mark.parametrize(('file', 'text', 'message'), [
    (None, '', 'has no run of train.py'),
    ('args.yaml', '[1, 2]', 'does not hold the settings'), ('args.yaml', '{a: [', 'does not hold the settings'),
    ('summary.csv', 'a,b\n1,2\n', 'is not the summary'),
    ('summary.csv', 'epoch,eval_top1\n0,x\n', 'is not the summary')])
def test_folders_that_are_no_runs(file, text, message, tmp_path):
    if file:
        (tmp_path / 'args.yaml').write_text('{model: lfnsb}')
        (tmp_path / file).write_text(text)
    result = CliRunner().invoke(main, ['weights', 'runs', str(tmp_path)])
    assert result.exit_code == 1 and message in result.output and 'Traceback' not in result.output


@pytest.mark.parametrize('name', recipe_names())
def test_every_recipe_is_known_again_from_the_settings_of_its_run(name):
    found = runs.find_recipe(runs.clean_settings(recipe_settings(name)))
    assert found['overrides'] == {}
    same = {key: value for key, value in yaml.safe_load(recipe_path(name).read_text()).items() if key != 'class_map'}
    other = {key: value for key, value in yaml.safe_load(recipe_path(found['recipe']).read_text()).items()
             if key != 'class_map'}
    assert found['recipe'] == name or same == other


def test_settings_like_no_recipe():
    assert runs.find_recipe({'model': 'resnet18', 'opt': 'sgd'}) == {'recipe': None, 'overrides': {}}


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)  # each on its own, for a slow machine takes minutes over one
def test_the_stored_figures_are_measured_again(name, ferplus_source, tmp_path):
    for split in release.SPLITS:
        with zipfile.ZipFile(ferplus_source / f'{split}.zip') as archive:
            archive.extractall(tmp_path)
    rows = ('hflip',) if name == 'lfnsb.ferplus' else ()  # every row of every weight would take a quarter of an hour
    lines = release.verify(name, tmp_path, rows)
    assert len(lines) == 3 + len(rows)
