"""The sentences of a page: what was found, where, how certain it is, what the page leaves out."""

from __future__ import annotations

from collections import Counter

from detect.report.tables import Entry, HealthyScores
from detect.scores import rounded_up


def digits(value: float | None) -> str:
    """Three significant digits, whole numbers from 1000 on; a dash for None."""
    return "–" if value is None else f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def level_mm(below_vertex_mm: float) -> int:
    """The level as it is told, also by page.js: JavaScript would round halves up, and Python rounds them to even."""
    return round(below_vertex_mm)


def level_of(below_vertex_mm: float) -> str:
    """The level of a slice in words; the highest slices lie above the top of the brain."""
    mm = level_mm(below_vertex_mm)
    return f"{abs(mm)} mm {'above' if mm < 0 else 'below'} the top"


def counted(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


def healthy_below(entry: Entry, calibration: HealthyScores) -> str:
    """How many healthy scans score lower, such as '4 of 5'; empty where unknown."""
    n = len(calibration.scores)
    return f"{round(entry.percentile * (n + 1) / 100)} of {n}" if n and entry.percentile is not None else ""


def found(entries: list[Entry], calibration: HealthyScores) -> list[str]:
    """Sentences on what was found, the most important first."""
    done, n = [e for e in entries if e.ok], len(calibration.scores)
    flags = [e.flagged for e in done if e.flagged is not None]
    above = sum(healthy_below(e, calibration) == f"{n} of {n}" for e in done)
    sentences = []
    if any(flags):
        sentences.append(f"{sum(flags)} of {counted(len(flags), 'scan')} flagged: the score is above the threshold.")
    elif flags:
        sentences.append("Not flagged: the score is not above the threshold." if len(flags) == 1 else
                         f"None of {len(flags)} scans flagged: no score is above the threshold.")
    elif n and len(done) > 1:
        sentences.append(f"{above or 'None'} of {len(done)} scans scored above all {n} healthy scans.")
    if done:
        beats = healthy_below(done[0], calibration)
        sentences.append(f"{'Highest: ' if len(done) > 1 else ''}{done[0].scan_id}, score {digits(done[0].score)}"
                         f"{f', above {beats} healthy scans' if beats else ''}.")
    sentences.append(f"{counted(sum(e.done for e in entries), 'scan')} compared, slice by slice, with the closest "
                     "normal head CT that the model can draw.")
    for status, what, where in (("unreliable", "not to be trusted", "apart, below the others"),
                                ("failed", "failed", "last in the list")):
        if count := sum(e.status == status for e in entries):
            sentences.append(f"{counted(count, 'scan')} {what}: {'it stands' if count == 1 else 'they stand'} {where}.")
    return sentences


def unshown(entries: list[Entry], others: Counter) -> list[str]:
    """A sentence about the scans that are only in scores.csv, with counts of all."""
    if not others["total"]:
        return []
    of_all = others + Counter(e.status for e in entries) + Counter(flagged=sum(bool(e.flagged) for e in entries))
    total = len(entries) + others["total"]
    return [f"This page shows the first {len(entries)} of {total} rows of scores.csv; of all {total} scans "
            f"{of_all['flagged'] or 'none'} are flagged, {of_all['unreliable'] or 'none'} unreliable and "
            f"{of_all['failed'] or 'none'} failed."]


def where(entries: list[Entry], calibration: HealthyScores) -> list[str]:
    """Sentences on where it was found, the most important first; none where no scan has a key slice."""
    first = next((e for e in entries if e.key), None)
    if first is None:
        return []
    key = first.key[0]
    by = "rises highest above healthy slices at its level" if calibration.levels else "scores highest"
    return [f"{first.scan_id}: slice {key.number}, {level_of(key.below_vertex_mm)}.",
            f"Each scan opens at the slice that {by}. Red outlines mark what differs from normal."]


def sure(entries: list[Entry], calibration: HealthyScores, evaluation: dict | None) -> list[str]:
    """Sentences on how certain it is, the most important first."""
    n = len(calibration.scores)
    sentences = []
    if evaluation is not None:
        scan = evaluation["scan"]
        if isinstance(scan["auc"], str):
            sentences.append(f"AUC against the labels: {scan['auc']}.")
        else:
            interval, level = scan["auc_delong"], evaluation["settings"]["level"]
            said = interval if isinstance(interval, str) else f"{interval[0]:.2f} to {interval[1]:.2f}"
            sentences += [f"AUC against the labels: {scan['auc']:.2f}.",
                          f"{100 * level:g}% interval {said}, from {scan['abnormal']} abnormal "
                          f"and {scan['normal']} normal scans."]
    if any(map(calibration.compares, entries)):
        sentences.append(f"Scores are compared with {counted(n, 'healthy scan')}: none can be called rarer than one in "
                         f"{n + 1}.")
        if calibration.threshold is None:
            sentences.append("That is too few for a threshold, so no scan is flagged or cleared.")
        elif calibration.fpr is None:
            passing = sum(score > calibration.threshold for score in calibration.scores)
            sentences.append(f"The threshold was given for this run; {passing} of these healthy scans pass it.")
        else:
            sentences.append(f"A healthy scan passes the threshold with a chance of at most "
                             f"{100 * rounded_up(calibration.fpr):.3g}%.")
    elif n:
        sentences.append(f"No scan here could be compared with the model's {counted(n, 'healthy scan')}: see the "
                         "notes.")
        if any(e.flagged is not None for e in entries):
            sentences.append("The threshold was given for this run.")
    elif any(e.percentile is not None for e in entries):
        sentences.append("Percentiles are among the model's healthy scans; this run does not tell how many there are.")
    else:
        sentences.append("No percentiles: the model has no healthy scans scored with these settings. Only the order "
                         "of the scans means something.")
    if evaluation is None:
        sentences.append("Without labels it is not known how well these scores tell ill from healthy.")
    return sentences


def coverage(entries: list[Entry], megabytes: float) -> str:
    """Which pictures the page holds; empty where it holds all."""
    pictured = [e for e in entries if e.overlays]
    complete = sum(e.complete for e in pictured)
    if complete == len(pictured):
        return ""
    key = sum(bool(e.pictures) for e in pictured) - complete
    parts = [f"all slices of the {counted(complete, 'scan')} with the highest scores"] if complete else []
    parts += [f"the key slices of {counted(key, 'further scan' if complete else 'scan')}, reduced"] if key else []
    if complete + key < len(pictured):
        parts.append(f"none of the other {counted(len(pictured) - complete - key, 'scan')}")
    return (f"To stay within {megabytes:g} MB this page holds {'; '.join(parts)}. All pictures are in the results "
            "folder, <scan>/overlay.")


def facts(run: dict, hashes: dict[str, str]) -> list[tuple[str, str]]:
    """Rows (name, value) of the foot of the page."""
    rows = [("model", (run.get("model") or {}).get("name") or "unnamed"), ("weights, SHA-256", run["weights_sha256"])]
    rows += [(f"{name}, SHA-256", value) for name, value in hashes.items()]
    rows += [(name, str(run[name])) for name in ("device", "precision", "threads", "processes")]
    rows += [("seconds", f"{run['seconds']:.0f}")]
    rows += [(f"seconds per scan, {stage}", f"{value:.1f}")
             for stage, value in run["seconds_per_scan_by_stage"].items()]
    return rows + [(f"version of {name}", str(value)) for name, value in run["versions"].items()]
