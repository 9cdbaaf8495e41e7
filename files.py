"""Files that are whole or not there: written beside their place and moved to it in one step; a full disk is named."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """A place beside `path` to write a file at; it becomes `path` when the block has ended well, and else is removed.

    Nobody sees half a file, and a power cut leaves the old or the new one. needed: as in full_disk_named.
    """
    writing = path.with_name(f".{path.name}.writing")
    try:
        with full_disk_named(path, needed):
            yield writing
            flush(writing)
        os.replace(writing, path)
        flush(path.parent)
    finally:
        writing.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """The whole text as UTF-8 or, where the program is stopped, the file as it was."""
    with replacing(path, len(text)) as writing:
        writing.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def full_disk_named(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns whatever a library raises when the disk of `path` is full into an OSError (ENOSPC) that says so.

    needed: bytes that the block writes at most; libraries that do not pass on the system's error (torch, LMDB) are
    recognised by less than that being free.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(path.parent).free
        told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not told and "No space left on device" not in str(error) and free >= needed:
            raise
        more = f"{megabytes(needed)} are needed" if needed else "more is needed"
        raise OSError(errno.ENOSPC, f"the disk is full: {more}, {megabytes(free)} are free", str(path)) from error


def require_space(path: Path, needed: int) -> None:
    """OSError (ENOSPC) before anything is written where `needed` bytes do not fit on the disk of `path`."""
    with full_disk_named(path, needed):
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError(errno.ENOSPC, "the disk is full")


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
