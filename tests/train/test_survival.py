"""Training that survives: a kill, a restart, a full disk, a loss that is not a number, folders that do not fit.

timm's own train script runs in this process wherever nothing has to be killed: its start takes longer than its epochs.
"""
from __future__ import annotations

import argparse
import csv
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm.utils
import torch
from support import ROOT, TESTS
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.task import ClassificationTask, TrainingTask
from torch.utils.data import Dataset

from timm_lfnsb.errors import UserError
from timm_lfnsb.train import launch
from timm_lfnsb.train.balance import BalancedDataset
from timm_lfnsb.train.checkpoints import SafeSaver, check_output, summarize
from timm_lfnsb.train.data_check import check_class_folders
from timm_lfnsb.train.launch import extend_train_script, load_module, run_script
from timm_lfnsb.train.seeds import SeededDataset, mix_seed, seed_epoch
from timm_lfnsb.train.watch import watch_loss

STANDIN = TESTS / 'support' / 'standin_train.py'
CPU = torch.device('cpu')
# Four batches an epoch, with randomness in the order, the workers, the collation (mixup), the loader (erasing) and the
# network (dropout).
BASE = ['--model', 'lfnsb', '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '6',
        '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '--log-interval', '1', '--seed', '3',
        '--cosine-harmony', '1', '--checkpoint-hist', '3']
RANDOM = ['--mixup', '0.2', '--cutmix', '1', '--reprob', '0.5', '--drop', '0.3', '--aa', 'rand-m5-n2',
          '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--clip-grad', '5']


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Undo what a run changes in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingTask, '__init__', TrainingTask.__init__)
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'path', list(sys.path))
        yield patch


def train(scripts: Path, data: Path, output: Path, experiment: str, *flags: object) -> Path:
    """Run train.py in this process; returns the folder of the run."""
    args = [*BASE, '--data-dir', data, '--class-map', data / 'class_map.txt', '--output', output,
            '--experiment', experiment, *flags]
    with patched():
        run_script(str(scripts / 'train.py'), [str(arg) for arg in args])
    return output / experiment


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_equal(a, b, where: str = '') -> None:
    """Equal to the last bit, tensors and all."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f'{where}/{i}')
    else:
        assert a == b, where


STATE = ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer', 'epoch', 'metric')


def assert_same_end(a: Path, b: Path, keys=STATE) -> None:
    first, second = load(a / 'last.pth.tar'), load(b / 'last.pth.tar')
    for key in keys:
        assert_equal(first[key], second[key], key)


# --- timm's flags with the loss ----------------------------------------------------------------------------------

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


def environment(**more: str) -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **more)


# --- kill and resume ---------------------------------------------------------------------------------------------

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


class Noise(Dataset):
    """Images that show what the random generators gave: python's, numpy's and torch's."""

    transform = None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        import random

        import numpy as np
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()]).view(4, 1, 1), 0


def draws(loader, epochs, seed=0, rank=0) -> dict[int, torch.Tensor]:
    seen = {}
    for epoch in epochs:
        seed_epoch(loader, seed, epoch, rank)
        batches = torch.cat([images.flatten(1) for images, _ in loader])
        seen[epoch] = torch.cat([batches.flatten(), torch.rand(1)])
    return seen


def noise_loader(num_workers: int, seed: int = 0, rank: int = 0, **kwargs):
    return create_loader(
        SeededDataset(Noise(), seed, rank), (4, 1, 1), 3, is_training=True, num_workers=num_workers,
        use_prefetcher=False, device=CPU, **kwargs)


