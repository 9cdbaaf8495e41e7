"""What each way of scoring brings, on healthy scans that the networks have not seen and on lesions pasted into them.

    python benchmarks/cross_validation.py --fold a.lmdb runs/a --fold b.lmdb runs/b --out runs/cross-validation

Each --fold is a database and the run of train_encoder.py made from it, with other scans held out in each. A held-out
scan, as it is and with each lesion of pasted.py in it, is reconstructed by its own fold's encoder; its residuals are
told in the statistics of all other held-out scans. Writes table.md, one row a setting of ROWS: AUC of scans with a
lesion of a kind against the healthy ones, the mean over the haemorrhages, and the AUC of slices with haemorrhage
against all healthy slices. Settings are chosen here, so that a test set is needed only once.

Every head is there healthy and with a lesion, and heads differ more among each other than a small lesion changes one:
AUC are lower than on a cohort of emergencies. They are for comparing rows.

Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed  # noqa: E402
from benchmarks import pasted  # noqa: E402
from ct.window import decode, encode  # noqa: E402
from dataset import SliceDataset  # noqa: E402
from detect import measure, normative  # noqa: E402
from detect.search import ProjectionSettings, judge, residual_scales  # noqa: E402
from gan.runlog import load_run  # noqa: E402
from model import Encoder, Generator, ModelConfig  # noqa: E402
from op import memory  # noqa: E402

HAEMORRHAGES = ("intraparenchymal", "subdural", "epidural", "subarachnoid", "intraventricular")
HEALTHY = "healthy"
LEAST_TRUTH = 5              # pixels of a lesion in a slice that counts as one with it
BATCH = 16

PLAIN = ProjectionSettings(measure="surprise", steps_latent=0, steps_noise=0)
BAND = dataclasses.replace(PLAIN, filter="band")
PEAK = dataclasses.replace(BAND, pool="peak", surprise_above=2.0, scan_score="top3")
# The residual itself, in HU, is the first row; each other one changes one thing of the row before.
ROWS = {
    "surprise": PLAIN,
    "in a band, away from bone": BAND,
    "highest place instead of mean over the brain": dataclasses.replace(BAND, pool="peak"),
    "counted from 2.0": dataclasses.replace(PEAK, scan_score="mean"),
    "dense fine, thin coarse": dataclasses.replace(PEAK, scan_score="mean", scale="sides"),
    "thin weighs 0.6": dataclasses.replace(PEAK, scan_score="mean", scale="sides", thin=0.6),
    "three highest slices": dataclasses.replace(PEAK, scale="sides", thin=0.6),
}


@dataclass(frozen=True)
class Case:
    """A held-out scan, as it is or with a lesion: its query and reconstruction, HU [S, N, N]."""

    scan_id: str
    kind: str
    query: torch.Tensor
    normal: torch.Tensor
    brain: torch.Tensor
    below_vertex_mm: np.ndarray
    truth: torch.Tensor

    @functools.cached_property
    def residual(self) -> torch.Tensor:
        """measure.residual, HU [S, N, N]."""
        window = measure.scale_median_size(self.brain.shape[-1], PLAIN.median_at_512)
        return measure.residual(self.query, self.normal, self.brain, window)


@torch.no_grad()
def cases_of(data: Path, run: Path, device: torch.device) -> list[Case]:
    """All cases of a fold. Raises DatasetError, CheckpointError; ValueError where the run is of another database."""
    snapshot = load_run(run, "--fold", "encoder", "train_encoder.py")
    held_out = SliceDataset(data, "val")
    if held_out.unlike(snapshot.meta):
        raise ValueError(f"--fold {data} {run}: the run is not one of train_encoder.py on this database")
    model = ModelConfig(**snapshot.meta["model"])
    encoder, generator = Encoder(model), Generator(model)
    snapshot.restore({"encoder": encoder, "generator": generator})
    for net in (encoder, generator):
        net.eval().to(device).compute_dtype = distributed.pick_precision("auto", device)

    def case(scan_id, kind, hu, brain, mm, truth):
        images = encode(hu)
        drawn = []
        for part in images.split(BATCH):
            code, noise = encoder.invert(part.to(device), generator)
            drawn.append(generator.synthesis(code, noise).cpu())
        return Case(scan_id, kind, decode(images), decode(torch.cat(drawn)), brain, mm, truth)

    cases, side_mm = [], pasted.pixel_mm(held_out.size, held_out.manifest["settings"]["standardise"]["head_fraction"])
    for s, scan_id in enumerate(held_out.scan_ids):
        scan = held_out.scan(s)
        hu, brain, mm = scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy()
        cases.append(case(scan_id, HEALTHY, hu, brain, mm, torch.zeros_like(brain)))
        lesions, left_out = pasted.paste_each(scan_id, hu.numpy(), brain.numpy(), mm, side_mm)
        cases += [case(scan_id, one.kind, torch.from_numpy(one.hu), brain, mm, torch.from_numpy(one.truth))
                  for one in lesions]
        for reason in left_out:
            print(reason, flush=True)
        print(f"{data.name} {scan_id}", flush=True)
    return cases


def surprises(cases: list[Case], settings: ProjectionSettings) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Signed surprise [S, 2, N, N] of every case, told without its own head, and where it is judged [S, N, N]."""
    told = [residual_scales(c.query, c.normal, c.residual, c.brain, settings) for c in cases]
    healthy = [(c, pair) for c, pair in zip(cases, told) if c.kind == HEALTHY]
    residuals, judged = zip(*(pair for _, pair in healthy))
    _, by_others = normative.fit_leaving_out(residuals, judged, [c.below_vertex_mm for c, _ in healthy])
    normal = {c.scan_id: one for (c, _), one in zip(healthy, by_others)}
    return [normal[c.scan_id].surprise(*pair, c.below_vertex_mm) for c, pair in zip(cases, told)], [w for _, w in told]


