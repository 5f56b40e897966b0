"""Counting against the design's table and the README."""
from __future__ import annotations

import json
import re

import pytest
from click.testing import CliRunner
from support import ROOT

from timm_lfnsb.cli import main
from timm_lfnsb.models.count import count_model
from timm_lfnsb.models.networks import default_cfgs


# fvcore at 1x3x112x112, without the classifier
@pytest.mark.parametrize('name, kwargs, macs', [
    ('lfnsb', dict(num_classes=7), 397.18), ('lfn_small', dict(num_classes=0), 396.41),
    ('mfn', dict(num_classes=0), 551.50), ('mobilefacenet', dict(num_classes=0, embed_dim=512), 227.6),
])
def test_macs(name, kwargs, macs):
    assert count_model(name, **kwargs).macs / 1e6 == pytest.approx(macs, abs=0.06)


def test_stages_add_up():
    count = count_model('lfnsb', num_classes=7)
    assert sum(params for params, _ in count.stages.values()) == count.params == 2_676_147
    assert sum(macs for _, macs in count.stages.values()) == pytest.approx(count.macs, rel=1e-6)
    assert count.uncounted['aten::prelu'] == 34 and 'aten::sigmoid' in count.uncounted


def test_command_line():
    result = CliRunner().invoke(main, ['count', 'lfnsb.rafdb'])
    assert result.exit_code == 0 and '2.676 M' in result.output and '397.2 M' in result.output
    assert '397.35 M' in result.output and 'multiply-accumulates' in result.output
    result = CliRunner().invoke(main, ['count', 'lfnsb.rafdb', '--json'])
    assert json.loads(result.output)['params'] == 2_676_147


def test_readme_table_is_what_count_prints():
    readme = (ROOT / 'README.md').read_text()
    for name in default_cfgs:
        count = count_model(f'{name}.rafdb')
        row = re.search(rf'^\| `{name}` \| (\S+) M \| (\S+) M \|', readme, re.M)
        assert row, name
        assert (f'{count.params / 1e6:.3f}', f'{count.macs / 1e6:.1f}') == row.groups()