@pytest.mark.parametrize('num_workers', [0, 1, 2])
def test_all_draws_of_an_epoch_depend_on_seed_and_epoch_alone(num_workers):
    """Also of workers that live on, and of this process after the loader is through."""
    whole = draws(noise_loader(num_workers), [0, 1, 2])
    torch.manual_seed(99)
    resumed = draws(noise_loader(num_workers), [2])
    assert torch.equal(whole[2], resumed[2])
    assert not torch.equal(whole[0], whole[1]) and not torch.equal(whole[1], whole[2])
    assert not torch.equal(draws(noise_loader(num_workers, seed=1), [0], seed=1)[0], whole[0])
    assert not torch.equal(draws(noise_loader(num_workers, rank=1), [0], rank=1)[0][1::4], whole[0][1::4])
    # No two images of an epoch share their random numbers, nor do two workers.
    numbers = whole[0][:-1].view(-1, 4)[:, 1]
    assert numbers.unique().numel() == len(numbers)


def test_seeds_do_not_collide_as_sums_would():
    seeds = {mix_seed(seed, epoch, rank, worker) for seed in range(4) for epoch in range(8) for rank in range(4)
             for worker in range(4)}
    assert len(seeds) == 4 * 8 * 4 * 4 and all(0 <= seed < 2 ** 32 for seed in seeds)
    assert mix_seed(-1, 0) != mix_seed(1, 0)


def test_the_seeded_dataset_is_the_dataset_it_wraps(face_folder):
    import pickle
    plain = create_dataset('', root=str(face_folder), split='train', is_training=True)
    dataset = SeededDataset(plain, 3)
    dataset.transform = len
    assert plain.transform is len and dataset.transform is len
    assert len(dataset) == 24 and dataset.reader is plain.reader and dataset.filename(5) == plain.filename(5)
    assert not hasattr(dataset, 'set_epoch') and hasattr(SeededDataset(BalancedDataset(plain, 1), 3), 'set_epoch')
    assert len(pickle.loads(pickle.dumps(dataset))) == 24  # for workers that are spawned


def test_mixup_off_reaches_the_workers(tmp_path, face_folder):
    """timm switches its mixup off in a copy that worker processes which live on never see."""
    module = argparse.Namespace(**vars(load_module(STANDIN)), create_loader=create_loader)
    collate = FastCollateMixup(mixup_alpha=1., num_classes=4, label_smoothing=0.)
    dataset = create_dataset('', root=str(face_folder), split='train', is_training=True)
    module.parser = argparse.ArgumentParser()
    module.parser.add_argument('--mixup-off-epoch', type=int, default=0)
    extend_train_script(module)
    module.parser.parse_args(['--mixup-off-epoch', '1'])
    loader = module.create_loader(
        dataset, (3, 32, 32), 6, is_training=True, num_workers=1, collate_fn=collate, device=CPU)
    mixed = []
    for enabled in (True, False):
        loader.mixup_enabled = enabled
        mixed.append(any(bool(((target > 0).sum(1) > 1).any()) for _, target in loader))
    assert mixed == [True, False]


def test_a_script_that_imports_the_saver_by_name_gets_ours():
    from timm.utils import CheckpointSaver, update_summary
    module = argparse.Namespace(parser=argparse.ArgumentParser(), CheckpointSaver=CheckpointSaver, utils=timm.utils)
    extend_train_script(module)
    module.parser.parse_args([])
    assert module.CheckpointSaver is module.utils.CheckpointSaver is SafeSaver
    assert module.utils.update_summary is summarize and module.utils.random_seed is timm.utils.random_seed
    assert timm.utils.CheckpointSaver is CheckpointSaver and timm.utils.update_summary is update_summary


@pytest.mark.parametrize('flag, word', [('--use-multi-epochs-loader', 'reads ahead'), ('--naflex-loader', 'NaFlex')])
def test_loaders_that_cannot_be_seeded_are_warned_of(flag, word, tmp_path, caplog):
    with patched():
        run_script(str(STANDIN), ['--output', str(tmp_path), flag])
    assert word in caplog.text and 'resumed' in caplog.text


