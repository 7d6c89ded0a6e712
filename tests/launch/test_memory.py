"""The allocator's setting, tested in child processes because it cannot be undone."""

import os
import subprocess
import sys

PROGRAM = """
import resource, sys, threading
import numpy as np
from launch.command import keep_memory

if sys.argv[1] == "keep" and not keep_memory():
    sys.exit("no such setting")
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=lambda: np.ones(2**26, np.uint8))
    thread.start(), thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode):
    """The page faults of the third allocation of 64 MB in a thread; None without glibc."""
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}  # so that pages have 4 kB
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "no such setting" in done.stderr:
        return None
    assert not done.returncode, done.stderr
    return int(done.stdout)


def test_memory_that_a_thread_freed_is_used_again_without_page_faults():
    kept = faults("keep")
    assert kept is None or kept < 0.1 * faults("default")
