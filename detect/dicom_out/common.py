"""What all DICOM objects of a scan's results share: the case and the identity of the model."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from ct.derived import Derived, DerivedError, Maker
from ct.scan import Scan
from detect.scores import choose_key_slices

SERIES = {"sr": 1, "seg": 2, "map": 3, "key-objects": 4, "pictures": 5}     # last digits of the series numbers
LONGEST_NAME = 64
TRACKING_ID = "Differs from the closest normal"         # one for the scan: SEG and SR name the same


@dataclass(frozen=True)
class Identity:
    """The model that made the results; the objects' UIDs depend on all of it.

    name          of the model, such as 'head-128'; made to fit where DICOM has a place for it, see fitting()
    version       of the software
    weights_hash  SHA-256 of the weights, hexadecimal; other weights are another device
    settings      everything else that decides the result, as one text, such as JSON
    in_hu         map and scores are in HU, as those by votes; else they have no unit, as a surprise
    """

    name: str
    version: str
    weights_hash: str
    settings: str = ""
    in_hu: bool = False

    def __post_init__(self):
        object.__setattr__(self, "name", fitting(self.name))

    @property
    def maker(self) -> Maker:
        return Maker(self.name, self.version, self.weights_hash[:64])

    @property
    def unit(self) -> Code:
        """Of map and scores."""
        return codes.UCUM.HounsfieldUnit if self.in_hu else codes.UCUM.NoUnits


def fitting(name: str) -> str:
    """A name as any DICOM object can hold it (LO), whatever the character set of its source: 64 characters of ASCII.

    Letters lose their accents; what is left that is not ASCII, or has a meaning of its own, becomes an underscore.
    """
    bare = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" and c != "\\" else "_" for c in bare)[:LONGEST_NAME].strip() or "unnamed model"


class Result(Protocol):
    """The part of a detect.Projection that the objects need; maps are [S, H, W] of the scan's own slices."""

    scan: Scan
    anomaly: np.ndarray                       # float, of Identity.unit
    mask: np.ndarray                          # bool
    slice_scores: np.ndarray                  # [S]
    projected: np.ndarray                     # bool [S]
    score: float
    percentile: float | None                  # of the score among healthy scans, %
    threshold: float | None
    flagged: bool | None                      # None without a threshold
    anomalous_ml: float | None


@dataclass(frozen=True)
class Case(Derived):
    """One scan's results to be written as DICOM; key_slices: see key_slices_of."""

    result: Result
    identity: Identity
    key_slices: tuple[int, ...]

    @property
    def tracking_uid(self) -> str:
        return self.uid("tracking")

    def header_of(self, kind: str, description: str, instance: int = 1) -> dict:
        """Derived.header for a kind of SERIES."""
        return self.header(kind, SERIES[kind], description, instance)


def open_case(result: Result, identity: Identity, phi: bool, made: datetime) -> Case:
    """Read the headers of the scan's files again. Raises DerivedError where results cannot refer to them."""
    scan = result.scan
    if not np.isfinite(result.score):
        raise DerivedError(f"{scan.scan_id}: its score is no number: a report would call the finding absent")
    for name in ("anomaly", "mask"):
        if getattr(result, name).shape != scan.hu.shape:
            raise DerivedError(f"{scan.scan_id}: {name} {list(getattr(result, name).shape)} does not fit the scan "
                               f"{list(scan.hu.shape)}")
    return Case.open(scan, identity.maker, (identity.settings, result.threshold), phi, made, result=result,
                     identity=identity, key_slices=key_slices_of(result))


def key_slices_of(result: Result) -> tuple[int, ...]:
    """Of the projected slices those with the highest scores, marked ones first, as choose_key_slices takes them."""
    marked = result.mask.any((1, 2))
    order = sorted(np.flatnonzero(result.projected), key=lambda k: (not marked[k], -result.slice_scores[k]))
    return tuple(int(order[place]) for place in choose_key_slices(result.scan.position_mm[order]))