def test_a_script_without_the_usual_epoch_is_warned_of(tmp_path, caplog):
    script = tmp_path / 'old_train.py'
    script.write_text(STANDIN.read_text().replace('def train_one_epoch(', 'def train_epoch('))
    with patched():
        run_script(str(script), ['--output', str(tmp_path)])
    assert 'no create_dataset or train_one_epoch' in caplog.text and 'goes unnoticed' in caplog.text


# --- disk --------------------------------------------------------------------------------------------------------

def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match=r'file/run cannot be written \(Not a directory\).*--output'):
        check_output(argparse.Namespace(output=str(tmp_path / 'file'), experiment='run'))
    if sys.platform == 'linux':
        with pytest.raises(UserError, match=r'/proc/none cannot be written'):
            check_output(argparse.Namespace(output='/proc/none', experiment=''))
    check_output(argparse.Namespace(output=str(tmp_path / 'new' / 'deep'), experiment='run'))
    assert list((tmp_path / 'new' / 'deep' / 'run').iterdir()) == []


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may write everywhere: run as a user')
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r'Permission denied'):
        check_output(argparse.Namespace(output=str(tmp_path), experiment='run'))


def test_other_processes_of_a_run_do_not_write(tmp_path, monkeypatch):
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    check_output(argparse.Namespace(output=str(tmp_path / 'new'), experiment=''))
    assert not (tmp_path / 'new').exists()


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r'none.pth.tar is not a file'):
        check_output(argparse.Namespace(output=str(tmp_path), resume=str(tmp_path / 'none.pth.tar')))


