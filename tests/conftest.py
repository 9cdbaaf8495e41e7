"""What several test files need: a small database of synthetic heads, a short training run on it; no network for any."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import train_encoder
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceWriter
from tests.helpers import synthetic_head

LOCAL = (None, "", "localhost", socket.gethostname(), "127.0.0.1", "::1", "0.0.0.0", "::")
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))))
THREADS = torch.get_num_threads()
for number in (signal.SIGINT, signal.SIGHUP):    # ignored in a shell's background and under nohup, and what tests start
    if signal.getsignal(number) == signal.SIG_IGN:                     # would inherit that, but not another handler
        signal.signal(number, lambda *_: None)
refused: list[str] = []                          # addresses beyond this machine that a test has tried to reach


def _refuse_network(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        host = args[1][0] if isinstance(args[1], tuple) else None
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0].decode() if isinstance(args[0], bytes) else args[0]
    else:
        return
    if host not in LOCAL and not str(host).startswith("127."):
        refused.append(host)
        raise PermissionError(f"{event} {host}: the tests, and what they test, use no network")


sys.addaudithook(_refuse_network)                # Python's own sockets; a hook stays for the life of the process


@pytest.fixture(autouse=True)
def no_network():
    """Fails a test whose code has tried, even where it went on without; gives the addresses."""
    yield refused
    tried, refused[:] = list(refused), []
    assert tried == []


@pytest.fixture(autouse=True)
def same_threads():
    """Fails a test that leaves another number of threads: those after it would compute in another order."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    assert left == THREADS


@pytest.fixture(scope="session")
def slices32(tmp_path_factory) -> Path:
    """Slices of 32 x 32 pixels: two scans of 8 to train on, one to validate with."""
    path = tmp_path_factory.mktemp("data") / "slices32.lmdb"
    settings = PreprocessSettings(StandardiseSettings(size=32))
    with SliceWriter(path, settings.to_json()) as writer:
        for seed, split in enumerate(("train", "train", "val")):
            hu, brain = synthetic_head(slices=12, size=32, spacing_mm=(10.0, 7.0, 7.0), angle_deg=5 * seed, seed=seed)
            shown = np.flatnonzero(brain.any((1, 2)))[:8]
            below_vertex_mm = 10.0 * (shown.max() - shown)
            record = ScanRecord.encode(f"head{seed}", hu[shown].clip(-20, 180), brain[shown], below_vertex_mm)
            writer.add(record, split, f"patient{seed}")
    return path


@pytest.fixture(scope="session")
def gan_flags(slices32) -> list[str]:
    """Of train.py, but --out: 8 steps of 4 images, every phase and the augmentation at work."""
    flags = dict(data=slices32, preset="smoke32", device="cpu", precision="fp32", style_dim=8, channel_base=64,
                 channel_max=8, batch=4, r1_every=2, path_every=2, ada_target=-1.5, ada_kimg=0.04, kimg=0.032,
                 tick_kimg=0.008, grid_kimg=0.032, snapshot_kimg=0.016)
    return [text for name, value in flags.items() for text in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="session")
def train_gan(gan_flags) -> Callable[..., int]:
    """train_gan(out, *flags) -> exit code of train.py."""
    def run(out: Path, *more: object) -> int:
        return train.main([*gan_flags, "--out", str(out), *map(str, more)])

    return run


@pytest.fixture(scope="session")
def gan_run(train_gan, tmp_path_factory) -> Path:
    """A finished run of 8 steps, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "gan"
    assert train_gan(out) == 0
    return out


@pytest.fixture(scope="session")
def hiding_run(slices32, gan_run, tmp_path_factory) -> Path:
    """Half an epoch of train_encoder.py with parts of the slices hidden: what a reader is trained beside."""
    out = tmp_path_factory.mktemp("runs") / "hiding"
    flags = ["--preset", "smoke32", "--hide", "0.9", "--batch", "4", "--epochs", "0.5", "--encoder-code", "8"]
    assert train_encoder.main(["--data", str(slices32), "--gan", str(gan_run), "--out", str(out), *flags]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_gan_config() -> train.TrainConfig:
    """8 images a step; every phase runs at step 0 and weighs something, and none draws a rank at a time."""
    return dataclasses.replace(train.PRESETS["smoke32"], style_dim=8, channel_base=64, channel_max=8, batch=8,
                               r1_gamma=50, noise="const", ada_target=0, precision="fp32")
