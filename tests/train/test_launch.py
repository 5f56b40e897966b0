"""`timm-lfnsb run`: with a stand-in script always, with timm's own scripts where TIMM_SCRIPTS is set."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support import ROOT
from support.train_script import STANDIN, load, one_sentence, run, run_forked, standin
from timm.data import create_dataset, create_loader

from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.recipes import recipe_names
from timm_lfnsb.train.balance import BalancedDataset
from timm_lfnsb.train.data_check import warn_of_other_labels


def test_without_the_option_nothing_changes(tmp_path):
    result = standin(tmp_path)
    assert result['task'] == 'ClassificationTask' and set(result['parts']) == {'loss', 'output'}


def test_the_options_build_our_task(tmp_path):
    result = standin(
        tmp_path, '--cosine-harmony', '2', '--cosine-harmony-variant', 'paper', '--cosine-harmony-fixed-centers')
    parts = result['parts']
    assert result['task'] == 'CosineHarmonyTask'
    assert parts['loss'] == pytest.approx(parts['task_loss'] + 2 * parts['cosine_harmony_loss'])
    assert result['args']['cosine_harmony_variant'] == 'paper'
    assert result['args']['cosine_harmony_fixed_centers'] is True


def test_the_options_work_from_yaml_and_the_command_line_wins(tmp_path):
    config = tmp_path / 'config.yaml'
    config.write_text(yaml.safe_dump(dict(
        model='mobilefacenet', cosine_harmony=1., cosine_harmony_alpha=0.4, cosine_harmony_fixed_centers=True)))
    result = standin(tmp_path, '--config', config, '--cosine-harmony-alpha', '0.2')
    assert result['task'] == 'CosineHarmonyTask'
    assert result['args']['cosine_harmony_alpha'] == 0.2 and result['args']['cosine_harmony_fixed_centers'] is True


def test_the_options_show_in_help():
    result = run_forked(STANDIN, '--help')
    assert result.returncode == 0
    for flag in ('--cosine-harmony WEIGHT', '--cosine-harmony-alpha', '--cosine-harmony-variant',
                 '--cosine-harmony-fixed-centers', '--balance-power POWER', '--skip-folders NAME', '--no-epoch-seeds',
                 '--kd-model-name'):
        assert flag in result.stdout


def test_the_launchers_own_help():
    result = run('--help')
    assert result.returncode == 0 and 'TIMM_SCRIPTS' in result.stdout


def test_class_maps_of_the_package_go_by_name(tmp_path):
    result = standin(tmp_path, '--class-map', 'ferplus')
    assert tuple(Path(result['args']['class_map']).read_text().split()) == EXPRESSIONS_8


def test_a_script_by_name_in_timm_scripts(tmp_path):
    folder = tmp_path / 'clone'
    folder.mkdir()
    (folder / 'train.py').write_text(STANDIN.read_text())
    result = run_forked('train.py', '--output', tmp_path, env={'TIMM_SCRIPTS': str(folder)})
    assert result.returncode == 0 and (tmp_path / 'result.json').is_file()


def test_other_scripts_run_as_they_are(tmp_path):
    script = tmp_path / 'validate.py'
    script.write_text("import sys, timm\n"
                      "if __name__ == '__main__':\n"
                      "    print(sys.argv[1:], timm.is_model('lfnsb'), sys.argv[0][-11:])\n")
    result = run(script, '--model', 'lfnsb', '--help')
    assert result.stdout.strip() == "['--model', 'lfnsb', '--help'] True validate.py"


@pytest.mark.parametrize('flags, words', [
    (['--kd-model-name', 'resnet18', '--kd-distill-type', 'feature'], ['--kd-model-name', 'logit']),
    (['--torchscript'], ['--torchscript', '--torchcompile']),
    (['--naflex-loader'], ['NaFlex']),
    (['--aug-splits', '3'], ['--aug-splits']),
    (['--cosine-harmony-alpha', '2'], ['[0, 1]']),
])
def test_what_cannot_work_is_refused_in_one_sentence(flags, words, tmp_path):
    one_sentence(run_forked(STANDIN, '--output', tmp_path, '--cosine-harmony', '1', *flags), *words)
    assert not (tmp_path / 'result.json').exists()


def test_the_same_flags_are_free_without_the_loss(tmp_path):
    assert standin(tmp_path, '--aug-splits', '3')['task'] == 'ClassificationTask'


def changed_standin(tmp_path, old: str, new: str) -> Path:
    text = STANDIN.read_text()
    assert old in text
    script = tmp_path / 'changed_train.py'
    script.write_text(text.replace(old, new))
    return script


def test_a_script_that_goes_past_the_replaced_task_is_refused(tmp_path):
    """A table of tasks made at import still holds timm's own: training without the loss must not go unnoticed."""
    parser = 'parser = argparse.ArgumentParser(description'
    script = changed_standin(tmp_path, parser, f"TASKS = {{'classification': ClassificationTask}}\n{parser}")
    script.write_text(script.read_text().replace('task = ClassificationTask(', "task = TASKS['classification']("))
    assert run_forked(script, '--output', tmp_path).returncode == 0
    one_sentence(run_forked(script, '--output', tmp_path, '--cosine-harmony', '1'), 'builds a ClassificationTask')