class Run:
    """A task with its optimizer, and savers for it."""

    def __init__(self, opt: str = 'adamw', ema: bool = False, model: str = 'mobilefacenet'):
        from timm.optim import create_optimizer_v2
        self.task = ClassificationTask(
            timm.create_model(model, num_classes=4, img_size=32), torch.nn.CrossEntropyLoss(), device=CPU,
            verbose=False)
        if ema:
            self.task.setup_ema(decay=0.9)
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), opt=opt, lr=1e-3, momentum=0.9)

    def step(self) -> None:
        self.task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
        self.optimizer.step()

    def saver(self, folder: Path, **kwargs) -> SafeSaver:
        args = argparse.Namespace(
            model='mobilefacenet', epochs=kwargs.pop('epochs', 3), resume=kwargs.pop('resume', ''))
        return SafeSaver(self.task.get_trainable_module(), self.optimizer, args=args, task=self.task,
                         checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: as near to a full disk as a test gets without one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_leaves_the_last_checkpoint_whole(tmp_path):
    run = Run()
    run.step()
    saver = run.saver(tmp_path)
    saver.save_checkpoint(0, metric=1.)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar'}
    size = len(before['last.pth.tar'])
    for save in (lambda: saver.save_checkpoint(1, metric=2.), lambda: saver.save_recovery(1, 5)):
        with file_size_limit(size // 2), pytest.raises(UserError) as error:
            save()
        message = str(error.value)
        assert 'epoch 1' in message and 'free some space' in message and f'--resume {tmp_path}/last.pth.tar' in message
        assert '\n' not in message
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # and nothing half-written
    saver.save_checkpoint(1, metric=2.)
    assert load(tmp_path / 'last.pth.tar')['epoch'] == 1 == load(tmp_path / 'model_best.pth.tar')['epoch']


def test_without_hard_links_a_failed_copy_keeps_the_best_checkpoint(tmp_path, monkeypatch):
    """Where the file system has none, timm copies; it removes the old file before."""
    run = Run()
    saver = run.saver(tmp_path)
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links here')))
    saver.save_checkpoint(0, metric=1.)
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 0

    def full(src, dst):
        Path(dst).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(shutil, 'copy2', full)
    with pytest.raises(UserError, match=r'No space left on device'):
        saver.save_checkpoint(1, metric=2.)
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 0
    assert not list(tmp_path.glob('*.tmp'))


def test_real_train_on_a_disk_that_fills(timm_scripts, face_folder, tmp_path, monkeypatch):
    """Epoch 0 is saved, epoch 1 is not; the run ends with one sentence and goes on from epoch 0."""
    save, count = torch.save, 0

    def fill(*args, **kwargs):
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(*args, **kwargs)

    monkeypatch.setattr(torch, 'save', fill)
    flags = ['--epochs', '2', '--val-split', '']
    with pytest.raises(UserError, match=r'checkpoint of epoch 1 cannot be written.*No space left.*--resume'):
        train(timm_scripts, face_folder, tmp_path, 'full', *flags)
    last = tmp_path / 'full' / 'last.pth.tar'
    assert load(last)['epoch'] == 0
    train(timm_scripts, face_folder, tmp_path, 'full', *flags, '--resume', last)
    assert load(last)['epoch'] == 1


def test_other_files_of_a_run_on_a_full_disk(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text("def main():\n    raise OSError(28, 'No space left on device', 'summary.csv')\n")
    with patched(), pytest.raises(UserError, match=r'summary.csv cannot be written \(No space left on device\)'):
        run_script(str(script), [])
    script.write_text("def main():\n    raise OSError(2, 'No such file', 'other.csv')\n")
    with patched(), pytest.raises(FileNotFoundError):
        run_script(str(script), [])


def test_a_restart_in_the_same_folder_keeps_the_best(tmp_path):
    if not hasattr(timm.utils.CheckpointSaver, 'load_state_dict_from_checkpoint'):
        pytest.skip('needs timm 1.0.31, whose checkpoints remember their history')
    run = Run()
    saver = run.saver(tmp_path, max_history=2)
    for epoch, metric in enumerate((3., 9., 5.)):
        saver.save_checkpoint(epoch, metric=metric)
    saver = run.saver(tmp_path, max_history=2, resume=str(tmp_path / 'last.pth.tar'))
    assert saver.save_checkpoint(3, metric=6.) == (9., 1)
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 1
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-1.pth.tar', 'checkpoint-3.pth.tar'}
    # In another folder there is no history to keep.
    (tmp_path / 'new').mkdir()
    assert run.saver(tmp_path / 'new', resume=str(tmp_path / 'last.pth.tar')).best_metric is None


def test_summary_has_one_header(tmp_path):
    path = tmp_path / 'summary.csv'
    for epoch in (0, 1):  # timm's script asks for a header at each start
        summarize(epoch, dict(loss=1.), dict(top1=2.), str(path), lr=0.1, write_header=True)
    assert path.read_text().split() == ['epoch,train_loss,eval_top1,lr', '0,1.0,2.0,0.1', '1,1.0,2.0,0.1']


# --- a loss that is not a number ---------------------------------------------------------------------------------

def test_the_last_batch_of_an_epoch_is_watched_too():
    task, images = Run().task, torch.full((2, 3, 32, 32), torch.inf)
    options = argparse.Namespace(clip_grad=1., amp=True, amp_dtype='float16')
    with pytest.raises(UserError, match=r'batch 0 of 1 .*--amp-dtype bfloat16') as error, \
            watch_loss(task, [0], 0, options):
        task(images, torch.tensor([0, 1]))
    assert '--clip-grad' not in str(error.value)
    task = Run().task
    with watch_loss(task, [0], 1, options):
        task(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1]))
    assert not task._forward_hooks and not task._forward_pre_hooks


def test_weights_that_are_nan_are_not_saved(tmp_path):
    run = Run(ema=True)
    saver = run.saver(tmp_path)
    with torch.no_grad():
        run.task.get_trainable_module(ema=True).module.fc.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=r'not finite at the end of epoch 0.*there is none before'):
        saver.save_checkpoint(0, metric=1.)
    assert list(tmp_path.iterdir()) == []
    run.task.get_trainable_module(ema=True).module.fc.weight.data.zero_()
    saver.save_checkpoint(0, metric=1.)
    run.task.get_trainable_module().fc.weight.data.fill_(torch.inf)
    for save in (lambda: saver.save_checkpoint(1, metric=2.), lambda: saver.save_recovery(1, 3)):
        with pytest.raises(UserError, match=r'--resume .*last.pth.tar'):
            save()
    assert {path.name for path in tmp_path.iterdir()} == {'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar'}
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 0


