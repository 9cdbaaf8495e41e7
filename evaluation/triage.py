"""The worklist simulation: does reading by score bring emergencies to the reader sooner, and at what cost to others?

One reader, one list. Scans arrive one after another; whenever the reader is free the list is sorted anew and
its first scan is read to the end (non-preemptive). First-come-first-served sorts by arrival. By-score sorts
by score, highest first, where a scan has a score only once the algorithm is through with it: arrivals queue
for the algorithm's machines, each of which takes `latency_s` a scan. Before that a scan stands behind all
scored ones, in order of arrival; the reader never idles while anything waits, so such a scan may well be read
before its score is there.

Defaults: the paper (Nature Communications 13:4251, 2022) gives, for emergencies read first-come-first-served,
a median wait of 422.5 s (IQR 299) and turnaround of 445.0 s (298), and by score a wait of 70.5 s and
turnaround of 88.5 s. Turnaround less wait puts a reading at 18 to 22.5 s: log-normal, median 20 s, sigma 0.5
(mean 22.7 s). An IQR of 299 s below the median means that scans already waited when reading began, and the
list grew from there. 60 scans, 13 s apart on average, the reader coming 150 s after the first, give a wait of
421.7 s (305) and a turnaround of 444.6 s (307) first-come-first-served here and, with one scan in five an
emergency and scores of AUC 0.85, 58 s (111) and 82 s (111) by score. The abstract does not tell the arrivals:
this is a load like the paper's, not its experiment.
"""

from __future__ import annotations

import heapq

import numpy as np
from scipy import stats

from evaluation.cohort import left_out_notes
from evaluation.metrics import Undefined
from evaluation.settings import TriageSettings

POLICIES = ("first_come", "by_score")


def scores_known_from(arrivals: np.ndarray, latency_s: float, machines: int) -> np.ndarray:
    """When each scan's score is there, s [n]; arrivals (s [n], increasing) are taken in order by the free machine."""
    free = [0.0] * machines
    ready = np.empty(len(arrivals))
    for i, arrival in enumerate(arrivals):
        ready[i] = max(arrival, heapq.heappop(free)) + latency_s
        heapq.heappush(free, ready[i])
    return ready


def read_worklist(arrivals: np.ndarray, reading: np.ndarray, scores: np.ndarray | None = None,
                  known_from: np.ndarray | None = None, reader_start_s: float = 0.0) -> np.ndarray:
    """When the reading of each scan begins, s [n]; first come, first served without `scores`, else by score.

    arrivals s [n], increasing; reading s [n], how long each takes; scores [n], known_from s [n]: when each is
    there. Equal scores are read in order of arrival.
    """
    starts = np.empty(len(arrivals))
    waiting, arrived, now = [], 0, reader_start_s
    for _ in range(len(arrivals)):
        if not waiting and arrived < len(arrivals):
            now = max(now, arrivals[arrived])                                # idle until the next one comes
        while arrived < len(arrivals) and arrivals[arrived] <= now:
            waiting.append(arrived)
            arrived += 1
        if scores is None:
            chosen = waiting[0]
        else:
            scored = [i for i in waiting if known_from[i] <= now]
            chosen = max(scored, key=lambda i: (scores[i], -i)) if scored else waiting[0]
        waiting.remove(chosen)
        starts[chosen] = now
        now += reading[chosen]
    return starts


