"""The Cosine-Harmony task against what timm's train script does with a task."""
from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

from timm_lfnsb import CosineHarmonyLoss, CosineHarmonyTask
from timm_lfnsb.train.task import average_features


def tiny(**kwargs) -> nn.Module:
    return timm.create_model('mobilefacenet', num_classes=4, img_size=32, **kwargs)


def make_task(model=None, **kwargs) -> CosineHarmonyTask:
    model = model if model is not None else tiny()
    return CosineHarmonyTask(model, nn.CrossEntropyLoss(), device=torch.device('cpu'), verbose=False, **kwargs)


BATCH = (torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3)), torch.tensor([0, 1, 2, 3, 0, 1]))


@pytest.mark.parametrize('weight', [0.5, 2.])
def test_total_is_the_sum_of_its_parts(weight):
    task = make_task(weight=weight).eval()
    parts = task(*BATCH)
    model, loss = task.get_eval_model(), task.trainable_module.loss
    logits = model(BATCH[0])
    torch.testing.assert_close(parts['output'], logits)
    torch.testing.assert_close(parts['task_loss'], nn.functional.cross_entropy(logits, BATCH[1]))
    torch.testing.assert_close(
        parts['cosine_harmony_loss'], loss(model.forward_features(BATCH[0]).mean((2, 3)), BATCH[1]))
    torch.testing.assert_close(parts['loss'], parts['task_loss'] + weight * parts['cosine_harmony_loss'])


@pytest.mark.parametrize('name, kwargs, kind', [
    ('test_resnet', {}, 'NCHW'),
    ('swin_tiny_patch4_window7_224', dict(
        img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 'NHWC'),
    ('test_vit', dict(img_size=64), 'tokens'),
])
def test_features_of_every_format_are_averaged_over_space(name, kwargs, kind):
    model = timm.create_model(name, num_classes=4, **kwargs).eval()
    task = make_task(model).eval()
    seen = []
    task.trainable_module.loss.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        task(images, torch.tensor([1, 3]))
        features = model.forward_features(images)
    assert seen[0].shape == (2, model.num_features)
    for i in range(2):
        for channel in (0, model.num_features - 1):
            if kind == 'NCHW':
                values = features[i, channel].flatten()
            elif kind == 'NHWC':
                values = features[i, :, :, channel].flatten()
            else:
                assert model.num_prefix_tokens == 1
                values = features[i, 1:, channel]
            assert seen[0][i, channel].item() == pytest.approx(sum(values.tolist()) / len(values), abs=1e-5)


def test_features_that_cannot_be_averaged_are_named():
    with pytest.raises(ValueError, match=r'got \(2, 3, 4, 5, 6\)'):
        average_features(torch.zeros(2, 3, 4, 5, 6))
    with pytest.raises(ValueError, match='got tuple'):
        average_features((torch.zeros(2, 3),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='forward_features'):
        make_task(nn.Linear(3, 3))


def test_the_optimizer_sees_the_centers_without_weight_decay():
    task = make_task()
    trainable = task.get_trainable_module()
    optimizer = create_optimizer_v2(trainable, opt='adamw', lr=0.1, weight_decay=0.3)
    centers = trainable.loss.centers
    decay = [g['weight_decay'] for g in optimizer.param_groups if any(p is centers for p in g['params'])]
    assert decay == [0.]
    before = centers.detach().clone()
    task(*BATCH)['loss'].backward()
    optimizer.step()
    assert not torch.equal(centers, before)


def test_layer_decay_keeps_the_models_own_layers():
    task = make_task()
    scales = {}
    names = {id(p): n for n, p in task.trainable_module.named_parameters()}
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=0.1, layer_decay=0.5)
    for group in optimizer.param_groups:
        for p in group['params']:
            scales[names[id(p)]] = group['lr_scale']
    assert scales['loss.centers'] == scales['model.fc.weight'] == 1.
    assert scales['model.stem.0.conv.weight'] < scales['model.stages.1.0.expand.conv.weight'] < 1.


def test_layer_decay_of_a_model_that_names_no_layers_is_timms_own():
    """It gets the learning rates that timm gives the model alone, and the centers that of the head."""
    class Bare(nn.Module):
        num_classes, num_features = 4, 8
        pretrained_cfg = dict(classifier='head')

        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 1) for i in range(9)))
            self.head = nn.Linear(8, 4)

        def forward_features(self, x):
            return self.blocks(x)

        def forward_head(self, x):
            return self.head(x.mean((2, 3)))

    def scales(module) -> dict[str, float]:
        names = {id(p): n.removeprefix('model.') for n, p in module.named_parameters()}
        optimizer = create_optimizer_v2(module, opt='adamw', lr=0.1, layer_decay=0.5)
        return {names[id(p)]: group['lr_scale'] for group in optimizer.param_groups for p in group['params']}

    model = Bare()
    expected = scales(model)
    assert len(set(expected.values())) == 3  # twelve parameters a layer, and the head
    task = make_task(model)
    assert scales(task.get_trainable_module()) == {**expected, 'loss.centers': 1.}


def test_fixed_centers_stay():
    task = make_task(learn_centers=False)
    assert not any('centers' in name for name, _ in task.trainable_module.named_parameters())
    assert 'centers' in task.get_task_state()['cosine_harmony']


