"""An orderly end, by a signal or with the parent: `with` blocks clean up, such as folders with patients' files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

# A time limit of SLURM, docker stop, an evicted pod; a terminal that is closed
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
DIE_WITH_PARENT = 1              # Linux: PR_SET_PDEATHSIG


class Terminated(SystemExit):
    """A signal has asked the program to end. code: the shell's, 128 + signal."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Terminated, instead of ending the process on the spot.

    Only once: a second signal must not interrupt the cleaning up. Signals that are handled or ignored already stay so.
    In other threads than the main one, which cannot set handlers, this does nothing.
    """
    mine = [number for number in SIGNALS if _in_main_thread() and signal.getsignal(number) == signal.SIG_DFL]

    def end(number: int, frame: object) -> None:
        for other in mine:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(128 + number)

    for number in mine:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in mine if _in_main_thread() else ():
            signal.signal(number, signal.SIG_DFL)


def end_with_parent(parent: int | None = None) -> None:
    """From now on this process gets SIGTERM when its parent dies, however that does: on Linux; elsewhere nothing.

    parent: its process number, where it is known: where it has died already, the signal comes at once. It must have
    started this process from a thread that lives as long as it does: the kernel looks at that thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)
        if parent not in (None, os.getppid()):
            os.kill(os.getpid(), signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
