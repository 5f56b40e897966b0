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


def test_the_backbone_is_the_donors_and_the_seed_decides_the_head(tmp_path):
    first, same, other = (tmp_path / 'new' / f'{name}.safetensors' for name in ('first', 'same', 'other'))
    count, left = graft('lfn_small', 'lfnsb.ferplus', first)
    graft('lfn_small', 'lfnsb.ferplus', same)
    graft('lfn_small', 'lfnsb.ferplus', other, seed=1)
    heads = [load_file(path)['fc.weight'] for path in (first, same, other)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])

    model = timm.create_model('lfn_small', num_classes=8).eval()
    load_checkpoint(model, str(first))  # strict, as --initial-checkpoint
    assert set(left) == {key for key in model.state_dict() if key.startswith(('head.', 'fc.'))}
    assert count + len(left) == len(model.state_dict())
    donor = timm.create_model('lfnsb.ferplus', pretrained=True).eval()
    x = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(model.forward_features(x), donor.forward_features(x))


@pytest.mark.parametrize('model, donor, message', [
    ('mfn', 'lfnsb.ferplus', 'different backbones'), ('lfn_small', 'ddamfn', 'no trained weights')])
def test_refusals_leave_no_file(model, donor, message, tmp_path):
    result = CliRunner().invoke(main, ['graft', model, str(tmp_path / 'x.safetensors'), '--donor', donor])
    assert result.exit_code == 1 and message in result.output and not list(tmp_path.iterdir())
