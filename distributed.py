"""Start-up, rank, reduce, print on rank 0. Everything here also works in one process without a launcher.

    device = distributed.pick_device("auto")
    distributed.init(device)             # a no-op unless torchrun set RANK, WORLD_SIZE and LOCAL_RANK
    ...
    distributed.cleanup()

The only state is torch.distributed's own process group. Every rank must call functions marked 'Collective'.
"""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


# ---- Device and precision

def pick_device(flag: str = "auto") -> torch.device:
    """The device of this rank for --device auto|cpu|cuda|cuda:N.

    'auto' is the GPU if there is one; 'auto' and 'cuda' take the GPU of the rank's LOCAL_RANK.
    Raises ValueError for an unknown flag, for CUDA where there is none, for a GPU number that does not exist
    and for 'cuda:N' under a launcher with several ranks (they would all share one GPU).
    """
    kind, _, number = flag.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in flag and not (kind == "cuda" and number.isdecimal())):
        raise ValueError(f"--device {flag}: expected auto, cpu, cuda or cuda:N")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cpu" or (kind == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise ValueError(f"--device {flag}: no usable CUDA GPU was found; use --device cpu, or mend the "
                         "driver (nvidia-smi must list a GPU and torch must be a CUDA build)")
    if number and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--device {flag}: torchrun gives each rank its own GPU; use --device cuda, and "
                         "choose GPUs with CUDA_VISIBLE_DEVICES")
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", 0))
    if index >= gpus:
        raise ValueError(f"--device {flag}: GPU {index} was asked for, but there are {gpus} (from 0 on); "
                         "lower N or torchrun's --nproc-per-node")
    return torch.device("cuda", index)


def pick_precision(flag: str, device: torch.device, units: Sequence[str] = ("amx_bf16",)) -> torch.dtype:
    """The type to compute in for --precision auto|bf16|fp32: torch.bfloat16 or torch.float32.

    'auto' is bf16 where that is faster: on Ampere and later GPUs, and on CPUs with one of these units. Elsewhere it is
    emulated, or slower than op/winograd.py in fp32, as with AVX512-BF16 for networks of convolutions of 3 x 3, and has
    to be asked for.
    """
    if flag not in ("auto", "bf16", "fp32"):
        raise ValueError(f"--precision {flag}: expected auto, bf16 or fp32")
    if flag != "auto":
        return torch.bfloat16 if flag == "bf16" else torch.float32
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # mkldnn's own test says yes for plain AVX512 too, where bf16 is emulated
        found = torch.cpu.get_capabilities()
        native = any(found.get(unit) for unit in units)
    return torch.bfloat16 if native else torch.float32


# ---- Start and end

def init(device: torch.device, timeout_minutes: float = 30) -> None:
    """Joins the ranks that torchrun started: gloo for tensors on the CPU, NCCL for those on a GPU. Alone, does nothing.

    timeout_minutes: how long a rank waits in a collective for the others before it raises; long, because they
    wait while rank 0 evaluates and writes. Raises ValueError if the launcher's environment is incomplete, or is one
    in which a restart could hang.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if not present or dist.is_initialized():
        return
    if len(present) < len(_LAUNCHER_VARIABLES):
        raise ValueError(f"expected all or none of {', '.join(_LAUNCHER_VARIABLES)} in the environment, "
                         f"found only {', '.join(present)}; start with torchrun, or unset them to run alone")
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout, rank=rank, world_size=world,
                            store=dist.PrefixStore(_attempt(), store), device_id=device if on_gpu else None)


def _attempt() -> str:
    """A name for this start of the workers, the same on all of them.

    torchrun keeps one store over its restarts: without a name of its own an attempt would read the addresses of the
    ranks that died, and wait for them. Each node counts its own restarts, so several nodes cannot agree on a name by
    that count; they need a new store each time instead.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ.get("GROUP_WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        raise ValueError("torchrun with --max-restarts on several nodes: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and "
                         "use --rdzv-backend=c10d; else a restart hangs on the store of the attempt before it")
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if shared else "only attempt"


def cleanup() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_alone(code: int) -> None:
    """Ends this process at once, after an error of which the other ranks may know nothing, if there is NCCL in between.

    NCCL's group is left together: who leaves alone may wait there for ranks that wait for him in an all-reduce, and
    torchrun sees no rank fail. Alone, or with gloo, does nothing: cleanup() does not wait.
    """
    if get_world_size() > 1 and "nccl" in dist.get_backend_config():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- Rank

def launched() -> tuple[int, int]:
    """This process's rank and the number of ranks that torchrun has started, for work that needs no process group."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_launched() -> bool:
    """Whether torchrun, or what sets the same, has started this process as one of its ranks."""
    return "RANK" in os.environ


def get_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the rank that prints and writes files."""
    return get_rank() == 0


def print0(*args, **kwargs) -> None:
    """print() on rank 0, flushed at once; silence elsewhere.

    Where whoever read the output has gone (`train.py ... | head`), the rest of it goes nowhere and the run goes on.
    """
    if is_main():
        try:
            print(*args, **{"flush": True, **kwargs})
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, (kwargs.get("file") or sys.stdout).fileno())
            os.close(nowhere)


def seed_for_rank(seed: int, rank: int, seen: int = 0) -> int:
    """A seed in [0, 2**63) whose random stream is independent of every other (seed, rank, seen)'s.

    0 <= seed < 2**64; seen: images so far, for streams that begin anew within a run.
    """
    sequence = np.random.SeedSequence(seed + (seen << 64), spawn_key=(rank,))
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


# ---- Collectives

def barrier() -> None:
    """Collective. Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather(value) -> list:
    """Collective. [rank 0's value, rank 1's value, ...] on every rank; picklable, tensors on the CPU."""
    values = [value]
    if dist.is_initialized():
        values = [None] * get_world_size()
        dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Collective. The sum of a tensor over ranks, as a new tensor of that shape and device; no gradient."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_reduce_max(number: float) -> float:
    """Collective. The largest of the ranks' numbers. By the CPU, so that a GPU's queue goes on."""
    largest = torch.tensor(number)
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def reduce_mean(scalars: dict[str, float | torch.Tensor]) -> dict[str, float]:
    """Collective. The mean of each scalar over ranks. Raises ValueError if the ranks' names differ."""
    by_rank = gather({name: float(value) for name, value in scalars.items()})
    for rank, other in enumerate(by_rank):
        if other.keys() != by_rank[0].keys():
            raise ValueError(f"reduce_mean: rank 0 has {sorted(by_rank[0])}, rank {rank} has {sorted(other)}")
    return {name: sum(other[name] for other in by_rank) / len(by_rank) for name in scalars}


def check_same_state(module: torch.nn.Module) -> None:
    """Collective. Raises RuntimeError, naming the first tensor, if the state_dict differs between ranks."""
    def checksum(tensor):
        return zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    by_rank = gather({name: checksum(tensor) for name, tensor in module.state_dict().items()})
    for rank, other in enumerate(by_rank):
        for name in {**by_rank[0], **other}:
            if by_rank[0].get(name) != other.get(name):
                raise RuntimeError(f"{name} differs between rank 0 and rank {rank}; all ranks must start "
                                   "from the same weights and take the same steps")


def average_gradients(parameters) -> None:
    """Collective. Replaces every gradient by its mean over ranks, in one transfer; needs no hooks, so it serves
    double backward (R1, path length) alike. A parameter must have a gradient on all ranks or on none."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
