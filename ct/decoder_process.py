"""Files decoded in a process of its own, with a limit of memory and of time.

Decoders are C and C++ that parse what anybody has sent: one that crashes, hangs, or allocates what a false header says
costs its scan alone, and the next file gets a new process. It is started at the first file and kept for the others.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import numpy as np

from common.stopping import SIGNALS

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-W", "ignore", "-c", "from ct.decoder_process import serve; serve()"]
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1"}           # NumPy's: of many threads the stacks alone would be MEMORY
TASKS = {"dicom": "ct.dicom_pixels", "picture": "ct.picture_pixels"}    # modules with decode(path) -> list of arrays
MEMORY = 2**29                  # bytes of the process beside the pixels; Python and the libraries take a third
COPIES = 4                      # of the pixels, while they are decoded
SECONDS = 300.0                 # for one file
PIPE = 2**20                    # bytes: Linux's 64 KB are filled and emptied many times a picture


class DecodingError(Exception):
    """Why a file was not decoded: what its decoder raised, or how the process ended."""


_lock = threading.Lock()
_worker: subprocess.Popen | None = None
_owner = 0                                            # the process that started it: a fork must not speak to it, too


# ---- the program's side

def decode_apart(task: str, path: Path, size: int) -> list[np.ndarray]:
    """What decode(path) of a task's module returns, run in the process for it.

    task: a key of TASKS. size: bytes of the decoded pixels, as the header tells. Raises DecodingError.
    """
    global _worker, _owner
    with _lock:
        if _worker is None or _owner != os.getpid():
            _worker = subprocess.Popen(COMMAND, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE)
            with contextlib.suppress(AttributeError, OSError):       # not Linux; more than this user may have
                fcntl.fcntl(_worker.stdout, fcntl.F_SETPIPE_SZ, PIPE)
            _owner = os.getpid()
        try:
            error, arrays = _ask(_worker, [task, os.path.abspath(path), size])
        except BaseException:                         # what it says after this would be no answer to what it is asked
            _worker.kill()
            _worker.communicate()
            _worker = None
            raise
    if error:
        raise DecodingError(error)
    return arrays


def _ask(worker: subprocess.Popen, request: list) -> tuple[str | None, list[np.ndarray]]:
    """The name of the error that the request led to, or None, and its arrays. DecodingError where no answer comes."""
    try:
        worker.stdin.write(json.dumps(request).encode() + b"\n")
        worker.stdin.flush()
        answer = select.poll()
        answer.register(worker.stdout, select.POLLIN)
        if not answer.poll(1000 * SECONDS):
            raise DecodingError(f"the decoder took more than {SECONDS:g} s")
        head = worker.stdout.readline()
    except BrokenPipeError:
        head = b""
    if not head:
        code = worker.wait()
        raise DecodingError(f"the decoder crashed, {signal.Signals(-code).name}" if code < 0 else "the decoder ended")
    error, described = json.loads(head)
    arrays = [np.empty(shape, dtype) for shape, dtype in described]
    for array in arrays:
        if worker.stdout.readinto(memoryview(array).cast("B")) != array.nbytes:
            raise DecodingError("the decoder ended")
    return error, arrays


# ---- the process

def serve() -> None:
    """For every line [task, path, bytes] of the standard input a line [error, [[shape, dtype], ...]] and the arrays."""
    for number in (signal.SIGINT, *SIGNALS):          # a terminal or systemd sends them to all processes: they are for
        signal.signal(number, signal.SIG_IGN)         # the program, which then closes the input
    logging.disable()                                 # warnings quote headers
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                                     # what a library prints is no reply
    for line in sys.stdin.buffer:
        task, path, size = json.loads(line)
        decode = import_module(TASKS[task]).decode
        error, arrays = None, []
        try:
            _limit_memory(MEMORY + COPIES * size)
            arrays = [np.ascontiguousarray(array) for array in decode(path)]
        except Exception as raised:                   # every decoder raises its own; its message may quote the header
            error = type(raised).__name__
        replies.write(json.dumps([error, [[array.shape, array.dtype.str] for array in arrays]]).encode() + b"\n")
        for array in arrays:
            replies.write(memoryview(array).cast("B"))
        replies.flush()


def _limit_memory(size: int) -> None:
    """Of this process; less where it has a lower limit already."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size if hard == resource.RLIM_INFINITY else min(size, hard), hard))
