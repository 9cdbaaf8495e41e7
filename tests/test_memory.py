"""memory.keep_freed: a large block that was freed is used again, without new pages from the system."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from op import memory

# A process of its own: in the tests' own, what other tests left free in the heap would serve the blocks as well.
PAGES = """
import resource
import sys

from op import memory

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(b"x") * (64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not memory.keep_freed(False):
    sys.exit("the C library is not glibc")
new_pages()
returned = new_pages()
memory.keep_freed()
new_pages()
print(returned, new_pages())
"""


def test_kept_memory_is_used_again_and_returned_memory_is_not():
    done = subprocess.run([sys.executable, "-c", PAGES], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    returned, kept = map(int, done.stdout.split())
    assert 10 * kept < returned, f"{kept} page faults with freed memory kept, {returned} without"


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False
