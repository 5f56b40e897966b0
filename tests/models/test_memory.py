"""Memory that training keeps."""
from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a tensor of 40 MB that is made and freed again and again, also by another thread, as gradients are.
SCRIPT = '''
import resource, sys, threading
import torch
from timm_lfnsb.models.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == 'keep' else None
def count_faults():
    for _ in range(5):
        torch.ones(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
if sys.argv[2] == 'main':
    count_faults()
else:
    thread = threading.Thread(target=count_faults)
    thread.start()
    thread.join()
'''


def faults(argument: str, thread: str, **variables: str) -> tuple[str, int]:
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith('MALLOC_') and key != 'GLIBC_TUNABLES'}
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, argument, thread], env={**environment, **variables}, capture_output=True,
        text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings: run on Linux with glibc')
@pytest.mark.parametrize('thread', ['main', 'other'])
def test_freed_memory_is_used_again(thread):
    _, without = faults('leave', thread)
    kept, within = faults('keep', thread)
    assert kept == 'True'
    assert without > 50  # 5 x 40 MB, even in huge pages
    assert within < without / 10
    if thread == 'main':
        assert faults('keep', thread, MALLOC_ARENA_MAX='2')[0] == 'False'  # somebody has settings of their own
