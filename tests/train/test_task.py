"""The tasks with losses on features against what timm's train script does with a task."""
from __future__ import annotations

import pytest
import timm
import torch
import torch.nn as nn
from support.train_script import CPU, TORCHRUN, python
from timm.optim import create_optimizer_v2
from timm.task import resume_task_checkpoint
from timm.utils import CheckpointSaver

from timm_lfnsb import CosineHarmonyTask, FeatureLossTask
from timm_lfnsb.losses import LOSSES


def tiny(name: str = 'mobilefacenet') -> nn.Module:
    return timm.create_model(name, num_classes=4, **({'img_size': 32} if name == 'mobilefacenet' else {}))


def make_task(model=None, criterion=None, **kwargs) -> CosineHarmonyTask:
    return CosineHarmonyTask(
        tiny() if model is None else model, criterion or nn.CrossEntropyLoss(), device=CPU, verbose=False, **kwargs)


def make_feature_task(losses, model=None) -> FeatureLossTask:
    return FeatureLossTask(
        tiny() if model is None else model, nn.CrossEntropyLoss(), losses=losses, device=CPU, verbose=False)


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


def test_the_total_of_several_losses_and_their_default_weights():
    settings = {'center': {}, 'dacl': {'weight': 2., 'hidden': 5}, 'cosine-harmony': {'alpha': 0.3}}
    task = make_feature_task(settings).eval()
    parts, features = task(*BATCH), task.get_eval_model().forward_features(BATCH[0]).mean((2, 3))
    total = parts['task_loss']
    for name, weight in (('center', 0.003), ('dacl', 2.), ('cosine_harmony', 1.)):
        torch.testing.assert_close(parts[f'{name}_loss'], task.trainable_module.loss[name](features, BATCH[1]))
        total = total + weight * parts[f'{name}_loss']
    torch.testing.assert_close(parts['loss'], total)


def test_cosine_harmony_alone_is_as_it_was():
    """Names of parameters, task state, and numbers, which checkpoints and users' code go by."""
    torch.manual_seed(5)
    task = make_task(tiny('test_resnet'), weight=0.5, alpha=0.3)
    torch.manual_seed(5)
    same = make_feature_task({'cosine-harmony': dict(weight=0.5, alpha=0.3)}, tiny('test_resnet'))
    names = [name for name, _ in task.trainable_module.named_parameters()]
    assert names[-1] == 'loss.centers' and all(name.startswith('model.') for name in names[:-1])
    assert task.get_task_state().keys() == {'cosine_harmony'} and task.weight == 0.5 and task.centers.shape == (4, 96)
    torch.testing.assert_close(task.eval()(*BATCH), same.eval()(*BATCH), rtol=0, atol=0)
    task.weight = 0.
    parts = task(*BATCH)
    assert parts.keys() == {'loss', 'output', 'task_loss', 'cosine_harmony_loss'}
    assert parts['loss'] == parts['task_loss']
    same.load_task_state({'cosine_harmony': {'centers': torch.zeros(4, 96)}})
    assert not same.get_task_state()['cosine_harmony']['centers'].any()


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


@pytest.mark.filterwarnings('ignore:__array_wrap__ must:DeprecationWarning')  # in the library, of NumPy
@pytest.mark.parametrize('name', LOSSES)
def test_each_loss_trains_without_weight_decay_and_is_clipped(name):
    if not LOSSES[name].loss.takes_soft_targets:
        pytest.importorskip('pytorch_metric_learning', reason='pip install "timm-lfnsb[losses]" brings it')
    task = make_feature_task({name: dict(weight=1.)}, tiny('test_resnet'))
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, opt='adamw', lr=0.1, weight_decay=0.3)
    ours = {id(parameter): parameter.detach().clone() for parameter in trainable.loss.parameters()}
    assert ours and {group['weight_decay'] for group in optimizer.param_groups if any(
        id(parameter) in ours for parameter in group['params'])} == {0.}
    assert ours.keys() < {id(parameter) for parameter in task.get_clip_parameters(exclude_head=True)}
    task(*BATCH)['loss'].backward()
    optimizer.step()
    assert not any(torch.equal(parameter, ours[id(parameter)]) for parameter in trainable.loss.parameters())
    assert set(task.get_checkpoint_state()['state_dict']) == set(tiny('test_resnet').state_dict())  # no trace


