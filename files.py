"""Files that are whole or not there: written beside their place and moved to it in one step; a full disk is named.

Tables and hashes of files, too: one reader, one writer, one hash.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_table(path: Path, columns: Sequence[str], error: type[ValueError] = ValueError,
               flag: str = "") -> list[dict[str, str]]:
    """Rows of a CSV file in UTF-8 whose header has at least these columns; cells that are not there are empty.

    Raises `error`, naming the flag it was given with, the file, what was expected and what was found.
    """
    where = f"{flag} {path}".strip()
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, found = list(reader), reader.fieldnames or []
    except FileNotFoundError as missing:
        raise error(f"{where}: cannot be read: no such file") from missing
    except (OSError, UnicodeDecodeError, csv.Error) as wrong:
        raise error(f"{where}: cannot be read as CSV in UTF-8 ({wrong}); save it as such") from wrong
    if absent := [column for column in columns if column not in found]:
        raise error(f"{where}: has no {', '.join(absent)}: expected columns {', '.join(columns)}; found "
                    f"{', '.join(found) or 'no header'}; columns are separated by commas")
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """CSV with these columns, replaced in one move; None and what a row lacks are empty, floats have six digits."""
    with replacing(path) as writing, open(writing, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: _cell(row.get(column)) for column in columns} for row in rows)


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value