def figures(cases: list[Case], scores: list[torch.Tensor], how: str) -> dict[str, float]:
    """AUC by kind, 'haemorrhage' (their mean) and 'slices'. scores: slice scores [S] of every case."""
    scans = [measure.scan_score(one, how) for one in scores]

    def auc(kind):
        chosen = [(c.kind == kind, score) for c, score in zip(cases, scans) if c.kind in (kind, HEALTHY)]
        return roc_auc_score(*zip(*chosen)) if any(label for label, _ in chosen) else float("nan")

    found = {kind: auc(kind) for kind in pasted.KINDS}
    found["haemorrhage"] = float(np.nanmean([found[kind] for kind in HAEMORRHAGES]))
    with_blood = [one[c.truth.sum((1, 2)) >= LEAST_TRUTH] for c, one in zip(cases, scores) if c.kind in HAEMORRHAGES]
    without = [one for c, one in zip(cases, scores) if c.kind == HEALTHY]
    values = torch.cat([*without, *with_blood]).numpy()
    found["slices"] = roc_auc_score(np.arange(len(values)) >= sum(map(len, without)), values)
    return found


def table(cases: list[Case]) -> str:
    """The table as Markdown, a line a row of ROWS."""
    def plain(case):
        return case.residual.abs().sum((1, 2)) / case.brain.sum((1, 2)).clamp(min=1)

    rows, told_by = {"residual, HU, mean over the brain": figures(cases, [plain(c) for c in cases], "mean")}, {}
    for name, settings in ROWS.items():
        if settings.filter not in told_by:
            told_by[settings.filter] = surprises(cases, settings)
        scores = [judge(*pair, settings)[2] for pair in zip(*told_by[settings.filter])]
        rows[name] = figures(cases, scores, settings.scan_score)
    columns = ("haemorrhage", "slices", *pasted.KINDS)
    lines = ["| " + " | ".join(("score", *columns)) + " |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{found[column]:.2f}" for column in columns) + " |"
              for name, found in rows.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=Path, nargs=2, metavar=("DATA", "RUN"), action="append", required=True,
                        help="a database and the run of train_encoder.py made from it; may be given several times")
    parser.add_argument("--out", type=Path, default=Path("runs/cross-validation"), help="folder for table.md")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    try:
        memory.keep_freed()
        device = distributed.pick_device(args.device)
        cases = [case for fold in args.fold for case in cases_of(*fold, device)]
        heads = [c.scan_id for c in cases if c.kind == HEALTHY]
        if len(set(heads)) < len(heads) or len(heads) < normative.MIN_SCANS:
            raise ValueError(f"--fold: {normative.MIN_SCANS} different held-out scans at least are needed, found "
                             f"{', '.join(heads)}")
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(table(cases), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
