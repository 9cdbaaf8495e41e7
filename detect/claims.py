"""Claims on scans: how runs that write into one folder of results share the work without talking to each other.

A claim is a file that exists or not: creating it is one atomic step, on network file systems as well. Its holder
touches it now and then. When the holder has died on this machine, or has not touched it for some minutes, another run
takes it over. If the holder wakes up after all, or the file system has no locks, two runs may, rarely, project one
scan twice; results replace each other whole, so nothing is spoilt.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

from common.files import full_disk_named, read_object

BEAT_S = 20.0
STALE_S = 300.0                  # the holder of a claim untouched for so long counts as dead
JUDGING = ".judging"             # locked while the claim of a dead holder is removed
LARGE = ".large"                 # with the host's name: locked while a scan too large to be held twice is in memory


class Claims:
    """The claims in one folder, for one process."""

    def __init__(self, folder: Path, beat_s: float = BEAT_S, stale_s: float = STALE_S):
        self.folder, self.beat_s, self.stale_s = folder, beat_s, stale_s
        self.folder.mkdir(parents=True, exist_ok=True)
        self.me = {"host": socket.gethostname(), "namespace": _namespace(), "pid": os.getpid(),
                   "started": _started(os.getpid()), "token": uuid.uuid4().hex}

    @contextlib.contextmanager
    def hold(self, name: str) -> Iterator[bool]:
        """Take the claim on `name` for the length of the block; False where a living run has it."""
        path = self.path(name)
        if not self._take(path):
            yield False
            return
        ended = threading.Event()
        beat = threading.Thread(target=self._beat, args=(path, ended), daemon=True)
        beat.start()
        try:
            yield True
        finally:
            ended.set()
            beat.join()
            if _read(path).get("token") == self.me["token"]:      # not one that was taken over from us
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """Named by a hash: a scan's name may be as long as a file's may."""
        return self.folder / hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]

    def _take(self, path: Path) -> bool:
        for _ in range(2):
            try:
                with full_disk_named(path), contextlib.ExitStack() as if_not_written:
                    with open(path, "x", encoding="utf-8") as file:
                        if_not_written.callback(path.unlink, missing_ok=True)   # empty, it would be taken for alive
                        json.dump(self.me, file)
                    if_not_written.pop_all()
                return True
            except FileExistsError:
                if not self._remove_abandoned(path):
                    return False
        return False

    def _remove_abandoned(self, path: Path) -> bool:
        """Remove the claim if its holder is dead; False where it lives.

        Under a lock: otherwise one run could remove the claim that another has just put in the dead one's place.
        """
        with self._alone():
            try:
                if not _died_here(_read(path), self.me) and self._now() - path.stat().st_mtime < self.stale_s:
                    return False
                path.unlink()
            except FileNotFoundError:                              # let go of, or taken over, in the meantime
                pass
        return True

    def one_on_this_machine(self) -> contextlib.AbstractContextManager:
        """A lock that one run on this machine holds at a time."""
        return self._alone(f"{LARGE}-{self.me['host']}")

    @contextlib.contextmanager
    def _alone(self, lock: str = JUDGING) -> Iterator[None]:
        """A lock across runs and threads; a dead run's is free."""
        with open(self.folder / lock, "a", encoding="utf-8") as file:
            with contextlib.suppress(OSError):                     # a file system without locks: then without
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _now(self) -> float:
        """By the file server's clock, as the claims' times are."""
        with tempfile.TemporaryFile(dir=self.folder) as file:
            return os.fstat(file.fileno()).st_mtime

    def _beat(self, path: Path, ended: threading.Event) -> None:
        while not ended.wait(self.beat_s):
            with contextlib.suppress(OSError):
                os.utime(path)


def _read(path: Path) -> dict:
    """Who holds a claim; empty where that is not, or not yet, written in it."""
    try:
        found = read_object(path)
    except (FileNotFoundError, ValueError):
        return {}
    return found if {"host", "namespace", "pid", "started", "token"} <= found.keys() else {}


def _died_here(claim: dict, me: dict) -> bool:
    """Whether the claim's process was one of this machine and runs no more; its number may be another's now."""
    if not claim or claim["namespace"] is None or any(claim[key] != me[key] for key in ("host", "namespace")):
        return False
    return _started(claim["pid"]) != claim["started"]


def _namespace() -> str | None:
    """Of the process numbers: containers count their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
