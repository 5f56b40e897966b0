"""Memory that training keeps."""
from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a tensor of 40 MB that is made and freed again and again.
SCRIPT = '''
import resource, sys
import torch
from timm_lfnsb.memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == 'keep' else None
for _ in range(5):
    torch.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(10_000_000)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
'''


def faults(argument: str, **variables: str) -> tuple[str, int]:
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith('MALLOC_') and key != 'GLIBC_TUNABLES'}
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, argument], env={**environment, **variables}, capture_output=True, text=True,
        check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings: run on Linux with glibc')
def test_freed_memory_is_used_again():
    _, without = faults('leave')
    kept, within = faults('keep')
    assert kept == 'True'
    assert without > 50  # 5 x 40 MB, even in huge pages
    assert within < without / 10
    assert faults('keep', MALLOC_ARENA_MAX='2')[0] == 'False'  # somebody has settings of their own
