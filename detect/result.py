"""A scan's result on the disk: its folder, and result.json, which says what scan it is of and what made it.

    OUT/SCAN/             a scan's results, written elsewhere and moved here whole
    OUT/scans/ab/SCAN/    with --part, for very many scans: 256 folders by hash of the name. A scan that has results
                          keeps its place, with or without --part

A scan is finished when its result.json holds the key of the projector, the fingerprint of its files and the outputs
that are asked for. A failed scan has one as well, with the reason, and is tried again by the next run.
Other content under the same names, sizes and times is noticed by what only the system sets, inode and time of status
change; where these differ, as after a copy, a hash of the content decides. Results stay when the files are gone.
Another scan of the same name, as from a second folder, replaces a result only with --overwrite: result.json says by
hashes which scan it is of.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.files import known_sha256, read_object, replace_text
from common.results import BY_HASH
from common.wording import differing, some
from ct import dicom
from ct.read import RESERVED, ScanSource
from detect.outputs import DICOM_ONLY, WRITTEN


class ReplacedError(ValueError):
    """Another run has replaced a result since it was collected: what is there now has to be collected anew."""


@dataclass(frozen=True)
class Result:
    """The part of a scan's result.json that the tables need; its slices stay on the disk."""

    folder: Path
    scan: dict                   # its row of scores.csv
    seconds: dict[str, float]    # by stage
    key: dict
    changed: bool = False        # mark_changed

    @property
    def ok(self) -> bool:
        return self.scan["status"] != "failed"

    @property
    def written(self) -> tuple[int, int] | None:
        """Differs between a result and the one that replaces it; None while another run does that."""
        try:
            found = (self.folder / "result.json").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    @property
    def slices(self) -> list[dict]:
        """Raises ReplacedError."""
        found = read_result(self.folder)
        if found is None or found["scan"] != self.scan:
            raise ReplacedError(f"{self.folder}: another run has replaced its results while tables were made of them; "
                                "start this run again, or projector.py merge")
        return found["slices"]


def result_folder(out: Path, scan_id: str, by_hash: bool = False) -> Path:
    """The folder for a scan's results. Raises ValueError for an id that would lead elsewhere, or is a table's name."""
    if Path(scan_id).name != scan_id or scan_id in ("", ".", "..", *RESERVED) or "\0" in scan_id:
        raise ValueError(f"a scan's id becomes the name of a folder; {scan_id!r} cannot: give the scan another id "
                         "(ct.read.find_scans does)")
    shard = hashlib.sha256(scan_id.encode("utf-8", "surrogateescape")).hexdigest()[:2]
    return out / BY_HASH / shard / scan_id if by_hash else out / scan_id


def find_result_folder(out: Path, scan_id: str, by_hash: bool = False) -> Path:
    """The folder of a scan's results, made with or without --part; where by_hash puts them if there are none.

    Raises ValueError where there are two, as after merging folders by hand.
    """
    places = [result_folder(out, scan_id, way) for way in (by_hash, not by_hash)]
    found = [place for place in places if (place / "result.json").is_file()]
    if len(found) > 1:
        raise two_results_error(scan_id, *found)
    return (found or places)[0]


def two_results_error(scan_id: str, one: Path, other: Path) -> ValueError:
    return ValueError(f"{scan_id}: has two results, {one} and {other}; remove one of these folders (their result.json "
                      "tells what each was made with)")


def read_result(folder: Path) -> dict | None:
    """The result.json of a scan's folder; None where there is none, or it is not whole. ValueError naming one that
    another program has written.
    """
    path = folder / "result.json"
    try:
        found = read_object(path) if path.is_file() else None
    except (FileNotFoundError, ValueError):           # another run is replacing it; half of it is none
        return None
    if found is not None and not _is_result(found):
        raise ValueError(f"{path}: another program's, or changed: expected key, origin, scan (scan_id, status, score, "
                         "seconds), slices and seconds, as projector.py writes them; move its folder away, or choose "
                         "another --out")
    return found


def _is_result(found: dict) -> bool:
    row = found.get("scan")
    kinds = {"key": dict, "origin": dict, "scan": dict, "slices": list, "seconds": dict}
    if not all(isinstance(found.get(name), kind) for name, kind in kinds.items()):
        return False
    numbers = () if row.get("status") == "failed" else ("score", "seconds")
    return (all(isinstance(row.get(name), str) for name in ("scan_id", "status"))
            and all(isinstance(row.get(name), (int, float)) for name in numbers)
            and all(isinstance(one, dict) for one in found["slices"]))


# ---------------------------------------------------------------------------------------------------------------
# What a result is of, and made with

def fingerprint(source: ScanSource) -> str | None:
    """Hash of the scan's files (names, sizes, times), scan.json included, and of how they are read.

    None where one is gone since the search, as when a share is no longer mounted.
    """
    if (found := file_stats(source)) is None:
        return None
    facts = [(path.name, one.st_size, one.st_mtime_ns) for path, one in zip(source.files, found)]
    options = {k: v for k, v in source.options.items() if not isinstance(v, Path)}
    read_as = (({"notes": source.notes} if source.notes else {}) | options           # as in the results of before
               | ({} if source.error is None else {"error": source.error}))
    return hashlib.sha256(repr((source.kind, facts, read_as)).encode()).hexdigest()


def made_with(key: dict, source: ScanSource, writers: Iterable[str]) -> dict:
    """The entries of result.json that results must have to be of this key, the files as they are now, and the outputs.
    """
    return {"key": key, "files": fingerprint(source), "outputs": _written_of(source, writers)}


def _written_of(source: ScanSource, writers: Iterable[str]) -> list[str]:
    """The outputs that a scan can have: those of DICOM_ONLY of DICOM alone."""
    return sorted(name for name in writers if source.kind == dicom.KIND or name not in DICOM_ONLY)


