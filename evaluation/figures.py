"""Figures of scores against labels, as numbers, as a table and as curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve

from evaluation import metrics
from evaluation.cohort import InputError, Units, key_names, left_out_notes, read_truth, read_volume, slice_positions
from evaluation.metrics import defined
from evaluation.settings import FigureSettings

NO_THRESHOLD = "undefined: no threshold set on other data"
FEW_PATIENTS = "few patients"              # beside an interval by bootstrap, which a note explains
CALLED = ("sensitivity", "specificity", "ppv", "npv")


# ----------------------------------------------------------------------------------------------------------
# Figures

def ranking(scores: np.ndarray, labels: np.ndarray, clusters: np.ndarray, settings: FigureSettings) -> dict:
    """AUC and average precision of one set of units, [n] each, with their intervals."""
    boot = {"clusters": clusters, "level": settings.level, "repeats": settings.bootstrap, "seed": settings.seed}
    ap = metrics.average_precision
    return {"abnormal": int((labels == 1).sum()), "normal": int((labels == 0).sum()),
            "clusters": len(np.unique(clusters)),
            "few": min(len(np.unique(clusters[labels == value])) for value in (0, 1)) < metrics.FEW,
            "auc": defined(metrics.auc, scores, labels),
            "auc_delong": defined(metrics.delong_interval, scores, labels, clusters, settings.level),
            "auc_bootstrap": defined(metrics.bootstrap_interval, metrics.auc, scores, labels, **boot),
            "average_precision": defined(ap, scores, labels),
            "average_precision_bootstrap": defined(metrics.bootstrap_interval, ap, scores, labels, **boot)}


def at_threshold(units: Units, chosen: np.ndarray, threshold: float | None, source: str,
                 settings: FigureSettings) -> dict:
    """Sensitivity, specificity, PPV and NPV of the chosen units, bool [n], as {value, interval, hits, of}.

    NO_THRESHOLD without a threshold. The intervals count correlated units of a patient as fewer independent ones.
    """
    names = [*CALLED, "ppv_at_prevalence"]
    if threshold is None:
        return {name: NO_THRESHOLD for name in names}
    scores, labels, clusters = units.where(chosen)
    given = scores, labels, threshold, units.worst[chosen]
    result = {"threshold": threshold, "threshold_source": source, **metrics.confusion(*given)}
    abnormal, called = labels == 1, metrics.called(*given)
    groups = ((abnormal, called), (~abnormal, ~called), (called, abnormal), (~called, ~abnormal))
    for name, (among, right) in zip(CALLED, groups):
        result[name] = _share(right[among], clusters[among], settings.level)
    result["ppv_at_prevalence"] = _ppv(result["sensitivity"], result["specificity"], settings.prevalence)
    return result


def _share(right: np.ndarray, clusters: np.ndarray, level: float) -> dict | str:
    if not len(right):
        return "undefined: 0 of 0"
    hits, total = int(right.sum()), len(right)
    correlated = len(np.unique(clusters)) < total
    worth = metrics.independent_units(right, clusters, level) if correlated else None
    value, *interval = metrics.proportion(hits, total, level, worth)
    return {"value": value, "interval": interval, "hits": hits, "of": total}


def _ppv(sensitivity, specificity, prevalence):
    """PPV at a prevalence. Its interval is conservative: both intervals at their lower, then upper ends."""
    if prevalence is None:
        return "undefined: no --prevalence given"
    if isinstance(sensitivity, str) or isinstance(specificity, str):
        return "undefined: needs abnormal and normal units"
    value = defined(metrics.ppv_at_prevalence, sensitivity["value"], specificity["value"], prevalence)
    if isinstance(value, str):
        return value
    ends = zip(sensitivity["interval"], specificity["interval"])
    return {"value": value, "interval": [metrics.ppv_at_prevalence(*end, prevalence) for end in ends],
            "prevalence": prevalence}


def level_figures(units: Units, threshold: float | None, source: str, settings: FigureSettings) -> dict:
    """All figures of one level, scans or slices."""
    everything = np.ones(len(units.keys), bool)
    result = {"n": len(units.keys), "left_out": units.left_out, "counted_worst": units.counted_worst,
              **ranking(*units.where(everything), settings),
              "roc": defined(metrics.roc_points, units.scores, units.labels),
              "at_threshold": at_threshold(units, everything, threshold, source, settings)}
    result["categories"] = {}
    for name in sorted({t for types in units.types for t in types}):
        chosen = np.array([name in types for types in units.types]) | (units.labels == 0)
        called = at_threshold(units, chosen, threshold, source, settings)
        result["categories"][name] = {**ranking(*units.where(chosen), settings),
                                      "sensitivity": called["sensitivity"]}
    untyped = sum(not types for types, label in zip(units.types, units.labels) if label == 1)
    return {**result, "abnormal_without_category": untyped}


# ----------------------------------------------------------------------------------------------------------
# Masks

def pixel_figures(units: Units, masks: Path, maps: Path, mask_gaps: str, settings: FigureSettings,
                  maps_of: Callable[[str], tuple[Path, bool]]) -> dict:
    """Dice by scan with a lesion, pooled Dice, and average precision of pixels by |anomaly|.

    A scan labelled 0 has an empty truth. masks and mask_gaps: folder and gaps of read_truth. maps: folder of
    slices.csv. maps_of: from a scan's id to its folder of maps and `upended` of read_truth. Raises InputError.
    """
    tally, absent = metrics.PixelTally(), []
    positions = slice_positions(maps / "slices.csv")
    patient = {scan_id: cluster for (scan_id,), cluster in zip(units.keys, units.clusters)}
    for (scan_id,), label in zip(units.keys, units.labels):
        folder, upended = maps_of(scan_id)
        if not (folder / "mask.nii.gz").is_file():
            absent.append(f"{scan_id} (no map)")
            continue
        predicted, affine = read_volume(folder / "mask.nii.gz")
        anomaly, _ = read_volume(folder / "anomaly.nii.gz")
        found = read_truth(masks, scan_id, predicted.shape, affine, mask_gaps, positions.get(scan_id), upended)
        if found is None and label == 1:
            absent.append(f"{scan_id} (no truth)")
            continue
        truth, counted = found or (np.zeros(predicted.shape, bool), np.ones(len(predicted), bool))
        if label == 0 and truth.any():
            raise InputError(f"--masks {masks}: the mask of {scan_id} has {truth.sum()} pixels, but its label is "
                             "0; expected an empty mask or none: correct one of the two")
        tally.add(scan_id, truth[counted], predicted[counted] > 0, anomaly[counted])
    if absent and settings.missing == "error":
        raise InputError(f"--masks {masks} and --maps {maps}: nothing to compare for "
                         f"{', '.join(absent)}. Add the files, or leave these scans out of the pixel "
                         "figures with --missing exclude")
    each = np.array(list(tally.dice_by_scan.values()))
    result = {"scans": len(units.keys) - len(absent), "left_out": len(absent),
              "dice_pooled": defined(tally.pooled_dice),
              "pixel_average_precision": defined(tally.average_precision),
              "dice_by_scan": tally.dice_by_scan}
    if not len(each):
        return {**result, "dice_mean": "undefined: no truth mask with a pixel in it"}
    boot = defined(metrics.bootstrap_interval, lambda s, _: float(s.mean()), each, np.ones(len(each)),
                   clusters=[patient[scan_id] for scan_id in tally.dice_by_scan],
                   level=settings.level, repeats=settings.bootstrap, seed=settings.seed)
    few = len({patient[scan_id] for scan_id in tally.dice_by_scan}) < metrics.FEW
    return {**result, "dice_mean": float(each.mean()), "dice_mean_bootstrap": boot, "few": few,
            "dice_median": float(np.median(each))}


# ----------------------------------------------------------------------------------------------------------
# Another method

def comparison(own: Units, other: Units, scores: Path, compared: Path) -> dict:
    """AUC of another method's scores and the paired test, on the scans of both; what is left out of it.

    own, other: of the tables `scores` and `compared`, and of the same labels, whose order both are in. InputError where
    they have no scan in common.
    """
    both = set(own.keys) & set(other.keys)
    if not both:
        raise InputError(f"--compare {compared}: none of its {len(other.keys)} labelled scans with a score "
                         f"({key_names(other.keys)}) is among the {len(own.keys)} of {scores} ({key_names(own.keys)}); "
                         "expected the same scans by another method: project them with it, too")
    ours, labels, clusters = own.where(np.array([key in both for key in own.keys]))
    theirs, _, _ = other.where(np.array([key in both for key in other.keys]))
    more = len(other.keys) - len(both)
    return {"scores": str(compared), "n": len(both), "auc": defined(metrics.auc, theirs, labels),
            "own_auc": defined(metrics.auc, ours, labels),
            "delong_p": defined(metrics.delong_paired_test, ours, theirs, labels, clusters),
            "left_out": other.left_out | ({f"without a score in {scores}": more} if more else {}),
            "counted_worst": other.counted_worst, "not_compared": len(own.keys) - len(both)}


# ----------------------------------------------------------------------------------------------------------
# Report

def shown(value) -> str:
    """A figure for the table: three digits, an interval, or why there is none."""
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)):
        return f"{value[0]:.3f} to {value[1]:.3f}"
    return f"{value:.3f}"


def resampled(interval, few: bool, how: str = "") -> str:
    """A bootstrap interval for the table, marked where it comes from few patients."""
    told = [how] * bool(how) + [FEW_PATIENTS] * (few and not isinstance(interval, str))
    return shown(interval) + (f" ({', '.join(told)})" if told else "")


def level_rows(level: str, figures: dict) -> list[tuple]:
    """Table rows of one level: (what, figure, value, interval, n)."""
    def ranked(what, f):
        n = f"{f['abnormal']} abnormal, {f['normal']} normal"
        yield what, "AUC", f["auc"], f"{shown(f['auc_delong'])} (DeLong)", n
        yield what, "", "", resampled(f["auc_bootstrap"], f["few"], "bootstrap"), ""
        yield (what, "average precision", f["average_precision"],
               resampled(f["average_precision_bootstrap"], f["few"]), n)

    def called(what, figure, f):
        if isinstance(f, str):
            return what, figure, f, "", ""
        return what, figure, f["value"], f["interval"], f"{f['hits']} of {f['of']}" if "of" in f else ""

    rows = list(ranked(level, figures))
    for figure in CALLED:
        rows.append(called(level, figure.upper() if figure in ("ppv", "npv") else figure,
                           figures["at_threshold"][figure]))
    rows.append(called(level, "PPV at prevalence", figures["at_threshold"]["ppv_at_prevalence"]))
    for category, f in figures["categories"].items():
        rows += ranked(f"{level}, {category}", f)
        if not isinstance(f["sensitivity"], str):
            rows.append(called(f"{level}, {category}", "sensitivity", f["sensitivity"]))
    return rows


def table(report: dict) -> dict[str, list]:
    """What is shown of the report: columns, rows of text, and notes on what was left out."""
    rows, notes = [], []
    for level in ("scan", "slice"):
        if level in report:
            f = report[level]
            rows += level_rows(level, f)
            notes += left_out_notes(f"{level}s", f["left_out"], f["counted_worst"])
            if f["abnormal_without_category"]:
                notes.append(f"abnormal {level}s without a category: {f['abnormal_without_category']}")
            if contrary := f.get("abnormal_scans_without_abnormal_slice"):
                notes.append(f"abnormal scans of which every slice is labelled, none of them abnormal: {contrary}")
            if "threshold" in f["at_threshold"]:
                notes.append(f"{level} threshold {f['at_threshold']['threshold']}: "
                             f"{f['at_threshold']['threshold_source']}")
    if "pixel" in report:
        f = report["pixel"]
        rows += [("pixel", "Dice, mean over scans", f["dice_mean"],
                  resampled(f.get("dice_mean_bootstrap", ""), f.get("few", False)),
                  f"{len(f['dice_by_scan'])} scans with a lesion"),
                 ("pixel", "Dice, pooled", f["dice_pooled"], "", f"{f['scans']} scans"),
                 ("pixel", "average precision", f["pixel_average_precision"], "", f"{f['scans']} scans")]
        notes += [f"scans left out of the pixel figures: {f['left_out']}"] * bool(f["left_out"])
    if "comparison" in report:
        f = report["comparison"]
        p = f"p {shown(f['delong_p'])} (paired DeLong)"
        rows.append(("scan", f"AUC of {f['scores']}", f["auc"], p, f"{f['n']} scans"))
        notes += left_out_notes(f"scans of {f['scores']}", f["left_out"], f["counted_worst"])
        if f["not_compared"]:
            notes.append(f"scans left out of the comparison: {f['not_compared']} (without a score in {f['scores']}); "
                         f"on the {f['n']} compared, AUC {shown(f['own_auc'])} here")
    rows = [[shown(cell) for cell in row] for row in rows]
    if any(FEW_PATIENTS in interval for _, _, _, interval, _ in rows):
        notes.append(f"{FEW_PATIENTS}: fewer than {metrics.FEW} of a class, or with a lesion. This interval, by "
                     "bootstrap, is then too narrow: in simulations 95% ones of average precision held the true value "
                     "in 84 of 100 cohorts with 5 patients of each class, in 89 with 20, in 92 with 50")
    columns = ["level", "figure", "value", f"{100 * report['settings']['level']:g}% interval", "n"]
    return {"columns": columns, "rows": rows, "notes": notes}


def markdown(columns: list[str], rows: list[list[str]], notes: list[str]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def plot_curves(levels: dict[str, Units], report: dict, out: Path) -> None:
    """roc.png and pr.png, one curve per level; for a level with one class only the legend says 'undefined'."""
    for kind, axes in (("roc", ("1 - specificity", "sensitivity")), ("pr", ("recall", "precision"))):
        figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
        ax = figure.add_subplot(xlabel=axes[0], ylabel=axes[1], xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        for colour, (level, units) in zip(("C0", "C1"), levels.items()):
            label = f"{level}: {'AUC' if kind == 'roc' else 'AP'} "
            label += shown(report[level]["auc" if kind == "roc" else "average_precision"])
            if len(np.unique(units.labels)) < 2:
                ax.plot([], [], colour, label=label)
            elif kind == "roc":
                ax.plot(*zip(*report[level]["roc"]), colour, label=label)
            else:
                y, x, _ = precision_recall_curve(units.labels, units.scores)
                ax.step(x, y, colour, where="post", label=label)
                ax.axhline(units.labels.mean(), color=colour, lw=0.8, ls=":")
        if kind == "roc":
            ax.plot([0, 1], [0, 1], "k:", lw=0.8)
        ax.legend(loc="lower right" if kind == "roc" else "lower left", fontsize=8)
        figure.savefig(out / f"{kind}.png")
