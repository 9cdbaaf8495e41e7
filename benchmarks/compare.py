"""What benchmarks that hold our projection against the baselines share: running, fitting, calibrating, remembering.

A method is a function from a preprocessed scan to a baselines.ScoredScan. Ours is not one: projector.py runs as a user
would run it, and its files are read. Every method has the same brain masks, the same measure and the same score: what
differs is how the closest normal is drawn. Baselines are fitted to the training part of a database and calibrated on
the healthy scans that it holds out; a bundle brings its calibration.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import torch

import distributed
from benchmarks import baselines
from benchmarks.baselines import ScoredScan
from bundling.origins import learnt_by_networks
from common.files import replacing, sha256
from common.wording import some
from ct.frame import Preprocessed, PreprocessSettings, preprocess_scan
from ct.geometry import nominal_stack
from ct.read import ScanSource, find_scans, read_scan
from ct.scan import Scan
from ct.standardise import standardise
from dataset import SliceDataset, is_same
from detect import normative
from detect.bundle import absent_files, load_bundle, published_settings, read_bundle_meta, read_settings
from detect.calibration import Fold, calibrate
from detect.fitted import Fitted
from detect.measure import Measure
from detect.projection import project_frame
from detect.reconstruct import Reconstructor
from detect.settings import Settings
from detect.surprise import Surprise
from evaluation.cohort import displayed, read_volume

ROOT = Path(__file__).resolve().parents[1]
OURS = "ours"
NAMES = {OURS: "this project", "published": "published search and votes, our distance",
         "dae": "denoising autoencoder", "hu": "HU above 55", "flat": "no reconstruction", "pca": "PCA by position"}
SIGNIFICANT = 0.05              # a p below it gets a star
Method = Callable[[Preprocessed], ScoredScan]


def say(line: str) -> None:
    print(line, flush=True)


class Progress:
    """Lines with the time left, reckoned from the items done in this run."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.number, self.done, self.started = what, total, 0, 0, time.perf_counter()

    def line(self, text: str, fresh: bool = True) -> None:
        self.number, self.done = self.number + 1, self.done + fresh
        left = (time.perf_counter() - self.started) / max(self.done, 1) * (self.total - self.number)
        if fresh or self.number == self.total:
            say(f"{self.what} {self.number}/{self.total}: {text}, {left / 60:.1f} min left")


# ---------------------------------------------------------------------------------------------------------------
# Ours

def refuse_other_data(meta: dict, model: Path, data: SliceDataset, flag: str,
                      parts: Sequence[str] = ("data", "held_out", "calibration_data")) -> None:
    """ValueError unless the model with this model.json was trained or calibrated on this database, that of `flag`.

    The baselines are to learn from the same. One prepared anew is taken for the same, and that is said. parts: of the
    provenance, the databases that will do; ("data",): the one that its networks learnt from alone.
    """
    known, own = meta["provenance"] or {}, data.facts()
    its = [known[part] for part in parts if part in known]
    same = [one for one in its if is_same(one, own)]
    if not same:
        split_otherwise = any(one["digest"] == own["digest"] for one in its)
        trained_on = its[0]["digest"] if its else "none it names"
        raise ValueError(f"{flag} {data.path}: " + ("holds other scans out than the database that" if split_otherwise
                         else f"has the digest {own['digest'][:12]},") + f" --model {model} was trained on "
                         f"{trained_on[:12]}; give that database")
    if all(one["digest"] != own["digest"] for one in same):
        say(f"note: {flag} {data.path} is taken for what --model {model} was trained or calibrated on, prepared anew: "
            "it has as many scans and slices, and another digest")


def refuse_learnt(meta: dict, data: SliceDataset, flags: str) -> None:
    """ValueError where a model with this model.json is known to have learnt from scans that the database holds out."""
    if seen := learnt_by_networks(data, meta["provenance"] or {}):
        raise ValueError(f"{flags}: the model was trained on this database with other scans held out, and may have "
                         f"learnt from {some(seen, 3)}; give scans that it has not seen")


