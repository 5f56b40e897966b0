"""Checkpoints that survive: a full disk, a folder that cannot be written, a restart, a loss that is no number."""
from __future__ import annotations

import argparse
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm.utils
import torch
from support.train_script import BASE, STANDIN, Run, launch, load, one_sentence, standin

from timm_lfnsb.errors import UserError
from timm_lfnsb.train.checkpoints import check_output, summarize, watch_loss


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / 'file').write_text('')
    one_sentence(launch(STANDIN, '--output', tmp_path / 'file', '--experiment', 'run'), 'Not a directory', 'file')
    one_sentence(launch(STANDIN, '--output', tmp_path, '--resume', 'none.pth.tar'), 'none.pth.tar is not a file')
    check_output(argparse.Namespace(output=str(tmp_path / 'new' / 'deep'), experiment='run', resume=''))
    assert list((tmp_path / 'new' / 'deep' / 'run').iterdir()) == []


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
    saver = Run().saver(tmp_path)
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
    saver = Run().saver(tmp_path)
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


def test_other_files_of_a_run_on_a_full_disk(tmp_path):
    script = tmp_path / 'train.py'
    script.write_text("def main():\n    raise OSError(28, 'No space left on device', 'summary.csv')\n")
    one_sentence(launch(script), 'No space left on device', 'summary.csv')


def test_a_restart_in_the_same_folder_keeps_the_best(tmp_path):
    if not hasattr(timm.utils.CheckpointSaver, 'load_state_dict_from_checkpoint'):
        pytest.skip('needs timm 1.0.31, whose checkpoints remember their history')
    run = Run()
    saver = run.saver(tmp_path, max_history=2)
    for epoch, metric in enumerate((3., 9., 5.)):
        saver.save_checkpoint(epoch, metric=metric)
    last = str(tmp_path / 'last.pth.tar')
    assert run.saver(tmp_path, last, max_history=2).save_checkpoint(3, metric=6.) == (9., 1)
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 1
    assert {path.name for path in tmp_path.glob('checkpoint-*')} == {'checkpoint-1.pth.tar', 'checkpoint-3.pth.tar'}
    # In another folder there is no history to keep.
    (tmp_path / 'new').mkdir()
    assert run.saver(tmp_path / 'new', last).best_metric is None


def test_summary_has_one_header(tmp_path):
    path = tmp_path / 'summary.csv'
    for epoch in (0, 1):  # timm's script asks for a header at each start
        summarize(epoch, dict(loss=1.), dict(top1=2.), str(path), lr=0.1, write_header=True)
    assert path.read_text().split() == ['epoch,train_loss,eval_top1,lr', '0,1.0,2.0,0.1', '1,1.0,2.0,0.1']


@pytest.mark.parametrize('names, keys, kept', [
    (('neutral', 'happy', 'sad', 'angry'), {'task_state'}, True),  # synonyms
    (('neutral', 'happiness', 'sadness', 'anger'), {'task_state', 'task_state_ema'}, True),
    (('anger', 'happiness', 'neutral', 'sadness'), {'task_state'}, False),
    (('neutral', 'happiness', 'sadness', 'anger'), {}, False),  # a run without the loss
])
def test_centers_go_on_from_the_initial_checkpoint_of_a_run_with_the_same_labels(
        names, keys, kept, face_folder, tmp_path, caplog):
    (tmp_path / 'old.txt').write_text('\n'.join(names))
    centers = {'task_state': torch.rand(4, 512), 'task_state_ema': torch.rand(4, 512)}
    states = {key: {'cosine_harmony': {'centers': centers[key]}} for key in keys}
    args = argparse.Namespace(model='mobilefacenet', class_map=str(tmp_path / 'old.txt'))
    torch.save({'state_dict': {}, 'args': args, **states}, tmp_path / 'last.pth.tar')
    flags = ['--cosine-harmony', '1', '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt']
    begun = torch.tensor(standin(tmp_path, *flags)['centers'])
    ours = torch.tensor(standin(tmp_path, *flags, '--initial-checkpoint', tmp_path / 'last.pth.tar')['centers'])
    expected = centers['task_state_ema' if 'task_state_ema' in keys else 'task_state'] if kept else begun
    torch.testing.assert_close(ours, expected)
    assert ('start anew' in caplog.text) == (not kept and bool(keys))


def test_the_last_batch_of_an_epoch_is_watched_too():
    task, images, target = Run().task, torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])
    with watch_loss(task, [0], 0):
        task(images, target)
    with pytest.raises(UserError, match=r'epoch 1, batch 0 of 1 .*--amp-dtype bfloat16'), watch_loss(task, [0], 1):
        task(images + torch.inf, target)


def test_weights_that_are_nan_are_not_saved(tmp_path):
    run = Run(ema=True)
    saver = run.saver(tmp_path)
    averages = run.task.get_trainable_module(ema=True).module
    averages.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r'not finite at the end of epoch 0.*there is none before'):
        saver.save_checkpoint(0, metric=1.)
    assert list(tmp_path.iterdir()) == []
    averages.fc.weight.data.zero_()
    saver.save_checkpoint(0, metric=1.)
    run.task.get_trainable_module().fc.weight.data.fill_(torch.inf)
    for save in (lambda: saver.save_checkpoint(1, metric=2.), lambda: saver.save_recovery(1, 3)):
        with pytest.raises(UserError, match=r'--resume .*last.pth.tar'):
            save()
    assert {path.name for path in tmp_path.iterdir()} == {'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar'}
    assert load(tmp_path / 'model_best.pth.tar')['epoch'] == 0


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
    result = launch(script, *BASE, '--epochs', '3', '--data-dir', face_folder, '--output', tmp_path, '--experiment',
                    'nan', '--model-ema')
    assert result.exit_code == 1
    assert '\nError: the loss is not finite in epoch 1, batch 3 of 4' in result.output
    state = load(tmp_path / 'nan' / 'last.pth.tar')
    assert state['epoch'] == 0 == load(tmp_path / 'nan' / 'model_best.pth.tar')['epoch']
    for key in ('state_dict', 'state_dict_ema'):
        assert all(tensor.isfinite().all() for tensor in state[key].values())