def test_scripts_that_parse_known_args_or_check_the_type(tmp_path):
    script = changed_standin(
        tmp_path, 'args = parser.parse_args(remaining)', 'args, _ = parser.parse_known_args(remaining)')
    script.write_text(script.read_text().replace(
        '    parts = task(', '    assert isinstance(task, ClassificationTask)\n    parts = task('))
    for flags, name in (([], 'ClassificationTask'), (['--cosine-harmony', '1'], 'CosineHarmonyTask')):
        result = run_forked(script, '--output', tmp_path, *flags)
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / 'result.json').read_text())['task'] == name


def test_a_variant_from_yaml_is_checked(tmp_path):
    (tmp_path / 'config.yaml').write_text('cosine_harmony: 1.0\ncosine_harmony_variant: best\n')
    one_sentence(run_forked(STANDIN, '--config', tmp_path / 'config.yaml'), 'reference, intended, paper')


def test_siblings_of_a_script_can_be_imported(tmp_path):
    (tmp_path / 'sibling.py').write_text('word = 17\n')
    (tmp_path / 'inference.py').write_text('import sibling\nprint(sibling.word)\n')
    assert run_forked(tmp_path / 'inference.py', '-c', 'not-a-recipe').stdout.strip() == '17'


def test_a_validation_split_that_is_not_there_is_refused(timm_scripts, face_folder):
    """timm would validate on the whole folder, training images included."""
    one_sentence(run('train.py', '--data-dir', face_folder, '--val-split', 'test', '--model', 'mobilefacenet',
                     env={'TIMM_SCRIPTS': str(timm_scripts)}), "no split 'test'", 'train, validation')


def test_missing_script():
    result = run_forked('no_such_train.py', env={'TIMM_SCRIPTS': ''})
    one_sentence(result, 'no_such_train.py', 'TIMM_SCRIPTS', 'pytorch-image-models')


def test_unknown_recipe(tmp_path):
    one_sentence(run_forked(STANDIN, '--config', 'no-such-recipe'), 'no-such-recipe', recipe_names()[0])


def test_script_without_tasks_is_too_old(tmp_path):
    script = tmp_path / 'legacy_train.py'
    text = STANDIN.read_text().replace('from timm.task import ClassificationTask, LogitDistillationTask\n', '')
    script.write_text(text.replace(
        'task = ClassificationTask(', 'return print(args.cosine_harmony)\n    task = (lambda **k: k)('))
    assert run_forked(script).stdout.strip() == '0.0'
    one_sentence(run_forked(script, '--cosine-harmony', '1'), 'too old', '1.0.27')


def test_script_without_main(tmp_path):
    script = tmp_path / 'train_thing.py'
    script.write_text('x = 1\n')
    one_sentence(run_forked(script), 'no main()')


# --- class balance -----------------------------------------------------------------------------------------------

@pytest.fixture(scope='session')
def imbalanced_folder(tmp_path_factory) -> Path:
    """Folders of 60, 15 and 4 images."""
    root = tmp_path_factory.mktemp('imbalanced')
    for label, count in {'happiness': 60, 'neutral': 15, 'sadness': 4}.items():
        for split in ('train', 'validation'):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new('L', (32, 32), i).save(root / split / label / f'{i}.png')
    return root


