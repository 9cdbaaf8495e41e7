"""Project head-CT scans: for every slice the closest normal image, maps of what differs, and scores.

    python projector.py SCANS --model models/ct-ich-128 --out results
    torchrun --nproc-per-node=4 projector.py SCANS --model models/ct-ich-128 --out results

SCANS is a folder that is searched for DICOM series, NIfTI files and folders of slices, or one such scan. Writes

    scores.csv, slices.csv      a row a scan, highest score first: the reading worklist; a row a slice
    report.html                 all of it to look at, in one file
    run.json                    versions, weights, settings, seconds
    SCAN/*.nii.gz               reconstruction, residual (HU), anomaly (surprise, or votes times residual), mask,
                                brain: in the scan's own geometry
    SCAN/overlay/NN.png         query, closest normal, residual, mask; NN counts the scan's slices from below

A rerun skips finished scans. Exit codes: 0 done, 2 wrong usage, 3 some scans failed (rows with a reason).
Not a medical device: for research only.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import platform
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch

import distributed
from config import add_options, given
from ct.frame import PreprocessSettings, preprocess_scan
from ct.read import ScanSource, find_scans, read_scan
from ct.scan import ScanError
from detect import measure
from detect.bundle import Bundle, load_bundle
from detect.outputs import replace_text, to_native, volume_ml, write_maps, write_overlays, write_tables
from detect.report import write_report
from detect.search import FAITHFUL, ProjectionSettings, perceptual_for, project
from op import memory, set_impl

TOO_MUCH = 0.35         # predicted part of the brain from which the reconstruction, not the brain, is at fault


class Projector:
    """A bundle, its settings, and what one scan goes through."""

    def __init__(self, bundle: Bundle, settings: ProjectionSettings, preprocessing: PreprocessSettings,
                 batch: int, vgg16=None, lpips=None):
        self.bundle, self.settings, self.preprocessing, self.batch = bundle, settings, preprocessing, batch
        self.perceptual = perceptual_for(bundle, settings, vgg16, lpips)
        calibration = bundle.meta["calibration"] or {}
        # A percentile means something only against scores that were made the same way; --scan-score has one for each.
        calibrated = dataclasses.replace(stored_settings(bundle), scan_score=settings.scan_score)
        same = calibrated == settings and _plain(preprocessing.to_json()) == _plain(
            bundle.meta["preprocessing"])
        self.healthy = calibration.get("scan_scores", {}).get(settings.scan_score) if same else None
        self.threshold = calibration.get("threshold", {}).get(settings.scan_score) if same else None

    def __call__(self, source: ScanSource, folder: Path) -> dict:
        """Project one scan and write its folder; returns its rows. Raises ScanError."""
        started = time.perf_counter()
        scan = read_scan(source)
        pre = preprocess_scan(scan, self.preprocessing)
        seconds = {"read and standardise": time.perf_counter() - started}
        hu, brain, below_vertex_mm = pre.kept_slices()
        hu, brain = torch.from_numpy(hu), torch.from_numpy(brain)
        result = project(hu, brain, below_vertex_mm, self.bundle, self.perceptual, self.settings, self.batch)
        seconds |= result.seconds
        writing = time.perf_counter()
        native = to_native(pre, result, self.settings.scan_score)
        notes = [*scan.notes]
        share = float(result.predicted.sum() / brain.sum())
        if share > TOO_MUCH:
            notes.append(f"{share:.0%} of the brain differs from its reconstruction: not to be trusted; check "
                         "the scan's window, orientation and brain mask")
        notes += write_maps(folder, scan, native)
        write_overlays(folder / "overlay", pre, native)
        seconds["write"] = time.perf_counter() - writing
        return self._rows(scan, native, result, notes, seconds, time.perf_counter() - started)

    def _rows(self, scan, native, result, notes, seconds, total) -> dict:
        percentile = flagged = None
        if self.healthy:
            percentile = float(measure.percentile_of(torch.tensor([native.scan_score]), torch.tensor(self.healthy))[0])
        if self.threshold is not None:
            flagged = int(native.scan_score > self.threshold)
        row = dict(scan_id=scan.scan_id, score=native.scan_score, percentile=percentile, flagged=flagged, status="ok",
                   reason=None, slices=len(scan.hu), projected_slices=int(native.projected.sum()),
                   error_hu=result.error_hu["latent"], anomalous_ml=volume_ml(native.mask, scan), seconds=total,
                   notes=" | ".join(dict.fromkeys(notes)))
        slices = [dict(scan_id=scan.scan_id, slice=i, position_mm=float(scan.position_mm[i]),
                       below_vertex_mm=float(native.below_vertex_mm[i]), projected=int(native.projected[i]),
                       score=float(native.slice_scores[i])) for i in range(len(scan.hu))]
        return {"scan": row, "slices": slices, "seconds": seconds}


def _plain(value):
    return json.loads(json.dumps(value))


# ---------------------------------------------------------------------------------------------------------------
# A folder of scans

def finished(folder: Path) -> dict | None:
    """The result.json of a scan's folder; None where there is none, or it is damaged."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def fingerprint(source: ScanSource) -> str:
    """Changes with the scan's files (names, sizes, times), scan.json included, and with how they are read."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    read_as = {k: v for k, v in source.options.items() if not isinstance(v, Path)}
    return hashlib.sha256(repr((source.kind, facts, read_as)).encode()).hexdigest()


def run(projector: Projector, sources: list[ScanSource], out: Path, key: dict) -> tuple[list[dict], list[dict]]:
    """Collective. Project this rank's share of the scans; returns all finished and all failed rows, on every rank.

    A scan is finished when its folder holds result.json, which is written last; `key` says what with, and its
    fingerprint that the files have not changed since.
    """
    done, failed = [], []
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for number, source in enumerate(sources):
        if number % world != rank:
            continue
        folder = out / source.scan_id
        marker = folder / "result.json"
        earlier, files = finished(folder), fingerprint(source)
        if earlier and earlier["key"] == key and earlier.get("files") == files:
            done.append(earlier)
            print(f"{number + 1}/{len(sources)} {source.scan_id}: finished before, skipped", flush=True)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        try:
            rows = {"key": key, "files": files, **projector(source, folder)}
            replace_text(marker, json.dumps(rows))
        except Exception as error:       # a scan that breaks us must not cost the others their results
            reason = str(error)
            if not isinstance(error, ScanError):
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            failed.append({"scan_id": source.scan_id, "status": "failed", "reason": reason})
            outcome = f"FAILED, {reason}"
        else:
            done.append(rows)
            outcome = f"score {rows['scan']['score']:.3f}, {rows['scan']['seconds']:.1f} s"
        print(f"{number + 1}/{len(sources)} {source.scan_id}: {outcome}", flush=True)
        if world == 1:
            write_tables(out, done, failed)
    shares = distributed.gather((done, failed))
    return [d for share in shares for d in share[0]], [f for share in shares for f in share[1]]


def run_report(projector: Projector, done, failed, device: torch.device, dtype: torch.dtype, seconds: float) -> dict:
    """What ran on what with which weights, and the healthy scores it may be held against: JSON."""
    bundle = projector.bundle
    stages: dict[str, float] = {}
    for d in done:
        for stage, value in d["seconds"].items():
            stages[stage] = stages.get(stage, 0) + value / len(done)
    return {
        "weights_sha256": bundle.weights_hash, "model": bundle.meta["provenance"],
        "projection": dataclasses.asdict(projector.settings), "preprocessing": projector.preprocessing.to_json(),
        "calibration": bundle.meta["calibration"] if projector.healthy else None,
        "scans": len(done), "failed": len(failed), "seconds": seconds, "seconds_a_scan_by_stage": stages,
        "device": str(device), "precision": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "ranks": distributed.get_world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="?", type=Path, help="folder that holds scans, or one scan")
    parser.add_argument("--query_save_path", dest="query", type=Path, help="the original's name for SCANS")
    parser.add_argument("--model", type=Path, required=True, help="model bundle made by latent_stats.py")
    parser.add_argument("--out", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--preset", choices=("model", "faithful"), default="model",
                        help="the settings that the model was calibrated for, or the published algorithm: 100 + 100 "
                             "steps and votes (then without percentiles, if the model was calibrated for others)")
    parser.add_argument("--overwrite", action="store_true", help="project again what other settings have projected")
    parser.add_argument("--batch", type=int, default=32, help="slices in the networks at a time: memory, not results")
    parser.add_argument("--slab-mm", type=float,
                        help="thickness that slices under 4 mm are averaged to (default: the model's)")
    parser.add_argument("--unknown-slice-spacing-mm", type=float, default=5.0,
                        help="taken (and noted) where a scan does not tell its slice spacing; 0 refuses such scans")
    parser.add_argument("--default-preprocessing", action="store_true",
                        help="for an imported bundle, which has none of its own: standardise as for training")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--ops", default="auto", choices=("auto", "ref"), help="ref: no CUDA kernels of our own")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--vgg16", type=Path, help="torchvision's vgg16 state dict, for --perceptual lpips")
    parser.add_argument("--lpips", type=Path, help="the published linear weights of LPIPS-VGG")
    add_options(parser, ProjectionSettings, "projection (default: as the model was calibrated)")
    args = parser.parse_args(argv)
    if (args.scans is None) == (args.query is None):
        parser.error("give SCANS, the folder that holds the scans (or --query_save_path), once")
    if args.batch < 1:
        parser.error(f"--batch must be at least 1, got {args.batch}")
    if args.slab_mm is not None and not args.slab_mm > 0:
        parser.error(f"--slab-mm must be above 0, got {args.slab_mm:g}")
    args.scans = args.scans or args.query
    return args


def stored_settings(bundle: Bundle) -> ProjectionSettings:
    """The settings that the bundle was calibrated for; what an older one does not say is the default."""
    try:
        return ProjectionSettings(**(bundle.meta["projection"] or {}))
    except TypeError as error:
        raise ValueError(f"--model: model.json: projection: {error}; made by another version: run latent_stats.py "
                         "anew") from error


def resolve(bundle: Bundle, args: argparse.Namespace) -> tuple[ProjectionSettings, PreprocessSettings]:
    """The bundle's settings with the given flags over them. Raises ValueError where the bundle lacks its own."""
    stored = stored_settings(bundle)
    settings = given(args, dataclasses.replace(stored, **FAITHFUL) if args.preset == "faithful" else stored)
    if bundle.meta["preprocessing"] is not None:
        preprocessing = PreprocessSettings.from_json(bundle.meta["preprocessing"])
    elif args.default_preprocessing:
        preprocessing = PreprocessSettings()
        standard = dataclasses.replace(preprocessing.standardise, size=bundle.config.size)
        preprocessing = dataclasses.replace(preprocessing, standardise=standard)
    else:
        raise ValueError(f"--model {args.model}: an imported bundle does not say how its scans were prepared; "
                         "give --default-preprocessing to standardise them as ours")
    if args.slab_mm is not None:
        preprocessing = dataclasses.replace(preprocessing, slab_mm=args.slab_mm)
    return settings, preprocessing


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.perf_counter()
    try:
        memory.keep_freed()
        set_impl(args.ops)
        device = distributed.pick_device(args.device)
        distributed.init(device)
        bundle = load_bundle(args.model, device)
        settings, preprocessing = resolve(bundle, args)
        dtype = distributed.pick_precision(args.precision, device)
        for net in (bundle.generator, bundle.discriminator, bundle.encoder):
            net.compute_dtype = dtype
        projector = Projector(bundle, settings, preprocessing, args.batch, args.vgg16, args.lpips)
        sources = find_scans(args.scans, args.unknown_slice_spacing_mm)
        key = _plain({"weights": bundle.weights_hash, "projection": dataclasses.asdict(settings),
                      "preprocessing": preprocessing.to_json(), "precision": str(dtype)})
        make_writable(args.out)
        refuse_other_results(args.out, sources, key, args.overwrite)
        distributed.barrier()
        done, failed = run(projector, sources, args.out, key)
        if distributed.is_main():
            write_tables(args.out, done, failed)
            facts = run_report(projector, done, failed, device, dtype, time.perf_counter() - started)
            (args.out / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            page = write_report(args.out, args.out / "report.html")
            print(f"{len(done)} scans projected, {len(failed)} failed: {args.out / 'scores.csv'}, {page}", flush=True)
        distributed.barrier()             # torchrun stops all ranks when the first ends with 3: not before the tables
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on with the scans that are left", file=sys.stderr)
        return 130
    finally:
        distributed.cleanup()
    return 3 if failed else 0


def make_writable(out: Path) -> None:
    """Makes the folder. ValueError where nothing can be written there, before hours of work for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error


def refuse_other_results(out: Path, sources: list[ScanSource], key: dict, overwrite: bool) -> None:
    """ValueError if a scan's results there were made with another model or other settings, unless overwrite."""
    for source in sources:
        earlier = finished(out / source.scan_id)
        if not overwrite and earlier and earlier["key"] != key:
            raise ValueError(f"--out {out}: holds results of {source.scan_id} made with another model or other "
                             "settings; choose another folder, or --overwrite")


if __name__ == "__main__":
    sys.exit(main())
