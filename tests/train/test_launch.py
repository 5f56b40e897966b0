"""`timm-lfnsb run` with a stand-in script; timm's own is in test_real_train."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from support.train_script import STANDIN, changed_standin, launch, one_sentence, standin

from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.recipes import recipe_names


def test_the_options_build_our_task(tmp_path):
    result = standin(
        tmp_path, '--cosine-harmony', '2', '--cosine-harmony-variant', 'paper', '--cosine-harmony-fixed-centers')
    parts = result['parts']
    assert result['task'] == 'CosineHarmonyTask'
    assert parts['loss'] == pytest.approx(parts['task_loss'] + 2 * parts['cosine_harmony_loss'])
    assert result['args']['cosine_harmony_variant'] == 'paper'
    reference = standin(tmp_path, '--cosine-harmony', '2')['parts']
    assert parts['cosine_harmony_loss'] != pytest.approx(reference['cosine_harmony_loss'])


def test_the_options_work_from_yaml_and_the_command_line_wins(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(dict(
        cosine_harmony=1., cosine_harmony_alpha=0.4, cosine_harmony_fixed_centers=True, no_epoch_seeds=True)))
    result = standin(tmp_path, '--config', config, '--cosine-harmony-alpha', '0.2')
    assert result['task'] == 'CosineHarmonyTask' and result['args']['cosine_harmony_alpha'] == 0.2
    assert result['args']['cosine_harmony_fixed_centers'] and result['args']['no_epoch_seeds']
    config.write_text('cosine_harmony: 1.0\ncosine_harmony_variant: best\n')  # argparse does not check it
    one_sentence(launch(STANDIN, '--config', config), 'reference, intended, paper')


def test_losses_on_features_by_name(tmp_path):
    result = standin(tmp_path, '--feature-loss', 'center', '--cosine-harmony', '2', '--feature-loss',
                     'island:0.5:island=0.1,learn_centers=false')
    parts = result['parts']
    assert result['task'] == 'FeatureLossTask'
    assert parts['loss'] == pytest.approx(parts['task_loss'] + 2 * parts['cosine_harmony_loss'] + 0.003 *
                                          parts['center_loss'] + 0.5 * parts['island_loss'])
    assert result['args']['feature_loss'] == ['center', 'island:0.5:island=0.1,learn_centers=false']
    assert list(result['task_state']) == ['cosine_harmony', 'center', 'island']
    alone = standin(tmp_path, '--cosine-harmony', '2', '--cosine-harmony-variant', 'margin')
    same = standin(tmp_path, '--feature-loss', 'cosine-harmony:2:variant=margin')
    assert alone['parts'] == same['parts'] and alone['task_state'] == same['task_state']


@pytest.mark.parametrize('yaml_losses, names', [
    (['center', 'dacl:0.5'], ['center', 'dacl']), ('separate', ['separate']), ([], [])])
def test_losses_from_yaml_and_the_command_line_wins(yaml_losses, names, tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(dict(feature_loss=yaml_losses)))
    assert list(standin(tmp_path, '--config', config)['task_state']) == names
    flags = ['--feature-loss', 'dda', '--feature-loss', 'affinity:0.1']
    assert list(standin(tmp_path, '--config', config, *flags)['task_state']) == ['dda', 'affinity']


def test_help():
    for flag in ('--cosine-harmony WEIGHT', '--feature-loss NAME[:WEIGHT[:key=value,...]]',
                 '--label-votes FILE', '--logit-adjustment TAU', '--kd-model-name'):
        assert flag in launch(STANDIN, '--help').output


def test_class_maps_of_the_package_go_by_name(tmp_path):
    result = standin(tmp_path, '--class-map', 'ferplus')
    assert tuple(Path(result['args']['class_map']).read_text().split()) == EXPRESSIONS_8


def test_a_script_by_name_in_timm_scripts(tmp_path):
    (tmp_path / 'train.py').write_text(STANDIN.read_text())
    assert launch('train.py', '--output', tmp_path, env={'TIMM_SCRIPTS': str(tmp_path)}).exit_code == 0
    assert (tmp_path / 'result.json').is_file()


def test_other_scripts_run_as_they_are_and_import_their_siblings(tmp_path):
    (tmp_path / 'sibling.py').write_text('word = 17\n')
    script = tmp_path / 'validate.py'
    script.write_text("import sys, timm, sibling\n"
                      "if __name__ == '__main__':\n"
                      "    print(sys.argv[1:], timm.is_model('lfnsb'), sys.argv[0][-11:], sibling.word)\n")
    result = launch(script, '--model', 'lfnsb', '-c', 'not-a-recipe', '--help')
    assert result.output.strip() == "['--model', 'lfnsb', '-c', 'not-a-recipe', '--help'] True validate.py 17"


@pytest.mark.parametrize('flags, words', [
    (['--cosine-harmony', '1', '--kd-model-name', 'resnet18', '--kd-distill-type', 'feature'],
     ['--kd-model-name', 'logit']),
    (['--cosine-harmony', '1', '--torchscript'], ['--torchscript']),
    (['--cosine-harmony', '1', '--naflex-loader'], ['--naflex-loader']),
    (['--cosine-harmony', '1', '--cosine-harmony-alpha', '2'], ['[0, 1]']),
    (['--feature-loss', 'focal'], ['--feature-loss focal', 'cosine-harmony, center, island']),
    (['--feature-loss', 'center:heavy'], ['above 0, not heavy']),
    (['--feature-loss', 'center:0'], ['above 0, not 0']),
    (['--feature-loss', 'center:true'], ['above 0, not true']),
    (['--feature-loss', 'center:1:learn_centers=no'], ['learn_centers is no, but must be like its default, True']),
    (['--feature-loss', 'island:1:island=1e999'], ['island is inf']),
    (['--feature-loss', 'dacl:1:hidden=8.5'], ['hidden is 8.5']),
    (['--feature-loss', 'center:1:alpha=1'], ['no setting alpha, only learn_centers']),
    (['--feature-loss', 'island:1:5'], ['5 is not key=value']),
    (['--feature-loss', 'dacl:1:hidden=wide'], ['hidden is wide, but must be like its default']),
    (['--feature-loss', 'cosine-harmony', '--cosine-harmony', '1'], ['named twice']),
    (['--feature-loss', 'arcface', '--mixup', '0.2'], ['arcface takes no mixed labels', '--mixup']),
    (['--feature-loss', 'center', '--torchscript'], ['--feature-loss cannot be combined', '--torchscript']),
    (['--feature-loss', 'center', '--kd-model-name', 'resnet18', '--kd-distill-type', 'feature'],
     ['--kd-model-name', 'logit']),
    (['--kd-model-name', 'resnet18,resnet34', '--kd-distill-type', 'feature'], ['several teachers', 'logit']),
    (['--balance-power', '1.5'], ['--balance-power', '[0, 1]']),
    (['--balance-power', '1', '--use-multi-epochs-loader'], ['--balance-power', '--use-multi-epochs-loader']),
    (['--label-votes', 'none.csv'], ['none.csv is not a file', 'prepare ferplus']),
    (['--label-votes', __file__], ['--label-votes', 'no column for file']),
    (['--label-votes', __file__, '--aug-splits', '3'], ['--label-votes cannot be combined', '--aug-splits']),
    (['--logit-adjustment', '-1'], ['--logit-adjustment', '[0, inf]']),
    (['--photo-look', '2'], ['--photo-look', '[0, 1]']),
    (['--pretrained-path', 'weights.safetensors'], ['--pretrained-path', 'add --pretrained']),
    (['--val-split', 'test'], ["no split 'test'", 'train, validation']),  # timm would take the whole folder
    (['--config', 'no-such-recipe'], ['no-such-recipe', recipe_names()[0]]),
])
def test_what_cannot_work_is_refused_in_one_sentence(flags, words, face_folder, tmp_path):
    data = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt']
    one_sentence(launch(STANDIN, '--output', tmp_path, *data, *flags), *words)
    assert not (tmp_path / 'result.json').exists()


def test_a_script_that_goes_past_the_replaced_task_is_refused(face_folder, tmp_path):
    """A table of tasks made at import still holds timm's own: training without the loss must not go unnoticed."""
    script = changed_standin(
        tmp_path, ('\nparser =', "\nTASKS = {'classification': ClassificationTask}\nparser ="),
        ('task = ClassificationTask(', "task = TASKS['classification']("))
    args = [script, '--output', tmp_path, '--data-dir', face_folder]
    assert launch(*args).exit_code == 0
    for option, value in (('--cosine-harmony', '1'), ('--feature-loss', 'center'), ('--logit-adjustment', '1')):
        one_sentence(launch(*args, option, value), f'{option}', 'builds a ClassificationTask')


