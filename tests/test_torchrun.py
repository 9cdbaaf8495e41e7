"""Training under torchrun: a rank killed, a node lost and back. Minutes long, so in `make soak` alone."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gan.snapshots import load_snapshot, snapshot_steps
from tests.processes import free_port

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parent.parent


@pytest.fixture
def torchrun(tmp_path):
    """torchrun(name, *flags) starts it in a session of its own, its log in tmp_path/name; all are killed at the end."""
    started = []

    def start(name: str, *flags: object, **environment: str) -> subprocess.Popen:
        with open(tmp_path / name, "ab") as log:
            process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, flags)], cwd=ROOT,
                                       stdout=log, stderr=log, start_new_session=True,
                                       env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
        started.append(process)
        return process
    yield start
    for process in started:
        kill_all(process)


def kill_all(process: subprocess.Popen) -> None:
    """torchrun and its workers, which it starts in sessions of their own."""
    victims = [process.pid, *workers(process)]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


def workers(process: subprocess.Popen) -> dict[int, int]:
    """{pid: rank} of a torchrun's workers."""
    found = {}
    for children in Path(f"/proc/{process.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            try:
                rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
            except (FileNotFoundError, ProcessLookupError):
                continue
            if rank:
                found[int(pid)] = int(rank[1])
    return found


def wait_for(condition, seconds: float = 400) -> float:
    """Seconds until the condition holds."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begin


def newest(run: Path) -> int:
    return max(snapshot_steps(run), default=0)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_a_killed_rank(torchrun, rendezvous, gan_flags, tmp_path):
    """Promise 5: on within 60 s from the last snapshot. Then SIGTERM to torchrun: a snapshot, and the rest later."""
    run, port = tmp_path / "run", free_port()
    where = ["--master-port", port] if rendezvous == "static" else ["--rdzv-backend=c10d",
                                                                    f"--rdzv-endpoint=localhost:{port}"]
    command = [*where, "--nproc-per-node=2", "--max-restarts=2", "train.py", *gan_flags, "--out", run]
    job = torchrun("log", *command, "--kimg", 1000)
    start = wait_for(lambda: newest(run))
    victim = next(pid for pid, rank in workers(job).items() if rank == 1)
    before = newest(run)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in workers(job))
    log = tmp_path / "log"
    seconds = wait_for(lambda: "\nstep " in log.read_text().partition("Resuming at")[2])
    print(f"{rendezvous}: {seconds:.1f} s from the kill to a new step; {start:.1f} s from the start to a snapshot")
    assert seconds < max(60, 1.5 * start)                           # on a busy machine a start takes its time
    wait_for(lambda: newest(run) > before + 16)

    job.send_signal(signal.SIGTERM)
    stop = time.monotonic()
    job.wait(60)
    print(f"{rendezvous}: stopped in {time.monotonic() - stop:.1f} s")
    assert log.read_text().count("stopped by SIGTERM") == 1
    step = load_snapshot(run).step
    last = torchrun("log", *command, "--kimg", step / 1000 + 0.016)
    assert last.wait(400) == 0 and newest(run) >= step + 16


def test_a_lost_node_and_its_return(torchrun, gan_flags, tmp_path):
    """Two agents as two nodes: one is killed with its worker, the other goes on alone; it comes back, both go on."""
    run, port = tmp_path / "run", free_port()
    command = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=one",
               f"--rdzv-endpoint=localhost:{port}", "--rdzv-conf=last_call_timeout=5,keep_alive_interval=1", "train.py",
               *gan_flags, "--out", run, "--kimg", 1000]
    log, fresh = tmp_path / "a", {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun("a", *command, **fresh)
    wait_for(lambda: newest(run))       # the first hosts the rendezvous
    second = torchrun("b", *command, **fresh)
    seconds = wait_for(lambda: "2 x 4 images" in log.read_text() + (tmp_path / "b").read_text())
    print(f"second node in after {seconds:.1f} s")
    before = newest(run)
    wait_for(lambda: newest(run) > before + 32)
    kill_all(second)
    before, alone = newest(run), log.read_text().count("1 x 4 images")
    seconds = wait_for(lambda: log.read_text().count("1 x 4 images") > alone and newest(run) > before + 32)
    print(f"on alone after {seconds:.1f} s")
    both = log.read_text().count("2 x 4 images")
    torchrun("b", *command, **fresh)
    seconds = wait_for(lambda: log.read_text().count("2 x 4 images") > both, 900)
    print(f"second node back after {seconds:.1f} s")
    before = newest(run)
    wait_for(lambda: newest(run) > before + 32)
    assert load_snapshot(run).step > before
