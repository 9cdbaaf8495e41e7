"""Commands in processes of their own, quick to start: forked from a server that has imported them once."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path

_context = multiprocessing.get_context("forkserver")
# The commands, and what they import once they have read their command line
_context.set_forkserver_preload(["train", "train_encoder", "train_reader", "healthygan.train", "projector", "gan.loop",
                                 "detect.dicom_out", "detect.folder", "detect.jobs", "detect.report"])


def start(command: str, argv: list, log: Path, **environment: object) -> multiprocessing.Process:
    """COMMAND.main(argv) in a session of its own; its output in `log`, its exit code as the process's."""
    process = _context.Process(target=_run, args=(command, [str(a) for a in argv], str(log),
                                                  {name: str(value) for name, value in environment.items()}))
    process.start()
    return process


def start_ranks(command: str, argv: list, log: Path, world: int = 2, **environment: object) -> list:
    """One process a rank, on a free port of this machine unless MASTER_PORT is given; logs in `log`-RANK."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": world, **environment}
    return [start(command, argv, log.with_name(f"{log.name}-{rank}"), RANK=rank, LOCAL_RANK=rank, **shared)
            for rank in range(world)]


def codes(processes: list, seconds: float = 300) -> list[int | None]:
    """Exit codes, negative for a signal; what has not ended in time is killed and gives None."""
    found = []
    for process in processes:
        process.join(seconds)
        found.append(process.exitcode)
        if process.exitcode is None:
            kill(process)
    return found


def kill(process: multiprocessing.Process) -> None:
    """SIGKILL to the process and everything it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:                                     # it has ended by itself, or has not begun
        process.kill()
    process.join()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _run(command: str, argv: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    import torch
    torch.set_num_threads(1)
    code = importlib.import_module(command).main(argv)
    sys.stdout.flush()
    os._exit(code)
