"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

from tests.helpers import REPO

FAULTS = """
import resource, sys, torch
from trainer.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def step():
    return [torch.ones(10 << 20) for _ in range(2)]  # 40 MB each, which glibc would return at once

for _ in range(40):
    step()  # the heap may grow for some twenty steps, until free blocks are large enough to reuse
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_memory_of_the_previous_step_is_reused():
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout)

    assert faults("returned") > 30_000  # pages, out of 3 × 2 × 10,240
    assert faults("kept") < 1_000
