"""Files written whole or not at all: beside their place, then moved to it in one step; full disks are reported as such.

Also tables, JSON and hashes of files: one reader, one writer, one hash. Text in a table stays text in a spreadsheet.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")          # spreadsheets run text that begins so; an apostrophe stops it
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
ABANDONED_S = 3600.0             # a half-written file untouched for so long was left by a killed process


class FullDiskError(OSError):
    """The disk of `path` is full; needed: bytes, 0 where unknown."""

    def __init__(self, path: Path, needed: int = 0):
        more = f"{megabytes(needed)} are needed" if needed else "more is needed"
        super().__init__(errno.ENOSPC, f"the disk is full: {more}, {megabytes(_free(path))} are free", str(path))
        self.needed = needed

    def __reduce__(self) -> tuple:
        """For errors from a pool's workers: OSError's own would call __init__ with three arguments."""
        return type(self), (Path(self.filename), self.needed)


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """A path beside `path` to write to; the file becomes `path` when the block ends well, and is removed otherwise.

    Nobody sees half a file, and a power cut leaves the old or the new one. Several processes may write at once: each
    has a path of its own, and the last to finish wins. Of a symbolic link the file it leads to is replaced. needed: as
    in full_disk_named.
    """
    path = followed(path)
    _tidy(path.parent.absolute(), int(time.time() / ABANDONED_S))
    writing = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    try:
        with full_disk_named(path, needed):
            yield writing
            flush(writing)
        os.replace(writing, path)
        flush(path.parent)
    finally:
        writing.unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """Where a symbolic link leads; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


@functools.lru_cache(maxsize=1 << 12)
def _tidy(folder: Path, hour: int) -> None:
    """Once an hour and folder: with a look at every file written, each would take longer than the last."""
    remove_abandoned(folder, f".*.{'[0-9a-f]' * 32}.writing")


@contextlib.contextmanager
def replacing_folder(path: Path, work: Path) -> Iterator[Path]:
    """`replacing` for a folder, which is written in the folder `work` on the same disk."""
    writing, old = (work / f"{uuid.uuid4().hex}.{what}" for what in ("writing", "old"))
    writing.mkdir(parents=True)
    try:
        with full_disk_named(path):
            yield writing
            for file in [*writing.rglob("*"), writing]:
                flush(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(writing, path, old)
        flush(path.parent)
    finally:
        for leftover in (writing, old):
            shutil.rmtree(leftover, ignore_errors=True)


def put_in_place(writing: Path, path: Path, old: Path) -> None:
    """Rename the folder `path` to `old`, and `writing` to `path`; if that is interrupted, `old` comes back."""
    try:
        if path.exists():
            path.rename(old)
        writing.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)


def remove_abandoned(folder: Path, pattern: str, age_s: float = ABANDONED_S) -> None:
    """Remove files of this pattern that have not been written to for `age_s` seconds: killed processes left them.

    Files that a process has locked (flock) stay, however old.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):                  # moved to its place, or removed by another
            if path.is_file() and time.time() - path.stat().st_mtime > age_s and not _is_locked(path):
                path.unlink()


@contextlib.contextmanager
def locked(path: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Hold a lock on a file, made where there is none, for the length of the block; a killed process's is let go of.

    Raises BlockingIOError where another still holds it after `wait_s` seconds; OSError where it cannot be made. A
    file system without locks is passed over. Forked processes do not inherit it: those of a loader outlive a killed
    run by seconds.
    """
    with open(path, "a", encoding="utf-8") as file:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise
                time.sleep(min(1.0, wait_s))
                continue
            except OSError:                            # a file system without locks
                pass
            break
        _locks.add(file)
        try:
            yield
        finally:
            _locks.discard(file)


def _forget_locks() -> None:
    while _locks:
        _locks.pop().close()


_locks: set[IO] = set()
os.register_at_fork(after_in_child=_forget_locks)


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)          # let go of when the file is closed
    except BlockingIOError:
        return True
    except FileNotFoundError:
        raise
    except OSError:                                    # a file system without locks: the age alone decides
        return False
    return False


