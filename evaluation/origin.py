"""Which model scores are of: by the run.json beside them, which projector.py and healthygan.test write."""

from __future__ import annotations

from pathlib import Path

from common.files import read_object
from common.wording import differing, some
from evaluation.cohort import InputError

# What scores hang on. A precision is not among these: a calibration, too, is compared across precisions
HANG_ON = ("weights_sha256", "settings", "preprocessing", "image_settings", "calibration")
VERSIONS = ("preprocessing", "measure")
# Of a run.json whose run's seconds are null
UNENDED = ("of a run that has not ended, and the scores beside it may be an earlier run's; start it again, or merge "
           "its parts")


def refuse_other_model(scores: Path, others: Path, flag: str) -> str:
    """InputError where the run.json of two folders are of two models, calibrations or settings, and what differs.

    scores: the folder of the evaluated ones; others: that of what `flag`, with its value, names. Returns why that is
    not known, '' where it is.
    """
    if scores.resolve() == others.resolve():
        return ""
    found = [folder / "run.json" for folder in (scores, others)]
    if absent := [str(path.parent) for path in found if not path.is_file()]:
        return f"not known whether by the same model: no run.json in {' and '.join(absent)}"
    here, there = (_hangs_on(path, flag) for path in found)
    if where := [line for name in here for line in differing(here[name], there[name], name)]:
        raise InputError(f"{flag}: made by another model or calibration or by other settings than the scores in "
                         f"{scores} ({some(where, 3, '; ')}); expected what the same model made in the same way: "
                         "project these scans with it, too")
    return ""


def read_run(path: Path, flag: str) -> dict:
    """The run.json of a run that has ended. InputError, naming the flag, for any other."""
    run = read_object(path, InputError, "project the scans again")
    if run.get("seconds", 0) is None:
        raise InputError(f"{flag}: {path} is {UNENDED}")
    return run


def _hangs_on(path: Path, flag: str) -> dict:
    """The entries of a run.json that scores hang on. Masks are drawn when these are there; a threshold is put on them.
    """
    run = read_run(path, flag)
    found = {name: run.get(name) for name in HANG_ON}
    for name, own in (("settings", "mask"), ("calibration", "threshold")):
        if isinstance(found[name], dict):
            found[name] = {key: value for key, value in found[name].items() if key != own}
    versions = run.get("versions") or {}
    return found | {"versions": {name: versions.get(name) for name in VERSIONS}}
