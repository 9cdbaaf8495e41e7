"""Training that is stopped, killed, or diverges: the promises 1 to 5 of docs/RELIABILITY.md.

A test that ends a process at a random moment runs a few times here, and a hundred times in `make soak`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

import train
import train_encoder
import train_reader
from common.files import locked
from gan import encoding, reading, training
from gan.run_folder import LOCK
from gan.runlog import _drop_rows_after
from gan.snapshots import load_snapshot, snapshot_steps
from healthygan import train as healthygan_train
from healthygan import training as healthygan_training
from tests import processes
from tests.helpers import assert_identical, without_clock, write_smooth_images

ROOT = Path(__file__).parent.parent


def rows(run: Path) -> list[dict]:
    """Of stats.jsonl, without what a clock says."""
    lines = (run / "stats.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def assert_same_run(ours: Path, reference: Path) -> None:
    """Bit for bit: weights, optimisers, random numbers, and every row of statistics."""
    found, expected = (load_snapshot(run) for run in (ours, reference))
    assert found.step == expected.step
    assert_identical(found.weights, expected.weights, "weights")
    assert_identical(without_clock(found.state), without_clock(expected.state), "state")
    assert rows(ours) == rows(reference)


# ---------------------------------------------------------------------------------------------------------------
# The four commands, and runs of them that were never interrupted

@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    data = tmp_path_factory.mktemp("images")
    for folder in ("train/healthy", "train/mixed"):
        write_smooth_images(data / folder, count=8)
    return data


@pytest.fixture(scope="module")
def flags(gan_flags, slices32, gan_run, hiding_run, images) -> dict[str, list]:
    """By command: arguments but --out. Ticks, snapshots and ADA's intervals of 4 steps do not coincide with step 3."""
    same = ["--device", "cpu", "--precision", "fp32", "--preset", "smoke32"]
    return {
        "train": gan_flags,
        "train_encoder": ["--data", slices32, "--gan", gan_run, *same, "--batch", 4, "--epochs", 2,
                          "--perceptual-epochs", 0.5, "--r1-every", 2],
        "train_reader": ["--data", slices32, "--encoder", hiding_run, *same, "--batch", 4],
        "healthygan.train": ["--data", images, *same, "--iterations", 8, "--tick", 4, "--choose", 4, "--snapshot", 4],
    }


@pytest.fixture(scope="module")
def whole_runs(flags, gan_run, tmp_path_factory) -> dict[str, Path]:
    """Eight steps of each, never interrupted."""
    runs = {"train": gan_run}
    for command in ("train_encoder", "train_reader", "healthygan.train"):
        runs[command] = tmp_path_factory.mktemp("runs") / command
        assert MAIN[command]([*map(str, flags[command]), "--out", str(runs[command])]) == 0
    return runs


MAIN: dict[str, Callable] = {"train": train.main, "train_encoder": train_encoder.main,
                             "train_reader": train_reader.main, "healthygan.train": healthygan_train.main}
STEPS = {"train": (training.Trainer, "step"), "train_encoder": (encoding.EncoderTrainer, "step"),
         "train_reader": (reading.ReadingTrainer, "learn"), "healthygan.train": (healthygan_training.Trainer, "step")}


@pytest.fixture
def from_a_terminal():
    """Signals as a terminal leaves them: nohup ignores SIGHUP, and a script SIGINT for what it starts with &."""
    before = {signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
              signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def during_step(monkeypatch):
    """during_step(command, number, act): act() in the middle of that step (from 1) of the process."""
    def install(command: str, number: int, act: Callable[[], None]) -> None:
        trainer, name = STEPS[command]
        count, step = iter(range(1, 10**6)), getattr(trainer, name)

        def watched(self, *args, **kwargs):
            if next(count) == number:
                act()
            return step(self, *args, **kwargs)
        monkeypatch.setattr(trainer, name, watched)
    return install


# ---------------------------------------------------------------------------------------------------------------
# 1 and 2: stopped by a signal, and on as if nothing had happened

@pytest.mark.parametrize("command", MAIN)
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 143),
                                          (signal.SIGHUP, 129)])
