"""Find the scans under a folder and read them: the one door for DICOM, NIfTI and folders of slices."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ct import dicom, nifti, slices
from ct.scan import Scan, ScanError

LOOKED_FOR = (
    "DICOM CT series, NIfTI files (.nii, .nii.gz), folders of PNG or JPEG slices with a scan.json, and "
    "<case>/png/*.png"
)
SKIPPED_FOLDERS = ("__MACOSX",)                       # and hidden ones: copies of file attributes, no scans


@dataclass(frozen=True)
class ScanSource:
    """A scan that was found but not read.

    scan_id  from folder and file names or a hash of the series UID, never patient data; unique in one search
    kind     'dicom', 'nifti' or 'slices'
    paths    the files that make it up
    options  what its reader needs besides; {'error': reason} for something that cannot be a scan as it is
    """

    scan_id: str
    kind: str
    paths: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Found:
    source: ScanSource
    anchor: Path                                      # what the id is named after; its parents make ids unique


def find_scans(folder: Path, unknown_slice_spacing_mm: float = 5.0) -> list[ScanSource]:
    """All scans under a folder (or one file), sorted by scan_id; only headers are read.

    Looks for DICOM series at any nesting and however mixed, NIfTI files, folders of pictures with a scan.json, and
    the original's <case>/png/*.png with an optional <case>/BrainExtraction/bet.npy. What looks like a scan but cannot
    be one (pictures without a scan.json, broken DICOM files) is a source too: read_scan raises its reason.
    A study's localisers, reports and other series without axial CT are a note on the study's scans.

    unknown_slice_spacing_mm: for folders of slices that do not tell theirs; 0 refuses them (when read).
    Raises ScanError where the folder does not exist or holds nothing of the kind.
    """
    folder = Path(folder)
    if not folder.exists():
        raise ScanError(f"{folder}: no such file or folder; expected {LOOKED_FOR}")
    if folder.is_file() and folder.suffix.lower() in slices.SUFFIXES:
        raise ScanError(f"{folder}: one picture is not a scan; give the folder of slices, with its scan.json")
    found: list[_Found] = []
    pictures: list[tuple[Path, list[Path]]] = []
    headers: list[dicom.Header] = []
    for directory, files in _walk(folder.resolve()):
        broken = []
        for path in files:
            if path.suffix.lower() in slices.SUFFIXES:
                continue
            if nifti.is_nifti(path):
                found.append(_Found(ScanSource(nifti.stem(path), "nifti", (path,)), path))
                continue
            try:
                header = dicom.read_header(path)
            except ScanError as error:
                broken.append((path, str(error)))
            else:
                headers += [header] if header is not None else []
        found += _broken_dicom(directory, broken)
        pictures.append((directory, [path for path in files if path.suffix.lower() in slices.SUFFIXES]))
    found += _dicom_series(headers)
    taken = {f.anchor if f.source.kind == "dicom" else f.anchor.parent for f in found}
    for directory, files in pictures:
        found += _slice_folder(directory, files, unknown_slice_spacing_mm, directory in taken)
    if not found:
        raise ScanError(f"{folder}: no scans found; looked for {LOOKED_FOR}")
    return sorted(_with_unique_ids(found), key=lambda source: source.scan_id)


def read_scan(source: ScanSource) -> Scan:
    """Read a scan that find_scans found. Raises ScanError with the reason where it cannot be used."""
    if "error" in source.options:
        raise ScanError(source.options["error"])
    if source.kind == "dicom":
        return dicom.read_dicom(source.scan_id, source.paths, **source.options)
    if source.kind == "nifti":
        return nifti.read_nifti(source.scan_id, source.paths[0])
    return slices.read_slices(source.scan_id, source.paths, **source.options)


def _walk(folder: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders with their files, sorted, links followed but no folder twice, hidden ones left aside."""
    if folder.is_file():
        yield folder.parent, [folder]
        return
    seen = set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and n not in SKIPPED_FOLDERS)
        files = [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
        yield Path(directory), [path for path in files if path.is_file()]


def _slice_folder(directory: Path, pictures: list[Path], unknown_slice_spacing_mm: float,
                  taken: bool) -> list[_Found]:
    """The folder's pictures as a scan; an error where scan.json or the pictures are missing.

    taken: the folder holds other scans, so that its name is theirs.
    """
    case = directory.parent if directory.name.lower() == "png" else directory
    specs = [path for path in (directory / "scan.json", case / "scan.json") if path.is_file()]
    name = f"{case.name}-pictures" if taken else case.name
    if not pictures:
        if not specs or any(p.is_dir() and p.name.lower() == "png" for p in directory.iterdir()):
            return []
        error = f"{specs[0]}: there are no PNG or JPEG slices beside it"
    elif not specs and (case == directory or any(p.suffix.lower() != ".png" for p in pictures)):
        error = f"{directory}: {len(pictures)} pictures without a scan.json; {slices.SCAN_JSON_HELP}"
    else:
        mask = case / "BrainExtraction" / "bet.npy"
        options = {"scan_json": specs[0] if specs else None, "mask": mask if mask.is_file() else None,
                   "unknown_slice_spacing_mm": unknown_slice_spacing_mm}
        return [_Found(ScanSource(name, "slices", tuple(pictures), options), case)]
    return [_Found(ScanSource(name, "slices", tuple(pictures), {"error": error}), case)]


def _broken_dicom(directory: Path, broken: list[tuple[Path, str]]) -> list[_Found]:
    if not broken:
        return []
    error = broken[0][1] + (f"; and {len(broken) - 1} more in this folder" if len(broken) > 1 else "")
    source = ScanSource(f"{directory.name}-unreadable", "dicom", tuple(p for p, _ in broken), {"error": error})
    return [_Found(source, directory)]


# ---- DICOM series

@dataclass(frozen=True)
class _Series:
    uid: str
    folder: Path
    headers: tuple[dicom.Header, ...]

    @property
    def usable(self) -> bool:
        return any(header.left_out is None for header in self.headers)


def _dicom_series(headers: list[dicom.Header]) -> list[_Found]:
    """Group files by series and series by study; series without axial CT are notes if the study has others."""
    studies: dict[str, list[_Series]] = {}
    for series in _group_series(headers):
        studies.setdefault(series.headers[0].study_uid or str(series.folder), []).append(series)
    chosen: list[tuple[_Series, dict[str, Any]]] = []
    for members in studies.values():
        useless = [series for series in members if not series.usable]
        if len(useless) == len(members):
            chosen += [(series, {}) for series in useless]
            continue
        reasons = dicom.describe_left_out([series.headers[0].left_out for series in useless])
        options = {"notes": (f"other series of the study left out: {reasons}",)} if useless else {}
        chosen += [(series, options) for series in members if series.usable]
    in_folder = Counter(series.folder for series, _ in chosen)
    found = []
    for series, options in chosen:
        name = series.folder.name
        if in_folder[series.folder] > 1:
            name += "-" + hashlib.sha256(series.uid.encode()).hexdigest()[:8]
        source = ScanSource(name, "dicom", tuple(header.path for header in series.headers), options)
        found.append(_Found(source, series.folder))
    return found


def _group_series(headers: list[dicom.Header]) -> list[_Series]:
    """Files by study and series, over folders; by folder where the UID is missing or an image is in two folders."""
    by_uid: dict[tuple[str, str], dict[Path, list[dicom.Header]]] = {}
    for header in headers:
        folders = by_uid.setdefault((header.study_uid, header.series_uid), {})
        folders.setdefault(header.path.parent, []).append(header)
    series = []
    for (_, uid), folders in by_uid.items():
        instances = [header.instance_uid for members in folders.values() for header in members]
        apart = sum(len({header.instance_uid for header in members}) for members in folders.values())
        if not uid or apart > len(set(instances)):
            series += [_Series(uid, folder, tuple(members)) for folder, members in folders.items()]
        else:
            members = tuple(header for members in folders.values() for header in members)
            series.append(_Series(uid, Path(os.path.commonpath(folders)), members))
    return series


# ---- names

def _with_unique_ids(found: list[_Found]) -> list[ScanSource]:
    """Sources with unique ids: those of one name get their parent folders' names in front, as many as it takes."""
    ids = [f.source.scan_id for f in found]
    parents = [f.anchor.parent for f in found]
    while True:
        counts = Counter(ids)
        again = [k for k, name in enumerate(ids) if counts[name] > 1 and parents[k].name]
        if not again:
            break
        for k in again:
            ids[k], parents[k] = f"{parents[k].name}-{ids[k]}", parents[k].parent
    seen: Counter[str] = Counter()
    sources = []
    for name, f in zip(ids, found):                   # case.nii beside case.nii.gz: no parent tells them apart
        seen[name] += 1
        sources.append(replace(f.source, scan_id=name if seen[name] == 1 else f"{name}-{seen[name]}"))
    return sources
