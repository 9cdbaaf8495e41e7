"""What a user could build in an afternoon: simple detectors to stand beside ours, on the same masks and slices.

    python benchmarks/baselines.py fit dae --data healthy.lmdb --out dae.safetensors
    python benchmarks/baselines.py score dae.safetensors SCANS --out results

hu   HU thresholds: how far a pixel lies above 55 HU, up to 95 HU where bone begins. Dense findings only: healthy
     ventricles and sulci lie below 15 HU like what is ill, and a second threshold there costs more than it finds
pca  principal components of the healthy slices at the same height; the residual of their reconstruction
dae  denoising autoencoder, a U-Net that takes coarse noise off (Kascenas, Pugeault and O'Neil, MIDL 2022)

All have one interface: fit(data), anomaly_map(hu, brain, below_vertex_mm), save(path); load(path) brings any of them
back. A map is in HU, 0 outside the brain, filtered by the same median as ours. Its scores are defined once: of a
slice the mean of the map over the brain, HU; of a scan measure.scan_score of its slices. `score` writes scores.csv,
slices.csv and SCAN/anomaly.nii.gz for evaluate.py. Exit codes: 0 done, 2 wrong usage, 3 some scans failed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

import distributed  # noqa: E402
from benchmarks.unet import UNet  # noqa: E402
from config import add_options, given, option  # noqa: E402
from ct.frame import Preprocessed, PreprocessSettings, preprocess_scan  # noqa: E402
from ct.read import find_scans, read_scan  # noqa: E402
from ct.scan import ScanError  # noqa: E402
from ct.write import write_nifti  # noqa: E402
from dataset import InfiniteSampler, SliceDataset  # noqa: E402
from detect import measure  # noqa: E402
from op.median import median2d  # noqa: E402

RANGE_HU = (-20.0, 100.0)       # what pca and dae see: brain, blood and the edge of bone, in every database alike
OUTSIDE_HU = 30.0               # what pca sees outside the brain: bone must not take up its components
BATCH = 32                      # slices in the network at a time when maps are made


class Baseline:
    """A detector with one dataclass of settings.

    preprocessing  the settings of the database it was fitted to (JSON); what it is given must be prepared so, too
    data_digest    of that database
    """

    kind: str
    settings_type: type

    def __init__(self, settings=None, device: torch.device | str = "cpu"):
        self.settings, self.device = settings or self.settings_type(), torch.device(device)
        self.preprocessing: dict | None = None
        self.data_digest: str | None = None

    def fit(self, data: SliceDataset) -> None:
        """Learns from the slices of a database's split. Raises ValueError where they are too few."""
        self._fit(data)
        self.preprocessing, self.data_digest = data.manifest["settings"], data.manifest["digest"]

    def anomaly_map(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        """How abnormal each pixel is, HU, float32 [S, N, N], at least 0 and 0 outside the brain.

        hu [S, N, N] in HU, standardised; brain bool [S, N, N]; below_vertex_mm [S]. Raises ValueError unless fitted.
        """
        if self.preprocessing is None:
            raise ValueError(f"baseline {self.kind}: not fitted; call fit(data) or load(path) first")
        return self._map(hu.float(), brain, np.asarray(below_vertex_mm)) * brain

    def _map(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def _fit(self, data: SliceDataset) -> None:
        """Learns; the defaults are those of a baseline that has nothing to learn and no state."""

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        """Takes what state() gave."""

    def save(self, path: Path) -> None:
        """One safetensors file: the state, and kind, settings and what it was fitted to as its metadata."""
        facts = {"settings": dataclasses.asdict(self.settings), "preprocessing": self.preprocessing,
                 "data_digest": self.data_digest}
        meta = {"kind": self.kind, **{key: json.dumps(value) for key, value in facts.items()}}
        state = self.state() or {"empty": torch.zeros(1)}              # the format wants a tensor
        save_file({key: value.contiguous().cpu() for key, value in state.items()}, path, metadata=meta)


class Reconstruction(Baseline):
    """A baseline that draws the closest normal slice; what it cannot draw is anomalous."""

    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor,
                       below_vertex_mm: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The slices as the baseline sees them, and the closest normal ones: HU, float32 [S, N, N] both."""
        raise NotImplementedError

    def _map(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        median = measure.scale_median_size(hu.shape[-1])
        return measure.residual(*self.closest_normal(hu, brain, below_vertex_mm), brain, median).abs()


def load(path: Path, device: torch.device | str = "cpu") -> Baseline:
    """A baseline that save wrote. Raises ValueError naming the file."""
    try:
        with safe_open(path, "pt") as file:
            meta, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as a baseline ({error}); fit it with baselines.py fit") from error
    if meta.get("kind") not in KINDS:
        raise ValueError(f"{path}: expected a baseline of kind {', '.join(KINDS)}, found {meta.get('kind')!r}")
    cls = KINDS[meta["kind"]]
    baseline = cls(cls.settings_type(**json.loads(meta["settings"])), device)
    baseline.preprocessing, baseline.data_digest = (json.loads(meta[key]) for key in ("preprocessing", "data_digest"))
    baseline.set_state(state)
    return baseline


# ---------------------------------------------------------------------------------------------------------------
# HU thresholds

@dataclass(frozen=True)
class HuSettings:
    low_hu: float = option(55.0, "healthy brain lies below")
    high_hu: float = option(95.0, "bone and its partial volume lie above")


class HuThresholds(Baseline):
    """Excess over low_hu, for pixels up to high_hu. Nothing is learnt: the thresholds are fresh blood's."""

    kind, settings_type = "hu", HuSettings

    def _map(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        excess = (hu - self.settings.low_hu).clamp(min=0) * (hu <= self.settings.high_hu) * brain
        return median2d(excess, measure.scale_median_size(hu.shape[-1]))


# ---------------------------------------------------------------------------------------------------------------
# Principal components by position

@dataclass(frozen=True)
class PcaSettings:
    components: int = option(32, "principal components at each height")
    step_mm: float = option(10.0, "a model every so many mm below the vertex, of the slices up to this far away")

    def __post_init__(self):
        if self.components < 1 or not self.step_mm > 0:
            raise ValueError(f"--components must be at least 1 and --step-mm above 0, got {self.components} and "
                             f"{self.step_mm:g}")


class PositionPca(Reconstruction):
    """For each height the mean slice and the components of its neighbours; what they cannot draw is anomalous."""

    kind, settings_type = "pca", PcaSettings

    def _fit(self, data: SliceDataset) -> None:
        k, step = self.settings.components, self.settings.step_mm
        heights = data.below_vertex_mm
        if unknown := int(np.isnan(heights).sum()):
            print(f"pca: {unknown} loose slices without a position are left out", flush=True)
        centres = np.unique(np.rint(heights[~np.isnan(heights)] / step)) * step
        near = [np.flatnonzero(np.abs(heights - c) <= step) for c in centres]
        enough = [i for i, slices in enumerate(near) if len(slices) > k]
        if not enough:
            raise ValueError(f"{data.path}: at most {max(map(len, near))} slices lie within {step:g} mm of one height, "
                             f"too few for {k} components: give more scans, or fewer --components")
        self.centres = torch.from_numpy(centres[enough])
        models = [_components(torch.stack([_brain_alone(**data[int(i)]) for i in near[n]]), k) for n in enough]
        self.mean, self.basis = (torch.stack(part) for part in zip(*models))      # [C, N, N], [C, k, N, N]

    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor,
                       below_vertex_mm: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        query = _brain_alone(hu, brain)
        nearest = (torch.from_numpy(np.ascontiguousarray(below_vertex_mm))[:, None] - self.centres).abs().argmin(1)
        drawn = [self._nearest_normal(image, int(c)) for image, c in zip(query, nearest)]
        return query, torch.stack(drawn)

    def _nearest_normal(self, image: torch.Tensor, centre: int) -> torch.Tensor:
        basis = self.basis[centre].float().flatten(1)                              # [k, N * N], orthonormal rows
        return self.mean[centre] + ((image - self.mean[centre]).flatten() @ basis.T @ basis).view_as(image)

    def state(self) -> dict[str, torch.Tensor]:
        return {"centres": self.centres, "mean": self.mean, "basis": self.basis.half()}

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        self.centres, self.mean, self.basis = state["centres"], state["mean"], state["basis"]


def _clipped(hu: torch.Tensor) -> torch.Tensor:
    return hu.float().clamp(*RANGE_HU)


def _brain_alone(hu: torch.Tensor, brain: torch.Tensor, **_) -> torch.Tensor:
    return torch.where(brain, _clipped(hu), OUTSIDE_HU)


def _components(slices: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [N, N] and the first k principal components [k, N, N], orthonormal, of slices [n, N, N] with n > k."""
    mean = slices.mean(0)
    centred = (slices - mean).flatten(1)
    variance, weights = torch.linalg.eigh(centred @ centred.T)                     # n x n: n is less than N * N
    basis = weights[:, -k:].T @ centred / variance[-k:].clamp(min=1e-6).sqrt()[:, None]
    return mean, basis.view(k, *mean.shape)


# ---------------------------------------------------------------------------------------------------------------
# Denoising autoencoder

@dataclass(frozen=True)
class DaeSettings:
    width: int = option(32, "channels at half the resolution; doubled with each further halving")
    depth: int = option(3, "how often the resolution is halved further")
    noise_hu: float = option(24.0, "standard deviation of the noise, HU: the paper's 0.2 of the intensity range")
    noise_size: int = option(16, "side of the noise before it is enlarged, pixels")
    steps: int = option(2500, "training steps")
    batch: int = option(16, "slices a step")
    lr: float = option(1e-3, "first rate of Adam; a cosine takes it to 0")
    seed: int = option(0, "of weights, order and noise")

    def __post_init__(self):
        for name in ("width", "depth", "noise_hu", "noise_size", "steps", "batch", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name):g}")


def coarse_noise(shape: tuple[int, int, int], coarse: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of `coarse` pixels a side, enlarged to [B, N, N] and shifted at random (Kascenas 2022, 2.1).

    The shift, one for each slice and around the edges, keeps the coarse grid from being learnt.
    """
    small = torch.randn(shape[0], 1, coarse, coarse, generator=generator)
    large = F.interpolate(small, size=shape[1:], mode="bilinear", align_corners=False)[:, 0]
    shifts = torch.randint(shape[-1], (shape[0], 2), generator=generator).tolist()
    return torch.stack([image.roll(shift, (0, 1)) for image, shift in zip(large, shifts)])


class DenoisingAutoencoder(Reconstruction):
    """Trained to take coarse noise off the brain of healthy slices, it takes lesions off, too."""

    kind, settings_type = "dae", DaeSettings

    def __init__(self, settings: DaeSettings | None = None, device: torch.device | str = "cpu"):
        super().__init__(settings, device)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            self.net = UNet(self.settings.width, self.settings.depth)
        self.net.to(self.device, memory_format=torch.channels_last)

    def _fit(self, data: SliceDataset) -> None:
        s = self.settings
        if data.size % (2 << s.depth):
            raise ValueError(f"{data.path}: slices of {data.size} pixels cannot be halved {s.depth + 1} times; give "
                             "a smaller --depth")
        sampler = InfiniteSampler(len(data), s.seed)
        batches = iter(DataLoader(data, s.batch, sampler=sampler, generator=torch.Generator()))
        optimiser = torch.optim.Adam(self.net.parameters(), lr=s.lr, amsgrad=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, s.steps)
        noise, losses, started = torch.Generator().manual_seed(s.seed), [], time.perf_counter()
        every = max(1, s.steps // 20)
        for step in range(1, s.steps + 1):
            losses.append(self._step(next(batches), optimiser, noise))
            schedule.step()
            if step % every == 0:
                seconds = time.perf_counter() - started
                print(f"dae: step {step}/{s.steps}, error {np.mean(losses):.2f} HU (root of the mean square), "
                      f"{seconds / step * (s.steps - step) / 60:.1f} min left", flush=True)
                losses = []

    def _step(self, batch: dict, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """One step on dict(hu, brain); the mean square error counts in the brain alone. Returns its root, HU."""
        clean, brain = _clipped(batch["hu"]), batch["brain"]
        noise = coarse_noise(clean.shape, self.settings.noise_size, generator) * self.settings.noise_hu
        clean, noisy, brain = (t.to(self.device) for t in (clean, clean + noise * brain, brain))
        error = ((self._denoised(noisy) - clean) ** 2 * brain).sum() / brain.sum().clamp(min=1)
        optimiser.zero_grad(set_to_none=True)
        (error / _HALF_RANGE**2).backward()
        optimiser.step()
        return error.item() ** 0.5

    def _denoised(self, hu: torch.Tensor) -> torch.Tensor:
        """HU [B, N, N] -> HU; bfloat16 inside, where it is fast on the CPU, too."""
        x = ((hu - _MIDDLE) / _HALF_RANGE)[:, None].contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.net(x)[:, 0].float() * _HALF_RANGE + _MIDDLE

    @torch.no_grad()
    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor,
                       below_vertex_mm: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        query = _clipped(hu)
        return query, torch.cat([self._denoised(part.to(self.device)).cpu() for part in query.split(BATCH)])

    def state(self) -> dict[str, torch.Tensor]:
        return self.net.state_dict()

    def set_state(self, state: dict[str, torch.Tensor]) -> None:
        self.net.load_state_dict(state)


_MIDDLE, _HALF_RANGE = sum(RANGE_HU) / 2, (RANGE_HU[1] - RANGE_HU[0]) / 2
KINDS: dict[str, type[Baseline]] = {cls.kind: cls for cls in (HuThresholds, PositionPca, DenoisingAutoencoder)}


# ---------------------------------------------------------------------------------------------------------------
# Scores

def slice_scores(maps: torch.Tensor, brain: torch.Tensor) -> torch.Tensor:
    """Mean of the map over the brain, HU, for each slice [S]; 0 without brain. maps, brain [S, N, N]."""
    return (maps * brain).sum((1, 2)) / brain.sum((1, 2)).clamp(min=1)


@dataclass(frozen=True)
class ScoredScan:
    """A scan's map in its own geometry, [S, H, W] in HU, and its slices' scores [S], 0 where not shown.

    shown  bool [S]: the slices that preprocessing kept
    """

    anomaly: np.ndarray
    slice_scores: np.ndarray
    shown: np.ndarray

    def scan_score(self, how: str) -> float:
        return measure.scan_score(torch.from_numpy(self.slice_scores[self.shown]), how)


def kept_slices(pre: Preprocessed) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """What a detector sees of a scan: hu and brain [S, N, N] and below_vertex_mm [S] of the kept slices."""
    hu, brain, below_vertex_mm = pre.kept_slices()
    return torch.from_numpy(hu), torch.from_numpy(brain), below_vertex_mm


def to_scan(pre: Preprocessed, maps: torch.Tensor, scores: torch.Tensor) -> ScoredScan:
    """Maps [S, N, N] and scores [S] of the kept slices, taken back to the scan."""
    return ScoredScan(pre.maps_to_scan(maps.numpy()), pre.scores_to_scan(scores.numpy()), pre.values_to_scan(pre.kept))


def score_scan(baseline: Baseline, pre: Preprocessed) -> ScoredScan:
    """Map and scores of a preprocessed scan."""
    hu, brain, below_vertex_mm = kept_slices(pre)
    maps = baseline.anomaly_map(hu, brain, below_vertex_mm)
    return to_scan(pre, maps, slice_scores(maps, brain))


# ---------------------------------------------------------------------------------------------------------------
# Command

def fit(args: argparse.Namespace) -> int:
    cls = KINDS[args.kind]
    device = distributed.pick_device(args.device)
    baseline = cls(given(args, cls.settings_type()), device)
    baseline.fit(SliceDataset(args.data, "train"))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    baseline.save(args.out)
    print(f"{args.kind} fitted to {args.data}: {args.out}")
    return 0


def score(args: argparse.Namespace) -> int:
    baseline = load(args.baseline, distributed.pick_device(args.device))
    settings = PreprocessSettings.from_json(baseline.preprocessing)
    args.out.mkdir(parents=True, exist_ok=True)
    scans, slices = [], []
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
    for name, columns, rows in (("scores", ("scan_id", "score", "status", "reason"), scans),
                                ("slices", ("scan_id", "slice", "score"), slices)):
        with open(args.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
    return 3 if any(row["status"] == "failed" for row in scans) else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar="fit|score")
    kinds = commands.add_parser("fit", help="learn from a database's training split").add_subparsers(
        required=True, dest="kind", metavar="|".join(KINDS))
    for kind, cls in KINDS.items():
        one = kinds.add_parser(kind, help=cls.__doc__.splitlines()[0])
        one.add_argument("--data", type=Path, required=True, help="database made by prepare.py")
        one.add_argument("--out", type=Path, required=True, help="file to write, such as dae.safetensors")
        one.set_defaults(work=fit)
        add_options(one, cls.settings_type, "settings")
    one = commands.add_parser("score", help="maps and scores of scans")
    one.add_argument("baseline", type=Path, help="file that fit wrote")
    one.add_argument("scans", type=Path, metavar="SCANS", help="folder that holds scans, or one scan")
    one.add_argument("--out", type=Path, required=True, help="results folder")
    one.add_argument("--scan-score", choices=measure.SCAN_SCORES, default="mean",
                     help="how slice scores become the scan's (default %(default)s)")
    one.add_argument("--mask-hu", type=float, help="also write mask.nii.gz: where the map exceeds this")
    one.set_defaults(work=score)
    for command in (*kinds.choices.values(), one):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.work(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
