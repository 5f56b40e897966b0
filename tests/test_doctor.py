"""`timm-lfnsb doctor`; that it asks nobody on the network is tested in weights/test_fetch.py."""
from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from timm_lfnsb import __version__, doctor, errors
from timm_lfnsb.cli import main
from timm_lfnsb.weights.names import embedded_weights


@pytest.fixture
def report(monkeypatch, tmp_path):
    """What doctor prints, by title, with a Hub cache of its own."""
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))

    def run() -> dict[str, str]:
        result = CliRunner().invoke(main, ['doctor'])
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert len(lines) == 10
        return {line[:11].strip(): line[12:] for line in lines}
    return run


def install(folder: Path, name: str, number: str, top_level: str = '') -> None:
    """What pip leaves of a package."""
    info = folder / f'{name.replace("-", "_")}-{number}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n')
    (info / 'top_level.txt').write_text(top_level)


def test_a_sound_installation(report, tmp_path, monkeypatch):
    (tmp_path / 'hub' / 'models--someone--some-faces').mkdir(parents=True)
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    lines = report()
    assert lines['timm_lfnsb'].startswith(__version__) and lines['timm_lfnsb'].endswith(', '.join(embedded_weights()))
    for name in ('timm', 'torch', 'huggingface_hub'):
        assert f'{name} {version(name)}' in lines['libraries']
    assert '.'.join(map(str, sys.version_info[:3])) in lines['system']
    assert lines['faces'].startswith('YuNet in OpenCV') and 'cpu' in lines['devices']
    assert lines['Hub cache'] == 'someone/some-faces'
    assert 'HF_HUB_OFFLINE=1' in lines['settings'] and 'secret' not in str(lines)


def test_packages_in_each_others_way(report, tmp_path, monkeypatch):
    install(tmp_path / 'one', 'opencv-contrib-python', '5.0.0', 'cv2\n')
    install(tmp_path / 'one', 'opencv-python-headless', '4.9.0', 'cv2\n')
    install(tmp_path / 'one', 'onnxruntime-gpu', '1.20.0', 'onnxruntime\n')
    install(tmp_path / 'one', 'onnxruntime', '1.19.0', 'onnxruntime\n')
    install(tmp_path / 'two', 'timm', '0.9.12', 'timm\n')
    real = version('timm')
    for folder in ('two', 'one'):
        monkeypatch.syspath_prepend(tmp_path / folder)
    text = report()['duplicates']
    assert ('opencv-contrib-python 5.0.0, opencv-python-headless 4.9.0 are in one folder, cv2: pip uninstall -y '
            'opencv-contrib-python opencv-python-headless, then pip install opencv-python-headless') in text
    assert 'pip uninstall -y onnxruntime onnxruntime-gpu, then pip install onnxruntime' in text
    assert f'timm is installed in several places (0.9.12, {real})' in text and 'torch is' not in text


def test_what_is_broken_or_missing_is_said_and_the_rest_goes_on(report, tmp_path, monkeypatch):
    (tmp_path / 'onnxruntime').mkdir()
    (tmp_path / 'onnxruntime' / '__init__.py').write_text('raise OSError("libort.so:\\n cannot open")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'onnxruntime', raising=False)
    monkeypatch.setattr(doctor, 'RUNTIMES', ('onnxruntime', 'no_such_runtime'))
    monkeypatch.setattr(doctor, 'cpu_name', lambda: 1 / 0)
    monkeypatch.setattr(doctor, 'EXTRAS', {**errors.EXTRAS, 'no_such_module': 'moving', 'nor_this': 'moving'})
    lines = report()
    assert lines['runtimes'] == 'torch, onnxruntime does not work (libort.so: cannot open), no no_such_runtime'
    assert lines['system'] == 'does not work: division by zero'
    assert 'moving lacks no_such_module, nor_this (pip install "timm-lfnsb[moving]")' in lines['extras']
    assert lines['Hub cache'] == 'empty' and lines['duplicates'] == 'none'
