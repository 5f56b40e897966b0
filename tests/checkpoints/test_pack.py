"""`timm-lfnsb pack`: checkpoints of train.py become timm folders with the run's own label names."""
from __future__ import annotations

import argparse
import json
import pickle

import pytest
import timm
import torch
from click.testing import CliRunner

from timm_lfnsb.checkpoints.pack import pack
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError

IN_MAP = ['neutral', 'happiness', 'sadness', 'anger']
BY_FOLDER = ['anger', 'happiness', 'neutral', 'sadness']


@pytest.fixture
def make_run(tmp_path, face_folder):
    """Write what train.py leaves behind after a run of mobilefacenet on the tiny folder."""
    def make(state=(), **settings):
        args = dict(model='mobilefacenet', num_classes=4, data_dir=str(face_folder), train_split='train', dataset='',
                    class_map=str(face_folder / 'class_map.txt'), model_kwargs={}, in_chans=None, gp=None,
                    mean=None, std=None, interpolation='', crop_pct=None, input_size=None, img_size=None)
        build = {'model': 'mobilefacenet', 'num_classes': 4, 'model_kwargs': {}} | settings
        model, ema = (timm.create_model(
            build['model'], num_classes=build['num_classes'], **build['model_kwargs']).eval() for _ in range(2))
        run = tmp_path / 'run'
        run.mkdir(exist_ok=True)
        torch.save({
            'epoch': 3, 'arch': args['model'], 'metric': 71.5, 'optimizer': {}, 'version': 2,
            'args': argparse.Namespace(**args | settings), 'state_dict': model.state_dict(),
            'state_dict_ema': ema.state_dict() | dict(state),
            'task_state': {'cosine_harmony': {'centers': torch.zeros(4, 512)}},
        }, run / 'model_best.pth.tar')
        return run, model, ema
    return make


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('ema', [True, False])
def test_the_folder_gives_the_same_logits_and_the_class_maps_labels(ema, make_run, tmp_path):
    run, model, model_ema = make_run()
    packed = pack(run, tmp_path / 'out', ema=ema)
    assert packed['label_names'] == IN_MAP and packed['ema'] == ema and packed['epoch'] == 3
    loaded = load(tmp_path / 'out')
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), (model_ema if ema else model)(images))
    assert list(loaded.pretrained_cfg['label_names']) == IN_MAP
    assert tuple(loaded.pretrained_cfg['input_size']) == (3, 112, 112)
    assert loaded.pretrained_cfg['crop_mode'] == 'squash' and loaded.pretrained_cfg['crop_pct'] == 1.0
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']


def test_transformers_loads_the_folder(make_run, tmp_path):
    transformers = pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")
    run, _, ema = make_run()
    pack(run, tmp_path / 'out')
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'out').eval()
    assert model.config.id2label == dict(enumerate(IN_MAP))
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, ema(images))


@pytest.mark.parametrize('settings, reason', [
    (dict(class_map=''), None),  # then it is the folders, as train.py indexed them
    (dict(class_map='/gone.txt'), r'gone\.txt is not there any more'),
    # Another folder's file of the same name would give wrong names without a word.
    (dict(class_map='class_map.txt'), 'relative path'),
    (dict(class_map='', data_dir='.'), 'relative path'),
    (dict(class_map='', data_dir='/nowhere'), '--labels'),
])
def test_labels_by_hand_only_where_the_run_is_silent(settings, reason, make_run, tmp_path, face_folder, monkeypatch):
    monkeypatch.chdir(face_folder)
    run, *_ = make_run(**settings)
    if reason is None:
        assert pack(run, tmp_path / 'out')['label_names'] == BY_FOLDER == config_of(tmp_path / 'out')['label_names']
        return
    with pytest.raises(UserError, match=reason):
        pack(run, tmp_path / 'out')
    for wrong, why in ((['a', 'b', 'c'], '4 classes, but there are 3'), (['a', 'b', 'c', 'a'], 'twice'),
                       (['a', '', 'b', 'c'], 'empty name')):
        with pytest.raises(UserError, match=why):
            pack(run, tmp_path / 'out', labels=wrong)
    assert not (tmp_path / 'out').exists()
    assert pack(run, tmp_path / 'out', labels=['a', 'b', 'c', 'd'])['label_names'] == ['a', 'b', 'c', 'd']