def balanced(folder: Path, power: float, seed: int = 0) -> BalancedDataset:
    return BalancedDataset(create_dataset('', root=str(folder), split='train', is_training=True), power, seed)


@pytest.mark.parametrize('power, expected', [(0, (60, 15, 4)), (0.5, (7.75, 3.87, 2)), (1, (1, 1, 1))])
def test_balance_power_sets_the_share_of_each_class(power, expected, imbalanced_folder):
    dataset = balanced(imbalanced_folder, power)
    targets = torch.tensor([target for _, target in dataset.dataset.reader.samples])
    counts = torch.zeros(3)
    for epoch in range(50):
        dataset.set_epoch(epoch)
        counts += targets[dataset.indices].bincount(minlength=3)
    assert len(dataset) == 79 and counts.sum() == 50 * 79
    torch.testing.assert_close(counts / counts.sum(), torch.tensor(expected) / sum(expected), atol=0.03, rtol=0)


def test_the_balanced_draw_is_a_function_of_seed_and_epoch(imbalanced_folder):
    """So every rank makes the same draw, and a resumed run the one of the uninterrupted run."""
    a, b, other = (balanced(imbalanced_folder, 1, seed) for seed in (3, 3, 4))
    draws = []
    for epoch in (0, 1, 2):
        a.set_epoch(epoch)
        draws.append(a.indices.tolist())
    assert draws[0] != draws[1] != draws[2]
    b.set_epoch(2)
    other.set_epoch(2)
    assert b.indices.tolist() == draws[2] != other.indices.tolist()


@pytest.mark.parametrize('choices', [None, [16, 32]])
def test_worker_processes_that_live_on_see_each_epochs_draw(choices, imbalanced_folder):
    """timm's own loader, plain and with --train-img-sizes, against the draw in the main process."""
    dataset = balanced(imbalanced_folder, 1)
    loader = create_loader(
        dataset, 32, 8, is_training=True, no_aug=True, num_workers=2, persistent_workers=True, use_prefetcher=False,
        input_size_choices=choices)
    targets = torch.tensor([target for _, target in dataset.dataset.reader.samples])
    seen = []
    for epoch in range(3):
        loader.dataset.set_epoch(epoch)
        seen.append(torch.cat([target for _, target in loader]).bincount(minlength=3))
        drawn = targets[dataset.indices].bincount(minlength=3)
        assert 79 - 72 == (drawn - seen[-1]).sum() and (drawn >= seen[-1]).all()  # the loader drops the last 7
    assert any(not torch.equal(counts, seen[0]) for counts in seen[1:])


def test_balance_power_in_the_launcher(imbalanced_folder, tmp_path):
    plain, same, power = (
        standin(tmp_path, '--data-dir', imbalanced_folder, *flags)['epochs']
        for flags in ([], ['--balance-power', '0'], ['--balance-power', '1']))
    assert plain == same and plain[0] == plain[1] and [plain[0].count(i) for i in range(3)] == [60, 15, 4]
    assert power[0] != power[1] and all(16 <= epoch.count(i) <= 37 for epoch in power for i in range(3))


@pytest.mark.parametrize('flags, words', [
    (['--balance-power', '1.5'], ['[0, 1]']),
    (['--balance-power', '1', '--naflex-loader'], ['NaFlex']),
    (['--balance-power', '1', '--aug-splits', '3'], ['--aug-splits']),
    (['--balance-power', '1', '--use-multi-epochs-loader'], ['--use-multi-epochs-loader']),
])
def test_balance_power_refuses_what_cannot_work(flags, words, tmp_path):
    one_sentence(run_forked(STANDIN, '--output', tmp_path, *flags), '--balance-power', *words)


def test_balance_power_needs_a_folder():
    from timm.data import ImageDataset

    class Reader:
        def __len__(self):
            return 3

    with pytest.raises(ValueError, match='folder of images'):
        BalancedDataset(ImageDataset('', reader=Reader()), 1)


# --- pretrained weights with other labels ------------------------------------------------------------------------

