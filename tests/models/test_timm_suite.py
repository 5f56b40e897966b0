"""timm's own model tests on this zoo's names: lfnsb by default, the others and the oldest timm where slow tests run.

timm's sdist on the package index brings its tests; TIMM_SDIST names a copy already at hand. The whole of
tests/test_models.py that is parametrised over all models runs on ours, no test of it is excluded. Tests that timm
parametrises over lists of its own modules or names skip plugins silently, so those that check a promise of every model
are called here for our names. Left out of them: test_prune_intermediate_layers_last_feature, which asks a pruned model
for average pooling; these networks have no pool but the one of their head.
"""
from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
from support import ROOT

OLDEST_TIMM = re.search(r'"timm>=([\d.]+)"', (ROOT / 'pyproject.toml').read_text())[1]
OURS = 'lfn or mfn or mobilefacenet or ddamfn'
FAST = 'lfnsb and not rafdb and not affectnet'

CALL_FOR_OUR_NAMES = '''
import inspect
import pytest
from tests import test_models
from timm_lfnsb.models.networks import default_cfgs

TESTS = [
    'test_model_forward_intermediates', 'test_model_forward_intermediates_features',
    'test_prune_intermediate_layers_contract', 'test_prune_intermediate_layers_params_used',
    'test_forward_after_prune_intermediate_layers', 'test_prune_to_stem_feature',
    'test_features_only_grad_checkpointing_backward', 'test_headless_checkpoint_reload',
    'test_feature_getter_stage_ends_torchscript',
]
TESTS = [name for name in TESTS if hasattr(test_models, name)]  # older releases have fewer
assert TESTS[:2] == ['test_model_forward_intermediates', 'test_model_forward_intermediates_features']


@pytest.mark.parametrize('model_name', sorted(default_cfgs))
@pytest.mark.parametrize('test', TESTS)
def test_ours(test, model_name):
    function = getattr(test_models, test)
    arguments = dict(model_name=model_name, batch_size=1, kwargs={})
    function(**{name: arguments[name] for name in inspect.signature(function).parameters})
'''


def pip(*args: str) -> None:
    result = subprocess.run([sys.executable, '-m', 'pip', *args], capture_output=True, text=True)
    offline = re.search('NewConnectionError|Max retries|Temporary failure|[Tt]imed out|ProxyError', result.stderr)
    if result.returncode and offline and not os.environ.get('CI'):
        pytest.skip("the package index cannot be reached for timm's sdist: set TIMM_SDIST to a copy")
    assert result.returncode == 0, result.stderr[-2000:]


def timm_tests(version: str, folder: Path) -> None:
    """Unpack the tests of a timm release, and only them: the installed package is what they shall test."""
    sdist = os.environ.get('TIMM_SDIST', '')
    if not sdist.endswith(f'timm-{version}.tar.gz'):
        pip('download', '--quiet', '--no-deps', '--no-binary', 'timm', f'timm=={version}', '--dest', str(folder))
        sdist = str(folder / f'timm-{version}.tar.gz')
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = Path(member.name)
            if member.isfile() and len(name.parts) == 3 and name.parts[1] == 'tests' and name.suffix == '.py':
                member.name = str(Path(*name.parts[1:]))
                archive.extract(member, folder, **({'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}))
    (folder / 'tests' / 'test_ours.py').write_text(CALL_FOR_OUR_NAMES)


def run_pytest(folder: Path, packages: list[Path], *args: str) -> str:
    """Run tests in a process of their own; returns the last line of their report."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, [*packages, ROOT])))
    result = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-rfEs', '-p', 'no:cacheprovider', *args], cwd=folder, env=env,
        capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout.strip().splitlines()[-1]


def run_timm_tests(folder: Path, packages: list[Path], networks: str, least: int) -> None:
    last = run_pytest(folder, [*packages, folder], '-p', 'timm_lfnsb', '--rootdir', str(folder), '-k', networks,
                      'tests/test_models.py', 'tests/test_ours.py')
    passed = re.search(r'(\d+) passed', last)
    assert passed and int(passed[1]) >= least and 'skipped' not in last, last


@pytest.mark.parametrize('networks, least', [
    (FAST, 10), pytest.param(f'({OURS}) and not ({FAST})', 40, marks=pytest.mark.slow)], ids=['lfnsb', 'others'])
def test_installed_timm(networks, least, tmp_path):
    timm_tests(timm.__version__, tmp_path)
    run_timm_tests(tmp_path, [], networks, least)


@pytest.mark.slow
def test_oldest_declared_timm(tmp_path):
    """timm's tests, and those of ours that lean on what timm changed between releases."""
    packages = tmp_path / 'packages'
    pip('install', '--quiet', '--no-deps', '--target', str(packages), f'timm=={OLDEST_TIMM}')
    timm_tests(OLDEST_TIMM, tmp_path)
    run_timm_tests(tmp_path, [packages], 'lfnsb', 10)
    run_pytest(ROOT, [packages], '-n', '0', *(f'tests/{name}' for name in (
        'checkpoints/test_pack.py', 'train/test_task.py', 'models/test_networks.py', 'models/test_reparameterize.py',
        'hub/test_ship.py', 'predict/test_recognizer.py')))
