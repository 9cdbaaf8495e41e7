"""Calibration on held-out healthy scans, for any method and measure: what turns a score into a percentile and a flag.

Every scan is reconstructed by networks that have not seen it, and judged by what other patients' scans make of the
measure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.wording import some
from ct import frame
from ct.slab import nearest_mm, slice_thickness_mm
from dataset import SliceDataset
from detect.measure import MEASURES, Measure
from detect.reconstruct import Reconstruction, Reconstructor, method
from detect.residual import Evidence
from detect.scores import (
    SCAN_SCORES,
    SLICE_MM,
    least_healthy,
    rounded_up,
    scan_score,
    thickness_mm,
    threshold_at_fpr,
)
from detect.settings import Settings

FPR = 0.05                            # of the stored thresholds
FIGURES = 10                          # healthy scans from which their range says what is usual
LEAST_RANGE_HU = 2.0                  # of such a range: scanners differ by as much


@dataclass(frozen=True)
class Fold:
    """A method, and the healthy scans that it has not seen."""

    reconstructor: Reconstructor
    held_out: SliceDataset


@dataclass(frozen=True)
class Trained:
    """What a training left, and its database.

    dataset     the database at path; of either split, for what it says of itself
    networks    JSON that all folds must have in common
    provenance  where the weights come from, JSON
    make        builds the method; takes a while where statistics are fitted
    scans       the held-out scans that this training has not seen; None: all of them
    """

    dataset: SliceDataset
    path: Path
    networks: dict[str, Any]
    provenance: dict[str, Any]
    make: Callable[[], Reconstructor]
    scans: Sequence[str] | None = None

    def held_out_ids(self) -> list[str]:
        """Ids of the scans to calibrate on."""
        return self.dataset.held_out_ids() if self.scans is None else list(self.scans)


def open_file(data: Path, path: Path, flag: str, settings: Settings, device: torch.device) -> Trained:
    """The training that left the file `path`, of a method that is one file. Raises unless it is of this database."""
    reconstructor, known = method(settings.method).from_training(path, device)
    dataset = SliceDataset(data, "train")
    if key := dataset.unlike(known):
        raise ValueError(f"{flag} {path}: was trained on another database than {data} (another {key}); give that one: "
                         "this one's held-out scans may be among its training scans")
    if "held_out" not in known:
        print(f"warning: {path}: does not say which scans it was trained on: if held-out scans were among them, the "
              "healthy scores come out too low")
    return Trained(dataset, data, reconstructor.config(), {"data": dataset.facts(), "trained": known.get("trained")},
                   lambda: reconstructor.with_settings(settings.reconstruction))


def check_held_out(settings: Settings, trained: list[Trained]) -> None:
    """ValueError unless each database holds out scans, of this preprocessing, no scan twice, and enough patients."""
    seen: dict[str, Path] = {}
    for one in trained:
        held_out = one.held_out_ids()
        if not held_out:
            raise ValueError(f"--data {one.path}: no held-out scans to calibrate on; prepare it with a --val-fraction "
                             "above 0, or pass --calibrate none")
        if twice := [scan_id for scan_id in held_out if scan_id in seen]:
            raise ValueError(f"--fold {one.path}: {some(twice)} held out in {seen[twice[0]]} already: folds hold "
                             "different scans out (prepare.py --split)")
        if (version := one.dataset.manifest.get("preprocessing_version", 1)) != frame.VERSION:       # 1 did not say
            raise ValueError(f"--data {one.path}: was prepared by version {version} of the preprocessing, and new "
                             f"scans are by version {frame.VERSION}: prepare it anew with prepare.py")
        seen |= dict.fromkeys(held_out, one.path)
        if one.networks != trained[0].networks or (
                one.dataset.manifest["settings"] != trained[0].dataset.manifest["settings"]):
            raise ValueError(f"--fold {one.path}: its networks or preprocessing are not those of --encoder: the "
                             "residuals would not be alike")
    people = {scan["patient"] for one in trained for scan in one.dataset.manifest["scans"] if scan["scan_id"] in seen}
    if len(people) < (least := MEASURES[settings.measure].least_patients):
        others = [f"measure={name}" for name, measure in MEASURES.items() if measure.least_patients <= len(people)]
        raise ValueError(f"measure={settings.measure}: needs held-out healthy scans of {least} patients, "
                         f"{trained[0].path} has those of {len(people)}; prepare it with a larger --val-fraction"
                         + (f", or use {' or '.join(others)}" if others else ""))


def calibrate(folds: Sequence[Fold], measure: Measure, log: Callable[[str], None] = print
              ) -> tuple[dict[str, Any], Measure]:
    """The calibration, as JSON, and the fitted measure, from the held-out scans, each reconstructed by its own fold.

    split          'val'
    scans          their number: their ids are names of folders, and not kept
    patients       the number of patients
    scan_scores    by each of SCAN_SCORES, one of each patient: that of his scan which scores highest. Patients are
                   drawn at random, scans of one are not: ranks among scans would flag more of the healthy than told
    slice_scores   one dict per slice: scan (index into these), below_vertex_mm, score; of a patient's second scan
                   and later ones nth, too, from 1
    threshold      by each of SCAN_SCORES, exceeded by a healthy scan with probability `fpr` at most; None
                   where there are too few patients, with the `reason`
    error_hu       mean absolute error of the reconstruction in the brain after each stage, HU, mean over scans
    healthy        error_hu and brain_hu of each scan: that error, and the median of its brain, HU
    precision      of the networks

    Raises ValueError for too few scans, and naming a scan that cannot be reconstructed or judged.
    """
    evidence: list[Evidence] = []
    patients = [patient for fold in folds for patient in fold.held_out.patients]
    errors: list[dict[str, float]] = []
    brain_hu: list[float] = []
    for fold in folds:
        for s, scan_id in enumerate(fold.held_out.scan_ids):
            scan = fold.held_out.scan(s)
            brain, mm = scan["brain"], scan["below_vertex_mm"].numpy()
            watch = measure.watch(brain, mm)
            try:
                found = fold.reconstructor.closest_normal(scan["hu"].float(), brain, mm, watch)
                evidence.append(measure.evidence(found, brain, mm, watch))
            except ValueError as error:
                raise ValueError(f"{fold.held_out.path}: {scan_id}: {error}") from error
            errors.append(found.error_hu)
            brain_hu.append(median_hu(scan["hu"], brain))
            log(f"{scan_id}: {len(mm)} slices, {sum(found.seconds.values()):.0f} s, error in HU "
                + ", ".join(f"{stage} {error:.2f}" for stage, error in found.error_hu.items()))
    fitted, findings = measure.fit(evidence, patients)
    scores = [one.slice_scores for one in findings]
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    calibration = summary([one.below_vertex_mm.tolist() for one in evidence], scores, errors, brain_hu, len(numbers),
                          [numbers[patient] for patient in patients])
    if (count := healthy_count(calibration)) < calibration["scans"]:
        log(f"note: {calibration['scans']} scans of {count} patients: those of one are alike, and "
            "tell less of another's than scans of as many patients would; of each patient the highest score counts")
    for how, values in healthy_scores(calibration).items():
        log(f"scores of the healthy scans by {how}, lowest first: "
            + " ".join(f"{value:.3g}" for value in sorted(values)))
    return calibration | {"precision": str(folds[0].reconstructor.precision).removeprefix("torch.")}, fitted


def summary(positions: list[list[float]], scores: list[torch.Tensor],
            errors: list[dict[str, float]], brain_hu: list[float], patients: int,
            whose: Sequence[int] | None = None) -> dict[str, Any]:
    """The calibration's JSON from positions, slice scores, errors and median of the brain (HU) of each scan.

    whose: number of each scan's patient, from 0 in the order of their first scans; None: each of another's.
    """
    whose = list(range(len(scores)) if whose is None else whose)
    nth = [whose[:s].count(patient) for s, patient in enumerate(whose)]
    scan_scores = {how: highest_of_each([scan_score(one, how, thickness_mm(mm)) for one, mm in zip(scores, positions)],
                                        whose) for how in SCAN_SCORES}
    slice_scores = [{"scan": whose[s]} | ({"nth": nth[s]} if nth[s] else {})
                    | {"below_vertex_mm": round(mm, 3), "score": score}
                    for s, (one, places) in enumerate(zip(scores, positions))
                    for score, mm in zip(one.tolist(), places)]
    found = thresholds(scan_scores, FPR, patients if patients < len(scores) else None)
    mean_error = {stage: sum(error[stage] for error in errors) / len(errors) for stage in errors[0]}
    return {"split": "val", "scans": len(scores), "patients": patients, "scan_scores": scan_scores,
            "slice_scores": slice_scores, "threshold": found, "error_hu": mean_error,
            "healthy": {"error_hu": [Reconstruction.last_error(error) for error in errors], "brain_hu": brain_hu}}


def highest_of_each(values: Sequence[float], whose: Sequence[int]) -> list[float]:
    """Of the values of scans the highest of each patient, in the order of their first scans."""
    highest: dict[int, float] = {}
    for value, patient in zip(values, whose):
        highest[patient] = max(value, highest.get(patient, value))
    return list(highest.values())


def thresholds(scan_scores: dict[str, list[float]], fpr: float, patients: int | None = None) -> dict[str, Any]:
    """{fpr, a threshold or None for each way of scoring, reason}: reason says why there is none, else None.

    scan_scores: one of each patient (a bundle made before may hold one of each scan). patients: how many people's scans
    these are, or the highest of; None: each of another's. 20 scans of one head do not tell what one head in 20 exceeds.
    """
    try:
        if patients is not None and patients < (needed := least_healthy(fpr)):
            raise ValueError(f"a false-positive rate of {fpr} needs healthy scans of {needed} patients, found those of "
                             f"{patients}; add scans of others or allow a higher rate")
        by_score = {how: threshold_at_fpr(scores, fpr) for how, scores in scan_scores.items()}
    except ValueError as error:
        return {"fpr": fpr} | dict.fromkeys(scan_scores) | {"reason": str(error)}
    return {"fpr": fpr} | by_score | {"reason": None}


# --- what is read of a calibration ---


@dataclass(frozen=True)
class Threshold:
    """Of scores by one of SCAN_SCORES: `value`, which a healthy scan exceeds with probability `fpr` at most.

    value is None where there are too few patients, with the reason, and where the calibration lacks such scores.
    """

    value: float | None
    fpr: float
    reason: str | None


def threshold_of(calibration: Mapping[str, Any], how: str) -> Threshold:
    """The stored one of scores by `how`."""
    stored = calibration["threshold"]
    return Threshold(stored.get(how), stored["fpr"], stored.get("reason"))


def healthy_scores(calibration: Mapping[str, Any]) -> dict[str, list[float]]:
    """By each of SCAN_SCORES that the calibration knows, one score of each healthy patient."""
    return calibration["scan_scores"]


def healthy_count(calibration: Mapping[str, Any]) -> int:
    """The number of healthy patients. The shipped calibrations do not hold it: theirs have one scan each."""
    return calibration.get("patients", calibration["scans"])


def healthy_slices(calibration: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Positions, mm below the vertex, and scores of all slices of the healthy scans, both [M]."""
    slices = calibration["slice_scores"]
    return np.array([one["below_vertex_mm"] for one in slices]), np.array([one["score"] for one in slices])