@pytest.fixture
def label_run(tmp_path, caplog):
    """The warning for a run with these options and class names, '' where there is none."""
    def check(names: list[str] | tuple[str, ...] | None = None, **options) -> str:
        if names is not None:
            options['class_map'] = str(tmp_path / 'map.txt')
            Path(options['class_map']).write_text('\n'.join(names) + '\n')
        options = dict(dict(class_map='', data_dir=None, dataset='', train_split='train', num_classes=None), **options)
        caplog.clear()
        warn_of_other_labels(argparse.Namespace(**options))
        return caplog.text
    return check


ALPHABETICAL = sorted(EXPRESSIONS_8)


def test_other_label_order_is_warned_of(label_run):
    text = label_run(ALPHABETICAL, model='lfnsb.ferplus', pretrained=True)
    assert ', '.join(EXPRESSIONS_8) in text and ', '.join(ALPHABETICAL) in text
    assert 'WARNING' in text and 'map.txt' in text and '--class-map' in text and '--head-init-scale 0' in text


def test_advice_spells_the_classes_as_the_run_does(label_run):
    names = ['Anger', 'Contempt', 'Disgust', 'Fear', 'Happy', 'Neutral', 'Sad', 'Surprise']
    text = label_run(names, model='lfnsb', pretrained=True, num_classes=8)
    assert 'the lines Neutral, Happy, Sad, Surprise, Fear, Disgust, Anger, Contempt,' in text


def test_other_classes_are_warned_of(label_run):
    text = label_run(['neutral', 'yawning', *EXPRESSIONS_8[2:]], model='lfnsb', pretrained=True, num_classes=8)
    assert 'yawning' in text and 'leave the weights out' in text
    text = label_run(EXPRESSIONS_7, model='lfnsb', pretrained=True, num_classes=7)
    assert 'new classifier' in text and 'mixed up' in text


def test_the_same_labels_are_not_warned_of(label_run):
    assert label_run(EXPRESSIONS_8, model='lfnsb', pretrained=True) == ''
    synonyms = ['Neutral', 'Happy', 'sad', 'surprised', 'fearful', 'disgusted', 'angry', 'contempt']
    assert label_run(synonyms, model='lfnsb.ferplus', pretrained=True) == ''


@pytest.mark.parametrize('options', [
    dict(model='lfnsb', pretrained=False),
    dict(model='lfnsb', pretrained=True, resume='last.pth.tar'),
    dict(model='hf-hub:nobody/nothing', pretrained=True),  # not fetched
    dict(model='resnet18', pretrained=True),               # has no label names
    dict(model='no_such_model', pretrained=True),
    dict(model='local-dir:no_such_folder', pretrained=True),
    dict(model='lfnsb', initial_checkpoint='no_such.pth.tar'),
])
def test_runs_without_known_labels_are_not_warned(options, label_run):
    assert label_run(ALPHABETICAL, **options) == ''


def test_labels_of_timm_folders(label_run, tmp_path):
    folder = tmp_path / 'weights'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(dict(architecture='lfnsb', label_names=list(EXPRESSIONS_8))))
    for options in (dict(model=f'local-dir:{folder}', pretrained=True),
                    dict(model='lfnsb', pretrained_path=str(folder / 'model.safetensors'))):
        assert label_run(EXPRESSIONS_8, **options) == ''
        assert ', '.join(ALPHABETICAL) in label_run(ALPHABETICAL, **options)


def test_labels_of_a_run_of_train_py(label_run, face_folder, tmp_path):
    """A checkpoint's run left args.yaml; both runs index the folders as train.py does."""
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(
        data_dir=str(face_folder), class_map=str(face_folder / 'class_map.txt'))))
    checkpoint = str(tmp_path / 'last.pth.tar')
    text = label_run(model='lfnsb', initial_checkpoint=checkpoint, data_dir=str(face_folder))
    assert 'neutral, happiness, sadness, anger' in text and 'anger, happiness, neutral, sadness' in text
    assert 'alphabetical' in text
    assert label_run(['neutral', 'happy', 'sad', 'angry'], model='lfnsb', initial_checkpoint=checkpoint) == ''


def test_the_launcher_warns_once_on_stderr(tmp_path, face_folder):
    result = run_forked(STANDIN, '--output', tmp_path, '--model', 'lfnsb', '--pretrained', '--data-dir', face_folder)
    assert result.returncode == 0 and result.stderr.count('other classes') == 1, result.stderr
    assert ', '.join(EXPRESSIONS_8) in result.stderr and 'anger, happiness, neutral, sadness' in result.stderr


