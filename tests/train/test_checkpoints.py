"""Checkpoints that survive: a full disk, a folder that cannot be written, a restart, a loss that is no number."""
from __future__ import annotations

import argparse
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import timm.utils
import torch
from support.train_script import STANDIN, Run, changed_standin, launch, load, one_sentence, standin

from timm_lfnsb.errors import UserError
from timm_lfnsb.train.checkpoints import check_output, summarize


def test_an_output_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / 'file').write_text('')
    one_sentence(launch(STANDIN, '--output', tmp_path / 'file', '--experiment', 'run'), 'Not a directory', 'file')
    one_sentence(launch(STANDIN, '--output', tmp_path, '--resume', 'none.pth.tar'), 'none.pth.tar is not a file')
    check_output(argparse.Namespace(output=str(tmp_path / 'new' / 'deep'), experiment='run', resume=''))
    assert not any((tmp_path / 'new' / 'deep' / 'run').iterdir())


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
        message = r'epoch 1 .*free some space; go on with --resume .*/last.pth.tar.$'
        with file_size_limit(size // 2), pytest.raises(UserError, match=message):
            save()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before  # and nothing half-written
    saver.save_checkpoint(1, metric=2.)
    assert load(tmp_path / 'last.pth.tar')['epoch'] == 1 == load(tmp_path / 'model_best.pth.tar')['epoch']


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


def test_summary_has_one_header(tmp_path):
    path = tmp_path / 'summary.csv'
    for epoch in (0, 1):  # timm's script asks for a header at each start
        summarize(epoch, dict(loss=1.), dict(top1=2.), str(path), lr=0.1, write_header=True)
    assert path.read_text().split() == ['epoch,train_loss,eval_top1,lr', '0,1.0,2.0,0.1', '1,1.0,2.0,0.1']


@pytest.mark.parametrize('names, keys, kept', [
    (('neutral', 'happy', 'sad', 'angry'), {'task_state'}, True),  # synonyms
    (('neutral', 'happiness', 'sadness', 'anger'), {'task_state', 'task_state_ema'}, True),
    (('anger', 'happiness', 'neutral', 'sadness'), {'task_state'}, False),
])
def test_centers_go_on_from_the_initial_checkpoint_of_a_run_with_the_same_labels(
        names, keys, kept, face_folder, tmp_path, caplog):
    (tmp_path / 'old.txt').write_text('\n'.join(names))
    centers = {'task_state': torch.rand(4, 512), 'task_state_ema': torch.rand(4, 512)}
    states = {key: {'cosine_harmony': {'centers': centers[key]}, 'dda': {'centers': torch.rand(3, 512)}}
              for key in keys}
    args = argparse.Namespace(model='mobilefacenet', class_map=str(tmp_path / 'old.txt'))
    torch.save({'state_dict': {}, 'args': args, **states}, tmp_path / 'last.pth.tar')
    flags = ['--cosine-harmony', '1', '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt']
    flags += ['--feature-loss', 'dda', '--feature-loss', 'center']  # one of another size, and one that is new
    begun = standin(tmp_path, *flags)['task_state']
    ours = standin(tmp_path, *flags, '--initial-checkpoint', tmp_path / 'last.pth.tar')['task_state']
    expected = centers['task_state_ema' if 'task_state_ema' in keys else 'task_state']
    assert (ours.pop('cosine_harmony') == {'centers': expected.tolist()}) == kept
    assert ours == {'dda': begun['dda'], 'center': begun['center']}
    assert ('centers of cosine_harmony' in caplog.text) == (not kept) and 'centers of dda' in caplog.text


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


def test_a_loss_that_is_not_finite_ends_the_run(face_folder, tmp_path):
    script = changed_standin(tmp_path, ('task(torch.randn(4, 3, 32, 32)', 'task(torch.full((4, 3, 32, 32), torch.inf)'))
    one_sentence(launch(script, '--output', tmp_path, '--data-dir', face_folder), 'not finite in epoch 0, batch 0 of 6')
