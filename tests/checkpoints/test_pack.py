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
from timm_lfnsb.train.checkpoints import PackError

IN_MAP = ['neutral', 'happiness', 'sadness', 'anger']
BY_FOLDER = ['anger', 'happiness', 'neutral', 'sadness']


@pytest.fixture
def make_run(tmp_path, face_folder):
    """Write what train.py leaves behind after a run of mobilefacenet on the tiny folder."""
    def make(**settings):
        args = dict(model='mobilefacenet', num_classes=4, data_dir=str(face_folder), train_split='train', dataset='',
                    class_map=str(face_folder / 'class_map.txt'), model_kwargs={}, in_chans=None, gp=None,
                    mean=None, std=None, interpolation='', crop_pct=None, input_size=None, img_size=None)
        args.update(settings)
        model = timm.create_model(args['model'], num_classes=args['num_classes'], **args['model_kwargs'])
        ema = timm.create_model(args['model'], num_classes=args['num_classes'], **args['model_kwargs'])
        run = tmp_path / 'run'
        run.mkdir(exist_ok=True)
        torch.save({
            'epoch': 3, 'arch': args['model'], 'metric': 71.5, 'optimizer': {}, 'version': 2,
            'args': argparse.Namespace(**args), 'state_dict': model.state_dict(), 'state_dict_ema': ema.state_dict(),
            'task_state': {'cosine_harmony': {'centers': torch.zeros(4, 512)}},
        }, run / 'model_best.pth.tar')
        return run, model.eval(), ema.eval()
    return make


