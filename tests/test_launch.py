"""`timm-lfnsb run`: with a stand-in script always, with timm's own scripts where TIMM_SCRIPTS is set."""
from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.recipes import class_map_path, recipe_names, recipe_path

STANDIN = Path(__file__).parent / 'standin_train.py'


def run(*args: str, env: dict[str, str] | None = None, launcher: list[str] | None = None):
    command = [*(launcher or [sys.executable, '-m', 'timm_lfnsb']), 'run', *map(str, args)]
    environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **(env or {}))
    return subprocess.run(command, capture_output=True, text=True, env=environ)


def standin(tmp_path, *args: str) -> dict:
    result = run(STANDIN, '--output', tmp_path, *args)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / 'result.json').read_text())


def one_sentence(result, *words: str) -> None:
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr
    assert result.stderr.startswith('Error: ') and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


def test_without_the_option_nothing_changes(tmp_path):
    result = standin(tmp_path)
    assert result['task'] == 'ClassificationTask' and set(result['parts']) == {'loss', 'output'}


def test_the_options_build_our_task(tmp_path):
    result = standin(
        tmp_path, '--cosine-harmony', '2', '--cosine-harmony-variant', 'paper', '--cosine-harmony-fixed-centers')
    parts = result['parts']
    assert result['task'] == 'CosineHarmonyTask'
    assert parts['loss'] == pytest.approx(parts['task_loss'] + 2 * parts['cosine_harmony_loss'])
    assert result['args']['cosine_harmony_variant'] == 'paper' and result['args']['cosine_harmony_fixed_centers'] is True


def test_the_options_work_from_yaml_and_the_command_line_wins(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(dict(
        model='mobilefacenet', cosine_harmony=1., cosine_harmony_alpha=0.4, cosine_harmony_fixed_centers=True)))
    result = standin(tmp_path, '--config', config, '--cosine-harmony-alpha', '0.2')
    assert result['task'] == 'CosineHarmonyTask'
    assert result['args']['cosine_harmony_alpha'] == 0.2 and result['args']['cosine_harmony_fixed_centers'] is True


def test_the_options_show_in_help():
    result = run(STANDIN, '--help')
    assert result.returncode == 0
    for flag in ('--cosine-harmony WEIGHT', '--cosine-harmony-alpha', '--cosine-harmony-variant',
                 '--cosine-harmony-fixed-centers', '--kd-model-name'):
        assert flag in result.stdout


def test_the_launchers_own_help():
    result = run('--help')
    assert result.returncode == 0 and 'TIMM_SCRIPTS' in result.stdout


def test_class_maps_of_the_package_go_by_name(tmp_path):
    result = standin(tmp_path, '--class-map', 'ferplus')
    assert tuple(Path(result['args']['class_map']).read_text().split()) == EXPRESSIONS_8


def test_shipped_class_maps_are_the_canonical_order():
    for path in recipe_path(recipe_names()[0]).parent.glob('*.classes.txt'):
        assert tuple(path.read_text().split()) in (EXPRESSIONS_7, EXPRESSIONS_8)
    assert class_map_path('nonsense') is None


@pytest.mark.parametrize('name', recipe_names())
def test_recipes_are_yaml_with_existing_class_maps(name):
    recipe = yaml.safe_load(recipe_path(name).read_text())
    assert class_map_path(recipe['class_map']) is not None
    assert len(class_map_path(recipe['class_map']).read_text().split()) == recipe['num_classes']


def test_a_script_by_name_in_timm_scripts(tmp_path):
    folder = tmp_path / 'clone'
    folder.mkdir()
    (folder / 'train.py').write_text(STANDIN.read_text())
    result = run('train.py', '--output', tmp_path, env={'TIMM_SCRIPTS': str(folder)})
    assert result.returncode == 0 and (tmp_path / 'result.json').is_file()


def test_other_scripts_run_as_they_are(tmp_path):
    script = tmp_path / 'validate.py'
    script.write_text("import sys, timm\n"
                      "if __name__ == '__main__':\n    print(sys.argv[1:], timm.is_model('lfnsb'), sys.argv[0][-11:])\n")
    result = run(script, '--model', 'lfnsb', '--help')
    assert result.stdout.strip() == "['--model', 'lfnsb', '--help'] True validate.py"


@pytest.mark.parametrize('flags, words', [
    (['--kd-model-name', 'resnet18'], ['knowledge distillation']),
    (['--torchscript'], ['--torchscript', '--torchcompile']),
    (['--naflex-loader'], ['NaFlex']),
    (['--aug-splits', '3'], ['--aug-splits']),
    (['--cosine-harmony-alpha', '2'], ['[0, 1]']),
])
def test_what_cannot_work_is_refused_in_one_sentence(flags, words, tmp_path):
    one_sentence(run(STANDIN, '--output', tmp_path, '--cosine-harmony', '1', *flags), *words)
    assert not (tmp_path / 'result.json').exists()


def test_the_same_flags_are_free_without_the_loss(tmp_path):
    assert standin(tmp_path, '--aug-splits', '3')['task'] == 'ClassificationTask'


def test_missing_script():
    environ = {'TIMM_SCRIPTS': ''}
    one_sentence(run('no_such_train.py', env=environ), 'no_such_train.py', 'TIMM_SCRIPTS', 'pytorch-image-models')


def test_unknown_recipe(tmp_path):
    one_sentence(run(STANDIN, '--config', 'no-such-recipe'), 'no-such-recipe', recipe_names()[0])


def test_script_without_tasks_is_too_old(tmp_path):
    script = tmp_path / 'legacy_train.py'
    text = STANDIN.read_text().replace('from timm.task import ClassificationTask\n', '')
    script.write_text(text.replace('task = ClassificationTask(', 'return print(args.cosine_harmony)\n    task = (lambda **k: k)('))
    assert run(script).stdout.strip() == '0.0'
    one_sentence(run(script, '--cosine-harmony', '1'), 'too old', '1.0.27')