@pytest.mark.parametrize('settings, kwargs, reason', [
    ({}, dict(labels=BY_FOLDER), "not the run's own"),
    (dict(num_classes=7), {}, '7 classes, but there are 4 labels'),
    (dict(state={'fc.weight': torch.full((4, 128), 1e6)}), dict(half=True), r'fc\.weight.*float16'),
])
def test_what_contradicts_the_run_is_refused(settings, kwargs, reason, make_run, tmp_path):
    run, *_ = make_run(**settings)
    with pytest.raises(UserError, match=reason):
        pack(run, tmp_path / 'out', **kwargs)
    assert [path.name for path in tmp_path.iterdir()] == ['run']


@pytest.mark.parametrize('settings', [
    dict(model='no_such_model'), dict(model_kwargs={'depth': 3}), dict(gp='max'), dict(model='local-dir:/gone')])
def test_settings_that_build_no_model_are_one_sentence(settings, make_run, tmp_path):
    run, *_ = make_run()
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    vars(checkpoint['args']).update(settings)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with pytest.raises(UserError, match='does not fit the model'):
        pack(run, tmp_path / 'out')


def test_model_arguments_and_preprocessing_of_the_run_survive(make_run, tmp_path):
    run, *_ = make_run(model='lfnsb', model_kwargs={'embed_dim': 64}, interpolation='bicubic', crop_pct=0.9)
    pack(run, tmp_path / 'out')
    config = config_of(tmp_path / 'out')
    assert config['model_args']['embed_dim'] == 64
    assert config['pretrained_cfg']['interpolation'] == 'bicubic' and config['pretrained_cfg']['crop_pct'] == 0.9
    assert not {'tag', 'license', 'file'} & set(config['pretrained_cfg'])  # it claims nothing about foreign weights
    assert load(tmp_path / 'out').head_hidden_size == 64


def test_grey_and_other_sizes_as_train_py_built_them(make_run, tmp_path):
    run, *_ = make_run(model_kwargs={'img_size': 64, 'in_chans': 1}, input_size=[1, 64, 64])
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    checkpoint['args'].model_kwargs = {}  # --input-size alone says it
    torch.save(checkpoint, run / 'model_best.pth.tar')
    pack(run, tmp_path / 'out')
    loaded = load(tmp_path / 'out')
    assert loaded(torch.randn(1, 1, 64, 64)).shape == (1, 4)
    assert tuple(loaded.pretrained_cfg['input_size']) == (1, 64, 64)


def test_half_precision_keeps_norms_and_halves_the_file(make_run, tmp_path):
    run, _, ema = make_run()
    pack(run, tmp_path / 'full')
    pack(run, tmp_path / 'half', half=True)
    full, half = ((tmp_path / name / 'model.safetensors').stat().st_size for name in ('full', 'half'))
    assert half < 0.6 * full
    loaded = load(tmp_path / 'half')
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.stem[0].bn.running_var, ema.stem[0].bn.running_var)
    torch.testing.assert_close(loaded.fc.weight, ema.fc.weight, rtol=1e-3, atol=1e-4)


class Evil:
    def __reduce__(self):
        return print, ('executed',)


@pytest.mark.parametrize('content', [b'hello', pickle.dumps(Evil()), 'truncated', torch.zeros(3)])
def test_foreign_and_damaged_files_are_one_sentence(content, make_run, tmp_path, capsys):
    run, *_ = make_run()
    path = run / 'model_best.pth.tar'
    if isinstance(content, torch.Tensor):
        torch.save(content, path)
    else:
        path.write_bytes(path.read_bytes()[:5000] if content == 'truncated' else content)
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 1 and result.output.startswith('Error: ') and str(path) in result.output
    assert 'executed' not in result.output + capsys.readouterr().out
    assert not (tmp_path / 'out').exists()


def test_command_line(make_run, tmp_path):
    run, *_ = make_run()
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 0 and 'neutral, happiness, sadness, anger' in result.output
    before = [path.read_bytes() for path in (tmp_path / 'out').iterdir()]
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 1 and 'is there already' in result.output
    assert [path.read_bytes() for path in (tmp_path / 'out').iterdir()] == before
    result = CliRunner().invoke(main, ['pack', str(tmp_path / 'nothing'), str(tmp_path / 'out2')])
    assert result.exit_code == 1 and 'does not exist' in result.output