def project(scans: Path, model: Path, out: Path, device: str, flags: Sequence[str] = (), name: str = "") -> dict:
    """Runs projector.py over a folder of scans; returns its run.json. It skips what it has finished before.

    flags: further ones of projector.py. Raises ValueError where it ends with more than failed scans.
    """
    command = [sys.executable, str(ROOT / "projector.py"), str(scans), "--model", str(model), "--out", str(out),
               "--device", device, *flags]
    progress = Progress(f"projection of {name or scans.name}", len(find_scans(scans)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        for line in running.stdout:
            counted = re.match(r"\d+/\d+ (.*)", line)
            if counted:
                progress.line(counted[1], fresh="finished before" not in line)
    if running.returncode not in (0, 3):
        raise ValueError(f"projector.py ended with {running.returncode}; its message is above")
    return json.loads((out / "run.json").read_text(encoding="utf-8"))


def as_written(volume: np.ndarray, scan: Scan) -> np.ndarray:
    """A volume [S, H, W] of a scan as read_volume gives it once projector.py has written it, [S', H, W].

    An unevenly spaced scan is resampled to even steps there, and one that was put upright lies as it came (ct.write).
    """
    geometry = scan.geometry or nominal_stack(scan.position_mm, scan.pixel_spacing_mm)
    placed = geometry.place(volume)
    array = placed.array.astype(np.uint8) if volume.dtype == bool else placed.array             # NIfTI has no bool
    return displayed(nibabel.Nifti1Image(array, placed.affine))[0].astype(volume.dtype, copy=False)


def checked_brain(results: Path, pre: Preprocessed, scan: Scan) -> np.ndarray:
    """The brain mask bool [S', H, W] of a projected scan's folder, as_written. ValueError unless it is that of `pre`.
    """
    brain = read_volume(results / "brain.nii.gz")[0] > 0
    if not np.array_equal(brain, as_written(pre.slabs.from_slabs(pre.brain), scan)):
        raise ValueError(f"{results / 'brain.nii.gz'}: not the mask that the baselines get; the program or the scan "
                         "has changed since: choose another --out")
    return brain


# ---------------------------------------------------------------------------------------------------------------
# The others

def fitted(kinds: list[str], data: SliceDataset, folder: Path, device: torch.device) -> dict[str, Fitted]:
    """The baselines by kind, from the folder where they were fitted before. ValueError for one of other data."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for kind in kinds:
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            say(f"fitting baseline {kind} to {data.path}")
            baseline = baselines.KINDS[kind](device=device)
            baseline.fit(data)
            baseline.save(path)
        found[kind] = fitted_before(path, data, device)
    return found


def fitted_before(path: Path, data: SliceDataset, device: torch.device) -> Fitted:
    """A baseline from its file. ValueError for one of other data."""
    baseline = baselines.load(path, device)
    if key := data.unlike(baseline.trained_on):
        raise ValueError(f"{path}: fitted to another database than {data.path} (another {key}); remove the file")
    return baseline


def fits_of(args: argparse.Namespace) -> Path:
    """The folder of the baselines' files."""
    return args.fits or args.out / "baselines"


def calibrated(baseline: Fitted, held_out: SliceDataset, settings: Settings) -> Method:
    """The baseline with the calibration that ours has: its residual as a surprise.

    held_out: healthy scans that it has not learnt from. settings: the projection's; those of its surprise count here.
    Raises ValueError where the scans are fewer than three.
    """
    scoring = settings.scoring if settings.measure == Surprise.name else None
    _, measure = calibrate([Fold(baseline, held_out)], Surprise(scoring, settings.mask), log=lambda line: None)
    return functools.partial(assess, baseline, measure)


def assess(reconstructor: Reconstructor, measure: Measure, pre: Preprocessed) -> ScoredScan:
    """Map (signed surprise) and slice scores of a preprocessed scan."""
    findings = project_frame(reconstructor, measure, *baselines.kept_slices(pre))[2]
    return baselines.to_scan(pre, findings.anomaly, findings.slice_scores)


def beside(path: Path, settings: Settings, preprocessing: PreprocessSettings,
           device: torch.device) -> tuple[Method, str]:
    """Another model bundle as a method, with its own calibration, and the hash of its weights.

    settings, preprocessing: of our projection. Its surprises are counted and pooled as ours are, and it gets its own
    HU range of the same slices. ValueError where its calibration does not allow that, or there is none.
    """
    bundle = load_bundle(path, device)
    own, ours = bundle.settings.scoring, settings.scoring
    if bundle.settings.measure != settings.measure or any(
            getattr(own, name) != getattr(ours, name) for name in ("median_at_512", "filter") if hasattr(ours, name)):
        raise ValueError(f"--beside {path}: is calibrated for other residuals (measure, filter, median) than --model; "
                         "calibrate it with the same (latent_stats.py --encoder)")
    if bundle.preprocessing is None:
        raise ValueError(f"--beside {path}: does not tell how its slices were prepared, as an imported bundle; "
                         "calibrate it (latent_stats.py --encoder)")
    frames = [replace(one, standardise=replace(one.standardise, hu_clip=None, bone_apart=False))
              for one in (bundle.preprocessing, preprocessing)]
    if frames[0] != frames[1]:
        raise ValueError(f"--beside {path}: takes slices of another size or frame than --model")
    bundle = bundle.with_settings(replace(bundle.settings, scoring=ours, mask=settings.mask))
    try:
        bundle.measure.check()
    except ValueError as error:
        raise ValueError(f"--beside {path}: {error}") from error

    def score_scan(pre: Preprocessed) -> ScoredScan:
        seen = standardise(pre.slabs.scan, pre.brain, bundle.preprocessing.standardise)
        return assess(bundle.reconstructor, bundle.measure, replace(pre, standardised=seen))

    return score_scan, bundle.weights_hash


def open_database(path: Path, flag: str, args: argparse.Namespace) -> SliceDataset:
    """The training split of a database, that of `flag`, or all without baselines, which alone learn from it.

    ValueError naming the flag that does not fit.

    All that can be wrong with the methods is found here, before hours of work. args: of add_arguments.
    """
    data = SliceDataset(path, "train" if args.baselines else "all")
    meta, _ = read_bundle_meta(args.model)
    refuse_other_data(meta, args.model, data, flag)
    held_out = data.manifest["counts"]["val"]["scans"]
    if args.baselines and held_out < normative.MIN_SCANS:
        raise ValueError(f"{flag} {path}: holds {held_out} held-out scans, but calibrating the baselines "
                         f"{', '.join(args.baselines)} needs {normative.MIN_SCANS}; prepare it with a larger "
                         "--val-fraction, or leave them out of --baselines")
    names = [OURS, *getattr(args, "rows", ()), *args.baselines, *(bundle.resolve().name for bundle in args.beside)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--beside: {', '.join(twice)} is the name of two methods; give the folder another name, "
                         "and any other method once")
    settings, cpu = read_settings(args.model, meta), torch.device("cpu")
    if "published" in getattr(args, "rows", ()) and (absent := absent_files(meta, published_settings(meta, settings))):
        raise ValueError(f"--rows published: --model {args.model} holds no search (it lacks {', '.join(absent)}); give "
                         "a bundle that does, or leave the row out")
    for kind in args.baselines:
        if (fit := fits_of(args) / f"{kind}.safetensors").is_file():
            fitted_before(fit, data, cpu)
    for bundle in args.beside:                   # what make_methods() will do, with what run.json will say of ours
        beside(bundle, settings, PreprocessSettings.from_json(meta["preprocessing"]), cpu)
    return data


def make_methods(args: argparse.Namespace, data: SliceDataset, run: dict) -> tuple[dict[str, Method], str]:
    """The methods beside ours by their names, and a hash of all that their results hang on.

    data: of open_database(). run: the run.json of our projection, whose settings of the surprise all share.
    """
    device, folder = distributed.pick_device(args.device), fits_of(args)
    found: dict[str, Method] = {}
    settings, preprocessing = Settings.from_json(run["settings"]), PreprocessSettings.from_json(run["preprocessing"])
    made_from = []
    for kind, baseline in fitted(args.baselines, data, folder, device).items():
        held_out = SliceDataset(data.path, "val", check=False)
        say(f"calibrating baseline {kind} on {len(held_out.scan_ids)} held-out scans")
        found[kind] = calibrated(baseline, held_out, settings)
        made_from.append(sha256(folder / f"{kind}.safetensors"))
    for path in args.beside:
        found[path.resolve().name], weights_hash = beside(path, settings, preprocessing, device)
        made_from.append(weights_hash)
    return found, key_of(run["weights_sha256"], run["settings"], run["preprocessing"], list(found), made_from)


# ---------------------------------------------------------------------------------------------------------------
# One scan

@dataclass(frozen=True)
class Measured:
    """A scan and what every method makes of it.

    brain    bool [S', H, W], the mask of all methods, as_written
    scored   by method; the maps as_written, as ours are, the slice scores in the scan's order, [S]
    seconds  by method, from the file to the scores
    """

    scan: Scan
    pre: Preprocessed
    brain: np.ndarray
    scored: dict[str, ScoredScan]
    seconds: dict[str, float]


def run_methods(source: ScanSource, results: Path, preprocessing: PreprocessSettings,
                methods: dict[str, Method]) -> Measured:
    """results: the scan's folder among those of projector.py. Raises ValueError where the brain masks differ."""
    started = time.perf_counter()
    scan = read_scan(source)
    pre = preprocess_scan(scan, preprocessing)
    prepared, scored, seconds = time.perf_counter() - started, {}, {}
    brain = checked_brain(results, pre, scan)
    for name, method in methods.items():
        started = time.perf_counter()
        found = method(pre)
        seconds[name] = prepared + time.perf_counter() - started
        scored[name] = replace(found, anomaly=as_written(found.anomaly, scan))
    return Measured(scan, pre, brain, scored, seconds)


def remembered(path: Path, key: str, measure: Callable[[], dict]) -> tuple[dict, bool]:
    """measure()'s dict of arrays, kept in an .npz file under a key; and whether it was made now.

    A file that cannot be read, as one that a power cut has left short, is made anew.
    """
    if path.is_file():
        with contextlib.suppress(Exception):           # no list of what numpy, zipfile and tokenize raise is whole
            with np.load(path) as stored:
                kept = dict(stored)
            if kept.pop("key") == key:
                return kept, False
    kept = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as writing, open(writing, "wb") as file:    # of a path, numpy would change the ending
        np.savez_compressed(file, key=key, **kept)
    return kept, True


def key_of(*facts) -> str:
    """A hash of JSON-able facts, for remembered()."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# Command line and results

def add_arguments(parser: argparse.ArgumentParser, database: str) -> None:
    """The arguments that the benchmarks share; database: the flag of the database that the baselines learn from."""
    add = parser.add_argument
    add(database, type=Path, required=True,
        help="the database that the model was trained or calibrated on, for the baselines")
    add("--model", type=Path, required=True, help="model bundle")
    add("--out", type=Path, required=True, help="folder for results and figures")
    add("--baselines", nargs="*", choices=list(baselines.KINDS), default=list(baselines.KINDS), metavar="KIND",
        help=f"of {', '.join(baselines.KINDS)} (default all)")
    add("--fits", type=Path, metavar="FOLDER",
        help="where KIND.safetensors of the baselines are kept, or taken from (default OUT/baselines)")
    add("--beside", type=Path, nargs="*", default=[], metavar="BUNDLE",
        help="further model bundles, of any method, each with its own calibration, scored as that of --model is; "
             "named after their folders")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")


def name_of(method: str) -> str:
    """As the tables call it; a bundle by its folder's name."""
    return NAMES.get(method, method)


def shown(value, digits: int = 2) -> str:
    """A figure, an interval, or a dash where the data do not define it (metrics.json says why)."""
    if isinstance(value, str):
        return "-"
    return f"{value[0]:.{digits}f}-{value[1]:.{digits}f}" if isinstance(value, tuple) else f"{value:.{digits}f}"


def differs(tested: dict) -> str:
    """A star where p_holm is SIGNIFICANT."""
    p = tested.get("p_holm", "")
    return "" if isinstance(p, str) or p >= SIGNIFICANT else "*"


def facts(run: dict, data: SliceDataset) -> dict:
    """What the figures of metrics.json come from: our projection, by its run.json, and the database."""
    of_run = ("model", "weights_sha256", "settings", "versions", "device", "threads")
    return {"database": data.manifest["digest"], **{key: run[key] for key in of_run}}


def write_figures(out: Path, figures: dict, table: str) -> None:
    """metrics.json and table.md; the table on the terminal as well."""
    (out / "metrics.json").write_text(json.dumps(figures, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
