"""Freed memory is kept: allocating the same blocks again faults in no new pages."""

import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from onevoice.processes import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def touch():
    blocks = [malloc(ctypes.c_size_t(40 << 20)) for _ in range(3)]
    for block in blocks:
        ctypes.memset(block, 1, 40 << 20)
    for block in blocks:
        free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT, mode], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted by Linux")
def test_freed_memory_is_kept() -> None:
    assert faults("keep") < 100
    assert faults("default") > 100  # or the function would be of no use
