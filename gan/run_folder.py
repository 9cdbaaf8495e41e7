"""The folder of a training run: held against others, gone on from where it is the same run, read by what comes next."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import distributed
from common.files import locked, replace_text
from common.weights import CheckpointError, holds_bundle
from common.wording import differing, some
from dataset import comparable
from gan.snapshots import Snapshot, load_snapshot, snapshot_steps
from model import ModelConfig

LOCK = ".lock"                   # in a run's folder: held by the run that is at work there
LAST_RANKS_S = 120.0             # a launcher starts ranks anew while those before may still write their snapshot, or a
                                 # file server still holds the lock of a node that is lost

OF_ANY_RUN = ("config", "model", "data", "held_out")          # what the meta of every run of a training command tells
OF_RUNS = {"gan": (), "encoder": ("gan",), "reader": ("beside",)}                     # and of one of a kind


def hold_folder(out: Path, held: contextlib.ExitStack) -> None:
    """Collective. Make the run folder, and lock it against other runs until `held` is closed.

    Raises CheckpointError, on all ranks, when it cannot be made or another run is at work there.
    """
    problem, what = None, "made a folder"
    if distributed.is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
            what = "written to"
            held.enter_context(locked(out / LOCK, LAST_RANKS_S if distributed.is_launched() else 0.0))
        except BlockingIOError:
            problem = f"another run is at work in {out}; stop it, wait for its end, or choose another --out"
        except OSError as error:
            problem = f"--out {out}: cannot be {what} ({error.strerror}); choose another"
    if problem := distributed.gather(problem)[0]:
        raise CheckpointError(problem)


def start_run(out: Path, meta: dict, modules: dict[str, torch.nn.Module]) -> Snapshot | None:
    """Collective. If the run folder holds snapshots, load the last one's weights into modules.

    Returns the snapshot (for its state), or None for a new run, whose meta go to config.json. Raises CheckpointError
    when the folder holds a run whose meta differ in anything but the config (kind, networks, data, GAN) or lack some of
    these.
    """
    snapshot = load_snapshot(out) if snapshot_steps(out) else None
    if snapshot is not None:
        for key in [key for key in meta if key != "config"]:               # in order: the kind first
            if key not in snapshot.meta:
                raise CheckpointError(f"{out}: the run there was started by an older version and does not tell its "
                                      f"{key}; go on with that version, or choose another --out")
            was, now = told_of(snapshot.meta, key), json.loads(json.dumps(told_of(meta, key)))
            if other := differing(was, now, key):
                raise CheckpointError(f"{out}: the run there has another {key} ({some(other, 3, '; ')}); go on with "
                                      "the same flags and database, or choose another --out")
        before, now = snapshot.meta.get("config", {}), json.loads(json.dumps(meta["config"]))
        if gone := sorted(set(before) - set(now)):
            raise CheckpointError(
                f"{out}: the run there was started by an older version, with settings that this one does not know "
                f"({', '.join(gone)}); go on with that version, or choose another --out")
        if changed := differing(before, {key: now[key] for key in before}, "config"):
            distributed.print0(f"note: the run in {out} goes on with other settings: {'; '.join(changed)}")
        snapshot.restore(modules)
    elif distributed.is_main():
        write_config(out, meta)
    return snapshot


def write_config(out: Path, meta: dict) -> None:
    """With a new run and with each of its snapshots: a later call that takes no step leaves it as it is."""
    replace_text(out / "config.json", json.dumps(meta, indent=2) + "\n")


def load_run(folder: Path, flag: str, kind: str, command: str) -> Snapshot:
    """The last snapshot of a run of this kind. Raises CheckpointError naming the flag."""
    if not snapshot_steps(folder):
        raise CheckpointError(f"{flag} {folder}: " + (
            f"a model bundle; a run folder of {command} is expected" if holds_bundle(folder) else
            f"holds no run of {command}; give the folder that was its --out"))
    snapshot = load_snapshot(folder)
    if snapshot.meta.get("kind") != kind:
        raise CheckpointError(f"{flag} {folder}: not a run of {command} (kind {snapshot.meta.get('kind')!r})")
    if untold := [key for key in OF_ANY_RUN + OF_RUNS[kind] if key not in snapshot.meta]:
        raise CheckpointError(f"{flag} {folder}: the run there was made by an older version and does not tell its "
                              f"{some(untold, 3)}; make it anew with {command}")
    return snapshot


def told_of(meta: dict, key: str) -> Any:
    """An entry of a run's meta, to be compared with another's: of before a network had a setting, its default."""
    if key == "model" and meta["kind"] in ("gan", "encoder"):
        return asdict(ModelConfig()) | meta[key]
    return comparable(meta[key]) if key == "data" else meta[key]
