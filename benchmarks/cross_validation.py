"""What each way of scoring brings, on healthy scans that the networks have not seen and on lesions pasted into them.

    python benchmarks/cross_validation.py --fold a.lmdb runs/a --fold b.lmdb runs/b --out runs/cross-validation
    python benchmarks/cross_validation.py --model scans.lmdb models/head-128 --out runs/cross-validation
    python benchmarks/cross_validation.py --model scans.lmdb models/head-128 --lesions 2:3 --out runs/further
    python benchmarks/cross_validation.py --model scans.lmdb models/head-128 --reader runs/reader-1 --reader ...

Each --fold is a database and the run of train_encoder.py made from it, with other scans held out in each; a --model is
a bundle of any method and a database of scans that were held out of its training; with --reader, runs of
train_reader.py in its folds, each reads the scans that it has held out. Without --reader a reader that has learnt from
some of the scans is left out. A held-out scan, as it is and with each lesion of pasted.py in it, is reconstructed by
its own fold's encoder; its residuals are told in the statistics of all other held-out scans. Writes table.md, one row a
setting of ROWS: AUC of scans with a lesion of a kind against the healthy ones, the mean over the haemorrhages, and the
AUC of slices with haemorrhage against all healthy slices; and changes.md: what each row changes against the row before,
with intervals by bootstrap over patients, each drawn with all heads and lesions. Settings are chosen here, so that a
test set is needed only once.

A head has the first lesion of each kind that pasted.py draws for it. With --lesions FIRST:LAST it has those of these
numbers instead: 2:3 are two others of each kind, on which no setting was chosen. Cases are kept whole: memory.

With --residual SHARE the closest normal is as if it missed a healthy head by SHARE of what it does, and held nothing
of a lesion: how close it would have to come.

Every head is there healthy and with a lesion, and heads differ more among each other than a small lesion changes one:
AUC are lower than on a cohort of emergencies. They are for comparing rows.

Exit codes: 0 done, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))                                      # run as a script from anywhere

import distributed
from benchmarks import pasted
from benchmarks.compare import refuse_learnt
from bundling.origins import (
    WITH_READER,
    digest_of,
    learnt_by_reader,
    learnt_by_run,
    open_encoder_run,
    open_reader,
    reader_of,
)
from common.wording import some
from config import exit_code
from dataset import SliceDataset
from detect import normative
from detect.bundle import load_bundle
from detect.folder import make_writable
from detect.reconstruct import Reconstruction, Reconstructor
from detect.residual import Evidence
from detect.scores import scan_score, thickness_mm
from detect.surprise import Surprise, SurpriseSettings
from gan.encoding import method_of
from gan.lineage import not_held_out
from op import memory

HAEMORRHAGES = ("intraparenchymal", "subdural", "epidural", "subarachnoid", "intraventricular")
HEALTHY = "healthy"
LEAST_TRUTH = 5              # pixels of a lesion in a slice that counts as one with it
RESAMPLES, LEVEL = 2000, 0.95

PLAIN = SurpriseSettings(filter="median", scale="both", hypodense=1.0, pool="area", surprise_above=2.5, read=0.0)
BAND = dataclasses.replace(PLAIN, filter="band")
PEAK = dataclasses.replace(BAND, pool="peak", surprise_above=2.0)
# The residual itself, in HU, is the first row; each other one changes one thing of the row before.
ROWS = {                                       # what a slice scores, and how slice scores become the scan's
    "surprise": (PLAIN, "mean"),
    "in a band, away from bone": (BAND, "mean"),
    "highest place instead of mean over the brain": (dataclasses.replace(BAND, pool="peak"), "mean"),
    "counted from 2.0": (PEAK, "mean"),
    "hyperdense fine, hypodense coarse": (dataclasses.replace(PEAK, scale="sides"), "mean"),
    "hypodense weighs 0.6": (dataclasses.replace(PEAK, scale="sides", hypodense=0.6), "mean"),
    "three highest slices": (dataclasses.replace(PEAK, scale="sides", hypodense=0.6), "top3"),
    "of the fine scale what is hyperdense": (SurpriseSettings(read=0.0), "top3"),
    # Of models that hold a reader
    "with what a reader says": (SurpriseSettings(), "top3"),
    "hypodense weighs 0.65": (dataclasses.replace(SurpriseSettings(), hypodense=0.65), "top3"),
}


@dataclass(frozen=True)
class Case:
    """A held-out scan, as it is or with a lesion, and its reconstruction; truth bool [S, N, N].

    patient: whose head it is, and so by whom it is not judged; "": nobody else's.
    """

    scan_id: str
    kind: str
    found: Reconstruction
    brain: torch.Tensor
    below_vertex_mm: np.ndarray
    truth: torch.Tensor
    patient: str = ""


def open_fold(data: Path, run: Path, device: torch.device) -> tuple[SliceDataset, Reconstructor]:
    """Held-out scans and networks of a --fold. Raises DatasetError, CheckpointError; ValueError unless both fit, and
    for scans that are known to have taught what the run began with."""
    snapshot = open_encoder_run(run, "--fold")
    held_out = SliceDataset(data, "val")
    if held_out.unlike(snapshot.meta):
        raise ValueError(f"--fold {data} {run}: the run is not one of train_encoder.py on this database")
    if seen := learnt_by_run(held_out, snapshot.meta):
        raise ValueError(f"--fold {data} {run}: what the run began with was trained on this database with other scans "
                         f"held out, and may have learnt from {some(seen, 3)}; give a run that began with networks "
                         "which have not seen them")
    return held_out, method_of(snapshot, None, device, distributed.pick_precision("auto", device))


def open_model(data: Path, folder: Path, device: torch.device) -> tuple[SliceDataset, Reconstructor]:
    """The same of a --model, without a reader that has learnt from some of the scans."""
    bundle, held_out = load_bundle(folder, device), SliceDataset(data, "val")
    refuse_learnt(bundle.meta, held_out, f"--model {data} {folder}")
    if learnt_by_reader(held_out, bundle.meta["provenance"] or {}):
        bundle.reconstructor.reader = None                        # it would find too little in them
    if held_out.prepared != bundle.preprocessing:
        raise ValueError(f"--model {data} {folder}: made for slices prepared in another way than those of the database")
    return held_out, bundle.reconstructor


def open_readers(data: Path, folder: Path, runs: list[Path], device: torch.device
                 ) -> list[tuple[SliceDataset, Reconstructor]]:
    """The same of a --model with each --reader, and the scans that this one has not seen."""
    held_out, reconstructor = open_model(data, folder, device)
    if reconstructor.name not in WITH_READER:
        raise ValueError(f"--reader: is for models of method {' or '.join(WITH_READER)}, {folder} is of "
                         f"{reconstructor.name}")
    found, beside = [], digest_of(reconstructor)
    for run in runs:
        snapshot = open_reader(run, beside)
        one = copy.copy(reconstructor)
        one.reader = reader_of(snapshot, device)
        patient = dict(zip(held_out.scan_ids, held_out.patients))
        taught_by = {patient[scan] for scan in not_held_out(patient, snapshot.meta, elsewhere=False)}
        unseen = {scan for scan in patient if patient[scan] not in taught_by}
        if not unseen:
            raise ValueError(f"--reader {run}: has held out none of the patients that {data} holds out; give runs of "
                             "train_reader.py --fold, each with patients of its own")
        found.append((SliceDataset(data, "val", check=False, scans=unseen), one))
    if seen := sorted(set(held_out.scan_ids).difference(*(part.scan_ids for part, _ in found))):
        print(f"left out, since no --reader has held them out: {', '.join(seen)}")
    return found


def cases_of(held_out: SliceDataset, reconstructor: Reconstructor, lesions: range) -> list[Case]:
    """All cases of held-out scans, with the lesions of these numbers of each kind (pasted.paste_each)."""
    def case(kind, hu, truth):
        return Case(scan_id, kind, reconstructor.closest_normal(hu, brain, mm), brain, mm, truth,
                    held_out.patients[s])

    cases, side_mm = [], pasted.pixel_mm(held_out.size, held_out.prepared.standardise.head_fraction)
    for s, scan_id in enumerate(held_out.scan_ids):
        scan = held_out.scan(s)
        hu, brain, mm = scan["hu"].float(), scan["brain"], scan["below_vertex_mm"].numpy()
        cases.append(case(HEALTHY, hu, torch.zeros_like(brain)))
        found, left_out = pasted.paste_each(scan_id, hu.numpy(), brain.numpy(), mm, side_mm, len(lesions),
                                            lesions.start)
        cases += [case(one.kind, torch.from_numpy(one.hu), torch.from_numpy(one.truth)) for one in found]
        for reason in left_out:
            print(reason, flush=True)
        print(f"{held_out.path.name} {scan_id}", flush=True)
    return cases


def surprises(cases: list[Case], settings: SurpriseSettings) -> tuple[list[torch.Tensor], list[Evidence]]:
    """Signed surprise [S, K, N, N] of every case by the statistics of other patients' heads, and its evidence."""
    measure = Surprise(settings)
    seen = [measure.evidence(c.found, c.brain, c.below_vertex_mm) for c in cases]
    healthy = [(c, one) for c, one in zip(cases, seen) if c.kind == HEALTHY]
    _, by_others = normative.fit_leaving_out([e.scales for _, e in healthy], [e.searched for _, e in healthy],
                                             [c.below_vertex_mm for c, _ in healthy],
                                             [c.patient or c.scan_id for c, _ in healthy])
    normal = {c.scan_id: one for (c, _), one in zip(healthy, by_others)}
    return [normal[c.scan_id].surprise(e.scales, e.searched, c.below_vertex_mm) for c, e in zip(cases, seen)], seen


