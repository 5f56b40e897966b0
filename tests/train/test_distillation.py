"""Distillation: one teacher or several, alone and with the Cosine-Harmony loss, against the formula."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from support import train_script as ts
from support.train_script import BASE, CPU, RANDOM, STANDIN, launch, load, one_sentence, standin
from timm.models import save_for_hf
from timm.task import FeatureDistillationTask, LogitDistillationTask

from timm_lfnsb.checkpoints.pack import pack
from timm_lfnsb.errors import UserError
from timm_lfnsb.models.loading import load_model
from timm_lfnsb.train.distillation import CosineHarmonyDistillationTask, load_feature_teacher, load_teachers

LABELS = ('neutral', 'happiness', 'sadness', 'anger')


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


@pytest.mark.parametrize('weights', [{}, dict(distill_loss_weight=0.7, task_loss_weight=0.3, temperature=2.)])
def test_the_loss_is_timms_and_the_cosine_harmony_loss(weights, teachers):
    student = timm.create_model('lfnsb', num_classes=4)
    ensemble = load_teachers(teachers[0], 3, LABELS)
    common = dict(criterion=torch.nn.CrossEntropyLoss(), device=CPU, verbose=False, **weights)
    task = CosineHarmonyDistillationTask(student, ensemble, weight=0.5, **common).eval()
    images, target = torch.randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1])
    parts = task(images, target)
    timms = LogitDistillationTask(student, ensemble, **common).eval()(images, target)
    for name in ('output', 'task_loss', 'kd_loss'):
        torch.testing.assert_close(parts[name], timms[name])
    torch.testing.assert_close(parts['loss'], timms['loss'] + 0.5 * parts['cosine_harmony_loss'])


@pytest.mark.parametrize('flags, task', [
    (['--cosine-harmony', '2'], 'CosineHarmonyDistillationTask'), ([], 'LogitDistillationTask'),
    (['--feature-loss', 'separate:2', '--feature-loss', 'center:2'], 'FeatureLossDistillationTask')])
def test_the_launcher_takes_over_timms_task(flags, task, teachers, face_folder, tmp_path):
    """Every teacher counts, and so does the prior that is taken off their answer as it is off the student's."""
    shutil.copytree(face_folder, tmp_path / 'faces')
    for path in (tmp_path / 'faces' / 'train' / 'anger').glob('*[1-5].png'):
        path.unlink()
    data = ['--data-dir', tmp_path / 'faces', '--class-map', face_folder / 'class_map.txt', *flags]
    runs = [standin(tmp_path, *data, '--kd-model-name', *more) for more in (
        [teachers[0]], [teachers[1]], [','.join(teachers)], [','.join(teachers), '--logit-adjustment', '1'])]
    assert {run['task'] for run in runs} == {task}
    assert len({round(run['parts']['kd_loss'], 6) for run in runs}) == 4
    for parts in (run['parts'] for run in runs):
        names = ('cosine_harmony_loss', 'separate_loss', 'center_loss')
        total = parts['task_loss'] + parts['kd_loss'] + 2 * sum(parts.get(name, 0) for name in names)
        assert parts['loss'] == pytest.approx(total, rel=1e-5)


def test_features_of_a_teacher_are_those_at_its_own_size(face_folder, tmp_path):
    """Its classes may be others than the run's: no answer of it is used."""
    name = save_teacher(tmp_path / 'teacher', ('fear', 'disgust'), 48, mean=(0.5,) * 3)
    student = timm.create_model('lfnsb', num_classes=4).eval()
    mean, std = (torch.tensor(student.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ('mean', 'std'))
    pixels, target = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    teacher, images = load_feature_teacher(name, 3), (pixels - mean) / std
    task = FeatureDistillationTask(student, teacher, criterion=torch.nn.CrossEntropyLoss(), verbose=False).eval()
    network = load_model(name).eval()
    large = F.interpolate(pixels, (48, 48), mode='bilinear')
    std = torch.tensor(network.pretrained_cfg['std']).view(3, 1, 1)
    expected = network.forward_head(network.forward_features((large - 0.5) / std), pre_logits=True)
    projection = task.trainable_module.projection
    features = projection(student.forward_head(student.forward_features(images), pre_logits=True))
    torch.testing.assert_close(task(images, target)['kd_loss'], (features - expected).square().mean())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())

    losses = []
    config = tmp_path / 'teacher' / 'config.json'
    text = config.read_text()
    for size in (48, 24, 48):
        config.write_text(text.replace('48', str(size)))
        run = standin(tmp_path, '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt',
                      '--kd-model-name', name, '--kd-distill-type', 'feature')
        assert run['task'] == 'FeatureDistillationTask'
        losses.append(run['parts']['kd_loss'])
    assert losses[0] == losses[2] != losses[1]


