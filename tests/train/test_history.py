"""Runs of train.py read back: settings, curves, and the recipe they followed."""
from __future__ import annotations

import pytest
import yaml
from click.testing import CliRunner

from timm_lfnsb.cli import main
from timm_lfnsb.recipes import recipe_names, recipe_path
from timm_lfnsb.train import history as runs
from timm_lfnsb.weights.names import embedded_weights, weights_info


def recipe_settings(name, **changes):
    return {**yaml.safe_load(recipe_path(name).read_text()), 'data_dir': '/somewhere', 'experiment': 'mine',
            'mixup': 0.0, 'aa': None, **changes}


def test_runs_of_a_resumed_run_and_one_that_has_just_begun(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'args.yaml').write_text(yaml.safe_dump(recipe_settings('ferplus-cpu-56', epochs=5, workers=9)))
    header = 'epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n'
    (tmp_path / 'a' / 'summary.csv').write_text(
        header + '0,2.0,1.9,40.0,80,0.1\n1,1.8,1.7,50.0,81,0.1\n'
        + header + '1,1.7,1.6,55.5,82,0.1\n2,1.5,1.5,53.0,83,0.1\n')
    (tmp_path / 'b').mkdir()
    (tmp_path / 'b' / 'args.yaml').write_text(
        '{model: resnet18, lr: null, lr_base: 0.1, lr_base_size: 256, opt: sgd, feature_loss: [center, "dda:0.1"]}')
    [run] = runs.read_runs(tmp_path / 'a')
    assert [row['eval_top1'] for row in run['curve']] == [40, 55.5, 53]
    assert run['recipe'] == 'ferplus-cpu-56' and run['overrides'] == {'epochs': 5}
    assert 'data_dir' not in run['settings'] and 'mixup' not in run['settings']
    result = CliRunner().invoke(main, ['weights', 'runs', str(tmp_path)])
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in result.output.splitlines()]
    first, second = (dict(zip(rows[0], row, strict=True)) for row in rows[2:])
    assert first['run'] == 'a' and first['recipe'] == 'ferplus-cpu-56 but epochs 5' and first['epochs'] == '3 of 5'
    assert first['best validation'] == '55.5 (epoch 1)' and first['validation curve'] == '40.0 55.5 53.0'
    assert first['last train loss'] == '1.500' and first['size'] == '56' and 'alpha 0.1' in first['loss']
    assert second['best validation'] == '-' and second['epochs'].startswith('0') and second['model'] == 'resnet18'
    assert 'lr base 0.1' in second['optimiser'] and second['loss'] == 'CE + center + dda:0.1'
    [begun] = runs.read_runs(tmp_path / 'b')
    begun['settings']['feature_loss'] = 'center'  # as a YAML file may name one
    assert runs.run_cells(begun)['loss'] == 'CE + center'
    begun['settings'].update(feature_loss=None, kd_model_name='resnet18', kd_distill_type='feature')
    assert runs.run_cells(begun)['loss'] == 'CE + distilled from features of resnet18'
    begun.update(recipe='ferplus', overrides={'epochs': 3, 'pretrained': None})
    assert runs.run_cells(begun)['recipe'] == 'ferplus but epochs 3, no pretrained'


def test_runs_without_folders_are_those_of_the_embedded_weights():
    result = CliRunner().invoke(main, ['weights', 'runs'])
    assert len(result.output.splitlines()) == 2 + sum(len(weights_info(name)['runs']) for name in embedded_weights())
    assert 'lfn_small.ferplus, 3 of ' in result.output and 'lfnsb.ferplus, 3 of ' in result.output


@pytest.mark.parametrize('name', embedded_weights())
def test_what_embedded_runs_say_of_recipes_holds_for_the_recipes_of_today(name):
    for run in weights_info(name)['runs']:
        stored = {key: run[key] for key in ('recipe', 'overrides')}
        assert runs.find_recipe(run['settings']) == stored


@pytest.mark.parametrize(('file', 'text', 'message'), [
    (None, '', 'has no run of train.py'),
    ('args.yaml', '[1, 2]', 'does not hold the settings'),
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
    first, second = (yaml.safe_load(recipe_path(recipe).read_text()) for recipe in (name, found['recipe']))
    assert first == {**second, 'class_map': first['class_map']}  # some are alike but for their labels


def test_folders_of_weights_are_named_without_their_place():
    settings = runs.clean_settings(recipe_settings(
        'ferplus-teacher-dlib', model='local-dir:/somewhere/FACES', kd_model_name='local-dir:/a/T,local-dir:U,mfn'))
    assert settings['model'] == 'local-dir:FACES'
    assert settings['kd_model_name'] == 'local-dir:T,local-dir:U,mfn'
    assert runs.find_recipe(settings) == {'recipe': 'ferplus-teacher-dlib', 'overrides': {}}
    # The same settings for a named network are not a run of the recipe that goes on from a folder's.
    assert runs.find_recipe({**settings, 'model': 'mfn'})['recipe'] != 'ferplus-teacher-dlib'
