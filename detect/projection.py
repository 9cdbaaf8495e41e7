"""A scan projected: its closest normal, what differs, how unusual that is. The Python API; no files, no flags."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from ct.frame import Preprocessed, PreprocessSettings, clipped_below, preprocess_scan
from ct.scan import Scan
from ct.slab import slice_thickness_mm
from detect import calibration
from detect.bundle import Bundle, versions
from detect.measure import Measure
from detect.reconstruct import Reconstruction, Reconstructor
from detect.residual import Evidence, Findings
from detect.scores import percentile_of, scan_score, thickness_mm
from detect.settings import Settings, stored

OTHER_SPACING = 1.25    # slices further apart than those of the calibration by this factor, or closer, do not compare
UNEVEN = 0.1            # of a scan's height may have another spacing (a slice at an end or between two spacings), or as
                        # much as of a healthy scan's
ROUNDED_MM = 0.01       # headers round positions: slices this much further apart are as far apart
TOO_FAR = 2.0           # times the mean error of healthy scans, where not each one's is known: did not come close
TOO_MUCH = 0.35         # predicted part of the brain from which the reconstruction, not the brain, is at fault


@dataclass(frozen=True)
class Projection:
    """A projected scan. Maps are [S, H, W] in the scan's own geometry: its slices, inferior to superior.

    reconstruction_hu  float32, HU: the closest normal
    residual_hu        float32, HU: scan minus closest normal in the brain, median-filtered, signed
    anomaly            float32, the further from 0 the more abnormal, positive where hyperdense and negative where
                       hypodense: weighted surprise, or votes times residual in HU
    mask, brain        bool: what is predicted anomalous, large components and what they extend to; the brain
    slice_scores       float32 [S], 0 where a slice was not projected
    below_vertex_mm    float64 [S]; projected bool [S]: False where there was too little brain
    score              of the scan
    percentile         among the healthy scans of the model's calibration; None where scores cannot be compared (notes)
    threshold          of the calibration, or the one given, which stays where only the calibration does not fit (none,
                       other settings or slice spacing); None without one and where the scan is not to be compared
                       (reservations, unreliable). flagged: score > threshold; None without one
    error_hu           mean absolute difference between scan and closest normal in the brain
    anomalous_ml       volume of the mask; None where the source does not tell its pixel spacing
    unreliable         why the score is not to be trusted; None where nothing speaks against it. No percentile, no flag
    notes              what a reader should know, in words
    seconds            by stage
    working            the scan at working thickness, with what it takes to bring maps back
    """

    scan: Scan = field(repr=False)
    reconstruction_hu: np.ndarray = field(repr=False)
    residual_hu: np.ndarray = field(repr=False)
    anomaly: np.ndarray = field(repr=False)
    mask: np.ndarray = field(repr=False)
    brain: np.ndarray = field(repr=False)
    slice_scores: np.ndarray = field(repr=False)
    below_vertex_mm: np.ndarray = field(repr=False)
    projected: np.ndarray = field(repr=False)
    score: float
    percentile: float | None
    threshold: float | None
    flagged: bool | None
    error_hu: float
    anomalous_ml: float | None
    unreliable: str | None
    notes: tuple[str, ...]
    seconds: dict[str, float] = field(repr=False)
    working: Preprocessed = field(repr=False)


class Projector:
    """Projects scans with a bundle: Projector(load_bundle(folder))(read_scan(source)) -> Projection.

    settings       None: the bundle's; others by bundle.settings.replace(name=value)
    preprocessing  None: the bundle's; needed for an imported bundle, which has none
    threshold      scans with a higher score are flagged; None: the calibration's
    alarm_rate     takes the calibration's threshold at this share of healthy scans, 0 to 1, instead of the stored one

    Raises ValueError where the bundle lacks what the settings or the alarm rate need, and for a threshold that is no
    number.
    """

    def __init__(self, bundle: Bundle, settings: Settings | None = None,
                 preprocessing: PreprocessSettings | None = None, threshold: float | None = None,
                 alarm_rate: float | None = None):
        self.calibrated_for = Settings.from_json(bundle.meta["settings"])     # bundle.settings may be others since
        self.bundle = bundle if settings is None else bundle.with_settings(settings)
        self.preprocessing = preprocessing or bundle.preprocessing
        if self.preprocessing is None:
            raise ValueError("the bundle does not say how its scans were prepared; give preprocessing")
        self.settings = self.bundle.settings
        self.bundle.reconstructor.check()
        self.bundle.measure.check()
        self.incomparable = self._why_incomparable()
        self.calibration = None if self.incomparable else bundle.meta["calibration"]
        self.spacing_mm = calibration.spacing_range(self.calibration) if self.calibration else None
        self.depth_mm = calibration.depth_range(self.calibration) if self.calibration else None
        if threshold is not None and alarm_rate is not None:
            raise ValueError("threshold and alarm_rate: each says what is flagged; give one of them")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold: expected a finite score, got {threshold:g}")
        self.threshold, self.alarm_rate = threshold, alarm_rate
        if alarm_rate is not None:
            if not self.calibration:
                raise ValueError(f"alarm rate {alarm_rate:g}: needs comparable healthy scores; {self.incomparable}")
            if (how := self.settings.scan_score) not in (known := calibration.healthy_scores(self.calibration)):
                raise ValueError(f"alarm rate {alarm_rate:g}: the calibration holds no scores by {how}, only by "
                                 f"{', '.join(known)}; choose one of them as scan_score, or run latent_stats.py again")
            self.calibration = calibration.at_rate(self.calibration, alarm_rate)

    def _why_incomparable(self) -> str | None:
        """Why scores cannot be compared with those of the calibration; None where they can."""
        meta, now = self.bundle.meta, versions()
        if not meta["calibration"]:
            return "the model is not calibrated: no percentile"
        for what in ("preprocessing", "measure"):
            if meta["versions"][what] != now[what]:
                return (f"the model was calibrated with version {meta['versions'][what]} of the {what}, this is "
                        f"version {now[what]}: no percentile; run latent_stats.py again")
        if plain(self.preprocessing.to_json()) != plain(meta["preprocessing"]):
            return "scans are prepared in another way than those of the calibration: no percentile"
        if others := self.settings.other_than(meta["settings"]):
            return f"the settings are not those of the calibration ({', '.join(others)}): no percentile"
        return None

    def prepare(self, scan: Scan) -> Preprocessed:
        """What comes before the networks. Raises ScanError where no head or no usable slice is found."""
        return preprocess_scan(scan, self.preprocessing)

    def __call__(self, scan: Scan, prepared: Preprocessed | None = None) -> Projection:
        """prepared: self.prepare(scan), which may be done elsewhere meanwhile. Raises ScanError as it does."""
        seconds, pre = {}, prepared
        if pre is None:
            started = time.perf_counter()
            pre = self.prepare(scan)
            seconds["standardise"] = time.perf_counter() - started
        hu, brain, below_vertex_mm = pre.kept_slices()
        hu, brain = torch.from_numpy(hu), torch.from_numpy(brain)
        found, evidence, findings, measuring = project_frame(self.bundle.reconstructor, self.bundle.measure, hu, brain,
                                                             below_vertex_mm)
        seconds |= found.seconds | {"measure": measuring}
        started = time.perf_counter()
        # By the calibration's mask settings: those of this run only draw, and must not change what is trusted
        predicted = self.bundle.measure.predicted(findings, self.calibrated_for.mask)
        share = float(predicted.sum() / brain.sum())
        notes = [*scan.notes, *pre.reservations]
        unreliable = None
        if share > TOO_MUCH:
            unreliable = (f"{share:.0%} of the brain differs from its reconstruction: not to be trusted; check the "
                          "scan's window, orientation and brain mask")
            notes.append(unreliable)
        if self.incomparable:
            notes.append(self.incomparable)
        score = scan_score(findings.slice_scores, self.settings.scan_score, thickness_mm(below_vertex_mm))
        # A large lesion is far from its closest normal, as it should be: what tells a bad reconstruction is the rest
        error_of_rest = found.error_in(brain & ~predicted)
        percentile, threshold, why_not = self._compare(score, error_of_rest, calibration.median_hu(hu, brain),
                                                       below_vertex_mm)
        notes += why_not
        if unreliable or pre.reservations:
            percentile = threshold = None
            notes.append(no_percentile(scan, self.preprocessing))
        mask = pre.maps_to_scan(findings.mask.numpy())
        return Projection(
            scan=scan, reconstruction_hu=pre.maps_to_scan(found.normal_hu.numpy(), float(found.query_hu.min())),
            residual_hu=pre.maps_to_scan(evidence.residual.numpy()), anomaly=pre.maps_to_scan(findings.anomaly.numpy()),
            mask=mask, brain=pre.slabs.from_slabs(pre.brain),
            slice_scores=pre.scores_to_scan(findings.slice_scores.numpy()),
            below_vertex_mm=pre.below_vertex_mm(),
            projected=pre.values_to_scan(pre.kept), score=score, percentile=percentile, threshold=threshold,
            flagged=None if threshold is None else score > threshold, error_hu=found.error,
            anomalous_ml=volume_ml(mask, scan), unreliable=unreliable, notes=tuple(dict.fromkeys(notes)),
            seconds=seconds | {"to the scan": time.perf_counter() - started}, working=pre)

    def _compare(self, score: float, error_of_rest: float, brain_hu: float,
                 below_vertex_mm: np.ndarray) -> tuple[float | None, float | None, list[str]]:
        """Percentile and threshold of a score, None where unknown, with notes that say why.

        Without a calibration that compares there is no note here: self.incomparable is one already.
        """
        how = self.settings.scan_score
        if not self.calibration:
            return None, self.threshold, []
        healthy = calibration.healthy_scores(self.calibration)
        if how not in healthy:
            return None, self.threshold, [f"the calibration holds no scores by {how}: no percentile"]
        spacing_mm = calibration.usual_spacing(below_vertex_mm)
        least = self.spacing_mm[0] / OTHER_SPACING - ROUNDED_MM
        most = self.spacing_mm[1] * OTHER_SPACING + ROUNDED_MM
        low, high = (f"{mm:.3g}" for mm in self.spacing_mm)
        usual_mm = low if low == high else f"{low} to {high}"
        if not least <= spacing_mm <= most:
            return None, self.threshold, [f"slices {spacing_mm:.3g} mm apart, those of the calibration "
                                          f"{usual_mm} mm: no percentile"]
        outside = calibration.share_outside(below_vertex_mm, least, most)
        if outside > UNEVEN and outside > calibration.largest_share_outside(self.calibration, least, most):
            return None, self.threshold, [f"{outside:.0%} of what the scan shows has slices closer together or further "
                                          f"apart than those of the calibration, {usual_mm} mm: no percentile"]
        stored = calibration.threshold_of(self.calibration, how)
        threshold = stored.value if self.threshold is None else self.threshold
        notes = [] if threshold is not None else [f"no threshold: {stored.reason}"]
        usual = calibration.mean_error_hu(self.calibration)
        # Flagged all the same, in all three cases: what a part of a head scores, all of it would at least, and a head
        # full of blood is so far off, too
        depth_mm, known = float(np.max(below_vertex_mm)), self.depth_mm
        if known and depth_mm < known[0] - (known[1] - known[0]):
            return None, threshold, [f"the scan shows the brain down to {depth_mm:.0f} mm below the vertex, healthy "
                                     f"scans down to {known[0]:.0f} to {known[1]:.0f} mm: what is not shown has no "
                                     "score; no percentile", *notes]
        within = calibration.usual_range(self.calibration, "brain_hu")
        if within and not within[0] <= brain_hu <= within[1]:
            return None, threshold, [f"the median of the brain is {brain_hu:.0f} HU, of healthy scans about "
                                     f"{within[0]:.0f} to {within[1]:.0f}: is the HU scale right? No percentile",
                                     *notes]
        within = calibration.usual_range(self.calibration, "error_hu")
        if not error_of_rest <= (within[1] if within else TOO_FAR * usual):       # of NaN, too, it is not close
            return None, threshold, [f"the closest normal is off by {error_of_rest:.1f} HU where nothing is marked, of "
                                     f"healthy scans by {usual:.1f}: it does not come close; no percentile", *notes]
        return percentile_of(score, healthy[how]), threshold, notes

    def key(self) -> dict:
        """All that results depend on, as JSON: results of different keys are never mixed in a folder.

        The calibration by its hash: it may be made again for the same weights.
        """
        precision = str(self.bundle.reconstructor.precision)
        alarm, own = {"threshold": self.threshold, "alarm_rate": self.alarm_rate}, self.calibrated_for.mask
        calibrated = hashlib.sha256(json.dumps(self.calibration, sort_keys=True).encode()).hexdigest()
        return plain({"weights": self.bundle.weights_hash, "settings": self.settings.to_json(), "versions": versions(),
                      "preprocessing": self.preprocessing.to_json(), "precision": precision,
                      "calibration": calibrated if self.calibration else None}
                     | ({} if own == self.settings.mask else {"calibrated_mask": stored(own)})   # tells what to trust
                     | {name: value for name, value in alarm.items() if value is not None})


def project_frame(reconstructor: Reconstructor, measure: Measure, hu: torch.Tensor, brain: torch.Tensor,
                  below_vertex_mm: np.ndarray) -> tuple[Reconstruction, Evidence, Findings, float]:
    """Closest normal, evidence and findings of one scan in the standard frame, and the seconds that the measure took.

    hu float32 [S, N, N], HU; brain bool [S, N, N]; below_vertex_mm [S]: all slices, in order.
    """
    watch = measure.watch(brain, below_vertex_mm)
    found = reconstructor.closest_normal(hu, brain, below_vertex_mm, watch)
    started = time.perf_counter()
    evidence = measure.evidence(found, brain, below_vertex_mm, watch)
    findings = measure.assess(evidence)
    return found, evidence, findings, time.perf_counter() - started


def no_percentile(scan: Scan, settings: PreprocessSettings) -> str:
    """The note of a scan that is not compared, for reasons in other notes; with the remedy where its HU are clipped."""
    note = "not compared with healthy scans: no percentile, no flag"
    if clipped_below(scan, settings):
        low, high = scan.saturation_hu
        note += (f"; give the scan with all of its HU, or a model that looks at no more than {low:g}..{high:g} HU "
                 "(hu_clip in its model.json)")
    return note


def volume_ml(mask: np.ndarray, scan: Scan) -> float | None:
    """Volume of a mask [S, H, W] in millilitres; None where the source does not tell its pixel spacing.

    What may lie where slices are missing does not count (ct.slab.slice_thickness_mm).
    """
    if scan.pixel_spacing_mm is None:
        return None
    one = len(scan.position_mm) == 1
    thickness = np.array([scan.slice_spacing_mm]) if one else slice_thickness_mm(scan.position_mm)
    return float((mask.sum((1, 2)) * thickness).sum() * np.prod(scan.pixel_spacing_mm) / 1000)


def plain(value):
    """As it comes back from JSON: tuples as lists."""
    return json.loads(json.dumps(value))