def is_made_with(made: dict, source: ScanSource, earlier: dict | None) -> bool:
    """Whether a result, failed or not, has the entries of made_with(). Files that are gone are not compared."""
    if not is_made_alike(made, source, earlier) or earlier.get("changed"):
        return False
    if made["files"] is None:
        return True
    return earlier["files"] == made["files"] and _content_unchanged(source, earlier)


def is_made_alike(made: dict, source: ScanSource, earlier: dict | None) -> bool:
    """Whether a result has these entries but for `files`: of this scan, as its files are now or as they were."""
    if not earlier or is_other_scan(source, earlier):
        return False
    return earlier["key"] == made["key"] and _written_of(source, earlier.get("outputs", ())) == made["outputs"]


def mark_changed(folder: Path) -> None:
    """Note in a scan's result.json that its files have changed since they were read: no table is to have it."""
    found = read_result(folder)
    replace_text(folder / "result.json", json.dumps(found | {"changed": True}))


def file_hashes(source: ScanSource) -> dict[str, str | None]:
    """Hashes of the scan's files, for result.json, taken just before they are read; None where one is gone.

    state  of inodes and times of status change, which nobody can set back after changing a file
    bytes  of the content
    """
    state = _system_state(source)                      # first: a file that changes meanwhile then has another state
    return {"state": state, "bytes": state and _content_hash(source.files, state)}


def _content_unchanged(source: ScanSource, earlier: dict) -> bool:
    """By `state`, and where that differs, as after a copy or a change of mode, by `bytes`."""
    state = _system_state(source)
    return state is None or earlier["state"] == state or earlier["bytes"] == _content_hash(source.files, state)


def _system_state(source: ScanSource) -> str | None:
    found = file_stats(source)
    return None if found is None else digest([f"{one.st_ino} {one.st_ctime_ns}" for one in found])


@functools.lru_cache(maxsize=1 << 16)
def _content_hash(files: tuple[Path, ...], state: str) -> str | None:
    try:
        return digest([known_sha256(path) for path in files])
    except OSError:
        return None


def origin(source: ScanSource) -> dict[str, str | None]:
    """Hashes that say which scan it is, for result.json, which must hold no UIDs and no folders' names.

    uid      of its series, wherever it lies; without a UID:
    place    of the folder of its files
    content  of its pictures, whatever a scan.json says of them; None where they cannot be read
    """
    uid = source.series_uid
    return {"uid": digest([uid])} if uid else {"place": _place(source), "content": _content(source)}


def is_other_scan(source: ScanSource, earlier: dict) -> bool:
    """Whether earlier results of this id are of another scan: another series or, without UIDs, other files elsewhere.

    Files that changed in place, and a folder that was moved, are the same scan.
    """
    known, uid = earlier["origin"], source.series_uid
    if uid or "uid" in known:
        return known.get("uid") != digest([uid])
    return known["place"] != _place(source) and known["content"] != (_content(source) or "unknown")


def _place(source: ScanSource) -> str:
    return digest([os.path.commonpath([path.absolute() for path in source.files])])


def _content(source: ScanSource) -> str | None:
    files, inner = source.paths, []
    if source.archive:
        files, inner = [source.archive], [path.as_posix() for path in source.paths]
    try:
        return digest([*map(known_sha256, files), *inner])
    except OSError:
        return None


def file_stats(source: ScanSource) -> list[os.stat_result] | None:
    """Status of the scan's files; None where one is gone since the search: read_scan will say so."""
    try:
        return [path.stat() for path in source.files]
    except OSError:
        return None


def digest(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# What a result may replace

def source_folders(sources: Iterable[ScanSource]) -> set[tuple[int, int]]:
    """All folders above the scans' files by device and inode, so that links and other names lead to the same."""
    places = {path.parent for source in sources for path in source.files}
    real = {Path(os.path.realpath(place)) for place in places}
    found = set()
    for folder in {one for place in real for one in (place, *place.parents)}:
        with contextlib.suppress(OSError):
            found.add(_identity(folder))
    return found


def refuse_foreign_folder(place: Path, folders: set[tuple[int, int]]) -> None:
    """ValueError if results would replace anything but results. folders: source_folders() of the scans."""
    if not os.path.lexists(place):
        return
    if not place.is_dir() or _identity(place) in folders or not (read_result(place) or _is_left_over(place)):
        raise ValueError(f"{place}: results would take the place of what is there, which this program has not made (is "
                         "it the scan itself?); choose another --out")


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_left_over(place: Path) -> bool:
    """Whether a folder is empty, or of a result whose result.json is damaged and which holds nothing else."""
    names = set(os.listdir(place))
    return not names or ("result.json" in names and names <= WRITTEN)


def refuse_other_result(out: Path, source: ScanSource, earlier: dict | None, key: dict) -> None:
    """ValueError if a scan's earlier result is of another scan, another model, other settings or another version."""
    if earlier and is_other_scan(source, earlier):
        raise ValueError(f"--out {out}: {source.scan_id} is another scan than the one whose results lie there; choose "
                         "another --out, or --ids uid, which no two scans share, or --overwrite")
    if earlier and earlier["scan"]["status"] != "failed" and earlier["key"] != key:
        raise ValueError(f"--out {out}: holds results of {source.scan_id} made with {told_apart(earlier['key'], key)}; "
                         "choose another folder, or --overwrite")


def told_apart(before: dict, now: dict) -> str:
    """In words, where two keys of results (Projector.key) differ."""
    where = [line for name in {**before, **now} for line in differing(before.get(name), now.get(name), name)]
    return ("another model or calibration, other settings or another version of this program "
            f"({some(where, 3, '; ')})")
