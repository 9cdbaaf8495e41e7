"""Files that are whole or not there: written beside their place and moved to it in one step; a full disk is named.

Tables, JSON and hashes of files, too: one reader, one writer, one hash. Text in a table stays text in a spreadsheet.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")          # text that begins so is no formula behind an apostrophe
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
ABANDONED_S = 3600.0             # who has written nothing to a file for so long was killed at it


class FullDiskError(OSError):
    """The disk of `path` is full; needed: bytes, 0 where that is not known."""

    def __init__(self, path: Path, needed: int = 0):
        more = f"{megabytes(needed)} are needed" if needed else "more is needed"
        super().__init__(errno.ENOSPC, f"the disk is full: {more}, {megabytes(_free(path))} are free", str(path))
        self.needed = needed

    def __reduce__(self) -> tuple:
        """For errors that a pool's worker hands on: OSError's own would give __init__ three words."""
        return type(self), (Path(self.filename), self.needed)


@contextlib.contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[Path]:
    """A place beside `path` to write a file at; it becomes `path` when the block has ended well, and else is removed.

    Nobody sees half a file, and a power cut leaves the old or the new one. Of several processes that write it at once
    the last one's stays: each has a place of its own. needed: as in full_disk_named.
    """
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


@functools.lru_cache(maxsize=1 << 12)
def _tidy(folder: Path, hour: int) -> None:
    """Once an hour: to look through a folder at each of the files that come into it would take ever longer."""
    remove_abandoned(folder, f".*.{'[0-9a-f]' * 32}.writing")


@contextlib.contextmanager
def replacing_folder(path: Path, work: Path) -> Iterator[Path]:
    """As `replacing`, for a folder, which is written in the folder `work` on the same disk."""
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
    """Rename the folder `writing` to `path`, and what was there to `old`; it comes back if that is broken off."""
    try:
        if path.exists():
            path.rename(old)
        writing.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)


def remove_abandoned(folder: Path, pattern: str, age_s: float = ABANDONED_S) -> None:
    """Remove the files of this pattern to which nobody has written for `age_s` seconds: killed processes began them.

    Not those that a process holds a lock of (flock): it lives, however long it has written nothing.
    """
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):                  # moved to its place, or removed by another
            if path.is_file() and time.time() - path.stat().st_mtime > age_s and not _is_locked(path):
                path.unlink()


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)          # let go of when the file is closed
    except BlockingIOError:
        return True
    except FileNotFoundError:
        raise
    except OSError:                                    # a file system that knows no locks: its age alone tells
        return False
    return False


def replace_text(path: Path, text: str) -> None:
    """The whole text as UTF-8 or, where the program is stopped, the file as it was."""
    with replacing(path, len(text)) as writing:
        writing.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def full_disk_named(path: Path, needed: int = 0) -> Iterator[None]:
    """Turns whatever a library raises when the disk of `path` is full into a FullDiskError.

    needed: bytes that the block writes at most; libraries that do not pass on the system's error (torch, LMDB) are
    recognised by less than that being free.
    """
    try:
        yield
    except FullDiskError:                              # named already, by a block within this one
        raise
    except Exception as error:
        told = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not told and "No space left on device" not in str(error) and _free(path) >= needed:
            raise
        raise FullDiskError(path, needed) from error


def require_space(path: Path, needed: int) -> None:
    """FullDiskError before anything is written where `needed` bytes do not fit on the disk of `path`."""
    if _free(path) < needed:
        raise FullDiskError(path, needed)


def _free(path: Path) -> int:
    return shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free


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


def known_sha256(path: Path) -> str:
    """sha256, of a file that is asked for again and again: read once while the system has not seen it change."""
    found = path.stat()
    return _known_sha256(path, found.st_ino, found.st_ctime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _known_sha256(path: Path, inode: int, ctime_ns: int) -> str:
    return sha256(path)


def read_object(path: Path, error: type[ValueError] = ValueError, mend: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises FileNotFoundError, and `error`, naming the file and ending with the mend, for
    what is no JSON, NaN and infinity among it, or no object.
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
    """A row of a table: cells by column. line: in its file, from 1, where the row ends; the header is a line, too."""

    line = 0


def read_table(path: Path, columns: Sequence[str], error: type[ValueError] = ValueError,
               flag: str = "", keep: Callable[[Row], bool] = lambda row: True) -> list[Row]:
    """Rows of a CSV file in UTF-8 whose header has at least these columns; cells that are not there are empty.

    keep: whether a row is kept, of a table that may be too long to be held whole. Raises `error`, naming the flag it
    was given with, the file, what was expected and what was found; where a row has cells beyond the header's, too.
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


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """CSV with these columns, replaced in one move; None and what a row lacks are empty, floats have six digits."""
    with replacing(path) as writing, open(writing, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({column: _cell(row.get(column)) for column in columns} for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return to_cell(value)
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def to_cell(text: str) -> str:
    """Text for a CSV file that may be opened in a spreadsheet: what that would take for a formula stays text."""
    return "'" + text if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def from_cell(cell: str) -> str:
    """The text that to_cell was given."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
