"""What a user could build in an afternoon: simple detectors to stand beside ours, on the same masks and slices.

    python benchmarks/baselines.py fit dae --data healthy.lmdb --out dae.safetensors
    python benchmarks/baselines.py score dae.safetensors SCANS --out dae

hu   HU thresholds: how far a pixel lies above 55 HU, up to 95 HU where bone begins. Hyperdense findings only: healthy
     ventricles and sulci lie below 15 HU like what is ill, and a second threshold there costs more than it finds
flat no reconstruction: the difference from one grey. Only calibrated does it say something: what is unusual at a place
pca  principal components of the healthy slices at the same height; the residual of their reconstruction (detect/pca.py)
dae  denoising autoencoder, a U-Net that takes coarse noise off (detect/autoencoder.py)

Here each is used as it is, without calibration: a map is the residual in HU, 0 outside the brain, filtered by the same
median as ours; a slice scores the mean of its map over the brain, a scan scan_score of its slices. (A bundle of
latent_stats.py with the same file has a calibration.) `score` writes scores.csv, slices.csv and SCAN/anomaly.nii.gz for
evaluate.py. Exit codes: 0 done, 2 wrong usage, 3 some scans failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

import distributed
from benchmarks import new_file
from common.files import write_table
from common.results import refuse_projected
from config import add_options, exit_code, given, option
from ct.frame import Preprocessed, PreprocessSettings, preprocess_scan
from ct.read import find_scans, read_scan
from ct.scan import ScanError
from ct.write import write_nifti
from dataset import SliceDataset
from detect.autoencoder import Autoencoder
from detect.fitted import Fitted, NoSettings
from detect.folder import make_writable
from detect.pca import PositionPca
from detect.residual import residual, scale_median_size
from detect.scores import SCAN_SCORES, scan_score, thickness_mm


@dataclass(frozen=True)
class HuFit:
    low_hu: float = option(55.0, "healthy brain lies below")
    high_hu: float = option(95.0, "bone and its partial volume lie above")


@dataclass(frozen=True)
class FlatFit:
    level_hu: float = option(30.0, "the grey of every place, about that of brain")


class Unlearnt(Fitted):
    """A baseline with nothing to learn, for slices of any size."""

    Settings = NoSettings

    def _fit(self, data: SliceDataset) -> None:
        """Nothing to learn."""

    def check_shapes(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> None:
        """Slices of any size will do."""

    def state(self) -> dict[str, torch.Tensor]:
        return {"empty": torch.zeros(1)}                               # the format wants a tensor

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Nothing was learnt."""


