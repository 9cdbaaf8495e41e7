"""memory.keep_freed: a large block that was freed is used again, without new pages from the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from op import memory

# Processes of their own: in the tests' own, what other tests left free in the heap would serve the blocks as well.
PAGES = """
import resource
import sys
from concurrent.futures import ThreadPoolExecutor

from op import memory

if not memory.keep_freed(sys.argv[1] == "kept"):
    sys.exit("the C library is not glibc")

def allocate():
    for _ in range(4):
        bytearray(b"x") * (64 << 20)

with ThreadPoolExecutor(1) as pool:
    run = allocate if sys.argv[2] == "main" else lambda: pool.submit(allocate).result()
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(freed: str, thread: str) -> int:
    """Page faults of four blocks of 64 MB, where as many were freed before."""
    done = subprocess.run([sys.executable, "-c", PAGES, freed, thread], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("thread", ["main", "another"])
def test_kept_memory_is_used_again_and_returned_memory_is_not(thread):
    returned, kept = new_pages("returned", thread), new_pages("kept", thread)
    assert 10 * kept < returned, f"{kept} page faults with freed memory kept, {returned} without"


HELD = """
from op import memory

def held():
    return int(open("/proc/self/statm").read().split()[1])

kept, before = memory.keep_freed(), held()
block = bytearray(b"x") * (64 << 20)
del block
freed = held()
memory.give_back()
print(kept, freed - before, held() - before)
"""


def test_what_is_kept_can_be_given_back():
    done = subprocess.run([sys.executable, "-c", HELD], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    kept, freed, given_back = done.stdout.split()
    if kept != "True":
        pytest.skip("the C library is not glibc")
    assert int(freed) > 10_000 > int(given_back)                         # pages of 4 kB: 16,384 were used


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False
    memory.give_back()
