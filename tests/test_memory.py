"""memory.keep_freed: a large block that was freed is used again, without new pages from the system."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

import memory


@pytest.fixture(autouse=True)
def as_before():
    if not memory.keep_freed():
        pytest.skip("the C library is not glibc")
    yield
    memory.keep_freed(False)


def new_pages(blocks: int = 4) -> int:
    """Page faults of filling some 64 MB blocks, each freed before the next."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(blocks):
        torch.ones(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_kept_memory_is_used_again_and_returned_memory_is_not():
    memory.keep_freed()
    new_pages()
    kept = new_pages()
    memory.keep_freed(False)
    new_pages()
    assert 10 * kept < new_pages()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed() is False