def load(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.mark.parametrize('ema', [True, False])
def test_the_folder_gives_the_same_logits_and_the_class_maps_labels(make_run, tmp_path, ema):
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


def test_without_a_class_map_the_folders_as_train_py_indexed_them(make_run, tmp_path):
    run, *_ = make_run(class_map='')
    assert pack(run, tmp_path / 'out')['label_names'] == BY_FOLDER
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['label_names'] == BY_FOLDER


def test_a_lost_class_map_is_never_replaced_by_the_folders(make_run, tmp_path):
    run, *_ = make_run(class_map=str(tmp_path / 'gone.txt'))
    with pytest.raises(PackError, match=r'gone\.txt is not there any more'):
        pack(run, tmp_path / 'out')
    assert pack(run, tmp_path / 'out', labels=IN_MAP)['label_names'] == IN_MAP


@pytest.mark.parametrize('settings', [dict(class_map='class_map.txt'), dict(class_map='', data_dir='faces')])
def test_relative_paths_of_a_run_are_not_trusted(settings, make_run, tmp_path, face_folder, monkeypatch):
    """Another folder's file of the same name would give wrong names without a word."""
    monkeypatch.chdir(face_folder)
    run, *_ = make_run(**settings)
    with pytest.raises(PackError, match='relative path'):
        pack(run, tmp_path / 'out')
    assert pack(run, tmp_path / 'out', labels=IN_MAP)['label_names'] == IN_MAP


def test_labels_by_hand_only_where_the_run_is_silent(make_run, tmp_path):
    run, *_ = make_run(class_map='', data_dir='/nowhere')
    with pytest.raises(PackError, match='--labels'):
        pack(run, tmp_path / 'out')
    with pytest.raises(PackError, match='4 classes, but there are 3'):
        pack(run, tmp_path / 'out', labels=['a', 'b', 'c'])
    for wrong in (['a', 'b', 'c', 'a'], ['a', '', 'b', 'c']):
        with pytest.raises(PackError, match='twice'):
            pack(run, tmp_path / 'out', labels=wrong)
    assert not (tmp_path / 'out').exists()
    assert pack(run, tmp_path / 'out', labels=['a', 'b', 'c', 'd'])['label_names'] == ['a', 'b', 'c', 'd']


def test_labels_that_contradict_the_run_are_refused(make_run, tmp_path):
    run, *_ = make_run()
    with pytest.raises(PackError, match="not the run's own"):
        pack(run, tmp_path / 'out', labels=BY_FOLDER)


def test_a_count_that_does_not_fit_is_refused(make_run, tmp_path):
    run, *_ = make_run(num_classes=7)
    with pytest.raises(PackError, match='7 classes, but there are 4 labels'):
        pack(run, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_model_arguments_and_preprocessing_of_the_run_survive(make_run, tmp_path):
    run, *_ = make_run(model_kwargs={'embed_dim': 64}, interpolation='bicubic', crop_pct=0.9)
    pack(run, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert config['model_args']['embed_dim'] == 64
    assert config['pretrained_cfg']['interpolation'] == 'bicubic' and config['pretrained_cfg']['crop_pct'] == 0.9
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


def test_the_config_claims_nothing_about_foreign_weights(make_run, tmp_path):
    run, *_ = make_run(model='lfnsb')
    pack(run, tmp_path / 'out')
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']
    assert not config.get('tag') and 'license' not in config and 'file' not in config


def test_half_precision_refuses_what_it_cannot_hold(make_run, tmp_path):
    run, *_ = make_run()
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    checkpoint['state_dict_ema']['fc.weight'][0, 0] = 1e6
    torch.save(checkpoint, run / 'model_best.pth.tar')
    with pytest.raises(PackError, match=r'fc\.weight.*float16'):
        pack(run, tmp_path / 'out', half=True)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('settings', [
    dict(model='no_such_model'), dict(model_kwargs={'depth': 3}), dict(gp='max'), dict(model='local-dir:/gone')])
def test_settings_that_build_no_model_are_one_sentence(settings, make_run, tmp_path):
    run, *_ = make_run()
    checkpoint = torch.load(run / 'model_best.pth.tar', weights_only=False)
    vars(checkpoint['args']).update(settings)
    torch.save(checkpoint, run / 'model_best.pth.tar')
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 1 and 'does not fit the model' in result.output and result.exception.code == 1


def test_half_precision_keeps_norms_and_halves_the_file(make_run, tmp_path):
    run, _, ema = make_run()
    pack(run, tmp_path / 'full')
    pack(run, tmp_path / 'half', half=True)
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('full', 'half')]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load(tmp_path / 'half')
    assert loaded.fc.weight.dtype == torch.float32
    assert torch.equal(loaded.stem[0].bn.running_var, ema.stem[0].bn.running_var)
    torch.testing.assert_close(loaded.fc.weight, ema.fc.weight, rtol=1e-3, atol=1e-4)


def test_an_existing_folder_is_not_touched(make_run, tmp_path):
    run, *_ = make_run()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('x')
    with pytest.raises(PackError, match='is there already'):
        pack(run, tmp_path / 'out')
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['mine.txt']


class Evil:
    def __reduce__(self):
        return print, ('executed',)


@pytest.mark.parametrize('content', ['text', 'pickle', 'truncated', 'tensor'])
def test_foreign_and_damaged_files_are_one_sentence(content, make_run, tmp_path, capsys):
    run, *_ = make_run()
    path = run / 'model_best.pth.tar'
    if content == 'text':
        path.write_text('hello')
    elif content == 'pickle':
        path.write_bytes(pickle.dumps(Evil()))
    elif content == 'truncated':
        path.write_bytes(path.read_bytes()[:5000])
    else:
        torch.save(torch.zeros(3), path)
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 1 and result.output.startswith('Error: ') and str(path) in result.output
    assert 'executed' not in result.output + capsys.readouterr().out
    assert not (tmp_path / 'out').exists()


def test_command_line(make_run, tmp_path):
    run, *_ = make_run()
    result = CliRunner().invoke(main, ['pack', str(run), str(tmp_path / 'out')])
    assert result.exit_code == 0 and 'neutral, happiness, sadness, anger' in result.output
    result = CliRunner().invoke(main, ['pack', str(tmp_path / 'nothing'), str(tmp_path / 'out2')])
    assert result.exit_code == 1 and 'does not exist' in result.output
