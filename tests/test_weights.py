"""The weights inside the package: they load as timm promises, and they are what their JSON says."""
from __future__ import annotations

import json
import re
import zipfile

import pytest
import timm
import torch
from click.testing import CliRunner
from conftest import ROOT

from timm_lfnsb import release
from timm_lfnsb.cli import main
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.networks import WEIGHTS_DIR, default_cfgs

NAMES = release.embedded_weights()


def test_there_are_weights_and_only_true_tags():
    assert 'lfnsb.ferplus' in NAMES
    tags = {f'{arch}.{tag}' for arch, cfg in default_cfgs.items() for tag, c in cfg.cfgs.items() if c.has_weights}
    assert tags == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_pretrained_loads_without_a_network(name, monkeypatch):
    import socket
    monkeypatch.setattr(socket.socket, 'connect', lambda *_: pytest.fail('network used'))
    arch = name.split('.')[0]
    model = timm.create_model(arch, pretrained=True).eval()
    assert model.pretrained_cfg['tag'] == name.split('.', 1)[1]
    assert tuple(model.pretrained_cfg['label_names']) == EXPRESSIONS_8 and model.num_classes == 8
    stored = release.weights_info(name)
    assert stored['label_names'] == list(EXPRESSIONS_8)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        logits = model(images)
        assert logits.isfinite().all() and logits.abs().max() < 100
        embedding = timm.create_model(arch, pretrained=True, num_classes=0).eval()(images)
        torch.testing.assert_close(embedding, model.forward_head(model.forward_features(images), pre_logits=True))
        fine_tune = timm.create_model(arch, pretrained=True, num_classes=5).eval()
        assert fine_tune(images).shape == (2, 5)
        torch.testing.assert_close(fine_tune.forward_features(images), model.forward_features(images))
        grey = timm.create_model(arch, pretrained=True, in_chans=1).eval()
        # timm sums the kernels of the channels, so a grey image replicated gives the same map
        one = torch.randn(2, 1, 112, 112)
        torch.testing.assert_close(grey(one), model(one.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-3)
        maps = timm.create_model(arch, pretrained=True, features_only=True).eval()(images)
        torch.testing.assert_close(maps[-1], model.forward_features(images))


@pytest.mark.parametrize('name', NAMES)
def test_json_describes_the_file(name):
    info = release.weights_info(name)
    assert release.sha256(WEIGHTS_DIR / f'{name}.safetensors') == info['sha256']
    for split in release.SPLITS:
        metrics = info['metrics'][split]
        total = sum(c['count'] for c in metrics['per_class'].values())
        right = sum(metrics['confusion'][i][i] for i in range(8))
        assert metrics['count'] == total == sum(map(sum, metrics['confusion']))
        assert metrics['accuracy'] == pytest.approx(right / total)
    assert re.fullmatch('[0-9a-f]{40}', info['commit']) and info['data']['sha256']
    assert all(run['curve'] and run['settings'] for run in info['runs'])
    assert '/' not in json.dumps([run['settings'] for run in info['runs']])  # no path of a machine


def test_readme_shows_what_the_json_says():
    readme = (ROOT / 'README.md').read_text()
    section = re.search(r'<!-- weights -->\n(.*?)<!-- /weights -->', readme, re.S)[1]
    assert section.strip().startswith(release.weights_table())


def test_list_and_verify_on_the_command_line(tmp_path):
    result = CliRunner().invoke(main, ['weights', 'list'])
    assert result.exit_code == 0 and 'lfnsb.ferplus' in result.output
    result = CliRunner().invoke(main, ['weights', 'verify', 'nonsense', '--data-dir', str(tmp_path)])
    assert result.exit_code == 1 and "no embedded weights 'nonsense'" in result.output
    result = CliRunner().invoke(main, ['weights', 'verify', '--data-dir', str(tmp_path)])
    assert result.exit_code == 1 and result.output.startswith('Error: ')


def test_verify_notices_other_figures(monkeypatch, tmp_path):
    stored = release.weights_info('lfnsb.ferplus')['metrics']['test']
    for shift, fails in ((0.001, False), (0.003, True)):
        measured = dict(stored, accuracy=stored['accuracy'] - shift)
        monkeypatch.setattr(release, 'measure', lambda *_, m=measured: {'test': m})
        if fails:
            with pytest.raises(release.ReleaseError, match='accuracy is'):
                release.verify('lfnsb.ferplus', tmp_path)
        else:
            assert 'lfnsb.ferplus on test' in release.verify('lfnsb.ferplus', tmp_path)[0]


@pytest.mark.slow
def test_the_stored_figures_are_measured_again(ferplus_source, tmp_path):
    for split in release.SPLITS:
        with zipfile.ZipFile(ferplus_source / f'{split}.zip') as archive:
            archive.extractall(tmp_path)
    for name in NAMES:
        assert len(release.verify(name, tmp_path)) == 2