def closer(cases: list[Case], share: float) -> list[Case]:
    """The cases as if a healthy head's residual were `share` of what it is, and a lesion's all that it changes."""
    healthy = {c.scan_id: c.found for c in cases if c.kind == HEALTHY}

    def one(case: Case) -> Case:
        own, query_hu = healthy[case.scan_id], case.found.query_hu
        residual = share * own.difference_hu + query_hu - own.query_hu
        found = dataclasses.replace(case.found, normal_hu=query_hu - residual, expected_hu=None, read=None)
        return dataclasses.replace(case, found=found)

    return [one(case) for case in cases]


def auc(pairs: dict[str, tuple[np.ndarray, np.ndarray]], times: np.ndarray) -> dict[str, np.ndarray]:
    """AUC by column, each [B], of B cohorts in which head i is there times[b, i] times; pairs as of compared().

    NaN where a cohort has no lesion of a kind; 'haemorrhage' is the mean over the kinds of which it has one.
    """
    def total(matrix):
        return np.einsum("bi,ij,bj->b", times, matrix, times)

    with np.errstate(invalid="ignore"):
        found = {column: total(won) / total(of) for column, (won, of) in pairs.items()}
        kinds = np.stack([found[kind] for kind in HAEMORRHAGES])
        return found | {"haemorrhage": np.nansum(kinds, axis=0) / (~np.isnan(kinds)).sum(axis=0)}


