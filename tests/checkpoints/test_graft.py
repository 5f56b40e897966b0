"""graft: the donor's backbone tensor by tensor, a random head, a file that --initial-checkpoint takes."""
from __future__ import annotations

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from timm.models import load_checkpoint

from timm_lfnsb.checkpoints.graft import graft
from timm_lfnsb.cli import main


@pytest.fixture(scope='module')
def grafted(tmp_path_factory):
    out = tmp_path_factory.mktemp('graft') / 'new' / 'init.safetensors'
    return out, graft('lfn_small', 'lfnsb.ferplus', out)


def test_backbone_is_the_donors(grafted):
    out, _ = grafted
    donor = timm.create_model('lfnsb.ferplus', pretrained=True).eval()
    model = timm.create_model('lfn_small', num_classes=8).eval()
    load_checkpoint(model, str(out))  # strict, as --initial-checkpoint
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), donor.forward_features(x))
        assert model(x).shape == (2, 8)


def test_names_what_stays_random(grafted):
    _, (count, left) = grafted
    model = timm.create_model('lfn_small')
    assert set(left) == {key for key in model.state_dict() if key.startswith(('head.', 'fc.'))}
    assert count + len(left) == len(model.state_dict())


def test_seed_decides_the_head(grafted, tmp_path):
    out, _ = grafted
    graft('lfn_small', 'lfnsb.ferplus', tmp_path / 'same.safetensors')
    graft('lfn_small', 'lfnsb.ferplus', tmp_path / 'other.safetensors', seed=1)
    heads = [
        load_file(path)['fc.weight']
        for path in (out, tmp_path / 'same.safetensors', tmp_path / 'other.safetensors')]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize('model, donor, message', [
    ('mfn', 'lfnsb.ferplus', 'different backbones'),
    ('lfn_small', 'mfn', 'no trained weights'),
    ('no_such_model', 'lfnsb.ferplus', 'Unknown model'),
])
def test_refusals_are_one_sentence_and_leave_no_file(model, donor, message, tmp_path):
    result = CliRunner().invoke(main, ['graft', model, str(tmp_path / 'x.safetensors'), '--donor', donor])
    assert result.exit_code == 1
    assert message in result.output
    assert 'Traceback' not in result.output
    assert not list(tmp_path.iterdir())
