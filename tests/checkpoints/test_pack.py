"""`timm-lfnsb pack`: checkpoints of train.py become timm folders with the run's own label names."""
from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
from click.testing import CliRunner

from timm_lfnsb.checkpoints.pack import pack
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate import calibration
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.models.loading import load_model

IN_MAP = ['neutral', 'happiness', 'sadness', 'anger']
BY_FOLDER = ['anger', 'happiness', 'neutral', 'sadness']


@pytest.fixture
def make_run(tmp_path, face_folder):
    """Write what train.py leaves behind after a run on the tiny folder; returns it, the network and its average."""
    def make(build: dict | None = None, **settings):
        args = dict(model='mobilefacenet', num_classes=4, data_dir=str(face_folder), train_split='train', dataset='',
                    class_map=str(face_folder / 'class_map.txt'), model_kwargs={}, in_chans=None, gp=None,
                    mean=None, std=None, interpolation='', crop_pct=None, input_size=None, img_size=None) | settings
        build = dict(model_name='mobilefacenet', num_classes=args['num_classes']) | (build or {})
        model, ema = (timm.create_model(**build).eval() for _ in range(2))
        run = tmp_path / 'run'
        run.mkdir()
        torch.save({
            'epoch': 3, 'arch': args['model'], 'metric': 71.5, 'optimizer': {}, 'version': 2,
            'args': argparse.Namespace(**args), 'state_dict': model.state_dict(),
            'state_dict_ema': ema.state_dict(),
            'task_state': {'cosine_harmony': {'centers': torch.zeros(4, 512)}},
        }, run / 'model_best.pth.tar')
        return run, model, ema
    return make


@pytest.mark.parametrize('ema', [True, False])
def test_same_logits_and_the_class_maps_labels(ema, make_run, tmp_path):
    run, model, model_ema = make_run()
    packed = pack(run, tmp_path / 'out', ema=ema)
    assert packed['label_names'] == IN_MAP and packed['ema'] == ema and packed['epoch'] == 3
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), (model_ema if ema else model)(images))
    config = loaded.pretrained_cfg
    assert list(config['label_names']) == IN_MAP and tuple(config['input_size']) == (3, 112, 112)
    assert config['crop_mode'] == 'squash' and config['crop_pct'] == 1.0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']
    # transformers passes it as well, and fails where it is here; test_transformers.py loads such folders
    assert 'num_classes' not in json.loads((tmp_path / 'out' / 'config.json').read_text()).get('model_args', {})


@pytest.mark.parametrize('settings, reason', [
    (dict(class_map=''), None),
    (dict(class_map='/gone.txt'), r'gone\.txt is not there any more'),
    # Another folder's file of the same name would give wrong names without a word.
    (dict(class_map='class_map.txt'), 'relative path'),
    (dict(class_map='', data_dir='/nowhere'), '--labels'),
])
def test_labels_by_hand_only_where_the_run_is_silent(settings, reason, make_run, tmp_path, face_folder, monkeypatch):
    monkeypatch.chdir(face_folder)
    run, *_ = make_run(**settings)
    if reason is None:  # the folders, as train.py indexed them
        assert pack(run, tmp_path / 'out')['label_names'] == BY_FOLDER
        return
    for labels, why in {None: reason, 'a,b,c': 'the model has 4 classes', 'a,b,c,a': 'one name for each',
                        'a,,c,d': 'one name for each'}.items():
        with pytest.raises(UserError, match=why):
            pack(run, tmp_path / 'out', labels=labels and labels.split(','))
    assert not (tmp_path / 'out').exists()
    assert pack(run, tmp_path / 'out', labels=list('abcd'))['label_names'] == ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('settings, kwargs, reason', [
    ({}, dict(labels=BY_FOLDER), "not the run's own"), (dict(num_classes=7), {}, 'the model has 7 classes'),
    (dict(model='no_such_model'), {}, 'does not fit the model'), (dict(gp='max'), {}, 'does not fit the model')])
def test_what_does_not_fit_the_run_is_refused(settings, kwargs, reason, make_run, tmp_path):
    run, *_ = make_run(**settings)
    with pytest.raises(UserError, match=reason):
        pack(run, tmp_path / 'out', **kwargs)
    assert [path.name for path in tmp_path.iterdir() if path.name != 'data'] == ['run']


def test_model_arguments_and_preprocessing_of_the_run_survive(make_run, tmp_path):
    run, *_ = make_run(dict(embed_dim=64, in_chans=1, img_size=64), model_kwargs={'embed_dim': 64},
                       input_size=[1, 64, 64], interpolation='bicubic', crop_pct=0.9)
    pack(run, tmp_path / 'out')
    written = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert not {'tag', 'license', 'file'} & set(written['pretrained_cfg'])  # it claims nothing about foreign weights
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    assert loaded.head_hidden_size == 64 and loaded(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    config = loaded.pretrained_cfg
    assert (tuple(config['input_size']), config['interpolation'], config['crop_pct']) == ((1, 64, 64), 'bicubic', 0.9)


@pytest.mark.parametrize('half', [False, True])
def test_a_temperature_is_fitted_on_validation_and_stored(half, make_run, tmp_path, face_folder, monkeypatch):
    fitted = []
    monkeypatch.setattr(calibration, 'fit_temperature', lambda predictions: fitted.append(predictions) or 1.25)
    run, *_ = make_run()
    packed = pack(run, tmp_path / 'out', half=half, calibrate=face_folder)
    model = load_model(f'local-dir:{tmp_path / "out"}')
    assert packed['temperature'] == model.softmax_temperature == 1.25
    expected = predict_folder(model, face_folder, 'validation')  # what was stored, and of that split
    assert fitted[0].files == expected.files and (fitted[0].labels == expected.labels).all()
    assert fitted[0].probabilities == pytest.approx(expected.probabilities, abs=1e-5)
    pack(run, tmp_path / 'plain')
    assert 'softmax_temperature' not in json.loads((tmp_path / 'plain' / 'config.json').read_text())


def test_half_precision_keeps_norms_and_halves_the_file(make_run, tmp_path):
    run, _, ema = make_run()
    pack(run, tmp_path / 'full')
    pack(run, tmp_path / 'half', half=True)
    full, half = ((tmp_path / name / 'model.safetensors').stat().st_size for name in ('full', 'half'))
    loaded = timm.create_model(f'local-dir:{tmp_path / "half"}', pretrained=True)
    assert half < 0.6 * full and loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.stem[0].bn.running_var, ema.stem[0].bn.running_var)
    torch.testing.assert_close(loaded.fc.weight, ema.fc.weight, rtol=1e-3, atol=1e-4)
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    checkpoint['state_dict_ema']['fc.weight'][0, 0] = 1e6
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with pytest.raises(UserError, match=r'fc\.weight has values that float16 cannot hold'):
        pack(run, tmp_path / 'infinite', half=True)
    assert not (tmp_path / 'infinite').exists()


def test_command_line(make_run, tmp_path):
    run, *_ = make_run()
    for source, out, code, words in ((run, 'out', 0, 'neutral, happiness, sadness, anger'),
                                     (run, 'run', 1, 'is there already')):
        result = CliRunner().invoke(main, ['pack', str(source), str(tmp_path / out)])
        assert result.exit_code == code and words in result.output
    assert [path.name for path in run.iterdir()] == ['model_best.pth.tar']