def mean_error_hu(calibration: Mapping[str, Any]) -> float:
    """Mean absolute error of the healthy scans' closest normal in the brain, HU; Reconstruction.error of each."""
    return Reconstruction.last_error(calibration["error_hu"])


def median_hu(hu: torch.Tensor, brain: torch.Tensor) -> float:
    """Of the brain, HU. Both [S, N, N]."""
    return float(hu[brain].float().median())


def usual_range(calibration: Mapping[str, Any], figure: str) -> tuple[float, float] | None:
    """Range of 'error_hu' or 'brain_hu', HU, in which a scan counts as like the healthy ones.

    Their own range, and as much again on both sides. None for too few scans, or where the calibration lacks them, as
    that of models/phantom-128 does.
    """
    values = calibration.get("healthy", {}).get(figure, ())
    if len(values) < FIGURES:
        return None
    width = max(max(values) - min(values), LEAST_RANGE_HU)
    return min(values) - width, max(values) + width


def spacing_range(calibration: Mapping[str, Any]) -> tuple[float, float]:
    """The smallest and the largest usual_spacing of the healthy scans, mm."""
    spacings = [usual_spacing(mm) for mm in _positions_mm(calibration)]
    return min(spacings), max(spacings)


def depth_range(calibration: Mapping[str, Any]) -> tuple[float, float] | None:
    """How far below the vertex the healthy scans reach, from the least to the most, mm; None for too few scans."""
    depths = [max(mm) for mm in _positions_mm(calibration)]
    return (min(depths), max(depths)) if len(depths) >= FIGURES else None


