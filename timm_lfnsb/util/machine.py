"""The machine and the checkout that something was measured with."""
from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    name = None
    if Path('/proc/cpuinfo').is_file():
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
        name = re.search(r'^model name\s*:\s*(.+?)\s*$', text, re.M)
    elif sys.platform == 'darwin':
        text = subprocess.run(['sysctl', '-n', 'machdep.cpu.brand_string'], capture_output=True, text=True).stdout
        name = re.search(r'(\S.*\S)', text)
    return name[1] if name else platform.processor() or platform.machine()


def processor(machine: dict[str, Any]) -> str:
    """Name and vector instructions, in which processors of one name can differ; older reports lack the latter."""
    return machine['cpu'] + (f' ({machine["vectors"]})' if machine.get('vectors') else '')


def git_commit() -> str | None:
    """Commit of the checkout this package is imported from, with a '+' behind it where files were changed since.

    None where the package is not in a checkout of its own.
    """
    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', str(Path(__file__).parents[1]), *arguments], capture_output=True, text=True, check=True,
        ).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '__init__.py')  # a virtual environment may lie in another checkout
        return git('rev-parse', 'HEAD') + ('+' if git('status', '--porcelain', '--', '.') else '')
    except (OSError, subprocess.CalledProcessError):
        return None