@pytest.mark.parametrize('flags', [[], ['--cosine-harmony', '0', '--amp', '--amp-dtype', 'bfloat16']])
def test_real_train_stops_at_a_loss_that_is_nan(flags, timm_scripts, face_folder, tmp_path):
    """A learning rate that blows the weights up, with and without the loss of this package."""
    with pytest.raises(UserError, match=r'in epoch 0, batch [12] of 4.*--clip-grad 1'):
        train(timm_scripts, face_folder, tmp_path, 'nan', '--opt', 'sgd', '--lr', '1e30', '--epochs', '2', *flags)
    assert not list((tmp_path / 'nan').glob('*.pth.tar'))


def test_real_train_keeps_the_good_checkpoint_when_the_loss_becomes_nan(timm_scripts, face_folder, tmp_path):
    """In the last batch of epoch 1, through the command line."""
    script = tmp_path / 'nan_train.py'
    script.write_text(f'''
exec(compile(open({str(timm_scripts / 'train.py')!r}).read(), 'train.py', 'exec'))
class SoftCrossEntropy(nn.Module):
    count = 0
    def forward(self, output, target):
        SoftCrossEntropy.count += 1
        return nn.functional.cross_entropy(output, target) / (SoftCrossEntropy.count != 8)
LabelSmoothingCrossEntropy = lambda smoothing: SoftCrossEntropy()
''')
    args = [*BASE, '--epochs', '3', '--data-dir', face_folder, '--output', tmp_path, '--experiment', 'nan',
            '--model-ema']
    result = subprocess.run([sys.executable, '-m', 'timm_lfnsb', 'run', *map(str, [script, *args])],
                            capture_output=True, text=True, env=environment())
    assert result.returncode == 1 and 'Traceback' not in result.stderr
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith('Error: the loss is not finite in epoch 1, batch 3 of 4'), result.stderr[-2000:]
    state = load(tmp_path / 'nan' / 'last.pth.tar')
    assert state['epoch'] == 0 == load(tmp_path / 'nan' / 'model_best.pth.tar')['epoch']
    for key in ('state_dict', 'state_dict_ema'):
        assert all(tensor.isfinite().all() for tensor in state[key].values())


# --- folders and class map ---------------------------------------------------------------------------------------

def folders(tmp_path: Path, train=('anger', 'happiness', 'neutral'), validation=None, classes=None, **options):
    from PIL import Image
    for split, names in dict(train=train, validation=validation or train).items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new('L', (8, 8)).save(tmp_path / split / name / 'a.png')
    defaults = dict(data_dir=str(tmp_path), train_split='train', val_split='validation', dataset='', class_map='')
    if classes is not None:
        (tmp_path / 'map.txt').write_text('\n'.join(classes) + '\n')
        defaults['class_map'] = str(tmp_path / 'map.txt')
    return argparse.Namespace(**{**defaults, **options})


CLASSES = ['neutral', 'happiness', 'anger']


def test_folders_that_fit_the_class_map_pass(tmp_path):
    options = folders(tmp_path, classes=CLASSES, validation=('anger', 'neutral'))
    (tmp_path / 'train' / 'empty').mkdir()
    shutil.copytree(tmp_path / 'train' / 'anger', tmp_path / 'train' / '.cache')
    check_class_folders(options)
    check_class_folders(argparse.Namespace(**{**vars(options), 'val_split': ''}))


