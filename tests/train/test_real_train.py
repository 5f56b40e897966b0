"""timm's own train script with our options: each flag learns, and a killed run goes on as if it had not been."""
from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm.utils
import torch
from support.train_script import BASE, CPU, RANDOM, assert_same_end, environment, load, train

FLAGS = {
    'accumulation': ['--grad-accum-steps', '3'],
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16'],
    'mixup': ['--mixup', '0.2', '--cutmix', '1'],
    'mixup without prefetcher': ['--mixup', '0.2', '--cutmix', '1', '--no-prefetcher'],
    'channels-last': ['--channels-last'],
    'layer decay': ['--layer-decay', '0.7'],
}


SLOW_FLAGS = {
    'compiled': ['--torchcompile', 'eager'],
    'bce': ['--bce-loss'],
    'checkpointing': ['--grad-checkpointing'],
}


@pytest.mark.parametrize('name', [*FLAGS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_FLAGS)])
def test_real_train_learns_with_each_flag(name, timm_scripts, face_folder, tmp_path):
    run = train(timm_scripts, face_folder, tmp_path, 'run', '--epochs', '2', '--no-aug', '--model-ema',
                '--model-ema-decay', '0.5', '--val-split', '', *{**FLAGS, **SLOW_FLAGS}[name])
    end = load(run / 'last.pth.tar')
    start = load(run / 'checkpoint-0.pth.tar')
    centers = [state[key]['cosine_harmony']['centers'] for state in (start, end) for key in ('task_state',
                                                                                            'task_state_ema')]
    assert all(tensor.isfinite().all() for tensor in centers)
    assert not torch.equal(centers[0], centers[2]) and not torch.equal(centers[1], centers[3])  # learned, and averaged
    assert not torch.equal(centers[2], centers[3])
    assert set(end['state_dict']) == set(timm.create_model('lfnsb', num_classes=4).state_dict())  # no wrapper's names
    losses = [float(row['train_loss']) for row in csv.DictReader((run / 'summary.csv').open())]
    assert losses[1] < losses[0]
    # Steps the optimizer made: one for each group of batches, the last one smaller.
    steps = {float(state['step']) for state in end['optimizer']['state'].values()}
    assert steps == {4. if name == 'accumulation' else 8.}


def test_accumulated_gradients_are_those_of_the_mean_loss():
    """Two halves, each divided by two, as timm's script does it."""
    from timm_lfnsb import CosineHarmonyTask
    model = timm.create_model('mobilefacenet', num_classes=4, img_size=32).eval()
    task = CosineHarmonyTask(model, torch.nn.CrossEntropyLoss(), device=CPU, verbose=False).eval()
    images, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    parameters = list(task.trainable_module.parameters())
    (0.5 * (task(images[:3], target[:3])['loss'] + task(images[3:], target[3:])['loss'])).backward()
    expected = [parameter.grad.clone() for parameter in parameters]
    task.zero_grad()
    for half in (slice(0, 3), slice(3, 6)):
        with task.no_sync():
            loss = task(images[half], target[half])['loss']
            loss /= 2
            loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.slow
def test_real_train_with_inductor(timm_scripts, face_folder, tmp_path):
    """Compiled and plain, the same run: equal to rounding. A network of few layers, for the compiler is slow."""
    whole, compiled = (
        train(timm_scripts, face_folder, tmp_path, name, '--model', 'test_resnet', '--epochs', '1', '--no-aug',
              '--mixup', '0.2', '--opt', 'sgd', '--lr', '1e-3', '--val-split', '', *flags)
        for name, flags in (('whole', []), ('compiled', ['--torchcompile'])))
    a, b = (load(run / 'last.pth.tar') for run in (whole, compiled))
    assert a['metric'] == pytest.approx(b['metric'], rel=1e-2)
    torch.testing.assert_close(a['task_state'], b['task_state'], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_two_processes_accumulate_and_resume(timm_scripts, face_folder, tmp_path):
    """DDP on gloo with accumulation, mixup and EMA: resumed equals whole, as in one process."""
    def ddp(experiment: str, *flags: object) -> Path:
        command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m',
                   'timm_lfnsb', 'run', timm_scripts / 'train.py', *BASE, *RANDOM, '-j', '1', '-b', '4',
                   '--grad-accum-steps', '2', '--epochs', '2', '--data-dir', face_folder, '--output', tmp_path,
                   '--experiment', experiment, *flags]
        result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment())
        assert result.returncode == 0, result.stderr[-3000:]
        return tmp_path / experiment
    whole = ddp('whole')
    assert_same_end(whole, ddp('resumed', '--resume', whole / 'checkpoint-0.pth.tar'))


@pytest.mark.parametrize('flags', [
    RANDOM,
    [*RANDOM, '-j', '2', '--sched-on-updates', '--grad-accum-steps', '2'],
    ['-j', '2', '--mixup', '0.2', '--mixup-off-epoch', '1', '--model-ema'],
    ['-j', '1', '--train-img-sizes', '32', '48', '--balance-power', '1', '--model-ema'],
], ids=['no workers', 'two workers', 'mixup off', 'sizes and balance'])
def test_a_resumed_run_equals_an_uninterrupted_one(flags, timm_scripts, face_folder, tmp_path):
    """To the last bit: weights, centers, their averages, optimizer."""
    flags = ['--epochs', '2', '--val-split', '', *flags]
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    # The checkpoint that a run broken off in its second epoch leaves behind.
    resumed = train(timm_scripts, face_folder, tmp_path, 'resumed', *flags, '--resume', whole / 'checkpoint-0.pth.tar')
    assert_same_end(whole, resumed)
    rows = [list(csv.DictReader((run / 'summary.csv').open())) for run in (whole, resumed)]
    assert rows[0][1:] == rows[1]


def test_without_epoch_seeds_timms_own_order_is_back(timm_scripts, face_folder, tmp_path):
    flags = ['--epochs', '2', '--val-split', '', '--no-epoch-seeds']
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    resumed = train(timm_scripts, face_folder, tmp_path, 'resumed', *flags, '--resume', whole / 'checkpoint-0.pth.tar')
    with pytest.raises(AssertionError, match=r'state_dict'):
        assert_same_end(whole, resumed, keys=['state_dict'])


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
    args = [*BASE, *flags, '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt',
            '--output', tmp_path, '--experiment', 'killed']
    killed = subprocess.run([sys.executable, '-m', 'timm_lfnsb', 'run', *map(str, [script, *args])],
                            capture_output=True, text=True, env=environment())
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-3000:]
    assert 'Train: 1 [   0/4' in killed.stderr
    last = tmp_path / 'killed' / 'last.pth.tar'
    assert load(last)['epoch'] == 0
    resumed = train(timm_scripts, face_folder, tmp_path, 'killed', *flags, '--resume', last)
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    assert_same_end(whole, resumed, keys=['state_dict', 'task_state', 'optimizer', 'epoch'])
    assert (whole / 'summary.csv').read_text() == (resumed / 'summary.csv').read_text()  # one header
    best = [load(run / 'model_best.pth.tar') for run in (whole, resumed)]
    assert best[0]['epoch'] == best[1]['epoch'] and best[0]['metric'] == best[1]['metric']
    names = [sorted(path.name for path in run.iterdir()) for run in (whole, resumed)]
    assert names[0] == names[1]
