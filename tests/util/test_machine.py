"""The commit that measurements and weights are marked with."""
from __future__ import annotations

import subprocess

from timm_lfnsb.util import machine


def test_commit_is_only_that_of_the_packages_own_checkout(monkeypatch, tmp_path):
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b', '-c', 'commit.gpgsign=false']
    (tmp_path / 'pkg' / 'util').mkdir(parents=True)
    (tmp_path / 'pkg' / '__init__.py').touch()
    monkeypatch.setattr(machine, '__file__', str(tmp_path / 'pkg' / 'util' / 'machine.py'))
    subprocess.run(['git', 'init', '-q', tmp_path], check=True)
    assert machine.git_commit() is None  # in a checkout, but not of it, as in a virtual environment
    subprocess.run([*git, 'add', '.'], check=True)
    subprocess.run([*git, 'commit', '-q', '-m', 'package'], check=True)
    commit = machine.git_commit()
    (tmp_path / 'pkg' / '__init__.py').write_text('changed')
    assert len(commit) == 40 and machine.git_commit() == commit + '+'
