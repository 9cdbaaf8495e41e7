"""detect/processes.py: each scan is one process's, those that die leave theirs, and none outlives the first."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import projector
from common import machine
from detect import processes
from tests.helpers import tiny_bundle
from tests.processes import runs
from tests.queue_data import flags, make_scans, run_whole, tables


def take(folder: Path, numbers, pause: float = 0.02) -> None:
    """Leaves a file that tells who took which number."""
    for number in numbers:
        (folder / f"{number}-{os.getpid()}").touch()
        time.sleep(pause)


def take_together(folder: Path, here: Path, numbers) -> None:
    """take, begun when three have come."""
    (here / str(os.getpid())).touch()
    wait_for(lambda: len(list(here.iterdir())) == 3)
    take(folder, numbers)


def die_on_the_second(folder: Path, numbers) -> None:
    for count, number in enumerate(numbers):
        if count:
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / f"{number}-{os.getpid()}").touch()


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def taken(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[0]) for path in folder.iterdir()]


def test_every_number_is_given_once_and_each_process_gets_some(tmp_path):
    folder, here = tmp_path / "taken", tmp_path / "here"
    folder.mkdir()
    here.mkdir()
    with processes.shared(3, 40, take_together, folder, here) as numbers:
        take_together(folder, here, numbers)
    assert sorted(taken(folder)) == list(range(40)) and not numbers.died
    assert len(Counter(path.name.partition("-")[2] for path in folder.iterdir())) == 3


def test_one_alone_starts_no_other(tmp_path):
    with processes.shared(1, 3, take, tmp_path) as numbers:
        assert list(numbers) == [0, 1, 2]
    assert taken(tmp_path) == []


def test_one_that_dies_leaves_its_number_and_the_others_go_on(tmp_path):
    with processes.shared(2, 10, die_on_the_second, tmp_path) as numbers:
        wait_for(lambda: len(taken(tmp_path)) == 1)
        take(tmp_path, numbers)
    assert len(set(range(10)) - set(taken(tmp_path))) == 1 and numbers.died == 1


def test_where_the_block_raises_the_others_are_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt), processes.shared(2, 10**6, take, tmp_path):
        wait_for(lambda: taken(tmp_path))
        raise KeyboardInterrupt
    before = taken(tmp_path)
    time.sleep(0.2)
    assert taken(tmp_path) == before


def take_on(folder: Path) -> None:
    with processes.shared(2, 6000, take, folder) as numbers:             # two minutes
        take(folder, numbers)


def test_a_killed_process_takes_the_others_with_it(tmp_path):
    first = multiprocessing.get_context("spawn").Process(target=take_on, args=(tmp_path,))
    first.start()

    def pids():
        return {int(path.name.partition("-")[2]) for path in tmp_path.iterdir()}

    wait_for(lambda: len(pids()) == 2)
    first.kill()
    first.join()
    wait_for(lambda: not any(runs(pid) for pid in pids()))


def take_and_clean_up(folder: Path, numbers) -> None:
    """take, with a file that is removed in the end, as what a zip was unpacked to is."""
    kept = folder / f"kept-{os.getpid()}"
    kept.touch()
    try:
        take(folder, numbers)
    finally:
        kept.unlink()


def clean_up(folder: Path) -> None:
    with processes.shared(2, 6000, take_and_clean_up, folder) as numbers:
        take_and_clean_up(folder, numbers)


def kept(folder: Path) -> list[Path]:
    return list(folder.glob("kept-*"))


def test_those_that_are_stopped_clean_up(tmp_path):
    """They were ended on the spot: what they had unpacked stayed in the temporary folder."""
    with pytest.raises(KeyboardInterrupt), processes.shared(2, 10**6, take_and_clean_up, tmp_path):
        wait_for(lambda: kept(tmp_path))
        raise KeyboardInterrupt
    assert not kept(tmp_path)


def test_those_whose_first_is_killed_clean_up(tmp_path):
    first = multiprocessing.get_context("spawn").Process(target=clean_up, args=(tmp_path,))
    first.start()
    wait_for(lambda: len(kept(tmp_path)) == 2)
    first.kill()
    first.join()
    wait_for(lambda: [path.name for path in kept(tmp_path)] == [f"kept-{first.pid}"])    # that of SIGKILL's own


@pytest.mark.parametrize("cores, free, scans, expected", [
    (2, 64e9, 100, 2), (16, 64e9, 100, 16), (16, 10e9, 100, 3), (2, 1e9, 100, 1), (2, 64e9, 7, 1), (2, 64e9, 8, 2),
    (2, 64e9, 0, 1),
])
def test_how_many_are_suitable(cores, free, scans, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "ROOT", tmp_path)                       # no container's limits
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(processes, "free_memory", lambda: int(free))
    assert processes.suitable(scans) == expected


def test_a_containers_limits_count(tmp_path, monkeypatch):
    """Under docker run --memory 8g --cpus 2 a machine of 64 cores started one each, and they were killed."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 500000000 kB\nMemAvailable: 400000000 kB\n")
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert processes.suitable(1000) == 64
    (group / "cpu.max").write_text("450000 100000\n")
    assert processes.suitable(1000) == 5                                                      # 4.5 cores
    (group / "memory.max").write_text("8000000000\n")
    (group / "memory.current").write_text("500000000\n")
    assert processes.suitable(1000) == 2


