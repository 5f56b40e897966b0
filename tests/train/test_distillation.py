"""Distillation: one teacher or several, alone and with the Cosine-Harmony loss, against the formula."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support.train_script import (
    BASE,
    RANDOM,
    STANDIN,
    assert_same_end,
    environment,
    load,
    one_sentence,
    run_forked,
    standin,
    train,
)
from timm.models import save_for_hf
from timm.task import LogitDistillationTask

from timm_lfnsb.errors import UserError
from timm_lfnsb.models.loading import load_model
from timm_lfnsb.train.distillation import CosineHarmonyDistillationTask, TeacherEnsemble, load_teachers

LABELS = ('neutral', 'happiness', 'sadness', 'anger')
CPU = torch.device('cpu')


def save_teacher(folder: Path, labels: tuple[str, ...], size: int = 40, name: str = 'test_resnet', **cfg) -> str:
    model = timm.create_model(name, num_classes=len(labels))
    model.pretrained_cfg.update(input_size=(3, size, size), label_names=labels, **cfg)
    save_for_hf(model, str(folder), model_config=dict(label_names=list(labels)), safe_serialization=True)
    return f'local-dir:{folder}'


@pytest.fixture(scope='module')
def teachers(tmp_path_factory) -> tuple[str, str]:
    """Two unlike ones, whose outputs are in other orders and whose inputs are normalised otherwise."""
    root = tmp_path_factory.mktemp('teachers')
    return (save_teacher(root / 'a', ('anger', 'happiness', 'neutral', 'sadness')),
            save_teacher(root / 'b', ('sad', 'neutral', 'angry', 'happy'), 24, 'test_efficientnet', mean=(0.5,) * 3))


def answer(name: str, pixels: torch.Tensor) -> torch.Tensor:
    """Probabilities of a teacher in the order of `LABELS`, by hand."""
    model = load_model(name).eval()
    cfg = model.pretrained_cfg
    size = cfg['input_size'][1:]
    images = F.interpolate(pixels, size, mode='bilinear', antialias=size[0] < pixels.shape[-1])
    images = (images - torch.tensor(cfg['mean']).view(3, 1, 1)) / torch.tensor(cfg['std']).view(3, 1, 1)
    with torch.no_grad():
        probabilities = model(images).softmax(1)
    synonyms = {'sad': 'sadness', 'angry': 'anger', 'happy': 'happiness'}
    names = [synonyms.get(label, label) for label in cfg['label_names']]
    return torch.stack([probabilities[:, names.index(label)] for label in LABELS], dim=1)


def test_several_teachers_are_averaged_by_label_name(teachers):
    student = timm.create_model('lfnsb', num_classes=4)
    mean, std = (torch.tensor(student.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    pixels = torch.rand(5, 3, 32, 32)
    ensemble = load_teachers(','.join(teachers), 3, LABELS)
    logits = ensemble(ensemble.normalize_input((pixels - mean) / std, mean, std))
    expected = (answer(teachers[0], pixels) + answer(teachers[1], pixels)) / 2
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-5, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in ensemble.parameters()) and not ensemble.training


def test_the_loss_is_the_sum_of_its_parts_as_timm_computes_them(teachers):
    student = timm.create_model('lfnsb', num_classes=4)
    ensemble = load_teachers(teachers[0], 3, LABELS)
    weights = dict(distill_loss_weight=0.7, task_loss_weight=0.3, temperature=2.)
    common = dict(criterion=torch.nn.CrossEntropyLoss(), device=CPU, verbose=False)
    task = CosineHarmonyDistillationTask(student, ensemble, weight=0.5, **weights, **common).eval()
    images, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    parts = task(images, target)
    timms = LogitDistillationTask(student, ensemble, **weights, **common).eval()(images, target)
    for name in ('output', 'task_loss', 'kd_loss'):
        torch.testing.assert_close(parts[name], timms[name])
    torch.testing.assert_close(parts['loss'], timms['loss'] + 0.5 * parts['cosine_harmony_loss'])


@pytest.mark.parametrize('weights, expected', [
    ({}, (1, 1)), (dict(task_loss_weight=0.3), (0.3, 0.7)), (dict(distill_loss_weight=2.), (1, 2))])
def test_weights_go_as_in_timm(weights, expected, teachers):
    student, teacher = timm.create_model('lfnsb', num_classes=4), load_teachers(teachers[0], 3, LABELS)
    ours = CosineHarmonyDistillationTask(student, teacher, device=CPU, verbose=False, **weights)
    timms = LogitDistillationTask(student, teacher, device=CPU, verbose=False, **weights)
    for task in (ours, timms):
        assert (task.task_loss_weight, task.distill_loss_weight) == pytest.approx(expected)


def test_the_prior_is_taken_off_the_teachers_answer(teachers):
    adjustment = torch.tensor([0.1, -1., 2., 0.])
    plain, adjusted = (load_teachers(teachers[0], 3, LABELS, prior) for prior in (None, adjustment))
    images = torch.rand(2, 3, 40, 40)
    torch.testing.assert_close(adjusted(images), plain(images) - adjustment)


def test_teachers_of_other_labels_or_without_names_are_refused(tmp_path, teachers):
    seven = save_teacher(tmp_path / 'seven', ('neutral', 'happiness', 'sadness', 'fear'))
    with pytest.raises(UserError, match=r'fear.*not those of the run.*anger'):
        load_teachers(f'{teachers[0]},{seven}', 3, LABELS)
    with pytest.raises(UserError, match=r'no label_names'):
        TeacherEnsemble([timm.create_model('test_resnet', num_classes=4)], LABELS)
    with pytest.raises(UserError, match=r'channels'):
        load_teachers(teachers[0], 1, LABELS)
    with pytest.raises(UserError):
        load_teachers('local-dir:' + str(tmp_path / 'none'), 3, LABELS)


@pytest.mark.parametrize('flags, task', [
    (['--cosine-harmony', '2'], 'CosineHarmonyDistillationTask'), ([], 'LogitDistillationTask')])
def test_the_launcher_takes_over_timms_task(flags, task, teachers, face_folder, tmp_path):
    data = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', *flags]
    result = standin(tmp_path, *data, '--kd-model-name', ','.join(teachers))
    parts = result['parts']
    assert result['task'] == task
    total = parts['task_loss'] + parts['kd_loss'] + 2 * parts.get('cosine_harmony_loss', 0)
    assert parts['loss'] == pytest.approx(total, rel=1e-5)


def test_the_launcher_refuses_teachers_that_do_not_fit(face_folder, tmp_path):
    data = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--cosine-harmony', '1']
    other = save_teacher(tmp_path / 'other', ('neutral', 'fear'))
    one_sentence(run_forked(STANDIN, '--output', tmp_path, *data, '--kd-model-name', other), 'not those of the run')
    one_sentence(run_forked(STANDIN, '--output', tmp_path, *data, '--kd-model-name', 'lfnsb.nothing'), 'lfnsb.nothing')
    one_sentence(run_forked(STANDIN, '--output', tmp_path, '--kd-model-name', f'{other},{other}'), 'labels of the run')


def test_real_train_with_teachers(teachers, timm_scripts, face_folder, tmp_path):
    """Resumed equals whole, and the checkpoint holds the student alone; with everything that draws labels beside it."""
    flags = ['--epochs', '2', '--val-split', '', '--kd-model-name', ','.join(teachers), '--kd-distill-type', 'logit',
             '--photo-look', '--class-map', face_folder / 'class_map.txt', *RANDOM]
    whole = train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    resumed = train(timm_scripts, face_folder, tmp_path, 'resumed', *flags, '--resume', whole / 'checkpoint-0.pth.tar')
    assert_same_end(whole, resumed)
    end = load(whole / 'last.pth.tar')
    student = set(timm.create_model('lfnsb', num_classes=4).state_dict())
    assert set(end['state_dict']) == student == set(end['state_dict_ema'])
    assert set(end['task_state']) == {'cosine_harmony'}


def test_real_train_keeps_centers_from_an_initial_checkpoint(timm_scripts, face_folder, tmp_path):
    flags = ['--epochs', '1', '--val-split', '', '--class-map', face_folder / 'class_map.txt']
    first = train(timm_scripts, face_folder, tmp_path, 'first', *flags)
    centers = load(first / 'last.pth.tar')['task_state']['cosine_harmony']['centers']
    ends = []
    for name, more in (('next', ['--initial-checkpoint', first / 'last.pth.tar']), ('other', [])):
        run = train(timm_scripts, face_folder, tmp_path, name, *flags, *more, '--lr', '1e-9', '--seed', '9')
        ends.append(load(run / 'last.pth.tar')['task_state']['cosine_harmony']['centers'])
    torch.testing.assert_close(ends[0], centers, atol=1e-4, rtol=0)
    assert not torch.allclose(ends[1], centers, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize('weight', ['0', '1'])
def test_two_processes_with_teachers(weight, teachers, timm_scripts, face_folder, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m',
               'timm_lfnsb', 'run', timm_scripts / 'train.py', *BASE, '--cosine-harmony', weight, '-b', '6',
               '--epochs', '1',
               '--kd-model-name', ','.join(teachers), '--logit-adjustment', '0.5', '--model-ema', '--val-split', '',
               '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--output', tmp_path,
               '--experiment', 'ddp']
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(load(tmp_path / 'ddp' / 'last.pth.tar')['state_dict']) == set(
        timm.create_model('lfnsb', num_classes=4).state_dict())
