"""A loss that is no number ends the run."""
from __future__ import annotations

import argparse

import pytest
import torch
from support.train_script import BASE, Run, launch, load, train

from timm_lfnsb.errors import UserError
from timm_lfnsb.train.watch import watch_loss


def test_the_last_batch_of_an_epoch_is_watched_too():
    task, images, target = Run().task, torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])
    options = argparse.Namespace(clip_grad=1., amp=True, amp_dtype='float16')
    with watch_loss(task, [0], 0, options):
        task(images, target)
    with pytest.raises(UserError, match=r'batch 0 of 1 .*--amp-dtype bfloat16') as error, \
            watch_loss(task, [0], 1, options):
        task(images + torch.inf, target)
    assert '--clip-grad' not in str(error.value)


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
    result = launch(script, *BASE, '--epochs', '3', '--data-dir', face_folder, '--output', tmp_path, '--experiment',
                    'nan', '--model-ema')
    assert result.exit_code == 1
    assert '\nError: the loss is not finite in epoch 1, batch 3 of 4' in result.output
    state = load(tmp_path / 'nan' / 'last.pth.tar')
    assert state['epoch'] == 0 == load(tmp_path / 'nan' / 'model_best.pth.tar')['epoch']
    for key in ('state_dict', 'state_dict_ema'):
        assert all(tensor.isfinite().all() for tensor in state[key].values())