def simulate(scores: np.ndarray, labels: np.ndarray, settings: TriageSettings,
             arrival_intervals: np.ndarray | None = None, reading_times: np.ndarray | None = None,
             clusters: np.ndarray | None = None) -> dict:
    """Sessions of the same arrivals read both ways; medians and IQRs of wait and turnaround, in seconds.

    scores, labels [N] of the labelled scans (1: emergency). arrival_intervals, reading_times: observed
    seconds to draw from instead of the exponential and log-normal ones. clusters [N]: whose scans these are; None:
    each of another patient. Wait is arrival to start of reading, turnaround arrival to end. p is Wilcoxon's
    signed-rank over patients, each with the mean wait of all appearances of their scans: neither more repeats nor more
    scans of a patient make it smaller. Raises Undefined with one class only.
    """
    labels = np.asarray(labels)
    clusters = np.arange(len(labels)) if clusters is None else np.asarray(clusters)
    if len(np.unique(labels)) < 2:
        raise Undefined(f"only one class ({int((labels == 1).sum())} emergencies of {len(labels)} scans)")
    rng = np.random.default_rng(settings.seed)
    drawn, waits, readings = [], {p: [] for p in POLICIES}, []
    for _ in range(settings.repeats):
        scan = _draw_scans(rng, labels, settings)
        arrivals = np.cumsum(_draw(rng, arrival_intervals, settings.scans,
                                   lambda n: rng.exponential(settings.arrival_s, n)))
        arrivals -= arrivals[0]
        reading = _draw(rng, reading_times, settings.scans,
                        lambda n: settings.reading_median_s * rng.lognormal(0, settings.reading_sigma, n))
        known = scores_known_from(arrivals, settings.latency_s, settings.machines)
        first_come = read_worklist(arrivals, reading, reader_start_s=settings.reader_start_s)
        by_score = read_worklist(arrivals, reading, np.asarray(scores)[scan], known, settings.reader_start_s)
        drawn.append(scan)
        readings.append(reading)
        for policy, starts in zip(POLICIES, (first_come, by_score)):
            waits[policy].append(starts - arrivals)
    drawn, readings = np.stack(drawn), np.stack(readings)                    # (repeats, scans)
    waits = {p: np.stack(w) for p, w in waits.items()}
    return {group: _summary(drawn, waits, readings, labels, clusters, value)
            for group, value in (("emergency", 1), ("other", 0))}


def _draw(rng, observed, n, model):
    return model(n) if observed is None else rng.choice(observed, n)


def _draw_scans(rng, labels, settings):
    """Indices of the session's scans, with replacement."""
    if settings.prevalence is None:
        return rng.integers(len(labels), size=settings.scans)
    emergency = rng.random(settings.scans) < settings.prevalence
    return np.where(emergency, rng.choice(np.flatnonzero(labels == 1), settings.scans),
                    rng.choice(np.flatnonzero(labels == 0), settings.scans))


def _summary(drawn, waits, readings, labels, clusters, value):
    """Figures of the scans with this label; drawn, waits and readings (repeats, scans)."""
    chosen = labels[drawn] == value
    if not chosen.any():
        raise Undefined(f"no scan with label {value} was drawn in any session")
    result = {"scans": int((labels == value).sum()), "cases": int(chosen.sum())}
    for policy, wait in waits.items():
        for name, seconds in (("wait", wait), ("turnaround", wait + readings)):
            low, median, high = np.quantile(seconds[chosen], [0.25, 0.5, 0.75])
            result[f"{policy}_{name}_s"] = {"median": float(median), "iqr": float(high - low)}
    means = {p: _mean_by_cluster(clusters[drawn[chosen]], w[chosen]) for p, w in waits.items()}
    difference = means["by_score"] - means["first_come"]
    result["mean_wait_change_s"] = float((waits["by_score"] - waits["first_come"])[chosen].mean())
    result["wilcoxon_p"] = (float(stats.wilcoxon(difference).pvalue) if np.any(difference)
                            else "undefined: both ways of reading give the same waits")
    return result


def _mean_by_cluster(cluster, wait):
    _, index = np.unique(cluster, return_inverse=True)
    return np.bincount(index, weights=wait) / np.bincount(index)


def markdown(report: dict) -> str:
    """The simulation as a Markdown table, and who is left out of it."""
    lines = ["| cases | order | wait, s: median (IQR) | turnaround, s: median (IQR) | Wilcoxon p |",
             "| --- | --- | --- | --- | --- |"]
    for group in ("emergency", "other"):
        f = report[group]
        for policy in POLICIES:
            wait, turnaround = f[f"{policy}_wait_s"], f[f"{policy}_turnaround_s"]
            p = f["wilcoxon_p"] if isinstance(f["wilcoxon_p"], str) else f"{f['wilcoxon_p']:.2g}"
            lines.append(f"| {group} ({f['scans']} scans) | {policy.replace('_', ' ')} "
                         f"| {wait['median']:.1f} ({wait['iqr']:.1f}) "
                         f"| {turnaround['median']:.1f} ({turnaround['iqr']:.1f}) "
                         f"| {p if policy == 'by_score' else ''} |")
    notes = left_out_notes("scans", report["left_out"], report["counted_worst"])
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"
