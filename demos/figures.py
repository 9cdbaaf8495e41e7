"""The phantom benchmark's figures, from what was measured on each scan: pure functions, the table and the pictures.

A scan's measures are a dict of arrays:
  truth_mm2 [S], shown [S] (bool), truth_pixels, voxel_ml      the truth, and the slices that preprocessing kept
  mask_pixels, mask_hits                                       of the projector's own mask
  METHOD_levels [2, LEVELS], METHOD_slices [S]                 count_levels of the map; slice scores
  METHOD_seconds                                               from the file to the scores
  ours_score                                                   the projector's scan score
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.compare import OURS, SIGNIFICANT, differs, name_of, shown
from evaluation import metrics
from evaluation.metrics import Undefined, defined

HAEMORRHAGES = ("epidural", "subdural_acute", "subdural_chronic", "subarachnoid", "intraparenchymal",
                "intraventricular")
LARGE_ML = 5.0
SLICE_MM2 = 25.0                # less truth than this does not make a slice abnormal
STEP, LEVELS = 0.05, 2401       # map values are counted in steps, up to 120 and all above


@dataclass(frozen=True)
class Case:
    """A phantom; kind None is healthy."""

    scan_id: str
    kind: str | None


@dataclass(frozen=True)
class Cohort:
    """Phantoms and the measures of each."""

    cases: list[Case]
    measures: list[dict]

    def of(self, kinds: set[str | None]) -> Cohort:
        both = [(c, m) for c, m in zip(self.cases, self.measures) if c.kind in kinds]
        return Cohort([c for c, _ in both], [m for _, m in both])

    @property
    def labels(self) -> np.ndarray:
        return np.array([case.kind is not None for case in self.cases], int)

    @property
    def ill(self) -> Cohort:
        return self.of({case.kind for case in self.cases} - {None})


def count_levels(values: np.ndarray, truth: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """How many brain pixels have |value| in each step of STEP: int64 [2, LEVELS], truth False and True."""
    level = np.minimum(np.abs(values[brain]) / STEP, LEVELS - 1).astype(np.int64)
    return np.stack([np.bincount(level[truth[brain] == is_true], minlength=LEVELS) for is_true in (False, True)])


def dice_curve(levels: np.ndarray, truth_pixels: int) -> np.ndarray:
    """Dice [LEVELS] of 'level t or higher' against the truth, from count_levels; truth_pixels of the whole scan."""
    hits, predicted = (counts[::-1].cumsum()[::-1] for counts in (levels[1], levels.sum(0)))
    return 2 * hits / np.maximum(predicted + truth_pixels, 1)


def pixel_ap(measures: list[dict], method: str) -> float:
    """Average precision over the brain pixels of these scans together. Raises Undefined without truth."""
    counts = np.sum([m[f"{method}_levels"] for m in measures], axis=0)
    truth, level = np.nonzero(counts)
    return metrics.average_precision(level, truth, counts[truth, level])


def scan_scores(cohort: Cohort, method: str) -> np.ndarray:
    """A score a scan [n]."""
    return np.array([float(m[f"{method}_score"]) for m in cohort.measures])


def slice_units(cohort: Cohort, method: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, labels and scan numbers of the shown slices; a little truth is neither normal nor abnormal."""
    scores, labels, scans = [], [], []
    for number, m in enumerate(cohort.measures):
        area = m["truth_mm2"]
        units = m["shown"] & ((area == 0) | (area >= SLICE_MM2))
        scores.append(m[f"{method}_slices"][units])
        labels.append(area[units] > 0)
        scans.append(np.full(units.sum(), number))
    return np.concatenate(scores), np.concatenate(labels).astype(int), np.concatenate(scans)


def is_large_haemorrhage(case: Case, measured: dict) -> bool:
    return case.kind in HAEMORRHAGES and measured["truth_pixels"] * measured["voxel_ml"] > LARGE_ML


def mean_dice(cohort: Cohort, dice: Callable[[dict], float], large_only: bool) -> float:
    """Mean of dice(measures) over scans with a truth. Raises Undefined where there is none."""
    each = [dice(m) for c, m in zip(cohort.cases, cohort.measures)
            if m["truth_pixels"] and (not large_only or is_large_haemorrhage(c, m))]
    if not each:
        raise Undefined("no haemorrhage is that large" if large_only else "no scan has a truth mask")
    return float(np.mean(each))


def method_figures(cohort: Cohort, method: str, level: int) -> dict:
    """All figures of one method on a cohort, the binary map cut at `level`."""
    scores, slices = scan_scores(cohort, method), slice_units(cohort, method)

    def dice(measured: dict) -> float:
        return dice_curve(measured[f"{method}_levels"], measured["truth_pixels"])[level]

    return {"emergencies": int(cohort.labels.sum()), "healthy": int((cohort.labels == 0).sum()),
            "scan_auc": defined(metrics.auc, scores, cohort.labels),
            "scan_auc_delong": defined(metrics.delong_interval, scores, cohort.labels),
            "slice_auc": defined(metrics.auc, *slices[:2]),
            "slice_auc_delong": defined(metrics.delong_interval, *slices),
            "pixel_ap": defined(pixel_ap, cohort.ill.measures, method),
            "dice": defined(mean_dice, cohort, dice, False),
            "dice_large_haemorrhage": defined(mean_dice, cohort, dice, True)}


