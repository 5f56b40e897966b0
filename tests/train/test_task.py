"""The Cosine-Harmony task against what timm's train script does with a task."""
from __future__ import annotations

import pytest
import timm
import torch
import torch.nn as nn
from support.train_script import CPU
from timm.optim import create_optimizer_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_lfnsb import CosineHarmonyTask


def tiny(name: str = 'mobilefacenet') -> nn.Module:
    return timm.create_model(name, num_classes=4, **({'img_size': 32} if name == 'mobilefacenet' else {}))


def make_task(model=None, criterion=None, **kwargs) -> CosineHarmonyTask:
    return CosineHarmonyTask(
        tiny() if model is None else model, criterion or nn.CrossEntropyLoss(), device=CPU, verbose=False, **kwargs)


BATCH = (torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3, 0, 1]))


@pytest.mark.parametrize('weight', [0.5, 2.])
def test_total_is_the_sum_of_its_parts(weight):
    task = make_task(weight=weight).eval()
    parts = task(*BATCH)
    model, loss = task.get_eval_model(), task.trainable_module.loss
    torch.testing.assert_close(parts['output'], model(BATCH[0]))
    torch.testing.assert_close(parts['task_loss'], nn.functional.cross_entropy(parts['output'], BATCH[1]))
    torch.testing.assert_close(
        parts['cosine_harmony_loss'], loss(model.forward_features(BATCH[0]).mean((2, 3)), BATCH[1]))
    torch.testing.assert_close(parts['loss'], parts['task_loss'] + weight * parts['cosine_harmony_loss'])


@pytest.mark.parametrize('name, kwargs, average', [
    ('test_resnet', {}, lambda x: x.flatten(2).mean(2)),  # NCHW
    ('swin_tiny_patch4_window7_224', dict(
        img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)),
     lambda x: x.flatten(1, 2).mean(1)),  # NHWC
    ('test_vit', dict(img_size=64), lambda x: x[:, 1:].mean(1)),  # a class token, and the others
])
def test_features_of_every_format_are_averaged_over_space(name, kwargs, average):
    model = timm.create_model(name, num_classes=4, **kwargs).eval()
    task = make_task(model).eval()
    seen = []
    task.trainable_module.loss.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        task(images, torch.tensor([1, 3]))
        expected = average(model.forward_features(images))
    assert expected.shape == (2, model.num_features)
    torch.testing.assert_close(seen[0], expected)


def test_the_optimizer_sees_the_centers_without_weight_decay():
    task = make_task()
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, opt='adamw', lr=0.1, weight_decay=0.3)
    centers = trainable.loss.centers
    assert [g['weight_decay'] for g in optimizer.param_groups if any(p is centers for p in g['params'])] == [0.]
    before = centers.detach().clone()
    task(*BATCH)['loss'].backward()
    optimizer.step()
    assert not torch.equal(centers, before)


def test_clipping_covers_model_and_centers():
    task = make_task()
    clipped, without_head = ({id(p) for p in task.get_clip_parameters(exclude)} for exclude in (False, True))
    assert clipped == {id(p) for p in task.trainable_module.parameters()}
    assert clipped - without_head == {id(p) for p in task.get_eval_model().fc.parameters()}


def test_timms_saver_and_resume_restore_model_centers_and_averages(tmp_path):
    def begin() -> tuple[CosineHarmonyTask, torch.optim.Optimizer]:
        task = make_task(tiny('test_resnet'))
        task.setup_ema(decay=0.5)
        return task, create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=0.1)

    (task, optimizer), (other, other_optimizer) = begin(), begin()
    task(*BATCH)['loss'].backward()
    optimizer.step()
    state = task.get_checkpoint_state()
    tiny('test_resnet').load_state_dict(state['state_dict'])  # the bare model
    ema_state = task.get_checkpoint_state(ema=True)
    assert set(ema_state) == {'state_dict_ema', 'task_state_ema'}
    CheckpointSaver(
        model=task.get_trainable_module(), optimizer=optimizer, task=task, checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path)).save_checkpoint(0, metric=1.)

    assert resume_task_checkpoint(other, str(tmp_path / 'last.pth.tar'), optimizer=other_optimizer) == 1
    other.load_checkpoint_state(ema_state['state_dict_ema'], ema_state['task_state_ema'], ema=True)
    ema, other_ema = (t.get_trainable_module(ema=True).module for t in (task, other))
    torch.testing.assert_close(other_ema.state_dict(), ema.state_dict())
    assert not torch.equal(ema.loss.centers, task.centers)
    torch.testing.assert_close(other.trainable_module.state_dict(), task.trainable_module.state_dict())