def test_scripts_of_older_releases(tmp_path, caplog):
    """They run as they are, with a warning of what is missing."""
    script = tmp_path / 'old_train.py'
    script.write_text('import argparse\nparser = argparse.ArgumentParser()\n'
                      'def main():\n    print(parser.parse_args())\n')
    assert launch(script).output.strip() == 'Namespace()'
    assert '1.0.27' in caplog.text and 'create_loader, train_one_epoch' in caplog.text
    assert launch(script, '--cosine-harmony', '1').exit_code == 2


def test_scripts_that_are_none(tmp_path):
    script = tmp_path / 'train_thing.py'
    script.write_text('x = 1\n')
    one_sentence(launch(script), 'no main()')
    missing = launch('no_such_train.py', env={'TIMM_SCRIPTS': ''})
    one_sentence(missing, 'no_such_train.py', 'TIMM_SCRIPTS', 'pytorch-image-models')


@pytest.mark.parametrize('name', ['infer.py', 'my_train.py'])
@pytest.mark.parametrize('package, words', [
    ('nobody_has_this.part', 'it needs nobody_has_this: pip install nobody_has_this'),
    ('onnxscript', 'it needs onnxscript: pip install "timm-lfnsb[export]"')])
def test_a_script_that_needs_more_than_timm(name, package, words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_text(f'import {package}\n')
    one_sentence(launch(tmp_path / name), f'{name} cannot run: {words}')


def test_a_script_whose_name_is_nearly_right(tmp_path):
    (tmp_path / 'validate.py').write_text('')
    one_sentence(launch('valdate.py', env={'TIMM_SCRIPTS': str(tmp_path)}), 'valdate.py (did you mean validate.py?)')