class HuThresholds(Unlearnt):
    """Excess over low_hu, for pixels up to high_hu; the thresholds are fresh blood's."""

    name, Fit = "hu", HuFit

    def _draw(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        return torch.where(hu <= self.fitting.high_hu, hu.clamp(max=self.fitting.low_hu), hu)


class Flat(Unlearnt):
    """One grey as the closest normal of every slice."""

    name, Fit = "flat", FlatFit

    def _draw(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        return torch.full_like(hu, self.fitting.level_hu)


KINDS: dict[str, type[Fitted]] = {"hu": HuThresholds, "flat": Flat, "pca": PositionPca, "dae": Autoencoder}


def load(path: Path | str, device: torch.device | str = "cpu") -> Fitted:
    """A baseline that save wrote. Raises ValueError naming the file."""
    try:
        with safe_open(path, "pt") as file:
            name = (file.metadata() or {}).get("method")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a baseline ({error}); fit it with baselines.py fit") from error
    found = {cls.name: cls for cls in KINDS.values()}
    if name not in found:
        raise ValueError(f"{path}: expected a baseline, one of {', '.join(found)}, found {name!r}")
    return found[name].from_training(Path(path), torch.device(device))[0]


def anomaly_map(baseline: Fitted, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
    """How abnormal each pixel is, HU, float32 [S, N, N], at least 0 and 0 outside the brain.

    hu [S, N, N] in HU, standardised; brain bool [S, N, N]; below_vertex_mm [S]. Raises ValueError unless fitted.
    """
    found = baseline.closest_normal(hu, brain, below_vertex_mm)
    window = scale_median_size(hu.shape[-1])
    return residual(found.query_hu, found.normal_hu, brain, window).abs()


# ---------------------------------------------------------------------------------------------------------------
# Scores

def slice_scores(maps: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Mean of the map over the brain, HU, for each slice [S]; 0 without brain. maps, brain [S, N, N]."""
    return (maps * brain).sum((1, 2)) / brain.sum((1, 2)).clamp(min=1)


@dataclass(frozen=True)
class ScoredScan:
    """A scan's map in its own geometry, [S, H, W] in HU, and its slices' scores [S], 0 where not shown.

    shown         bool [S]: the slices that preprocessing kept
    kept_scores   [K]: of the slices or slabs that were looked at, and
    thickness_mm  [K]: what each of them stands for. Slices of a slab have that slab's score, and would count each
    """

    anomaly: np.ndarray
    slice_scores: np.ndarray
    shown: np.ndarray
    kept_scores: torch.Tensor
    thickness_mm: Sequence[float]

    def scan_score(self, how: str) -> float:
        return scan_score(self.kept_scores, how, self.thickness_mm)


def kept_slices(pre: Preprocessed) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """What a detector sees of a scan: hu and brain [S, N, N] and below_vertex_mm [S] of the kept slices."""
    hu, brain, below_vertex_mm = pre.kept_slices()
    return torch.from_numpy(hu), torch.from_numpy(brain), below_vertex_mm


def to_scan(pre: Preprocessed, maps: torch.Tensor, scores: torch.Tensor) -> ScoredScan:
    """Maps [S, N, N] and scores [S] of the kept slices, taken back to the scan."""
    return ScoredScan(pre.maps_to_scan(maps.numpy()), pre.scores_to_scan(scores.numpy()), pre.values_to_scan(pre.kept),
                      scores, thickness_mm(pre.standardised.below_vertex_mm[pre.kept]))


def score_scan(baseline: Fitted, pre: Preprocessed) -> ScoredScan:
    """Map and scores of a preprocessed scan."""
    hu, brain, below_vertex_mm = kept_slices(pre)
    maps = anomaly_map(baseline, hu, brain, below_vertex_mm)
    return to_scan(pre, maps, slice_scores(maps, brain))


# ---------------------------------------------------------------------------------------------------------------
# Command

def fit(args: argparse.Namespace) -> int:
    cls = KINDS[args.kind]
    device = distributed.pick_device(args.device)
    baseline = cls(given(args, cls.Fit()), device=device)
    baseline.fit(SliceDataset(args.data, "train"))
    baseline.save(args.out)
    print(f"{args.kind} fitted to {args.data}: {args.out}")
    return 0


def refuse_other_results(out: Path) -> None:
    """ValueError where another command has results: theirs would be lost, and their run.json would speak of ours."""
    refuse_projected(out)
    if (out / "run.json").exists():
        raise ValueError(f"--out {out}: holds results of another command (run.json); choose another --out")


def score(args: argparse.Namespace) -> int:
    make_writable(args.out)
    refuse_other_results(args.out)
    baseline = load(args.baseline, distributed.pick_device(args.device))
    settings = PreprocessSettings.from_json(baseline.trained_on["data"]["settings"])
    scans, slices = [], []
    try:
        _score_each(args, baseline, settings, scans, slices)
    finally:                                           # what is done is kept, whatever ends the work
        for name, columns, rows in (("scores", ("scan_id", "score", "status", "reason"), scans),
                                    ("slices", ("scan_id", "slice", "score"), slices)):
            write_table(args.out / f"{name}.csv", columns, rows, exact=("score",))
    return 3 if any(row["status"] == "failed" for row in scans) else 0


def _score_each(args: argparse.Namespace, baseline: Fitted, settings: PreprocessSettings, scans: list[dict],
                slices: list[dict]) -> None:
    """Writes the maps and appends the rows of scores.csv and slices.csv, scan by scan."""
    for source in find_scans(args.scans):
        try:
            scan = read_scan(source)
            scored = score_scan(baseline, preprocess_scan(scan, settings))
        except ScanError as error:
            scans.append({"scan_id": source.scan_id, "score": "", "status": "failed", "reason": str(error)})
            print(f"{source.scan_id}: FAILED, {error}", flush=True)
            continue
        folder = args.out / source.scan_id
        folder.mkdir(exist_ok=True)
        write_nifti(folder / "anomaly.nii.gz", scored.anomaly, scan)
        if args.mask_hu is not None:
            write_nifti(folder / "mask.nii.gz", scored.anomaly > args.mask_hu, scan)
        scans.append({"scan_id": source.scan_id, "score": scored.scan_score(args.scan_score), "status": "ok"})
        slices += [{"scan_id": source.scan_id, "slice": i, "score": float(scored.slice_scores[i])}
                   for i in np.flatnonzero(scored.shown)]
        print(f"{source.scan_id}: score {scans[-1]['score']:.3f} HU", flush=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="fit|score")
    kinds = commands.add_parser("fit", help="learn from a database's training split").add_subparsers(
        required=True, dest="kind", metavar="|".join(KINDS))
    for kind, cls in KINDS.items():
        one = kinds.add_parser(kind, help=cls.__doc__.splitlines()[0])
        one.add_argument("--data", type=Path, required=True, help="database made by prepare.py")
        one.add_argument("--out", type=new_file, required=True, help="file to write, such as dae.safetensors")
        one.set_defaults(work=fit)
        add_options(one, cls.Fit, "settings")
    one = commands.add_parser("score", help="maps and scores of scans")
    one.add_argument("baseline", type=Path, help="file that fit wrote")
    one.add_argument("scans", type=Path, metavar="SCANS", help="folder that holds scans, or one scan")
    one.add_argument("--out", type=Path, required=True, help="results folder, none of projector.py's")
    one.add_argument("--scan-score", choices=list(SCAN_SCORES), default="mean",
                     help="how slice scores become the scan's (default %(default)s)")
    one.add_argument("--mask-hu", type=float, help="also write mask.nii.gz: where the map exceeds this")
    one.set_defaults(work=score)
    for command in (*kinds.choices.values(), one):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return exit_code(args.work, args)


if __name__ == "__main__":
    sys.exit(main())
