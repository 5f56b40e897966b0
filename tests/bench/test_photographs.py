"""`bench --photographs`: the recognizer's stream beside a loop of calls. No test looks at how long anything took."""
from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.bench.photographs import measure_photographs
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError


def test_command(tmp_path):
    out = tmp_path / 'report.json'
    result = CliRunner().invoke(main, ['bench', '--photographs', '3', '--rounds', '2', '--json', str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert (report['photographs'], report['side'], report['model']) == (3, 1024, 'lfnsb')
    for name in ('serial', 'loop', 'stream', 'serial_cpu', 'loop_cpu', 'stream_cpu', 'ratio_serial', 'ratio_loop'):
        assert 0 < report[name]['q1'] <= report[name]['median'] <= report[name]['q3']
    assert 0 < report['peak_mb'][0] <= report['peak_mb'][1]
    for name in ('serial', 'loop'):
        assert f'stream / {name}: {report[f"ratio_{name}"]["median"]:.2f} ' in result.stdout
    assert result.stderr.count('round ') == 2


@pytest.mark.parametrize('wrong', ['fewer', 'another order'])
def test_other_results_are_an_error(monkeypatch, wrong):
    stream = ExpressionRecognizer.stream

    def changed(self, images):
        results = list(stream(self, images))
        if len(results) > 2:  # else it is a call's own, or the warming up
            results = results[::-1] if wrong == 'another order' else [[], *results[1:]]
        return iter(results)

    monkeypatch.setattr(ExpressionRecognizer, 'stream', changed)
    with pytest.raises(UserError, match='other faces than the loop'):
        measure_photographs(3, side=200, rounds=1, progress=lambda message: None)
