"""timm's own train script with our options: each flag learns, and a killed run goes on as if it had not been."""
from __future__ import annotations

import csv
import shutil
import signal

import pytest
import timm
import torch
import yaml
from support.train_script import BASE, RANDOM, TORCHRUN, assert_same_end, load, python, train

SOFT = ['--feature-loss', 'separate', '--feature-loss', 'dacl']
ALL = [*SOFT, *(text for name in ('center', 'island', 'affinity', 'dda:0.1', 'arcface:0.1', 'cosface:0.1', 'sphereface')
                for text in ('--feature-loss', name))]


@pytest.mark.parametrize('flags', [
    ['--grad-accum-steps', '3'],
    ['--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--layer-decay', '0.7'],
    ['--mixup', '0.2', '--cutmix', '1'],
    ['--mixup', '0.2', '--cutmix', '1', '--no-prefetcher', *SOFT],
    pytest.param(['--amp', '--amp-dtype', 'bfloat16', *ALL], id='--amp, all losses'),
    pytest.param(['--torchcompile', 'eager'], marks=pytest.mark.slow),
    pytest.param(['--torchcompile', 'eager', *ALL], marks=pytest.mark.slow, id='--torchcompile, all losses'),
    pytest.param(['--bce-loss'], marks=pytest.mark.slow),
    pytest.param(['--grad-checkpointing'], marks=pytest.mark.slow),
], ids=' '.join)
@pytest.mark.filterwarnings('ignore:__array_wrap__ must:DeprecationWarning')  # in the library, of NumPy
def test_real_train_learns_with_each_flag(flags, timm_scripts, face_folder, tmp_path):
    run = train(timm_scripts, face_folder, tmp_path, 'run', '--epochs', '2', '--no-aug', '--model-ema',
                '--model-ema-decay', '0.5', '--val-split', '', '--model', 'lfnsb', *flags)
    start, end = load(run / 'checkpoint-0.pth.tar'), load(run / 'last.pth.tar')
    names = {text.partition(':')[0] for text in flags if text in ALL} - {'--feature-loss'}
    assert set(end['task_state']) == {'cosine_harmony', *names}
    for name in end['task_state']:
        for key in end['task_state'][name]:
            values = [state[task][name][key] for state in (start, end) for task in ('task_state', 'task_state_ema')]
            assert all(tensor.isfinite().all() for tensor in values)
            assert not torch.equal(values[0], values[2]) and not torch.equal(values[1], values[3])  # learned, averaged
            assert not torch.equal(values[2], values[3])
    assert set(end['state_dict']) == set(timm.create_model('lfnsb', num_classes=4).state_dict())  # no wrapper's names
    losses = [float(row['train_loss']) for row in csv.DictReader((run / 'summary.csv').open())]
    assert losses[1] < losses[0]
    # Steps the optimizer made: one for each group of batches, the last one smaller.
    steps = {float(state['step']) for state in end['optimizer']['state'].values()}
    assert steps == {4. if '--grad-accum-steps' in flags else 8.}


@pytest.mark.parametrize('flags', [
    [*RANDOM, '-j', '2', '--sched-on-updates', '--grad-accum-steps', '2'],
    ['--mixup', '0.2', '--mixup-off-epoch', '1', '--model-ema', '--feature-loss', 'dacl', '--feature-loss', 'center:1'],
    ['-j', '1', '--train-img-sizes', '32', '48', '--balance-power', '1', '--model-ema'],
    ['--no-epoch-seeds'],
], ids=['two workers', 'mixup off', 'sizes and balance', "timm's own order"])
def test_a_resumed_run_equals_an_uninterrupted_one(flags, timm_scripts, face_folder, tmp_path):
    """To the last bit: weights, centers, their averages, optimizer; but not in timm's own order."""
    flags = ['--epochs', '2', '--val-split', '', *flags]
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    # The checkpoint that a run broken off in its second epoch leaves behind.
    resumed = train(timm_scripts, face_folder, tmp_path, 'resumed', *flags, '--resume', whole / 'checkpoint-0.pth.tar')
    if '--no-epoch-seeds' in flags:
        with pytest.raises(AssertionError, match=r'state_dict'):
            assert_same_end(whole, resumed, keys=['state_dict'])
        return
    assert_same_end(whole, resumed)
    rows = [list(csv.DictReader((run / 'summary.csv').open())) for run in (whole, resumed)]
    assert rows[0][1:] == rows[1]


def test_kill_in_mid_epoch_loses_nothing_but_the_epoch(timm_scripts, face_folder, tmp_path):
    """kill -9 in the second batch of epoch 1, then --resume in the same folder."""
    script = tmp_path / 'kill_train.py'
    script.write_text(f'''
import os, signal
exec(compile(open({str(timm_scripts / 'train.py')!r}).read(), 'train.py', 'exec'))
def update_ema(self, step):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
ClassificationTask.update_ema = update_ema
''')
    flags = ['--epochs', '2', '-j', '2', '--mixup', '0.2', '--drop', '0.3']
    killed = python('-m', 'timm_lfnsb', 'run', script, *BASE, *flags, '--data-dir', face_folder, '--class-map',
                    face_folder / 'class_map.txt', '--output', tmp_path, '--experiment', 'killed')
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert 'Train: 1 [   0/4' in killed.stderr
    last = tmp_path / 'killed' / 'last.pth.tar'
    assert load(last)['epoch'] == 0
    resumed = train(timm_scripts, face_folder, tmp_path, 'killed', *flags, '--resume', last)
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    assert_same_end(whole, resumed, keys=['state_dict', 'task_state', 'optimizer', 'epoch'])
    assert (whole / 'summary.csv').read_text() == (resumed / 'summary.csv').read_text()  # one header
    assert load(whole / 'model_best.pth.tar')['epoch'] == load(resumed / 'model_best.pth.tar')['epoch']
    names = [sorted(path.name for path in run.iterdir()) for run in (whole, resumed)]
    assert names[0] == names[1]


def test_two_processes_with_class_balance(timm_scripts, face_folder, tmp_path):
    """torchrun with two gloo processes on the CPU."""
    shutil.copytree(face_folder, tmp_path / 'faces')
    for path in (tmp_path / 'faces' / 'train' / 'anger').glob('*[1-5].png'):
        path.unlink()
    result = python(
        *TORCHRUN, timm_scripts / 'train.py', *BASE, '--model-ema', '--balance-power', '1', '--data-dir',
        tmp_path / 'faces', '--epochs', '1', '--output', tmp_path, '--experiment', 'ddp', '--val-split', '')
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count('anger 1 -> 5, happiness 6 -> 5, neutral 6 -> 5, sadness 6 -> 5') == 1
    assert yaml.safe_load((tmp_path / 'ddp' / 'args.yaml').read_text())['balance_power'] == 1.0
    assert load(tmp_path / 'ddp' / 'last.pth.tar')['task_state']['cosine_harmony']['centers'].isfinite().all()