def test_clipping_covers_model_and_centers():
    task = make_task()
    clipped, without_head = ({id(p) for p in task.get_clip_parameters(exclude)} for exclude in (False, True))
    assert clipped == {id(p) for p in task.trainable_module.parameters()}
    assert clipped - without_head == {id(p) for p in task.get_eval_model().fc.parameters()}


@pytest.mark.parametrize('make', [make_task, lambda model: make_feature_task({
    'dda': {}, 'dacl': {}, 'island': {'learn_centers': False}}, model)], ids=['cosine-harmony', 'several'])
def test_timms_saver_and_resume_restore_model_losses_and_averages(make, tmp_path):
    def begin() -> tuple[FeatureLossTask, torch.optim.Optimizer]:
        task = make(tiny('test_resnet'))
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
    assert not torch.equal(*(next(iter(module.loss.parameters())) for module in (ema, task.trainable_module)))
    torch.testing.assert_close(other.trainable_module.state_dict(), task.trainable_module.state_dict())


def test_losses_that_a_checkpoint_does_not_have_begin_anew_with_a_warning(caplog):
    old = make_feature_task({'center': {}}, tiny('test_resnet'))
    new = make_feature_task({'center': {}, 'dda': {}}, tiny('test_resnet'))
    state, begun = old.get_task_state(), new.get_task_state()['dda']['centers'].clone()
    old.load_task_state(state)
    assert not caplog.records
    new.load_task_state(state)
    assert 'with the losses center, and this one has center, dda' in caplog.text
    torch.testing.assert_close(new.get_task_state()['center'], state['center'])
    torch.testing.assert_close(new.get_task_state()['dda']['centers'], begun)


@pytest.mark.parametrize('losses, message', [
    ({'focal': {}}, 'no loss focal'), ({'center': {'alpha': 1}}, 'no setting alpha'),
    ({'cosine-harmony': {'margin': 2}}, 'margin')])
def test_wrong_losses_are_a_clear_value_error(losses, message):
    with pytest.raises(ValueError, match=message):
        make_feature_task(losses, tiny('test_resnet'))
    with pytest.raises(ValueError, match='Identity lacks them'):
        make_feature_task({'center': {}}, nn.Identity())


SCRIPT = """
import sys
import timm, torch
from torch import distributed
from timm_lfnsb import FeatureLossTask
distributed.init_process_group('gloo')
rank = distributed.get_rank()
torch.manual_seed(0)
model = timm.create_model('test_resnet', num_classes=4, norm_layer=torch.nn.Identity)
torch.manual_seed(rank)  # timm seeds each process otherwise
task = FeatureLossTask(model, losses={
    'center': {'weight': 1., 'learn_centers': False}, 'dacl': {'weight': 1.}, 'dda': {}}, verbose=False)
task.prepare_distributed(broadcast_buffers=False)
state = {name: {key: tensor.clone() for key, tensor in loss.items()} for name, loss in task.get_task_state().items()}
images, target = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 4
task(images[rank::2], target[rank::2])['loss'].backward()
torch.save([state, {name: p.grad for name, p in task.trainable_module.module.named_parameters()}],
           f'{sys.argv[1]}/{rank}.pt')
whole = FeatureLossTask(model, losses={
    'center': {'weight': 1., 'learn_centers': False}, 'dacl': {'weight': 1.}, 'dda': {}}, verbose=False)
model.zero_grad()
whole.load_task_state(state)
whole(images, target)['loss'].backward()
torch.save({name: p.grad for name, p in whole.trainable_module.named_parameters()}, f'{sys.argv[1]}/whole{rank}.pt')
"""


def test_two_processes_begin_alike_and_average_what_they_learn(tmp_path):
    """torchrun with two gloo processes: gradients of model and losses are those of the whole batch."""
    (tmp_path / 'two.py').write_text(SCRIPT)
    result = python(*TORCHRUN, tmp_path / 'two.py', tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    (state, gradients), (other_state, other_gradients) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert set(state) == {'center', 'dacl', 'dda'}
    torch.testing.assert_close(state, other_state, rtol=0, atol=0)
    torch.testing.assert_close(gradients, other_gradients, rtol=0, atol=0)
    torch.testing.assert_close(gradients, torch.load(tmp_path / 'whole0.pt'), rtol=1e-4, atol=1e-6)