def test_a_signal_stops_with_a_snapshot_and_the_same_command_goes_on(
        command, number, code, flags, whole_runs, during_step, tmp_path, capsys, monkeypatch, from_a_terminal):
    argv = [*map(str, flags[command]), "--out", str(tmp_path)]
    with monkeypatch.context():
        during_step(command, 3, lambda: os.kill(os.getpid(), number))
        assert MAIN[command](argv) == code
    monkeypatch.undo()
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert len(snapshot_steps(tmp_path)) == 1                # after step 3, when none was due
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL           # as it was found
    assert MAIN[command](argv) == 0
    assert_same_run(tmp_path, whole_runs[command])


def test_two_ranks_stopped_within_an_ada_interval_go_on_to_the_bit(flags, tmp_path):
    """ADA's sums are of all ranks: restored from rank 0's alone, r_t and p would be others."""
    argv = [*flags["train"], "--batch", 2, "--tick-kimg", 0.016]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert processes.codes(processes.start_ranks("train", [*argv, "--out", whole], tmp_path / "a")) == [0, 0]
    short = processes.start_ranks("tests.stopping_train", [*argv, "--out", stopped], tmp_path / "b")
    assert processes.codes(short) == [143, 143]                          # only one of them got the signal
    assert snapshot_steps(stopped) == [12]
    state = load_snapshot(stopped).state["ada"]
    assert state["steps"] == 3 and state["signs"][1] == 12                # logits of both ranks
    assert processes.codes(processes.start_ranks("train", [*argv, "--out", stopped], tmp_path / "c")) == [0, 0]
    assert_same_run(stopped, whole)