def test_script_without_main(tmp_path):
    script = tmp_path / 'train_thing.py'
    script.write_text('x = 1\n')
    one_sentence(run(script), 'no main()')


# --- timm's own scripts ------------------------------------------------------------------------------------------

BASE = ['--model', 'mobilefacenet', '--num-classes', '4', '--input-size', '3', '112', '112', '--device', 'cpu', '-j', '1',
        '-b', '24', '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '--log-interval', '1', '--seed', '3',
        '--cosine-harmony', '1', '--model-ema', '--model-ema-decay', '0.9', '--no-aug', '--checkpoint-hist', '5']


def read_losses(run_dir: Path) -> list[float]:
    with open(run_dir / 'summary.csv') as file:
        return [float(row['train_loss']) for row in csv.DictReader(file)]


def load(path: Path) -> dict:
    import argparse
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def test_real_train_checkpoint_and_resume(timm_scripts, face_folder, tmp_path):
    """One batch an epoch fixes the order of samples: a resumed run repeats the uninterrupted one's losses."""
    env = {'TIMM_SCRIPTS': str(timm_scripts)}
    base = [*BASE, '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--epochs', '3',
            '--output', tmp_path]
    whole = run('train.py', *base, '--experiment', 'whole', env=env)
    assert whole.returncode == 0, whole.stderr[-3000:]
    # A run broken off after one epoch: its checkpoint is the uninterrupted run's first.
    first = load(tmp_path / 'whole' / 'checkpoint-0.pth.tar')
    assert first['epoch'] == 0 and {'state_dict', 'state_dict_ema', 'task_state', 'task_state_ema'} <= set(first)
    assert first['args'].cosine_harmony == 1.0
    assert not any('loss.' in key or key.startswith('model.') for key in first['state_dict'])

    resumed = run('train.py', *base, '--experiment', 'resumed', '--resume', tmp_path / 'whole' / 'checkpoint-0.pth.tar',
                  env=env)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert read_losses(tmp_path / 'resumed') == pytest.approx(read_losses(tmp_path / 'whole')[1:], abs=1e-4)
    a, b = (load(tmp_path / name / 'last.pth.tar') for name in ('whole', 'resumed'))
    assert a['epoch'] == b['epoch'] == 2
    for key in ('task_state', 'task_state_ema'):
        torch.testing.assert_close(a[key]['cosine_harmony'], b[key]['cosine_harmony'], rtol=1e-4, atol=1e-4)
    for key in ('state_dict', 'state_dict_ema'):
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-3)
    assert not torch.equal(a['task_state']['cosine_harmony']['centers'], first['task_state']['cosine_harmony']['centers'])

    settings = yaml.safe_load((tmp_path / 'whole' / 'args.yaml').read_text())
    assert settings['cosine_harmony'] == 1.0 and settings['cosine_harmony_variant'] == 'intended'

    validated = run('validate.py', '--model', 'mobilefacenet', '--num-classes', '4', '--device', 'cpu', '--data-dir',
                    face_folder, '--class-map', face_folder / 'class_map.txt', '--checkpoint',
                    tmp_path / 'whole' / 'last.pth.tar', '--workers', '1', env=env)
    assert validated.returncode == 0 and '"top1"' in validated.stdout, validated.stderr[-3000:]


def test_real_train_with_registration_alone(timm_scripts, face_folder, tmp_path):
    """Without the launcher: `train.py --device-modules timm_lfnsb`."""
    args = ['--model', 'lfnsb', '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '1', '-b', '24',
            '--epochs', '1', '--val-split', '', '--device-modules', 'timm_lfnsb', '--data-dir', face_folder,
            '--output', tmp_path, '--experiment', 'plain']
    result = subprocess.run(
        [sys.executable, timm_scripts / 'train.py', *map(str, args)], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / 'plain' / 'last.pth.tar').is_file()


def test_real_train_on_two_processes(timm_scripts, face_folder, tmp_path):
    """torchrun with two gloo processes on the CPU: both ranks end with equal centers."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port', '29533',
                '-m', 'timm_lfnsb']
    # Each rank leaves its centers in a file when it ends.
    (tmp_path / 'sitecustomize.py').write_text('''
import os, sys
if 'RANK' in os.environ and 'LOCAL_RANK' in os.environ:
    import atexit
    def report():
        import gc
        from timm_lfnsb.loss import CosineHarmonyLoss
        import torch
        found = [m for m in gc.get_objects() if type(m) is CosineHarmonyLoss and m.training]
        if found:
            torch.save([m.centers.detach() for m in found], os.environ['PROBE'] + os.environ['RANK'])
    atexit.register(report)
''')
    environ = dict(os.environ, PYTHONPATH=f'{tmp_path}{os.pathsep}{ROOT}', OMP_NUM_THREADS='1', PROBE=str(tmp_path / 'rank'),
                   TIMM_SCRIPTS=str(timm_scripts))
    args = [*BASE, '-b', '6', '--data-dir', face_folder, '--epochs', '1', '--output', tmp_path, '--experiment', 'ddp',
            '--val-split', '']
    result = subprocess.run(
        [*torchrun, 'run', 'train.py', *map(str, args)], capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stderr[-3000:]
    ranks = [torch.load(f'{tmp_path}/rank{rank}', weights_only=True) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) >= 1
    for a, b in zip(*ranks, strict=True):
        assert torch.equal(a, b)
    saved = load(tmp_path / 'ddp' / 'last.pth.tar')['task_state']['cosine_harmony']['centers']
    assert any(torch.equal(saved, center) for center in ranks[0])
