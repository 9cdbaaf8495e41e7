"""Who is evaluated: scores and labels from CSV files, matched by scan or by slice; nobody is left out silently."""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from PIL import Image

from common.files import Row
from common.files import read_table as read_rows
from common.pictures import UNREADABLE, refuse_16_bit_colour
from common.wording import some
from evaluation.metrics import empirical_threshold

Key = tuple                                # (scan_id,) or (scan_id, slice)
Score = float | str                        # or one of UNSCORED where there is none that counts
HALF = 0.5 - 0.01                          # of a step between slices: as ct.geometry has it, which draws the maps
OPTIONAL = ("types", "patient")            # columns of a table of labels
UNSCORED = ("failed", "unreliable")        # status of a scan in scores.csv other than 'ok'


class InputError(ValueError):
    """Files or flags that do not fit; the message names them, what was expected and found, and how to fix it."""


@dataclass(frozen=True)
class Label:
    label: int                             # 0 normal, 1 abnormal
    types: tuple[str, ...]                 # kinds of finding, none for a normal one
    patient: str                           # alone() where none is given


@dataclass(frozen=True)
class Units:
    """Scans or slices with a score and a label, in the order of the label file."""

    keys: list[Key]
    scores: np.ndarray                     # float64 [n]
    labels: np.ndarray                     # int64 [n]
    types: list[tuple[str, ...]]
    clusters: np.ndarray                   # [n], the patient
    left_out: dict[str, int]               # why -> how many
    worst: np.ndarray                      # bool [n]: without a score that counts; ranked and, at any threshold,
                                           # called wrongly
    not_chosen: frozenset[Key] = frozenset()   # labelled, and left out on purpose

    @property
    def counted_worst(self) -> int:
        return int(self.worst.sum())

    def where(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Scores, labels and clusters of the chosen ones, a bool [n]."""
        return self.scores[chosen], self.labels[chosen], self.clusters[chosen]


def alone(scan_id: str) -> str:
    """In place of a patient where none is given. No patient is read with a space before it, so an id is no name."""
    return f" {scan_id}"


def name(key: Key) -> str:
    """A key for messages, with leading and trailing spaces and unprintable or composed characters made visible."""
    shown = " slice ".join(map(str, key))
    plain = shown.isprintable() and shown == shown.strip() and unicodedata.is_normalized("NFC", shown)
    return shown if plain else ascii(shown)


def key_names(keys: Sequence[Key]) -> str:
    """The first few keys, for messages."""
    return some([*map(name, keys)], 3)


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a CSV file whose header has at least these columns. Raises InputError."""
    return read_rows(path, columns, InputError)


def rows_by_key(path: Path, columns: Sequence[str], by_slice: bool) -> Iterator[tuple[Key, Row]]:
    """Rows of a table of scans or slices, each with its key. Raises InputError for a key that is no key or not new."""
    seen = set()
    for row in read_table(path, ("scan_id", *(["slice"] if by_slice else []), *columns)):
        if not row["scan_id"]:
            raise InputError(f"{path}, line {row.line}: has no scan_id; give it one, or remove the line")
        if by_slice and not row["slice"].isdecimal():
            raise InputError(f"{path}, line {row.line}: slice must be a whole number from 0, found {row['slice']!r}")
        key = (row["scan_id"], int(row["slice"])) if by_slice else (row["scan_id"],)
        if key in seen:
            raise InputError(f"{path}, line {row.line}: {name(key)} is there twice; each may have one row")
        seen.add(key)
        yield key, row


def seconds_by_scan(path: Path) -> dict[str, float]:
    """Seconds by scan, from seconds.csv of projector.py. Raises InputError."""
    return {row["scan_id"]: finite(path, row, "seconds") for row in read_table(path, ("scan_id", "seconds"))}


def read_scores(path: Path, by_slice: bool = False) -> dict[Key, Score]:
    """Score by key, or the status of a scan where that is one of UNSCORED (slices have none). Raises InputError."""
    scores = {}
    for key, row in rows_by_key(path, ("score",) if by_slice else ("score", "status"), by_slice):
        status = "ok" if by_slice else row["status"]
        if status not in ("ok", *UNSCORED):
            raise InputError(f"{path}, line {row.line}: {name(key)} has status {status!r}; expected 'ok' or 'failed' "
                             "or 'unreliable'")
        scores[key] = status if status in UNSCORED else finite(path, row, "score")
    return scores


def finite(path: Path, row: Row, column: str) -> float:
    """A cell as a number. Raises InputError where it is none, or not finite."""
    try:
        value = float(row[column])
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise InputError(f"{path}, line {row.line}: {column} must be a finite number, with a decimal point, found "
                         f"{row[column]!r}")
    return value


def read_labels(path: Path, where: Sequence[str] = (),
                by_slice: bool = False) -> tuple[dict[Key, Label], set[Key]]:
    """Labels by key, and the keys left out by the conditions COLUMN=VALUE. Raises InputError.

    Of several conditions on one column one must hold; every column with conditions must meet them. A condition that no
    row meets is refused.
    """
    conditions: dict[str, set[str]] = {}
    for column, _, value in (condition.partition("=") for condition in where):
        conditions.setdefault(column, set()).add(value.strip())
    labels, not_chosen = {}, set()
    rows = list(rows_by_key(path, ("label", *conditions), by_slice))
    _refuse_misspelt(path, rows[0][1] if rows else ())
    _refuse_unmet(path, [row for _, row in rows], conditions)
    for key, row in rows:
        if any(row[column].strip() not in values for column, values in conditions.items()):
            not_chosen.add(key)
            continue
        types = tuple(sorted({t.strip() for t in row.get("types", "").split("|")} - {""}))
        value = row["label"].strip()
        if value not in ("0", "1"):
            raise InputError(f"{path}, line {row.line}: {name(key)} has label {row['label']!r}; expected 0 or 1")
        if value == "0" and types:
            raise InputError(f"{path}, line {row.line}: {name(key)} has label 0 and types {'|'.join(types)!r}; "
                             "expected no types beside label 0: leave that cell empty")
        labels[key] = Label(int(value), types, row.get("patient", "").strip() or alone(row["scan_id"]))
    _refuse_two_spellings(path, {one for label in labels.values() for one in label.types})
    if not labels:
        raise InputError(f"{path}: no labels" + (f" where {', '.join(where)}" if where else ""))
    return labels, not_chosen


def _refuse_misspelt(path: Path, columns: Collection[str]) -> None:
    meant = {column.strip().lower(): column for column in columns}
    for column in OPTIONAL:
        if column in meant and column not in columns:
            raise InputError(f"{path}: has the column {meant[column]!r}, which would not be read; name it {column!r}")


def _refuse_two_spellings(path: Path, types: set[str]) -> None:
    """Of types: each would be a category of its own, and of a list with other separators all together."""
    spelled: dict[str, str] = {}
    for one in sorted(types):
        if ";" in one:
            raise InputError(f"{path}: has the type {one!r}; expected '|' between types")
        other = spelled.setdefault(" ".join(one.casefold().split()), one)
        if other != one:
            raise InputError(f"{path}: has the types {other!r} and {one!r}; expected one spelling of each")


def _refuse_unmet(path: Path, rows: Sequence[Row], conditions: dict[str, set[str]]) -> None:
    for column, values in conditions.items():
        there = sorted({row[column].strip() for row in rows})
        if unmet := sorted(values.difference(there)):
            raise InputError(f"{path}: no row has {', '.join(f'{column}={value}' for value in unmet)}; {column} has "
                             f"{some([*map(repr, there)]) or 'no value'} there; correct --where, or leave that out")


def refuse_contradiction(labels: dict[Key, Label], slice_labels: dict[Key, Label], path: Path) -> None:
    """InputError where a slice is labelled 1 of a scan that is labelled 0. path: of the slices' labels."""
    wrong = [key for key, label in slice_labels.items() if label.label and key[:1] in labels
             and not labels[key[:1]].label]
    if wrong:
        raise InputError(f"{path}: {len(wrong)} slices have label 1 though their scan has label 0 "
                         f"({key_names(wrong)}); correct one of the two")


def refuse_counted_from_1(labels: Collection[Key], scores: Collection[Key], path: Path) -> None:
    """InputError where the labels of slices count from 1: in every scan with scores from 0 on to one fewer."""
    labelled, scored = _slices_by_scan(labels), _slices_by_scan(scores)
    both = labelled.keys() & scored.keys()
    if both and all(scored[scan][0] == 0 and labelled[scan] == (1, scored[scan][1] + 1) for scan in both):
        raise InputError(f"{path}: counts slices from 1: in every scan the last label is of a slice more than there "
                         "are, and slice 0 has none; expected them counted from 0")


def _slices_by_scan(keys: Iterable[Key]) -> dict[str, tuple[int, int]]:
    """The first and the last slice of each scan."""
    found: dict[str, tuple[int, int]] = {}
    for scan, number in keys:
        first, last = found.get(scan, (number, number))
        found[scan] = min(first, number), max(last, number)
    return found


def join(scores: dict[Key, Score], labels: dict[Key, Label], missing: str,
         not_chosen: Iterable[Key] = (), what: str = "scans", tables: str = "scores against labels",
         mend: str = "Mend the files, choose rows of the labels with --where COLUMN=VALUE") -> Units:
    """Scores and labels by key. tables, mend: what they are from and how to make them fit, for messages.

    missing: what to do with a unit without a score (failed or absent), with an unreliable one, or without a label:
    'error' (InputError), 'exclude', or 'worst'. With 'worst' a unit without a score is ranked wrongly, below all
    others if abnormal and above them if normal, and called wrongly; one without a label is excluded. The result counts
    them. not_chosen: keys left out on purpose.
    """
    not_chosen = frozenset(not_chosen)
    faults = {**{why: [k for k in labels if scores.get(k) == why] for why in UNSCORED},
              "labelled without a score": [k for k in labels if k not in scores],
              "scored without a label": [k for k in scores if k not in labels and k not in not_chosen]}
    faults = {why: keys for why, keys in faults.items() if keys}
    if missing == "error" and faults:
        listed = "; ".join(f"{len(keys)} {what} {why} ({key_names(keys)})" for why, keys in faults.items())
        raise InputError(f"{tables}: {listed}. {mend}, or say --missing exclude or --missing worst")
    finite = {k: scores[k] for k in labels if k in scores and scores[k] not in UNSCORED}
    if not finite:
        raise InputError(f"{tables}: none of the labelled {what} has a score")
    worst = {1: min(finite.values()) - 1, 0: max(finite.values()) + 1}
    kept = [k for k in labels if missing == "worst" or k in finite]
    left_out = {why: len(keys) for why, keys in faults.items()
                if missing == "exclude" or why == "scored without a label"}
    if not_chosen & scores.keys():
        left_out["not chosen"] = len(not_chosen & scores.keys())
    values = [finite.get(k, worst[labels[k].label]) for k in kept]
    return Units(kept, np.array(values, np.float64), np.array([labels[k].label for k in kept], np.int64),
                 [labels[k].types for k in kept], np.array([labels[k].patient for k in kept]), left_out,
                 np.array([k not in finite for k in kept], bool), not_chosen)


def left_out_notes(what: str, left_out: dict[str, int], counted_worst: int) -> list[str]:
    """Sentences for the reader on who of `what` ('scans') is left out or counted as ranked wrongly; [] where nobody."""
    notes = [f"{what} left out: {count} ({why})" for why, count in left_out.items()]
    return notes + [f"{what} that failed, are unreliable or have no score, counted as ranked wrongly: "
                    f"{counted_worst}"] * bool(counted_worst)


def threshold_from(paths: list[Path], fpr: float, missing: str, evaluated: Units,
                   origin: Callable[[Path, Key], tuple[str, str] | None], folder: Path) -> tuple[float, str]:
    """Threshold at `fpr` on the normal scans of other data, SCORES (all healthy) or SCORES LABELS; and its source.

    LABELS may hold the evaluated scans, too, and without a score what --where leaves out. origin: from a folder of
    results and a key to what says which scan it is, a kind and a hash, None where unknown. folder: of the evaluated
    ones. Raises InputError.
    """
    scores = read_scores(paths[0])
    labels = read_labels(paths[1])[0] if len(paths) > 1 else {key: Label(0, (), alone(key[0])) for key in scores}
    patient = dict(zip(evaluated.keys, evaluated.clusters.tolist()))
    patients = set(patient.values())
    here = {key: origin(folder, key) for key in patient}
    there = {key: origin(paths[0].parent, key) for key in labels if key in scores}

    def is_shared(key: Key) -> bool:
        if key in here and labels[key].patient == patient[key] == alone(key[0]):     # their ids alone are the same
            return not _are_others(here[key], there[key])
        return key in here or labels[key].patient in patients

    if shared := sorted(filter(is_shared, there)):
        raise InputError(f"--threshold-from {paths[0]}: {len(shared)} of its scans are evaluated here too, or "
                         f"others of their patients ({key_names(shared)}); a threshold must come from other data, or, "
                         "where these are others of the same name, project with --ids uid")
    known = {found: key for key, found in here.items() if found}
    again = [f"{name(key)}, here {name(known[found])}" for key, found in there.items() if found in known]
    if again:
        raise InputError(f"--threshold-from {paths[0]}: {len(again)} of its scans are evaluated here too, under "
                         f"another id ({some(again, 3, '; ')}: their result.json tell); a threshold must come from "
                         "other data")
    tables = f"--threshold-from {' '.join(map(str, paths))}"
    others = {key: label for key, label in labels.items()
              if key in scores or (key not in here and key not in evaluated.not_chosen)}
    units = join(scores, others, missing, tables=tables,
                 mend="Mend the files" + ", keep in LABELS only scans of SCORES" * (len(paths) > 1))
    normal = np.where(units.worst, np.inf, units.scores)[units.labels == 0]         # no threshold clears the worst
    if not len(normal):
        raise InputError(f"--threshold-from {paths[-1]}: has no normal scans to set a threshold on")
    threshold = empirical_threshold(normal, fpr)
    if threshold == np.inf:
        raise InputError(f"--threshold-from {paths[0]}: {np.isinf(normal).sum()} of {len(normal)} normal scans have no "
                         "score that counts, so with --missing worst no threshold has a false-positive rate of "
                         f"{fpr:g}; mend those scans, raise --fpr, or say --missing exclude")
    told = [f"false-positive rate {fpr:g} on {len(normal)} normal scans of {paths[0]}"]
    if units.left_out:
        told.append("left out there: " + ", ".join(f"{count} ({why})" for why, count in units.left_out.items()))
    if unscored := np.isinf(normal).sum():
        told.append(f"of these without a score that counts, and above any threshold: {unscored}")
    return threshold, "; ".join(told)


def _are_others(one: tuple[str, str] | None, other: tuple[str, str] | None) -> bool:
    """Whether two origins are known to be of two scans: hashes of one kind that differ."""
    return bool(one and other) and one[0] == other[0] and one != other


def read_volume(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI file as [S, H, W], inferior, anterior and the patient's right first; and its affine."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        return displayed(nibabel.load(path))
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise InputError(f"{path}: cannot be read as a NIfTI volume ({error})") from error


def displayed(image: nibabel.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """A NIfTI image as read_volume gives it."""
    image = nibabel.as_closest_canonical(image)
    return np.asarray(image.dataobj)[::-1, ::-1].transpose(2, 1, 0), image.affine


def slice_positions(path: Path) -> dict[str, np.ndarray]:
    """Positions of each scan's slices along the axis, mm, increasing, from slices.csv of projector.py.

    Empty without the file or without positions in it. Raises InputError.
    """
    found: dict[str, list[float]] = {}
    for row in read_table(path, ("scan_id", "slice")) if path.is_file() else ():
        if row.get("position_mm"):
            found.setdefault(row["scan_id"], []).append(finite(path, row, "position_mm"))
    return {scan_id: np.sort(positions) for scan_id, positions in found.items()}


def read_truth(folder: Path, scan_id: str, like: tuple[int, ...], affine: np.ndarray, gaps: str,
               position_mm: np.ndarray | None = None,
               upended: bool = False) -> tuple[np.ndarray, np.ndarray] | None:
    """Truth bool [S, H, W] in the geometry of a predicted map of shape `like`, and which slices count, bool [S].

    From <scan_id>.nii.gz, or <scan_id>/NN.png where NN is the scan's slice from 0; None without either. Raises
    InputError, also where a scan or a slice has two masks.

    gaps         what slices without a picture are: 'error', 'empty' or 'skip'
    position_mm  of the scan's slices. The map of an unevenly spaced scan is resampled to even steps (ct.write), and
                 each of its slices gets the mask of the nearest slice. None: NN counts the map's slices
    upended      the stack came upside down: NN counts from the head's lower end, and the map, which lies as the stack
                 came, ends there
    """
    path = folder / f"{scan_id}.nii.gz"
    by_number = pictures_by_slice(folder / scan_id)
    if path.is_file() and by_number:
        raise InputError(f"{path} and {next(iter(by_number.values()))} are both masks of {scan_id}; expected a volume "
                         "or pictures, not both: remove one or the others")
    if path.is_file():
        truth, own = read_volume(path)
        if truth.shape != like or not np.allclose(own, affine, atol=0.01):
            raise InputError(f"{path}: its shape {truth.shape} or affine is not the predicted map's "
                             f"({like}); the truth must be in the geometry of the scan")
        return truth > 0, np.ones(like[0], bool)
    if not by_number:
        return None
    count = like[0] if position_mm is None else len(position_mm)
    masks, given = np.zeros((count, *like[1:]), bool), np.zeros(count, bool)
    for number, picture in by_number.items():
        mask = marked_pixels(picture)
        if number >= count or mask.shape != like[1:]:
            raise InputError(f"{picture}: expected a slice number below {count} and {like[1:]} pixels, "
                             f"found {number} and {mask.shape}")
        masks[number], given[number] = mask, True
    if gaps == "error" and not given.all():
        raise InputError(f"{folder / scan_id}: {given.sum()} of {count} slices have a mask; say with "
                         "--mask-gaps whether the others are 'empty' or to 'skip'")
    nearest = np.arange(count) if position_mm is None else np.zeros(like[0], int)
    if position_mm is not None and count > 1:
        even = np.linspace(position_mm[0], position_mm[-1], like[0])
        upper = np.clip(np.searchsorted(position_mm, even), 1, count - 1)
        weight = (even - position_mm[upper - 1]) / (position_mm[upper] - position_mm[upper - 1])
        nearest = np.where(weight < HALF, upper - 1, upper)
    nearest = nearest[::-1] if upended else nearest
    return masks[nearest], given[nearest] | (gaps == "empty")


def pictures_by_slice(folder: Path) -> dict[int, Path]:
    """The masks NN.png of a scan's folder by slice. Raises InputError for one without a number, or two of one."""
    by_number: dict[int, Path] = {}
    for picture in sorted(folder.glob("*.png")):
        if not picture.stem.isdecimal():
            raise InputError(f"{picture}: expected the number of a slice, from 0, found {picture.stem!r}")
        other = by_number.setdefault(int(picture.stem), picture)
        if other != picture:
            raise InputError(f"{other} and {picture} are both masks of slice {int(picture.stem)}; expected one: remove "
                             "the other")
    return by_number


def marked_pixels(picture: Path) -> np.ndarray:
    """Pixels of a mask that are neither black nor transparent, bool [H, W]. Raises InputError."""
    try:
        with Image.open(picture) as image:
            refuse_16_bit_colour(picture, image)
            if image.mode != "P" and len(image.getbands()) == 1 and not image.has_transparency_data:
                return np.asarray(image) > 0
            pixels = np.asarray(image.convert("RGBA"))       # not as grey, which rounds dark colours to black
            return pixels[..., :3].any(axis=-1) & (pixels[..., 3] > 0)
    except UNREADABLE as error:
        raise InputError(f"{picture}: cannot be read as a picture ({error}); expected a mask: write it anew") from error


def read_seconds(path: Path, may_be_0: bool = False) -> np.ndarray:
    """Seconds above 0, or from 0 on, one number a line; empty lines and # comments are skipped. Raises InputError."""
    wanted = f"seconds {'from 0 on' if may_be_0 else 'above 0'}, one number a line, with a decimal point"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: expected {wanted}, in UTF-8 ({problem})") from None
    seconds = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not (0 < value < np.inf or (may_be_0 and value == 0)):
            raise InputError(f"{path}, line {number}: expected {wanted}, found {text!r}")
        seconds.append(value)
    if not seconds:
        raise InputError(f"{path}: expected {wanted}, found none")
    return np.array(seconds)