def test_a_signal_that_is_ignored_stays_so(flags, during_step, tmp_path):
    """As SIGHUP is under nohup: the terminal may be closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        during_step("train", 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert train.main([*map(str, flags["train"]), "--out", str(tmp_path)]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_does_not_wait(flags, during_step, tmp_path, capsys, from_a_terminal):
    during_step("train", 2, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert train.main([*map(str, flags["train"]), "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err and snapshot_steps(tmp_path) == []


def test_a_reader_of_the_output_that_goes_away_ends_nothing(flags, tmp_path):
    """`train.py ... | head` ended without a snapshot."""
    read, write = os.pipe()
    os.close(read)
    argv = [*map(str, flags["train"]), "--kimg", "0.016", "--out", str(tmp_path / "run")]       # two rows
    done = subprocess.run([sys.executable, "train.py", *argv], stdout=write, stderr=subprocess.PIPE, text=True,
                          cwd=ROOT, timeout=300)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "BrokenPipe" not in done.stderr and newest(tmp_path / "run") == 16


def test_a_killed_launcher_takes_its_ranks_with_it(flags, tmp_path):
    """They went on, and the same command, given again, was a second training in the folder."""
    run, log, argv = tmp_path / "run", tmp_path / "log", [*map(str, flags["train"]), "--kimg", "100"]
    launcher = subprocess.Popen([sys.executable, "-c", "import subprocess, sys; subprocess.run(sys.argv[1:])",
                                 sys.executable, "train.py", *argv, "--out", run], cwd=ROOT, stdout=log.open("w"),
                                env={**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())})
    wait_for(lambda: snapshot_steps(run))
    (rank,) = map(int, Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split())
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not processes.runs(rank), 60)
    step = load_snapshot(run).step
    assert step == rows(run)[-1]["step"] or step % 16                    # written at its end: no row is beyond it


def test_two_trainings_do_not_share_a_folder(flags, tmp_path, capsys):
    """Both wrote their rows and snapshots."""
    run = tmp_path / "run"
    run.mkdir()
    with locked(run / LOCK):
        assert train.main([*map(str, flags["train"]), "--out", str(run)]) == 2
    assert f"error: another run is at work in {run}; stop it, wait for its end" in capsys.readouterr().err
    assert os.listdir(run) == [LOCK]
    assert train.main([*map(str, flags["train"]), "--kimg", "0.004", "--out", str(run)]) == 0


def test_what_a_power_cut_leaves_in_the_statistics_is_dropped(tmp_path):
    """'error: Expecting value', at every start from then on."""
    path = tmp_path / "stats.jsonl"
    path.write_bytes(b'{"step": 8}\n' + b"\0" * 50 + b'{"step": 16}\n[24]\n\xff\n{"step": "32"}\n{"step": 40}\n'
                     b'{"step": 48}\n{"step": 4')
    with pytest.warns(UserWarning) as told:
        _drop_rows_after(path, 40)
    assert path.read_bytes() == b'{"step": 8}\n{"step": 40}\n'
    assert [str(one.message).partition(":")[0] for one in told] == [f"{path}, line {line}" for line in (2, 3, 4, 5)]


def test_loader_processes_leave_a_signal_to_all_to_the_run(flags, tmp_path):
    """As Ctrl-C on a terminal or scancel: every process of the job gets the signal."""
    run = tmp_path / "run"
    process = processes.start("train", [*flags["train"], "--kimg", 100, "--workers", 2, "--out", run], tmp_path / "log")
    wait_for(lambda: snapshot_steps(run))
    os.killpg(process.pid, signal.SIGTERM)
    assert processes.codes([process]) == [143], (tmp_path / "log").read_text()
    assert load_snapshot(run).step > 16 or len(snapshot_steps(run)) == 1


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------------------------
# 3: killed at any moment

@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.soak)])
@pytest.mark.filterwarnings("ignore:.*left half-written")
def test_killed_at_random_moments(kills, gan_flags, tmp_path):
    """With a snapshot and a row every step. The newest snapshot loads every time, and no row comes twice."""
    steps = 8 * kills if kills < 10 else 4 * kills
    argv = [*gan_flags, "--kimg", steps * 0.004, "--tick-kimg", 0.004, "--snapshot-kimg", 0.004, "--grid-kimg", 1000]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert processes.codes([processes.start("train", [*argv, "--out", whole], tmp_path / "log")], 3600) == [0]
    wait, reached = random.Random(0), []
    for _ in range(kills):
        before = newest(run)
        process = processes.start("train", [*argv, "--out", run], tmp_path / "log")
        wait_for(lambda before=before: newest(run) > before or not process.is_alive(), 600)  # noqa: B023
        time.sleep(wait.uniform(0, 0.5))
        processes.kill(process)
        assert process.exitcode in (-signal.SIGKILL, 0)
        reached.append(load_snapshot(run).step)
        assert len(steps_of(run)) == len(set(steps_of(run)))
        if process.exitcode == 0:
            break
    print(f"{len(reached) - (process.exitcode == 0)} kills of {kills}, snapshot {reached[-1]} of {steps * 4} by then")
    assert reached == sorted(reached) and len(set(reached)) > 2
    assert processes.codes([processes.start("train", [*argv, "--out", run], tmp_path / "log")], 3600) == [0]
    assert_same_run(run, whole)


def newest(run: Path) -> int:
    return max(snapshot_steps(run), default=0)


def steps_of(run: Path) -> list[int]:
    """Of the rows that a reader finds, at any moment: a line that is not yet whole is none."""
    lines = (run / "stats.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------------------------------------------------------
# 4: divergence

# Calls of the losses below, from 0, that lie in the second half of a run: after its first snapshot, before its last
POISON = {"train": 5, "train_encoder": 4, "train_reader": 10, "healthygan.train": 3}


def poisoned(monkeypatch, command: str, calls: range) -> None:
    """Make a loss NaN at these of its calls (from 0)."""
    module, name = {"train": (training, "d_logistic"), "train_encoder": (encoding, "d_logistic"),
                    "train_reader": (reading, "reading_loss"),
                    "healthygan.train": (healthygan_training.losses, "identity")}[command]
    loss, count = getattr(module, name), iter(range(10**6))
    monkeypatch.setattr(module, name, lambda *a: loss(*a) * (torch.nan if next(count) in calls else 1))


@pytest.mark.parametrize("command", MAIN)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")                # the grid of pictures of nothing
def test_a_run_that_diverges_goes_back_once(command, flags, whole_runs, monkeypatch, tmp_path, capsys):
    """A loss is NaN once after the first snapshot: the run ends well, by another way, without a row twice."""
    poisoned(monkeypatch, command, range(POISON[command], POISON[command] + 1))
    argv = [*map(str, flags[command]), "--out", str(tmp_path)]
    assert MAIN[command](argv) == 0
    assert "Going back to the last snapshot once" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(whole_runs[command])]
    assert rows(tmp_path)[0] == rows(whole_runs[command])[0] and rows(tmp_path)[-1]["rollbacks"] == 1
    first, whole = load_snapshot(tmp_path), load_snapshot(whole_runs[command])
    assert first.state["rollbacks"] == 1
    assert any(not torch.equal(t, whole.weights[network][name]) for network, state in first.weights.items()
               for name, t in state.items())


@pytest.mark.parametrize("command", MAIN)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_run_that_diverges_again_exits_4_and_keeps_the_last_good(command, flags, monkeypatch, tmp_path, capsys):
    poisoned(monkeypatch, command, range(POISON[command], 1000))
    assert MAIN[command]([*map(str, flags[command]), "--out", str(tmp_path)]) == 4
    shown = capsys.readouterr().err
    assert shown.count("diverged at step") == 2 and "last good snapshot is kept" in shown
    good = load_snapshot(tmp_path)
    assert good.state["rollbacks"] == 0
    assert all(t.isfinite().all() for state in good.weights.values() for t in state.values())


def test_a_run_that_diverges_before_its_first_snapshot_exits_4(flags, monkeypatch, tmp_path, capsys):
    poisoned(monkeypatch, "train", range(1000))
    assert train.main([*map(str, flags["train"]), "--out", str(tmp_path)]) == 4
    shown = capsys.readouterr().err
    assert "Going back" not in shown and "is kept" not in shown and f"{tmp_path} holds no snapshot yet" in shown


def test_a_stop_after_a_rollback_goes_on_with_its_random_numbers(flags, during_step, monkeypatch, tmp_path):
    def diverging(out, stop_at):
        with monkeypatch.context() as patch:
            poisoned(patch, "train", range(5, 6))
            if stop_at:
                during_step("train", stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            code = train.main([*map(str, flags["train"]), "--out", str(out)])
        monkeypatch.undo()
        return code

    assert diverging(tmp_path / "whole", None) == 0
    assert diverging(tmp_path / "stopped", 7) == 143                    # steps 1 to 6 (NaN), back to 4, then one more
    assert train.main([*map(str, flags["train"]), "--out", str(tmp_path / "stopped")]) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------
# 5: restarts of torchrun

def test_an_attempt_does_not_wait_for_the_ranks_of_the_one_before(flags, tmp_path):
    """torchrun's store outlives the workers; addresses of ranks that are dead stand in it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": 1}
    argv = [*flags["train"], "--batch", 2, "--out", tmp_path / "run"]
    first = processes.start_ranks("train", [*argv, "--kimg", 100], tmp_path / "a", **agent,
                                  TORCHELASTIC_RESTART_COUNT=0)
    wait_for(lambda: snapshot_steps(tmp_path / "run"))
    processes.kill(first[1])
    assert processes.codes(first[:1], 60) == [1]                         # it says so, and does not hang
    step = newest(tmp_path / "run")
    again = processes.start_ranks("train", [*argv, "--kimg", step / 1000 + 0.008], tmp_path / "b", **agent,
                                  TORCHELASTIC_RESTART_COUNT=1)
    assert processes.codes(again, 60) == [0, 0]
    assert newest(tmp_path / "run") == step + 8