# --- timm's own scripts ------------------------------------------------------------------------------------------

BASE = ['--model', 'mobilefacenet', '--num-classes', '4', '--input-size', '3', '112', '112', '--device', 'cpu',
        '-j', '1', '-b', '24', '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '--log-interval', '1',
        '--seed', '3', '--cosine-harmony', '1', '--model-ema', '--model-ema-decay', '0.9', '--no-aug',
        '--checkpoint-hist', '5']


def test_real_train_with_registration_alone(timm_scripts, face_folder, tmp_path):
    """Without the launcher: `train.py --device-modules timm_lfnsb`."""
    args = ['--model', 'lfnsb', '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '1', '-b', '24',
            '--epochs', '1', '--val-split', '', '--device-modules', 'timm_lfnsb', '--data-dir', face_folder,
            '--output', tmp_path, '--experiment', 'plain']
    result = subprocess.run(
        [sys.executable, timm_scripts / 'train.py', *map(str, args)], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert result.returncode == 0, result.stderr[-3000:]
    validated = run('validate.py', '--model', 'lfnsb', '--num-classes', '4', '--img-size', '32', '--device', 'cpu',
                    '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--workers', '1',
                    '--checkpoint', tmp_path / 'plain' / 'last.pth.tar', env={'TIMM_SCRIPTS': str(timm_scripts)})
    assert validated.returncode == 0 and '"top1"' in validated.stdout, validated.stderr[-3000:]


def test_real_train_on_two_processes(timm_scripts, face_folder, tmp_path):
    """torchrun with two gloo processes on the CPU: both ranks end with equal centers."""
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone',
                '-m', 'timm_lfnsb']
    # timm's script, in which each rank leaves its centers in a file before it ends.
    script = tmp_path / 'ddp_train.py'
    script.write_text(f'''
import gc, os
import torch
exec(compile(open({str(timm_scripts / 'train.py')!r}).read(), 'train.py', 'exec'))
_destroy = torch.distributed.destroy_process_group
def destroy_process_group():
    from timm_lfnsb.losses.cosine_harmony import CosineHarmonyLoss
    trained, = (m for m in gc.get_objects() if type(m) is CosineHarmonyLoss and m.training)
    torch.save(trained.centers.detach(), os.environ['PROBE'] + os.environ['RANK'])
    _destroy()
torch.distributed.destroy_process_group = destroy_process_group
''')
    environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', PROBE=str(tmp_path / 'rank'))
    args = [*BASE, '-b', '6', '--data-dir', face_folder, '--epochs', '1', '--output', tmp_path, '--experiment', 'ddp',
            '--val-split', '']
    result = subprocess.run(
        [*torchrun, 'run', str(script), *map(str, args)], capture_output=True, text=True, env=environ)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(f'{tmp_path}/rank{rank}', weights_only=True) for rank in (0, 1))
    # Ranks draw their random start with different seeds, so equality is the work of DDP.
    assert torch.equal(first, second)
    assert torch.equal(first, load(tmp_path / 'ddp' / 'last.pth.tar')['task_state']['cosine_harmony']['centers'])


def test_real_train_with_class_balance(timm_scripts, imbalanced_folder, tmp_path):
    """Two gloo processes, and rising image sizes in one."""
    env = {'TIMM_SCRIPTS': str(timm_scripts)}
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone',
                '-m', 'timm_lfnsb']
    base = ['train.py', '--model', 'lfnsb', '--num-classes', '3', '--img-size', '32', '--device', 'cpu', '-j', '1',
            '-b', '8', '--epochs', '2', '--val-split', '', '--cosine-harmony', '1', '--data-dir', imbalanced_folder,
            '--output', tmp_path, '--balance-power', '1']
    for experiment, launcher, flags in (
            ('ddp', torchrun, []), ('sizes', None, ['--train-img-sizes', '32', '48'])):
        result = run(*base, '--experiment', experiment, *flags, env=env, launcher=launcher)
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stderr.count('happiness 60 -> 26, neutral 15 -> 26, sadness 4 -> 26') == 1
        settings = yaml.safe_load((tmp_path / experiment / 'args.yaml').read_text())
        assert settings['balance_power'] == 1.0