def compared(cases: list[Case], scores: list[torch.Tensor], how: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By kind and for 'slices': how many pairs of head i with a lesion and head j without are there, and are won.

    (won, of), each [heads, heads]; a tie is half won. scores: slice scores [S] of every case.
    """
    heads = sorted({c.scan_id for c in cases})
    scans = [np.array([scan_score(one, how, thickness_mm(c.below_vertex_mm))]) for c, one in zip(cases, scores)]
    slices = [one[c.truth.sum((1, 2)) >= LEAST_TRUTH].numpy() if c.kind != HEALTHY else one.numpy()
              for c, one in zip(cases, scores)]

    def by_head(values, kinds):
        found = {head: [np.empty(0)] for head in heads}
        for c, value in zip(cases, values):
            if c.kind in kinds:
                found[c.scan_id].append(value)
        return [np.concatenate(found[head]) for head in heads]

    def against_healthy(values, kinds):
        ill, healthy = by_head(values, kinds), by_head(values, (HEALTHY,))
        won = [[(np.greater.outer(a, b) + 0.5 * np.equal.outer(a, b)).sum() for b in healthy] for a in ill]
        return np.array(won, float), np.outer([*map(len, ill)], [*map(len, healthy)]).astype(float)

    return {kind: against_healthy(scans, (kind,)) for kind in pasted.KINDS} | {
        "slices": against_healthy(slices, HAEMORRHAGES)}


def figures(pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """AUC by kind, 'haemorrhage' (their mean) and 'slices', of compared()."""
    return {column: float(value[0]) for column, value in auc(pairs, np.ones((1, len(pairs["slices"][0])))).items()}


def change(before: dict, after: dict, patients: list[str], seed: int = 0) -> dict[str, tuple[float, float]]:
    """Interval of the change in AUC by column between two of compared(), by bootstrap over patients with their heads.

    patients: of each head, as compared() sorts them. A kind that few heads have is judged by the resamples with one of
    them, 63 % at the least, and is left out of the haemorrhages' mean in the others. NaN for a kind that no head has.
    """
    _, index = np.unique(patients, return_inverse=True)
    count = index.max() + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES)
    times = drawn[:, index].astype(float)
    old, new = auc(before, times), auc(after, times)
    found = {}
    for column in new:
        differences = new[column] - old[column]
        known = differences[~np.isnan(differences)]
        found[column] = tuple(np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])) if len(known) else (np.nan,) * 2
    return found


def tables(cases: list[Case]) -> tuple[str, str]:
    """AUC, a line per row of ROWS, and what each row changes against the one before with its interval: Markdown."""
    plain, scores = "residual, HU, mean over the brain", {}
    row_of = {name: row for name, row in ROWS.items() if cases[0].found.read is not None or not row[0].read}
    for filtering in dict.fromkeys(settings.filter for settings, _ in row_of.values()):       # one at a time: memory
        of_filter = {name: settings for name, (settings, _) in row_of.items() if settings.filter == filtering}
        found, seen = surprises(cases, next(iter(of_filter.values())))
        for name, settings in of_filter.items():
            scores[name] = [Surprise(settings).findings(*pair).slice_scores for pair in zip(found, seen)]
        if filtering == PLAIN.filter:
            scores[plain] = [e.residual.abs().sum((1, 2)) / e.brain.sum((1, 2)).clamp(min=1) for e in seen]
        del found, seen
    rows = {plain: (scores[plain], "mean"), **{name: (scores[name], how) for name, (_, how) in row_of.items()}}
    pairs = {name: compared(cases, *row) for name, row in rows.items()}
    found = {name: figures(one) for name, one in pairs.items()}
    owners = {c.scan_id: c.patient or c.scan_id for c in cases}
    patients = [owners[head] for head in sorted(owners)]
    columns, names = ("haemorrhage", "slices", *pasted.KINDS), list(rows)

    def changed(before, after):
        limits = change(pairs[before], pairs[after], patients)
        return ["{:+.2f} ({:+.2f} to {:+.2f})".format(found[after][c] - found[before][c], *limits[c]) for c in columns]

    def markdown(lines):
        head = ["| " + " | ".join(("score", *columns)) + " |", "| --- " * (len(columns) + 1) + "|"]
        return "\n".join([*head, *(f"| {' | '.join((name, *cells))} |" for name, cells in lines.items())]) + "\n"

    return (markdown({name: [f"{found[name][c]:.2f}" for c in columns] for name in names}),
            markdown({after: changed(before, after) for before, after in zip(names, names[1:])}))


def benchmark(args: argparse.Namespace) -> None:
    """Raises OSError, and ValueError where there are too few scans or files do not fit."""
    memory.keep_freed()
    device = distributed.pick_device(args.device)
    if args.reader and (args.fold or len(args.model) != 1):
        raise ValueError("--reader: give it with one --model, and without --fold")
    if args.residual is not None and not 0 < args.residual < float("inf"):
        raise ValueError(f"--residual must be above 0, got {args.residual:g}")
    make_writable(args.out)
    sources = [*(open_fold(*fold, device) for fold in args.fold), *(
        open_readers(*args.model[0], args.reader, device) if args.reader else
        [open_model(*one, device) for one in args.model])]
    heads = [scan_id for scans, _ in sources for scan_id in scans.scan_ids]
    if len(set(heads)) < len(heads) or len(heads) < normative.MIN_SCANS:
        raise ValueError(f"--fold and --model: {normative.MIN_SCANS} different held-out scans at least are needed, "
                         f"found {', '.join(heads)}")
    if len({getattr(one, "reader", None) is None for _, one in sources}) > 1:
        raise ValueError("--model: some hold a reader and others none; give models of one kind")
    cases = [case for source in sources for case in cases_of(*source, args.lesions)]
    if args.residual is not None:
        cases = closer(cases, args.residual)
    texts = dict(zip(("table.md", "changes.md"), tables(cases)))
    for name, text in texts.items():
        (args.out / name).write_text(text, encoding="utf-8")
    print(texts["table.md"], end="")


def numbers(text: str) -> range:
    """FIRST:LAST of the command line. Always both: a number alone is how many in inversion.py, and is refused here."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError("expected FIRST:LAST, counted from 1, such as 2:3 for the second and the "
                                         f"third lesion of each kind, found {text!r}")
    return range(int(first), int(last) + 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fold", type=Path, nargs=2, metavar=("DATA", "RUN"), action="append", default=[],
                        help="a database and the run of train_encoder.py made from it; may be given several times")
    parser.add_argument("--model", type=Path, nargs=2, metavar=("DATA", "BUNDLE"), action="append", default=[],
                        help="a database of scans held out of a bundle's training, and the bundle")
    parser.add_argument("--reader", type=Path, action="append", default=[], metavar="RUN",
                        help="a run of train_reader.py that reads, of the --model's scans, those that it has held out; "
                             "may be given several times")
    parser.add_argument("--out", type=Path, default=Path("runs/cross-validation"),
                        help="folder for table.md and changes.md")
    parser.add_argument("--lesions", type=numbers, default=range(1, 2), metavar="FIRST:LAST",
                        help="which lesions of each kind are pasted into each scan, by their number (default 1:1)")
    parser.add_argument("--residual", type=float, default=None, metavar="SHARE",
                        help="as if a healthy head's residual were this share of what it is, and lesions wholly erased")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return exit_code(benchmark, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
