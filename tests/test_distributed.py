"""distributed.py: alone without a launcher, and as two gloo ranks."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import distributed
from common.files import locked
from gan import run_folder
from gan.run import Stopped, run_command
from tests.processes import codes


@pytest.fixture
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def two_ranks(rank: int, port: int, out: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.init(torch.device("cpu"), timeout_minutes=0.5)
    result = {"rank": distributed.get_rank(), "world": distributed.get_world_size(),
              "main": distributed.is_main()}
    result["mean"] = distributed.reduce_mean({"loss": 1.0 + 2 * rank, "r_t": torch.tensor(-0.5)})
    result["gather"] = distributed.gather([f"scan{rank}", rank])
    local = torch.tensor([1.0, 10.0 * rank])
    result["sum"] = distributed.all_reduce_sum(local).tolist()
    result["local"] = local.tolist()
    try:
        distributed.reduce_mean({"a" if rank == 0 else "b": 0.0})
    except ValueError as e:
        result["names"] = str(e)

    module = torch.nn.Linear(2, 2, bias=False).bfloat16()
    torch.nn.init.constant_(module.weight, 0.5)
    distributed.check_same_state(module)
    if rank == 1:
        module.weight.data[1, 1] += 0.25
    try:
        distributed.check_same_state(module)
    except RuntimeError as e:
        result["state"] = str(e)
    distributed.barrier()
    distributed.print0(f"hello from {rank}")
    distributed.cleanup()
    result["after"] = distributed.get_world_size()
    torch.save(result, f"{out}/{rank}.pt")
    os._exit(0)              # torch's threads now and then abort a process on its way out; the result is what is tested


def test_two_ranks(tmp_path, capfd):
    mp.spawn(two_ranks, args=(free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert (result["rank"], result["world"], result["main"]) == (rank, 2, rank == 0)
        assert result["mean"] == {"loss": 2.0, "r_t": -0.5}
        assert result["gather"] == [["scan0", 0], ["scan1", 1]]
        assert result["sum"] == [2.0, 10.0]
        assert result["local"] == [1.0, 10.0 * rank]
        assert result["names"] == "reduce_mean: rank 0 has ['a'], rank 1 has ['b']"
        assert "weight differs between rank 0 and rank 1" in result["state"]
        assert result["after"] == 1
    printed = capfd.readouterr().out
    assert "hello from 0" in printed and "hello from 1" not in printed


def rank_that_fails(rank: int, port: int, error: BaseException) -> None:
    """Rank 1 fails in run_command, while rank 0 waits for it. With stand-ins for NCCL's name and its way out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.get_backend_config = lambda: "cpu:gloo,cuda:nccl"
    torch.distributed.destroy_process_group = lambda: time.sleep(1000)

    def work(device, rollback):
        distributed.barrier()
        if rank == 1:
            raise error
        distributed.all_reduce_sum(torch.ones(2))
    run_command(work, "cpu", Path("none"))
    os._exit(99)                                       # it is the process that has to end, not the command


@pytest.mark.parametrize("error, code, said", [
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "OutOfMemoryError: CUDA out of memory"),
    (OSError("disk full"), 2, "error: disk full"),
    (KeyboardInterrupt(), 130, "interrupted; the same command begins anew: there is no snapshot yet")])
def test_a_rank_that_fails_alone_says_so_and_ends(error, code, said, capfd):
    """It said nothing, and waited for the others before it left NCCL's group."""
    port = free_port()
    ranks = [mp.get_context("spawn").Process(target=rank_that_fails, args=(rank, port, error)) for rank in range(2)]
    for process in ranks:
        process.start()
    assert codes(ranks, 60) == [1, code]
    shown = capfd.readouterr().err
    assert said in shown and shown.count("Traceback") == (2 if code == 1 else 1)           # rank 0's is of gloo


