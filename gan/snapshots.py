"""Run folders of the training commands.

A run folder holds snapshots, `snapshot-00012000/`: weights as safetensors, one file per network; optimisers,
RNGs and the like in state.pt (tensors and plain Python values only); meta.json with a SHA-256 of each file. A
snapshot is written beside its place and renamed, so a killed run leaves the one before it whole.

In a distributed run, save on rank 0 only.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.files import flush, full_disk_named, put_in_place, require_space, sha256
from common.weights import (
    CheckpointError,
    digest,
    load_strictly,
    load_tensors,
    portable,
    read_json,
    save_tensors,
    verify,
    write_json,
)
from model import ModelConfig

FORMAT_VERSION = 2                       # the only one that is read
_PLAIN = (bool, int, float, str, bytes, type(None))


@dataclass(frozen=True)
class Snapshot:
    """One moment of a training run, on the CPU."""

    step: int
    path: Path
    weights: dict[str, dict[str, torch.Tensor]]      # by network name
    state: dict[str, Any]                            # optimisers, RNGs, ...: as it was saved
    meta: dict[str, Any]

    def known(self) -> dict[str, Any]:
        """What a run that begins with these weights keeps of where they come from, JSON."""
        return {"step": self.step, **self.meta}

    def digest(self) -> str:
        """Of the weights: runs that tell the same of themselves may differ in these, such as from --init or machine."""
        return digest(self.weights)

    def model(self) -> ModelConfig:
        """Of the networks of train.py and train_encoder.py. Raises CheckpointError where another version made them."""
        try:
            return ModelConfig(**self.meta["model"])
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: its networks are not as this version knows them ({error}); use the "
                                  "version that made the run, or make it anew") from error

    def restore(self, modules: Mapping[str, nn.Module]) -> None:
        """Load the weights into modules, strictly. Raises CheckpointError when names or shapes do not fit."""
        for name, module in modules.items():
            if name not in self.weights:
                raise CheckpointError(f"{self.path}: no network '{name}', only {sorted(self.weights)}")
            load_strictly(module, self.weights[name], self.path / f"{name}.safetensors")


def snapshot_steps(run: str | Path) -> list[int]:
    """Steps of the finished snapshots of a run folder, ascending; empty for a new or missing folder."""
    names = (path.name for path in Path(run).glob("snapshot-*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"snapshot-(\d+)", name)))


def save_snapshot(run: str | Path, step: int, modules: Mapping[str, nn.Module], state: Mapping[str, Any],
                  meta: Mapping[str, Any], keep: int = 2, distance: float | None = None) -> Path:
    """Write a snapshot atomically, then drop all but the newest `keep` and the best. Returns its folder.

    modules  networks by name; each becomes NAME.safetensors
    state    tensors, numbers, strings, None, and dicts, lists and tuples of these; anything else is refused,
             so that it can be read back without unpickling code
    meta     anything JSON can hold
    distance how far what the run draws is from what it should draw; the snapshot with the least is the best

    Raises OSError, naming the space needed, when the disk is full; the snapshots that are there stay whole.
    """
    run = Path(run)
    needed = _bytes({name: module.state_dict() for name, module in modules.items()}) + _bytes(state, "state")
    for leftover in [*run.glob(".snapshot-*.writing"), *run.glob(".snapshot-*.replaced")]:
        shutil.rmtree(leftover)

    run.mkdir(parents=True, exist_ok=True)
    final, writing = _snapshot_path(run, step), run / f".snapshot-{step:08d}.writing"
    require_space(final, needed)
    with full_disk_named(final, needed):
        writing.mkdir()
        for name, module in modules.items():
            save_tensors(portable(module.state_dict()), writing / f"{name}.safetensors")
        torch.save(dict(state), writing / "state.pt")
        files = {path.name: sha256(path) for path in sorted(writing.iterdir())}
        content = dict(format_version=FORMAT_VERSION, step=step, distance=distance, files=files, meta=dict(meta))
        write_json(writing / "meta.json", content)
        for path in [*writing.iterdir(), writing]:
            flush(path)

    replaced = run / f".{final.name}.replaced"
    put_in_place(writing, final, replaced)
    flush(run)
    shutil.rmtree(replaced, ignore_errors=True)
    _prune(run, keep)
    return final


def set_aside_newer(run: str | Path, step: int) -> None:
    """Rename what is newer than the snapshot of this step, which a run went on from or wrote last: it was passed over
    as damaged, and must not count among those that are kept."""
    run = Path(run)
    for newer in [other for other in snapshot_steps(run) if other > step]:
        folder = _snapshot_path(run, newer)
        aside = run / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        warnings.warn(f"{folder}: damaged, now {aside.name}, which may be deleted", stacklevel=2)


def load_snapshot(run: str | Path) -> Snapshot:
    """Read the newest whole snapshot of a run, checked against its hashes, with a warning for each passed over.

    Raises CheckpointError when there is none.
    """
    run = Path(run)
    steps = snapshot_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: no snapshot here; check the folder, or start the run anew")
    for leftover in run.glob(".snapshot-*.writing"):
        warnings.warn(f"{leftover}: left half-written when the run stopped; not used", stacklevel=2)
    for step in reversed(steps):
        try:
            return _read_snapshot(_snapshot_path(run, step))
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the snapshot before it", stacklevel=2)
    raise CheckpointError(f"{run}: all {len(steps)} snapshots are damaged; start the run anew")


def _read_snapshot(folder: Path) -> Snapshot:
    content = read_json(folder / "meta.json", "the snapshot is not whole; use another", FORMAT_VERSION)
    verify(folder, content["files"], "the file was altered or cut short; use another snapshot")
    networks = [name for name in content["files"] if name.endswith(".safetensors")]
    weights = {name.removesuffix(".safetensors"): load_tensors(folder / name) for name in networks}
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return Snapshot(content["step"], folder, weights, state, content["meta"])


def _prune(run: Path, keep: int) -> None:
    steps = snapshot_steps(run)
    measured = {step: distance for step in steps if (distance := _distance(_snapshot_path(run, step))) is not None}
    kept = {*steps[-max(keep, 1):], *sorted(measured, key=measured.get)[:1]}
    for step in set(steps) - kept:       # in one move first: a run killed here leaves no half of a snapshot
        folder = _snapshot_path(run, step)
        shutil.rmtree(folder.rename(run / f".{folder.name}.replaced"))


def _distance(folder: Path) -> float | None:
    """Of a snapshot; None where it was not measured, or meta.json is damaged."""
    try:
        return read_json(folder / "meta.json", "damaged", FORMAT_VERSION).get("distance")
    except CheckpointError:
        return None


def _snapshot_path(run: Path, step: int) -> Path:
    return run / f"snapshot-{step:08d}"


def _bytes(value: Any, where: str = "weights") -> int:
    """Of the tensors in value, about. Raises CheckpointError for what is neither plain nor a tensor."""
    if type(value) in (dict, OrderedDict):
        return sum(_bytes(key, f"a key of {where}") + _bytes(item, f"{where}[{key!r}]") for key, item in value.items())
    if type(value) in (list, tuple):
        return sum(_bytes(item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if type(value) not in _PLAIN:
        raise CheckpointError(f"{where}: a {type(value).__module__}.{type(value).__name__} cannot be saved; "
                              "store a tensor, number, string, dict, list or tuple")
    return 0


def load_optimiser(optimiser: torch.optim.Optimizer, state: dict) -> None:
    """Take the moments of a saved state, but keep the learning rate and the like: those are today's flags."""
    optimiser.load_state_dict({**state, "param_groups": optimiser.state_dict()["param_groups"]})