def test_token_distillation_matches_labels_by_name(teachers, face_folder, tmp_path):
    flags = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--kd-distill-type', 'token',
             '--model', 'deit_tiny_distilled_patch16_224', '--kd-model-name']
    assert standin(tmp_path, *flags, teachers[0])['task'] == 'TokenDistillationTask'
    other = save_teacher(tmp_path / 'other', ('neutral', 'happiness', 'sadness', 'fear'))
    one_sentence(launch(STANDIN, '--output', tmp_path, *flags, other), 'fear) are not those of the run')
    flags[-2] = 'lfnsb'
    one_sentence(launch(STANDIN, '--output', tmp_path, *flags, teachers[0]), '--kd-distill-type token: ', 'distill')


def test_the_launcher_refuses_teachers_that_do_not_fit(teachers, face_folder, tmp_path):
    data = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--cosine-harmony', '1']
    other = save_teacher(tmp_path / 'other', ('neutral', 'happiness', 'sadness', 'fear'))
    for flags, words in (
            ([*data, '--kd-model-name', f'{teachers[0]},{other}'], 'fear) are not those of the run'),
            ([*data, '--kd-model-name', 'lfnsb.nothing'], 'lfnsb has no tag nothing'),
            (['--kd-model-name', f'{other},{other}'], 'not those of the run')):
        one_sentence(launch(STANDIN, '--output', tmp_path, *flags), words)
    with pytest.raises(UserError, match='other channels'):
        load_teachers(teachers[0], 1, LABELS)


def test_real_train_with_teachers(teachers, timm_scripts, face_folder, tmp_path):
    """Resumed equals whole, and the checkpoint holds the student alone; with everything that draws labels beside it."""
    flags = ['--epochs', '2', '--val-split', '', '--kd-model-name', ','.join(teachers), '--kd-distill-type', 'logit',
             '--photo-look', *RANDOM]
    whole = ts.train(timm_scripts, face_folder, tmp_path, 'whole', *flags)
    resumed = ts.train(
        timm_scripts, face_folder, tmp_path, 'resumed', *flags, '--resume', whole / 'checkpoint-0.pth.tar')
    ts.assert_same_end(whole, resumed)
    end = load(whole / 'last.pth.tar')
    student = set(timm.create_model('test_resnet', num_classes=4).state_dict())
    assert set(end['state_dict']) == student == set(end['state_dict_ema'])
    assert set(end['task_state']) == {'cosine_harmony'}


def test_real_train_with_the_features_of_a_teacher(teachers, timm_scripts, face_folder, tmp_path):
    """What is packed is the student, without the projection onto the teacher's features."""
    run = ts.train(timm_scripts, face_folder, tmp_path, 'features', '--epochs', '1', '--val-split', '',
                   '--model-ema',
                   '--cosine-harmony', '0', '--kd-model-name', teachers[1], '--kd-distill-type', 'feature')
    student = set(timm.create_model('test_resnet', num_classes=4).state_dict())
    end = load(run / 'last.pth.tar')
    assert set(end['state_dict']) == student == set(end['state_dict_ema'])
    with pytest.raises(UserError, match='trained other parameters: give the options of that run'):
        ts.train(timm_scripts, face_folder, tmp_path, 'features', '--epochs', '2', '--val-split', '',
                 '--cosine-harmony', '0', '--resume', run / 'last.pth.tar')
    pack(run, tmp_path / 'packed')
    assert set(load_model(f'local-dir:{tmp_path / "packed"}').state_dict()) == student


@pytest.mark.slow
@pytest.mark.parametrize('weight', ['0', '1'])
def test_two_processes_with_teachers(weight, teachers, timm_scripts, face_folder, tmp_path):
    result = ts.python(
        *ts.TORCHRUN, timm_scripts / 'train.py', *BASE, '--cosine-harmony', weight, '--epochs', '1', '--model-ema',
        '--kd-model-name', ','.join(teachers), '--logit-adjustment', '0.5', '--val-split', '', '--data-dir',
        face_folder, '--class-map', face_folder / 'class_map.txt', '--output', tmp_path, '--experiment', 'ddp')
    assert result.returncode == 0, result.stderr[-3000:]
    student = set(timm.create_model('test_resnet', num_classes=4).state_dict())
    assert set(load(tmp_path / 'ddp' / 'last.pth.tar')['state_dict']) == student
