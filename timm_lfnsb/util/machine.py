"""The machine and the checkout that something was measured with."""
from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
        match = re.search(r'^model name\s*:\s*(.+)$', text, re.M)
        if match:
            return match[1].strip()
    except OSError:
        if sys.platform == 'darwin':
            name = subprocess.run(['sysctl', '-n', 'machdep.cpu.brand_string'], capture_output=True, text=True)
            if name.stdout.strip():
                return name.stdout.strip()
    return platform.processor() or platform.machine()


def processor(machine: dict[str, Any]) -> str:
    """Name and vector instructions, in which processors of one name can differ; older reports lack the latter."""
    return machine['cpu'] + (f' ({machine["vectors"]})' if machine.get('vectors') else '')


def source_commit() -> str | None:
    """Commit of the checkout this package is imported from, with a '+' behind it where files were changed since.

    None where the package is not in a checkout of its own.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', str(Path(__file__).parent.parent), *arguments], capture_output=True, text=True, check=True,
        ).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '__init__.py')  # a virtual environment may lie in another checkout
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '--', '.') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def git_commit() -> str | None:
    """Commit of the code the weights were packed with, None outside a checkout."""
    if not shutil.which('git'):
        return None
    result = subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