def rank_of_a_second_run(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    run_folder.LAST_RANKS_S = 0.1
    os._exit(run_command(lambda *args: run_folder.hold_folder(out, ExitStack()), "cpu", out))


def test_all_ranks_end_where_another_run_is_at_work(tmp_path, capfd):
    port = free_port()
    with locked(tmp_path / run_folder.LOCK):
        ranks = [mp.get_context("spawn").Process(target=rank_of_a_second_run, args=(rank, port, tmp_path))
                 for rank in range(2)]
        for process in ranks:
            process.start()
        assert codes(ranks, 60) == [2, 2]
    assert capfd.readouterr().err.count(f"error: another run is at work in {tmp_path}") == 2


def test_print0_goes_on_where_nobody_reads(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        for _ in range(2):
            distributed.print0("step 8")


@pytest.mark.parametrize("end, code, waits", [
    (None, 0, True), (Stopped(signal.SIGTERM), 143, True), (FloatingPointError("diverged"), 4, True),
    (ValueError("wrong"), 2, False), (RuntimeError("odd"), 1, False), (KeyboardInterrupt(), 130, False)])
def test_the_group_is_left_where_all_ranks_end_alike(end, code, waits, no_launcher, monkeypatch, tmp_path, capsys):
    left = []

    def work(device, rollback):
        if end:
            raise end

    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "end_alone", lambda code: left.append(code))
    assert run_command(work, "cpu", tmp_path) == code and left == ([] if waits else [code])
    assert (capsys.readouterr().err != "") == (code != 0)


def test_alone_an_error_is_the_callers(no_launcher, tmp_path):
    def work(device, rollback):
        raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        run_command(work, "cpu", tmp_path)
    distributed.end_alone(1)                                                        # does nothing


def test_alone_without_a_launcher(no_launcher, capsys):
    distributed.init(torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert (distributed.get_rank(), distributed.get_world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.reduce_mean({"loss": torch.tensor(2.5)}) == {"loss": 2.5}
    assert distributed.gather("a") == ["a"]
    tensor = torch.ones(2)
    total = distributed.all_reduce_sum(tensor)
    total += 1
    assert tensor.tolist() == [1, 1]
    distributed.check_same_state(torch.nn.BatchNorm1d(2))
    distributed.barrier()
    distributed.print0("here")
    distributed.cleanup()
    assert capsys.readouterr().out == "here\n"


def test_half_a_launcher_is_an_error(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="found only RANK; start with torchrun"):
        distributed.init(torch.device("cpu"))


def test_seeds_differ_by_rank_and_by_seed():
    # The released code seeds every rank alike; seed + rank would make rank 1 of seed 0 rank 0 of seed 1.
    seeds = {distributed.seed_for_rank(seed, rank) for seed in range(8) for rank in range(8)}
    assert len(seeds) == 64
    assert distributed.seed_for_rank(3, 1) == distributed.seed_for_rank(3, 1)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def fake_gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_pick_device(no_launcher, monkeypatch):
    fake_gpus(monkeypatch, 0)
    assert distributed.pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device cuda: no usable CUDA GPU"):
        distributed.pick_device("cuda")
    fake_gpus(monkeypatch, 2)
    assert distributed.pick_device("cpu") == torch.device("cpu")
    assert distributed.pick_device("auto") == torch.device("cuda:0")
    assert distributed.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="GPU 2 was asked for, but there are 2"):
        distributed.pick_device("cuda:2")
    for flag in ("gpu", "cuda:", "cuda:x", "cpu:0", "auto:1", ""):
        with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
            distributed.pick_device(flag)


def test_pick_device_under_a_launcher(monkeypatch):
    fake_gpus(monkeypatch, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.pick_device("auto") == distributed.pick_device("cuda") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="each rank its own GPU"):
        distributed.pick_device("cuda:0")


def test_pick_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert distributed.pick_precision("bf16", cpu) == torch.bfloat16
    assert distributed.pick_precision("fp32", cpu) == torch.float32
    for amx, avx, expected in ((False, False, torch.float32), (False, True, torch.float32),
                               (True, False, torch.bfloat16)):
        found = {"amx_bf16": amx, "avx512_bf16": avx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert distributed.pick_precision("auto", cpu) == expected
        assert distributed.pick_precision("auto", cpu, ("avx512_bf16",)) == (torch.bfloat16 if avx else torch.float32)
    with pytest.raises(ValueError, match="--precision fp16: expected auto, bf16 or fp32"):
        distributed.pick_precision("fp16", cpu)


@pytest.mark.parametrize("kept, said", [(True, "goes on from the last snapshot"), (False, "begins anew: there is no")])
def test_an_interrupted_run_says_whether_it_goes_on(tmp_path, capsys, kept, said):
    """It was said of runs that had no snapshot yet, too."""
    def work(*args):
        raise KeyboardInterrupt

    if kept:
        (tmp_path / "snapshot-00000008").mkdir()
    assert run_command(work, "cpu", tmp_path) == 130
    assert f"interrupted; the same command {said}" in capsys.readouterr().err