def test_clipping_covers_model_and_centers():
    task = make_task()
    clipped = {id(p) for p in task.get_clip_parameters()}
    assert clipped == {id(p) for p in task.trainable_module.parameters()}
    without_head = {id(p) for p in task.get_clip_parameters(exclude_head=True)}
    model = task.get_eval_model()
    assert clipped - without_head == {id(model.fc.weight), id(model.fc.bias)}


def test_checkpoint_is_the_bare_model_and_the_task_state_the_centers(tmp_path):
    task = make_task()
    task.setup_ema(decay=0.5)
    task.trainable_module.loss.centers.data += 1
    state = task.get_checkpoint_state()
    assert tiny().load_state_dict(state['state_dict']).missing_keys == []
    ema_state = task.get_checkpoint_state(ema=True)
    assert set(ema_state) == {'state_dict_ema', 'task_state_ema'}

    other = make_task()
    other.setup_ema(decay=0.5)
    other.load_checkpoint_state(state['state_dict'], state['task_state'])
    other.load_checkpoint_state(ema_state['state_dict_ema'], ema_state['task_state_ema'], ema=True)
    for name, tensor in task.trainable_module.state_dict().items():
        assert torch.equal(other.trainable_module.state_dict()[name], tensor)
    ema = other.get_trainable_module(ema=True).module
    assert torch.equal(ema.loss.centers, task.get_trainable_module(ema=True).module.loss.centers)
    assert not torch.equal(ema.loss.centers, other.trainable_module.loss.centers)


def test_a_checkpoint_without_centers_loads():
    task = make_task()
    centers = task.trainable_module.loss.centers.detach().clone()
    task.load_checkpoint_state(tiny().state_dict(), None)
    assert torch.equal(task.trainable_module.loss.centers, centers)


def test_timms_saver_and_resume_restore_the_centers(tmp_path):
    from timm.task import resume_task_checkpoint
    task = make_task()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='adamw', lr=0.1)
    task(*BATCH)['loss'].backward()
    optimizer.step()
    saver = CheckpointSaver(
        model=task.get_trainable_module(), optimizer=optimizer, task=task,
        checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=1.)

    other = make_task()
    other_optimizer = create_optimizer_v2(other.get_trainable_module(), opt='adamw', lr=0.1)
    assert resume_task_checkpoint(other, str(tmp_path / 'last.pth.tar'), optimizer=other_optimizer) == 1
    for t, o in ((task, optimizer), (other, other_optimizer)):
        torch.manual_seed(5)
        o.zero_grad()
        t(*BATCH)['loss'].backward()
        o.step()
    for name, tensor in task.trainable_module.state_dict().items():
        torch.testing.assert_close(other.trainable_module.state_dict()[name], tensor)


def test_ema_follows_model_and_centers():
    task = make_task()
    task.setup_ema(decay=0.9)
    start = copy.deepcopy(task.trainable_module.state_dict())
    with torch.no_grad():
        for p in task.trainable_module.parameters():
            p += 1
    task.update_ema(step=100)
    ema = task.get_trainable_module(ema=True).module.state_dict()
    for name in ('loss.centers', 'model.fc.weight'):
        torch.testing.assert_close(ema[name], start[name] + 0.1)
    assert task.get_eval_model(ema=True) is task.get_trainable_module(ema=True).module.model


def test_soft_targets_of_mixup():
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    task = CosineHarmonyTask(tiny(), SoftTargetCrossEntropy(), device=torch.device('cpu'), verbose=False)
    images, target = Mixup(mixup_alpha=0.3, cutmix_alpha=1., num_classes=4)(*BATCH)
    parts = task(images, target.float())
    parts['loss'].backward()
    assert parts['cosine_harmony_loss'].isfinite()


def test_bfloat16_autocast():
    task = make_task()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        parts = task(*BATCH)
    assert parts['cosine_harmony_loss'].dtype == torch.float32
    parts['loss'].backward()
    assert task.trainable_module.loss.centers.grad.isfinite().all()


def test_compile_keeps_checkpoints_clean():
    task = make_task()
    task.compile(backend='eager')
    parts = task(*BATCH)
    parts['loss'].backward()
    assert set(task.get_checkpoint_state()['state_dict']) == set(tiny().state_dict())
    assert 'centers' in task.get_task_state()['cosine_harmony']
    assert len(list(task.get_clip_parameters())) == len(list(task.trainable_module.parameters()))


def test_task_takes_what_the_installed_timm_adds():
    """Keyword arguments this class does not know go to timm's own task."""
    import inspect

    from timm.task import ClassificationTask
    if 'criterion_kwargs' in inspect.signature(ClassificationTask.__init__).parameters:
        task = CosineHarmonyTask(tiny(), criterion_kwargs=dict(smoothing=0.2), verbose=False)
        assert task(*BATCH)['loss'].isfinite()
    with pytest.raises(TypeError):
        CosineHarmonyTask(tiny(), nn.CrossEntropyLoss(), no_such_option=1)


def test_loss_settings_reach_the_loss():
    loss = make_task(alpha=0.3, variant='reference', learn_centers=False).trainable_module.loss
    assert isinstance(loss, CosineHarmonyLoss) and (loss.alpha, loss.variant) == (0.3, 'reference')
    assert not isinstance(loss.centers, nn.Parameter)
