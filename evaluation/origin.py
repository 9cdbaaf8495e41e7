"""Which model scores are of: by the run.json beside them, which projector.py and healthygan.test write."""

from __future__ import annotations

from pathlib import Path

from common.files import read_object
from common.wording import differing, some
from evaluation.cohort import InputError

# What scores hang on. A precision is not among these: a calibration, too, is compared across precisions
HANG_ON = ("weights_sha256", "settings", "preprocessing", "image_settings", "calibration")
VERSIONS = ("preprocessing", "measure")


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
    here, there = map(_hangs_on, found)
    if where := [line for name in here for line in differing(here[name], there[name], name)]:
        raise InputError(f"{flag}: made by another model or calibration or by other settings than the scores in "
                         f"{scores} ({some(where, 3, '; ')}); expected what the same model made in the same way: "
                         "project these scans with it, too")
    return ""


def _hangs_on(path: Path) -> dict:
    """The entries of a run.json that scores hang on. Masks are drawn when these are there; a threshold is put on them.
    """
    run = read_object(path, InputError, "project the scans again")
    if run.get("seconds", 0) is None:
        raise InputError(f"{path}: of a run that has not ended: the tables beside it may be those of an earlier one; "
                         "start it again, or merge its parts")
    found = {name: run.get(name) for name in HANG_ON}
    for name, own in (("settings", "mask"), ("calibration", "threshold")):
        if isinstance(found[name], dict):
            found[name] = {key: value for key, value in found[name].items() if key != own}
    versions = run.get("versions") or {}
    return found | {"versions": {name: versions.get(name) for name in VERSIONS}}