def replace_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, replaced in one move."""
    with replacing(path, len(text)) as writing:
        writing.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def full_disk_named(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn whatever a library raises when the disk of `path` is full into a FullDiskError.

    needed: the most bytes that the block writes. Libraries that hide the system's error (torch, LMDB) are taken to
    have met a full disk where fewer are free.
    """
    try:
        yield
    except FullDiskError:                              # named already, by a block within this one
        raise
    except Exception as error:
        reported = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not reported and "No space left on device" not in str(error) and _free(path) >= needed:
            raise
        raise FullDiskError(path, needed) from error


def no_folder(path: Path) -> Path | None:
    """What keeps `path` from being a folder that is written to: it, or the nearest of its parents that is there, where
    that is a file or may not be written to. None where nothing does."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return None if there.is_dir() and os.access(there, os.W_OK) else there


def require_space(path: Path, needed: int) -> None:
    """Raise FullDiskError where `needed` bytes do not fit on the disk of `path`."""
    if _free(path) < needed:
        raise FullDiskError(path, needed)


def _free(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """sha256 of a file, cached until its inode or time of status change differs."""
    found = path.stat()
    return _known_sha256(path, found.st_ino, found.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _known_sha256(path: Path, inode: int, ctime_ns: int) -> str:
    return sha256(path)


def read_object(path: Path, error: type[ValueError] = ValueError, mend: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Raises FileNotFoundError, and `error`, naming the file and ending with `mend`, for what is no JSON object; NaN and
    infinity are no JSON.
    """
    after = f": {mend}" if mend else ""

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is no number of JSON")
        return value

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_float=number, parse_constant=number)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as wrong:            # RecursionError: lists in lists in lists
        raise error(f"{path}: cannot be read as JSON ({wrong}){after}") from wrong
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, found a {type(found).__name__}{after}")
    return found


class Row(dict[str, str]):
    """A row of a table: cells by column. line: the line of the file on which it ends, from 1 for the header."""

    line = 0


def read_table(path: Path, columns: Sequence[str], error: type[ValueError] = ValueError,
               flag: str = "", keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows of a CSV file in UTF-8 whose header has at least these columns; missing cells are empty.

    keep: which rows to keep, for tables too long to hold whole. Raises `error`, naming the flag, the file, what was
    expected and what was found; also for a row with more cells than the header.
    """
    where = f"{flag} {path}".strip()

    def row_of(cells: dict[str | None, Any], line: int) -> Row:
        if any(beyond := cells.pop(None, [])):
            raise error(f"{where}, line {line}: has {len(cells) + len(beyond)} cells, the header {len(cells)}; put a "
                        "text with a comma in quotes, or correct the row")
        row = Row({name: from_cell(cell) for name, cell in cells.items()})
        row.line = line
        return row

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            found = reader.fieldnames or []
            rows = (row_of(cells, reader.line_num) for cells in reader)
            rows = [row for row in rows if keep(row)] if set(columns) <= set(found) else []
    except FileNotFoundError as missing:
        raise error(f"{where}: cannot be read: no such file") from missing
    except (OSError, UnicodeDecodeError, csv.Error) as wrong:
        raise error(f"{where}: cannot be read as CSV in UTF-8 ({wrong}); save it as such") from wrong
    if twice := sorted({column for column in found if column and found.count(column) > 1}):
        raise error(f"{where}: has the column {', '.join(twice)} more than once; which one counts? Remove the others, "
                    "or give them other names")
    if absent := [column for column in columns if column not in found]:
        raise error(f"{where}: has no {', '.join(absent)}: expected columns {', '.join(columns)}; found "
                    f"{', '.join(found) or 'no header'}; the first line holds the names, spelled so, and commas alone "
                    "between them")
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]],
                exact: Collection[str] = ()) -> None:
    """Write CSV with these columns, replaced in one move. None and missing cells are empty, floats have six digits;
    those of the columns `exact` all that they need to read back as they are.
    """
    with replacing(path) as writing, open(writing, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: _cell(row.get(column), "" if column in exact else ".6g") for column in columns}
                         for row in rows)


def _cell(value: Any, digits: str) -> Any:
    if isinstance(value, str):
        return to_cell(value)
    return "" if value is None else format(value, digits) if isinstance(value, float) else value


def to_cell(text: str) -> str:
    """A cell that a spreadsheet shows as this text, even where it looks like a formula."""
    return "'" + text if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """The inverse of to_cell."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