def _positions_mm(calibration: Mapping[str, Any]) -> list[list[float]]:
    """Of the slices of each healthy scan, mm below the vertex."""
    positions_mm: dict[tuple[int, int], list[float]] = defaultdict(list)
    for one in calibration["slice_scores"]:
        positions_mm[one["scan"], one.get("nth", 0)].append(one["below_vertex_mm"])
    return list(positions_mm.values())


def usual_spacing(positions_mm: Sequence[float]) -> float:
    """The median distance of neighbouring slices, mm; SLICE_MM for a single slice."""
    return float(np.median(np.abs(np.diff(positions_mm)))) if len(positions_mm) > 1 else SLICE_MM


def share_outside(positions_mm: Sequence[float], least_mm: float, most_mm: float) -> float:
    """The share of a scan's height in slices whose nearer neighbour is closer than least_mm or farther than most_mm.

    The nearer one, so that a scan of one spacing has one with slices missing, too. 0 for a single slice.
    """
    if len(positions_mm) < 2:
        return 0.0
    position_mm = np.asarray(positions_mm, float)
    step_mm, height_mm = nearest_mm(position_mm), slice_thickness_mm(position_mm)
    return float(height_mm[(step_mm < least_mm) | (step_mm > most_mm)].sum() / height_mm.sum())


def largest_share_outside(calibration: Mapping[str, Any], least_mm: float, most_mm: float) -> float:
    """That of the healthy scan where it is largest."""
    return max(share_outside(mm, least_mm, most_mm) for mm in _positions_mm(calibration))


def at_rate(calibration: dict[str, Any], rate: float) -> dict[str, Any]:
    """The calibration with thresholds that a healthy scan exceeds with probability `rate` at most.

    Raises ValueError, with the number of healthy scans that the rate needs, where there are too few for it.
    """
    if not 0 < rate < 1:
        raise ValueError(f"alarm rate: expected a share between 0 and 1, such as 0.05, got {rate:g}")
    found = thresholds(healthy_scores(calibration), rate, calibration.get("patients"))
    if found["reason"]:
        n = healthy_count(calibration)
        whose = f" of {n} patients" if n < calibration["scans"] else ""
        raise ValueError(f"alarm rate {rate:g}: {calibration['scans']} healthy scans{whose} cannot tell it; the lowest "
                         f"rate that they allow is {rounded_up(1 / (n + 1)):.3g}, or calibrate with more scans "
                         "(latent_stats.py)")
    return calibration | {"threshold": found}