def shipped_dice(measured: dict) -> float:
    """Dice of the mask that the projector wrote."""
    return 2 * measured["mask_hits"] / (measured["mask_pixels"] + measured["truth_pixels"])


def report(cohort: Cohort, methods: list[str], how: str, surprise_mask: float) -> dict:
    """The figures of metrics.json; methods begins with ours.

    how: slice scores became a scan's. surprise_mask: of the binary maps.
    """
    kinds = list(dict.fromkeys(case.kind for case in cohort.cases if case.kind))
    level = round(surprise_mask / STEP)
    scores = {method: scan_scores(cohort, method) for method in methods}
    result = {"scan_score": how, "surprise_mask": surprise_mask,
              "shipped_mask_dice": defined(mean_dice, cohort, shipped_dice, True), "methods": {}}
    for method in methods:
        result["methods"][method] = {
            "seconds_a_scan": float(np.mean([m[f"{method}_seconds"] for m in cohort.measures])),
            "all": method_figures(cohort, method, level),
            "kinds": {kind: method_figures(cohort.of({kind, None}), method, level) for kind in kinds}}
    ours, tests = scores[OURS], {}
    for method in methods[1:]:
        of = {None: np.ones(len(cohort.cases), bool)} | {
            kind: np.array([case.kind in (kind, None) for case in cohort.cases]) for kind in kinds}
        tests |= {(kind, method): defined(metrics.delong_paired_test, ours[units], scores[method][units],
                                          cohort.labels[units]) for kind, units in of.items()}
    for family in ([key for key in tests if key[0] is None], [key for key in tests if key[0]]):
        for (kind, method), corrected in metrics.holm({key: tests[key] for key in family}).items():
            f = result["methods"][method]
            (f["kinds"][kind] if kind else f["all"]).update(p=tests[kind, method], p_holm=corrected)
    result["scans"] = {case.scan_id: {"kind": case.kind, **{m: float(scores[m][i]) for m in methods}}
                       for i, case in enumerate(cohort.cases)}
    return result


# ---------------------------------------------------------------------------------------------------------------
# Table and pictures

def table(figures: dict) -> str:
    """Markdown: all emergencies, a row a method; then a row a kind, methods side by side."""
    methods = figures["methods"]
    everything = methods[OURS]["all"]
    lines = [f"{everything['emergencies']} emergencies and {everything['healthy']} healthy phantoms, none seen before.",
             "", "| method | scan AUC (95 %) | slice AUC (95 %) | Dice, haemorrhage > 5 ml | pixel AP | "
             "seconds per scan | p |", "| --- " * 7 + "|"]
    for method, f in methods.items():
        a = f["all"]
        lines.append(f"| {name_of(method)} | {shown(a['scan_auc'])} ({shown(a['scan_auc_delong'])}) | "
                     f"{shown(a['slice_auc'])} ({shown(a['slice_auc_delong'])}) | "
                     f"{shown(a['dice_large_haemorrhage'])} | {shown(a['pixel_ap'])} | {f['seconds_a_scan']:.1f} | "
                     f"{shown(a['p_holm'], 4) if 'p_holm' in a else ''} |")
    columns = ["kind", "scans", *map(name_of, methods)]
    lines += ["", "Scan AUC / pixel AP by kind:", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for kind, ours in methods[OURS]["kinds"].items():
        each = [f["kinds"][kind] for f in methods.values()]
        cells = [f"{shown(f['scan_auc'])}{differs(f)} / {shown(f['pixel_ap'])}" for f in each]
        lines.append(f"| {' | '.join([kind.replace('_', ' '), str(ours['emergencies']), *cells])} |")
    notes = [f"p: paired DeLong test of the scan AUC against ours, Holm's correction for {len(methods) - 1} methods; "
             f"by kind, *: p < {SIGNIFICANT} after the correction for all methods and kinds."] * (len(methods) > 1)
    notes += [f"Dice: surprise above {figures['surprise_mask']:g}. Scan score from slice scores: "
              f"{figures['scan_score']}.",
              f"Dice of the masks that projector.py writes, haemorrhage > 5 ml: {shown(figures['shipped_mask_dice'])}."]
    if figures["failed"]:
        notes.append(f"Left out because they could not be projected: {', '.join(figures['failed'])}.")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def typical(cohort: Cohort) -> dict[str, str]:
    """The scan of each kind whose score by ours is the median, among those with a truth: kind -> scan id."""
    found: dict[str, list] = {}
    for case, m in zip(cohort.cases, cohort.measures):
        if case.kind and m["truth_pixels"]:
            found.setdefault(case.kind, []).append((m["ours_score"], case.scan_id))
    return {kind: sorted(scans)[len(scans) // 2][1] for kind, scans in found.items()}


def example_sheet(rows: dict[str, Image.Image], columns: int = 2) -> Figure:
    """A picture of four panels for each kind, in `columns` blocks side by side."""
    count = -(-len(rows) // columns)
    figure = Figure(figsize=(6.4 * columns, 1.9 * count + 0.3), dpi=100, facecolor="black", layout="constrained")
    axes = np.atleast_1d(figure.subplots(count, columns)).reshape(count, columns).T.ravel()
    for ax in axes:
        ax.axis("off")
    for ax, (kind, picture) in zip(axes, rows.items()):
        ax.imshow(picture)
        ax.set_title(kind.replace("_", " "), color="white", fontsize=9, loc="left", pad=2)
    figure.suptitle("each row: query, closest normal, anomaly, truth", color="white", fontsize=9)
    return figure
