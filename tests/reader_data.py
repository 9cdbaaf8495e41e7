"""What the tests of runs of train_reader.py need: the command, and runs that say something else."""

from __future__ import annotations

import json
import shutil

import train_reader
from common.weights import write_json
from gan.snapshots import load_snapshot


def run(slices, encoder, out, *flags) -> int:
    """Exit code of train_reader.py."""
    command = ["--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32", "--batch", 4, *flags]
    return train_reader.main([str(word) for word in command])


def with_held_out(run, held_out, copy):
    """A copy of a run that says it held these scans out."""
    return with_meta(run, copy, held_out=held_out)


def with_meta(run, copy, **changes):
    """A copy of a run that tells other things of itself; of what is None it tells nothing."""
    shutil.copytree(run, copy)
    path = copy / load_snapshot(run).path.name / "meta.json"
    content = json.loads(path.read_text())
    content["meta"] = {key: value for key, value in (content["meta"] | changes).items()
                       if key not in changes or value is not None}
    write_json(path, {key: value for key, value in content.items() if key != "digest"})
    return copy
