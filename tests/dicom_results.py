"""Projections that are written as DICOM in the tests."""

from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace

import numpy as np

from ct.read import find_scans, read_scan
from ct.scan import Scan
from detect.dicom_out import Identity, dicom_writer
from detect.surprise import Surprise

RNG = np.random.default_rng(2)
HU = RNG.permutation(np.arange(6 * 12 * 10)).reshape(6, 12, 10).astype(np.float32) - 700    # every pixel its own value
DENSE = 0                              # about one pixel in 40 is marked
IDENTITY = Identity("tiny", "1.2", "ab" * 32, "{}")
MADE = datetime(2024, 5, 6, 7, 8, 9)


@dataclass(frozen=True)
class Result:
    """A projection whose maps are the scan itself, so that a file's own pixels say what a result must hold."""

    scan: Scan
    anomaly: np.ndarray
    mask: np.ndarray
    slice_scores: np.ndarray
    projected: np.ndarray
    score: float = 3.25
    percentile: float | None = 97.5
    threshold: float | None = 2.5
    flagged: bool | None = True
    anomalous_ml: float | None = 1.5


@dataclass(frozen=True)
class Negative(Result):
    score: float = 0.5
    flagged: bool | None = False
    anomalous_ml: float | None = 0.0
    percentile: float | None = field(default=12.0)


def result_of(scan, kind=Result, **values):
    mask = scan.hu > DENSE if kind is Result else np.zeros(scan.hu.shape, bool)
    scores = np.arange(len(scan.hu), dtype=np.float32)
    return kind(scan, scan.hu.copy(), mask, scores, np.arange(len(scan.hu)) < 5, **values)


def read_only(folder):
    source, = find_scans(folder)
    return read_scan(source)


def writer(phi=True):
    key = {"weights": "w", "threshold": 1.0}
    bundle = SimpleNamespace(meta={"provenance": {"name": "tiny"}}, weights_hash="ab" * 32, measure=Surprise())
    return dicom_writer(SimpleNamespace(bundle=bundle, key=lambda: key), phi)
