"""Zip files of scans: unpacked to a temporary folder for as long as they are looked at, within bounds."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ct.limits import check_ratio
from ct.scan import ScanError

SUFFIX, MAGIC = ".zip", b"PK\x03\x04"
MAX_BYTES = 20 * 2**30           # unpacked; the longest head CT series are 1 to 2 GB
MAX_FILES = 50_000
SPARE_BYTES = 2**30              # left free on the disk


def claims(path: Path, head: bytes) -> bool:
    """Whether a file is a zip archive to look into: not .docx, .npz and the like, which are zip files too."""
    return head.startswith(MAGIC) and path.suffix.lower() in (SUFFIX, "")


@contextmanager
def unpacked(path: Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """A temporary folder with the archive's files, or `only` those of these names; removed in the end.

    Raises ScanError where the archive is damaged or encrypted, has a path that leads out of the folder, or unpacks to
    more than the bounds or the disk allow.
    """
    with tempfile.TemporaryDirectory(prefix="scan-") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir() and (only is None or m.filename in only)]
                _check(path, members, shutil.disk_usage(folder).free)
                for member in members:
                    target = Path(folder, member.filename)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as packed, open(target, "xb") as file:
                        shutil.copyfileobj(packed, file)
        except ScanError:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ScanError(f"{path.name}: cannot be unpacked ({type(error).__name__}): it is damaged, encrypted or "
                            "packed by a method other than deflate; unpack it yourself") from error
        yield Path(folder)


def _check(path: Path, members: list[zipfile.ZipInfo], free: int) -> None:
    total, limit = sum(member.file_size for member in members), min(MAX_BYTES, free - SPARE_BYTES)
    if len(members) > MAX_FILES or total > limit:
        raise ScanError(f"{path.name}: {len(members)} files that unpack to {total / 1e9:.1f} GB; expected at most "
                        f"{MAX_FILES} files and {max(limit, 0) / 1e9:.1f} GB (what the disk has room for); unpack it "
                        "yourself")
    check_ratio(path.name, total, path.stat().st_size)
    for member in members:
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename or "\0" in member.filename:
            raise ScanError(f"{path.name}: holds a path that leads out of the archive; unpack it yourself")
