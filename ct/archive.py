"""Zip files of scans: unpacked to a temporary folder for as long as they are looked at, within bounds."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from common.stopping import orderly_end
from ct.limits import check_ratio
from ct.scan import ScanError

SUFFIX, MAGIC = ".zip", b"PK\x03\x04"
# Names of what may hold scans and is not looked into
OTHER_NAMES = re.compile(r".*\.(?:tar|tgz|tbz2?|txz|7z|rar|(?:tar|dcm|dicom|ima|nii|zip)\.(?:gz|bz2|xz|zst))",
                         re.IGNORECASE | re.DOTALL)
MAX_BYTES = 20 * 2**30           # unpacked; the longest head CT series are 1 to 2 GB
MAX_FILES = 50_000
SPARE_BYTES = 2**30              # left free on the disk
PREFIX = "cn-stylegan-"          # of the temporary folders; then eight digits for the machine
ABANDONED_S = 7 * 86400.0        # an unlocked folder of another machine, or from before a restart, is as old at least


def claims(path: Path, head: bytes) -> bool:
    """Whether a file is a zip archive to look into: not .docx, .npz and the like, which are zip files too."""
    return head.startswith(MAGIC) and path.suffix.lower() in (SUFFIX, "")


def why_closed(path: Path, head: bytes, within: bool) -> str | None:
    """Why an archive is not looked into, by first bytes and name; None for a zip file that is, and for other files.

    within: whether it lies in a zip file itself. Of two layers nothing is known until both are unpacked, and of the
    rest nothing at all: a folder may hold nothing else of a patient.
    """
    if claims(path, head):
        return f"{path.name}: a zip file within a zip file; unpack the outer one yourself" if within else None
    if OTHER_NAMES.fullmatch(path.name):
        return f"{path.name}: of archives only zip files are looked into; unpack it yourself, or leave it out"
    return None


@contextmanager
def unpacked(path: Path, only: Collection[str] | None = None) -> Iterator[Path]:
    """A temporary folder with the archive's files, or `only` those of these paths in it; removed in the end.

    SIGTERM is such an end, too (common/stopping.py): the files are patients'. After SIGKILL, remove_abandoned does it.
    Raises ScanError where the archive is damaged or encrypted, has a path that leads out of the folder, or unpacks to
    more than the bounds or the disk allow.
    """
    with orderly_end(), _folder() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist()
                           if not m.filename.endswith(("/", "\\")) and (only is None or _place(m) in only)]
                _check(path, members, shutil.disk_usage(folder).free)
                for member in members:
                    target = Path(folder, _place(member))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as packed, open(target, "xb") as file:
                        shutil.copyfileobj(packed, file)
        except ScanError:
            raise
        except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ScanError(f"{path.name}: cannot be unpacked ({type(error).__name__}): it is damaged, encrypted or "
                            "packed by a method other than deflate; unpack it yourself") from error
        yield Path(folder)


@contextmanager
def _folder() -> Iterator[str]:
    """A temporary folder that others can see to be in use: it is locked for as long as this process lives."""
    handle = None
    while handle is None:
        folder = tempfile.mkdtemp(prefix=f"{PREFIX}{_machine()}-")
        handle = _locked(folder)                      # None: another run has removed it before it was locked
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked(folder: str) -> int | None:
    """A handle of a folder, locked but on file systems that know no locks; None if the folder is there no more."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX)
    if os.path.isdir(folder):
        return handle
    os.close(handle)
    return None


def remove_abandoned() -> None:
    """Remove what killed runs of this user have left unpacked in the temporary folder; never what a living one uses.

    The system lets go of a folder's lock when its process dies. Some file systems do not pass on the locks of other
    machines: what comes from one must be old, too. Where there are no locks nothing is removed.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):            # gone, another user's, or in use
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                facts, is_here = os.fstat(handle), folder.name.startswith(f"{PREFIX}{_machine()}-")
                if facts.st_uid == os.geteuid() and (is_here or time.time() - facts.st_mtime > ABANDONED_S):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def _machine() -> str:
    """This machine since its last start, of whose processes alone a lock is known to tell: containers share it."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8")
    except OSError:
        name = socket.gethostname()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _place(member: zipfile.ZipInfo) -> str:
    """Where a member lies once it is unpacked: some programs write './head/1.dcm', 'head//1.dcm' or 'head\\1.dcm'."""
    return PurePosixPath(member.filename.replace("\\", "/")).as_posix()


def _check(path: Path, members: list[zipfile.ZipInfo], free: int) -> None:
    total, limit = sum(member.file_size for member in members), min(MAX_BYTES, free - SPARE_BYTES)
    if len(members) > MAX_FILES or total > limit:
        raise ScanError(f"{path.name}: {len(members)} files that unpack to {total / 1e9:.1f} GB; expected at most "
                        f"{MAX_FILES} files and {max(limit, 0) / 1e9:.1f} GB (what the disk has room for); unpack it "
                        "yourself")
    check_ratio(path.name, total, path.stat().st_size)
    for member in members:
        name = PurePosixPath(_place(member))
        if name.is_absolute() or ".." in name.parts or "\0" in member.filename:
            raise ScanError(f"{path.name}: holds a path that leads out of the archive; unpack it yourself")