def test_a_synonym_and_an_unknown_folder_are_refused_with_both_lists(tmp_path):
    options = folders(tmp_path, classes=CLASSES, validation=('anger', 'Happy', 'yawning'))
    with pytest.raises(UserError) as error:
        check_class_folders(options)
    message = str(error.value)
    assert f'{tmp_path}/validation has folders' in message and '\n' not in message
    assert 'Happy (which the class map calls happiness), yawning (folders: Happy, anger, yawning; class map' in message
    assert 'neutral, happiness, anger)' in message
    assert f'timm-lfnsb prepare folder {tmp_path}' in message and '--skip-folders' in message


@pytest.mark.parametrize('skip', [['yawning'], 'yawning'])
def test_folders_left_out_on_purpose(skip, tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'yawning'), skip_folders=skip)
    check_class_folders(options)
    options.skip_folders = ['yaw']
    with pytest.raises(UserError, match=r'yawning'):
        check_class_folders(options)
    options.class_map = ''
    with pytest.raises(UserError, match=r'needs a --class-map'):
        check_class_folders(options)


def test_tar_files_are_looked_into(tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'happy'))
    with tarfile.open(tmp_path / 'faces.tar', 'w') as tar:
        tar.add(tmp_path / 'train', 'train')
    options.data_dir, options.val_split = str(tmp_path / 'faces.tar'), ''
    with pytest.raises(UserError, match=r'faces.tar has folders.*happy \(which the class map calls happiness\)'):
        check_class_folders(options)
    (tmp_path / 'map.txt').write_text('happy\nanger\n')
    check_class_folders(options)


def test_zip_files_and_empty_splits_are_refused(tmp_path):
    options = folders(tmp_path, classes=CLASSES)
    shutil.rmtree(tmp_path / 'validation')
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation' / 'faces.zip').write_bytes(b'')
    with pytest.raises(UserError, match=r"no images found for the split 'validation'.*no zip files.*prepare"):
        check_class_folders(options)


def test_a_class_map_that_cannot_be_read_or_is_too_large(tmp_path):
    options = folders(tmp_path, classes=CLASSES, num_classes=3)
    check_class_folders(options)
    options.num_classes = 2
    with pytest.raises(UserError, match=r'up to 2, counted from 0, but --num-classes is 2'):
        check_class_folders(options)
    options.class_map = str(tmp_path / 'none.txt')
    with pytest.raises(UserError, match=r'none.txt cannot be read'):
        check_class_folders(options)


def test_splits_numbered_differently_are_refused_without_a_class_map(tmp_path):
    """timm numbers the folders it finds in each split: one that is missing shifts the others."""
    with pytest.raises(UserError, match=r'anger, happiness, neutral.*anger, neutral'):
        check_class_folders(folders(tmp_path / 'a', validation=('anger', 'neutral')))
    check_class_folders(folders(tmp_path / 'b', validation=('anger', 'happiness')))
    with pytest.raises(UserError, match=r'give a class map'):
        check_class_folders(folders(tmp_path / 'c', validation=('anger', 'happiness', 'neutral', 'sadness')))


def test_the_launcher_checks_folders_before_all_else(tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'happy'))
    with patched(), pytest.raises(UserError, match=r'happy'):
        run_script(str(STANDIN), ['--data-dir', str(tmp_path), '--class-map', options.class_map, '--output',
                                  str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_the_options_show_in_help_and_work_from_yaml(tmp_path, capsys):
    with patched(), pytest.raises(SystemExit):
        run_script(str(STANDIN), ['--help'])
    text = capsys.readouterr().out
    assert '--skip-folders NAME' in text and '--no-epoch-seeds' in text and 'Safe training' in text
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'yawning'))
    config = tmp_path / 'config.yaml'
    config.write_text('skip_folders: [yawning]\nno_epoch_seeds: true\n')
    with patched():
        run_script(str(STANDIN), ['--config', str(config), '--data-dir', str(tmp_path), '--class-map',
                                  options.class_map, '--output', str(tmp_path)])
    assert launch.rank() == 0
    assert '"no_epoch_seeds": true' in (tmp_path / 'result.json').read_text()
