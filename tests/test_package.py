"""What the wheel and the sdist hold."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from support import ROOT


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Every data file of the package is in both, nothing of data sets is, and PyPI would take their metadata."""
    for module in ('build', 'twine'):
        pytest.importorskip(module, reason="pip install 'timm-lfnsb[dev]' brings it")
    source = tmp_path / 'source'
    source.mkdir()
    for name in ('LICENSE', 'README.md', 'pyproject.toml'):
        shutil.copy(ROOT / name, source)
    for name in ('timm_lfnsb', 'tests'):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    # The environment's own setuptools where it has one, so that this needs no network.
    isolation = ['--no-isolation'] if importlib.util.find_spec('setuptools') else []
    subprocess.run([sys.executable, '-m', 'build', *isolation, str(source)], check=True, stdout=subprocess.DEVNULL)
    files = sorted((source / 'dist').iterdir())
    subprocess.run([sys.executable, '-m', 'twine', 'check', '--strict', *map(str, files)], check=True)

    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'timm_lfnsb').rglob('*')
              if path.is_file() and '__pycache__' not in path.parts}
    wheel, = (zipfile.ZipFile(path) for path in files if path.suffix == '.whl')
    sdist, = (tarfile.open(path) for path in files if path.suffix == '.gz')
    in_wheel = {name for name in wheel.namelist() if '.dist-info/' not in name}
    in_sdist = {name.partition('/')[2] for name in sdist.getnames()}
    assert in_wheel == wanted
    assert wanted <= in_sdist
    assert not [name for name in in_wheel | in_sdist if name.endswith(('.png', '.jpg', '.zip', '.csv', '.pth', '.bin'))]
    weights = sum(entry.compress_size for entry in wheel.infolist() if entry.filename.endswith('.safetensors'))
    assert weights < 32e6 and max(path.stat().st_size for path in files) - weights < 1e6


def test_extras_are_imported_only_where_they_are_what_it_is_for():
    """Importing the package imports neither OpenCV nor scikit-image; predict and most commands need no extra."""
    code = '''
import importlib, sys
from pathlib import Path
for name in ('sklearn', 'scipy', 'matplotlib', 'onnx', 'onnxruntime', 'openvino', 'executorch', 'transformers'):
    sys.modules[name] = None
import timm_lfnsb, timm_lfnsb.errors
assert not {'cv2', 'skimage', 'fvcore'} & set(sys.modules)
timm_lfnsb.align_face
assert 'cv2' in sys.modules
for path in sorted(Path(timm_lfnsb.__path__[0]).rglob('[!_]*.py')):
    name = '.'.join(path.with_suffix('').relative_to(Path(timm_lfnsb.__path__[0]).parent).parts)
    try:
        importlib.import_module(name)
    except (ImportError, timm_lfnsb.errors.UserError):
        print(name)
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = {name.split('.')[1] for name in done.stdout.split()}
    assert folders <= {'evaluate', 'experiments'}, done.stdout  # they measure
