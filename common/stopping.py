"""An orderly end by a signal: `with` blocks let go of what they hold, such as patients' files in temporary folders."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

# A time limit of SLURM, docker stop, an evicted pod; a terminal that is closed
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(SystemExit):
    """A signal has asked the program to end. code: the shell's, 128 + signal."""


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Terminated, where they would else end the process on the spot.

    Once: a second one must not break off what the first has begun to clean up. Signals that somebody else handles, or
    ignores, stay theirs. Only the main thread can ask for signals: in another the block is a block, and no more.
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


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