# ---- projector.py --jobs

@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    return make_scans(tmp_path_factory.mktemp("scans") / "six", 6)


@pytest.fixture(scope="module")
def alone(scans, model, tmp_path_factory) -> Path:
    return run_whole(scans, model, tmp_path_factory.mktemp("results") / "alone", "--jobs", "1")


class OthersFirst(processes.Turns):
    """The process that makes it takes nothing before another has taken something."""

    def __init__(self, *args):
        super().__init__(*args)
        self.first = os.getpid()

    def __iter__(self):
        if os.getpid() == self.first:
            wait_for(lambda: self._next.value)
        return super().__iter__()


def test_two_jobs_give_the_same_tables(scans, model, alone, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(processes, "Turns", OthersFirst)
    assert projector.main(flags(scans, model, tmp_path / "out", "--jobs", "2")) == 3
    assert tables(tmp_path / "out") == tables(alone)
    said = capfd.readouterr()
    assert said.out.count("/6 scan-") == 6 and not said.err                              # each scan, and each once


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_the_callers_threads_are_left_alone(scans, model, alone, jobs):
    """They were not: what a session trained after 8 scans was computed in another order than what it went on from."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert projector.main(flags(scans, model, alone, "--jobs", jobs)) == 3           # all is done already
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_no_more_threads_than_cores_that_a_container_leaves(scans, model, alone, monkeypatch):
    """PyTorch counts those of the machine."""
    monkeypatch.setattr("common.machine.usable_cores", lambda: 3)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    try:
        projector.main(flags(scans, model, alone, "--jobs", "1"))
    finally:
        torch.set_num_threads(before)
    assert json.loads((alone / "run.json").read_text())["threads"] == 3


def test_a_job_that_is_killed_costs_no_scan(scans, model, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("detect.run.share_in", _killed)
    monkeypatch.setattr(processes, "Turns", OthersFirst)
    assert projector.main(flags(scans, model, tmp_path / "out", "--jobs", "2")) == 3
    assert tables(tmp_path / "out") == tables(alone)


def _killed(make, threads, processes, numbers) -> None:
    next(iter(numbers))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("jobs, said", [("0", "at least 1"), ("two", "invalid int")])
def test_jobs_that_cannot_be(jobs, said, capsys):
    with pytest.raises(SystemExit):
        projector.parse(["scans", "--model", "m", "--jobs", jobs])
    assert said in capsys.readouterr().err


def test_torchrun_has_its_own_processes(scans, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert projector.main(flags(scans, model, tmp_path / "out", "--jobs", "2")) == 2
    assert "torchrun" in capsys.readouterr().err
