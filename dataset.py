"""Standardised slices in one LMDB file.

The file is written by prepare.py (gan.database.build_lmdb) and read by everything that trains. Its parts:

  00000000, ...  one record a slice: CRC-32 of what follows, index of the scan, mm below the vertex, pixels.
                 The pixels are HU + 1024 as uint16, as differences to the row above, zigzag-coded, high bytes
                 before low bytes, then the brain mask as bits; all of it through zlib
  manifest       JSON: size, preprocessing settings, the split by patient, counts, scans, a digest of all CRCs and
                 one of those of the held-out slices
  (the seal)     20 bytes after LMDB's last page: magic, length and CRC-32 of the file before them; checked
                 before LMDB maps the file, because LMDB answers a truncated or altered file with a signal
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import math
import os
import struct
import tempfile
import uuid
import zlib
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import torch
from torch.utils.data import Dataset

from common.files import full_disk_named, remove_abandoned
from ct.settings import PreprocessSettings

FORMAT_VERSION = 1
SPLITS = ("train", "val")
FACTS = ("digest", "counts", "val_digest")     # what is told of a database; of an earlier version's no val_digest
HU_OFFSET = 1024
HU_LIMITS = (-1024, 2**15 - 1)           # what fits both the uint16 of the record and the int16 handed out

_SEAL = struct.Struct("<8sQI")           # magic, length of the file without the seal, CRC-32 of that part
_SEAL_MAGIC = b"CTSLICES"
_LMDB_MAGIC = struct.pack("<I", 0xBEEFC0DE)
_RECORD = struct.Struct("<IId")          # CRC-32 of the rest, index of the scan, mm below the vertex
_MANIFEST = b"manifest"
_CHUNK = 1 << 24
_PAGE = 4096


class DatasetError(ValueError):
    """A slice database that cannot be made or used. The message says what was expected and the mend."""


# ------------------------------------------------------------------------------------------------------------
# One slice

def encode_slice(hu: np.ndarray, brain: np.ndarray) -> bytes:
    """hu [N, N] (any float or integer, HU; stored to the nearest 1 HU) and brain bool [N, N], compressed."""
    rounded = np.rint(hu)
    if not (np.isfinite(rounded).all() and rounded.min() >= HU_LIMITS[0] and rounded.max() <= HU_LIMITS[1]):
        raise DatasetError(f"HU must be finite and within {HU_LIMITS}, found {rounded.min()} to "
                           f"{rounded.max()}: clip the scan (--hu-clip LOW HIGH)")
    values = (rounded.astype(np.int32) + HU_OFFSET).astype(np.uint16)
    steps = np.diff(values, axis=0, prepend=np.uint16(0)).view(np.int16)   # modulo 2^16: reversible
    zigzag = ((steps << 1) ^ (steps >> 15)).view(np.uint16)                # small steps, small codes
    high, low = (zigzag >> 8).astype(np.uint8), zigzag.astype(np.uint8)
    deflate = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    plain = high.tobytes() + low.tobytes() + np.packbits(brain.astype(bool)).tobytes()
    return deflate.compress(plain) + deflate.flush()


def decode_slice(payload: bytes, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of encode_slice: hu int16 [size, size] and brain bool [size, size]."""
    pixels = size * size
    plain = np.frombuffer(zlib.decompress(payload), np.uint8)
    zigzag = plain[:pixels].astype(np.uint16) << 8 | plain[pixels:2 * pixels]
    steps = (zigzag >> 1) ^ -(zigzag & 1)
    values = np.cumsum(steps.reshape(size, size), axis=0, dtype=np.uint16)
    brain = np.unpackbits(plain[2 * pixels:], count=pixels).view(bool).reshape(size, size)
    return (values - np.uint16(HU_OFFSET)).view(np.int16), brain


@dataclass(frozen=True)
class ScanRecord:
    """One scan's slices, encoded: what a worker hands to the writer.

    slices           index of each slice among the slabs of its scan (its own images where they are thick)
    below_vertex_mm  mm below the vertex, one a slice; NaN where unknown, of loose slices (ct.loose)
    source, notes    as in ct.scan.Scan
    pixels           a hash of the scan as it was read, by which a copy of it is known; empty where none is looked for
    """

    scan_id: str
    size: int
    slices: tuple[int, ...]
    below_vertex_mm: tuple[float, ...]
    payloads: tuple[bytes, ...]
    source: str = "slices"
    notes: tuple[str, ...] = ()
    pixels: str = ""

    @classmethod
    def encode(cls, scan_id: str, hu: np.ndarray, brain: np.ndarray, below_vertex_mm: np.ndarray,
               slices: np.ndarray | None = None, source: str = "slices",
               notes: tuple[str, ...] = (), pixels: str = "") -> ScanRecord:
        """hu [S, N, N] in HU, brain bool [S, N, N], below_vertex_mm [S]; slices defaults to 0..S-1."""
        square = hu.ndim == 3 and hu.shape[1] == hu.shape[2]
        if not square or brain.shape != hu.shape or len(below_vertex_mm) != len(hu):
            raise DatasetError(f"{scan_id}: expected hu and brain [S, N, N] and S positions, got {hu.shape}, "
                               f"{brain.shape} and {len(below_vertex_mm)}")
        indices = range(len(hu)) if slices is None else slices
        return cls(scan_id, hu.shape[1], tuple(int(i) for i in indices),
                   tuple(float(mm) for mm in below_vertex_mm),
                   tuple(encode_slice(h, b) for h, b in zip(hu, brain)), source, tuple(notes), pixels)


# ------------------------------------------------------------------------------------------------------------
# Writing

class SliceWriter:
    """Writes a slice database; nothing appears at `path` before a `with` block has ended well.

    Until then it grows in a hidden file beside `path`, locked for as long as this process lives. What killed ones have
    left of theirs an hour ago or more is removed. Where another run has written `path` by then, which only overwrite
    replaces, a DatasetError tells what the finished database is called instead.

    settings  the preprocessing, JSON-able; kept in the manifest as it is
    flag      the command's flag that names `path`, for what is said when it cannot be written
    facts     further manifest entries, JSON-able (what failed, how the split was made); filled by the caller
    manifest  what was written, once the block has ended
    """

    def __init__(self, path: str | os.PathLike, settings: dict, overwrite: bool = False, flag: str = "--out"):
        self.path = Path(path)
        if self.path.is_dir():
            raise DatasetError(f"{self.path} is a folder: {flag} names a file, such as {self.path / 'healthy.lmdb'}")
        if os.path.lexists(self.path) and not overwrite:           # a link that leads nowhere, too
            raise DatasetError(f"{self.path} exists already: choose another {flag}, or pass --overwrite")
        if not self.path.parent.is_dir():
            raise DatasetError(f"{self.path}: the folder {self.path.parent} does not exist: create it first")
        try:                                       # hours of work come before the first record
            with tempfile.TemporaryFile(dir=self.path.parent):
                pass
        except OSError as error:
            raise DatasetError(f"{self.path}: the folder {self.path.parent} cannot be written ({error.strerror}): "
                               f"choose another {flag}") from error
        self.settings, self.facts = settings, {}
        self._overwrite, self._flag = overwrite, flag
        self._scans: list[dict] = []
        self._ids: set[str] = set()
        self._crcs: list[int] = []
        self._size: int | None = None
        # Not by the process: those of two containers that share a disk may have one number
        self._partial = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.partial")
        remove_abandoned(self.path.parent, f".{glob.escape(self.path.name)}.*.partial")

    def __enter__(self) -> SliceWriter:
        self._env = lmdb.open(os.fsencode(self._partial), subdir=False, lock=False, map_size=1 << 26, sync=False)
        self._lock = os.open(self._partial, os.O_RDWR)
        with contextlib.suppress(OSError):             # a file system that knows no locks
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def add(self, record: ScanRecord, split: str, patient: str) -> None:
        """Appends a scan; its slices stay together and in order."""
        if split not in SPLITS:
            raise DatasetError(f"{record.scan_id}: split must be one of {SPLITS}, got '{split}'")
        if self._size not in (None, record.size):
            raise DatasetError(f"{record.scan_id}: slices of size {record.size}, not {self._size}")
        if record.scan_id in self._ids:
            raise DatasetError(f"{record.scan_id}: written twice; scan ids must be unique")
        self._size = record.size
        self._ids.add(record.scan_id)
        first = len(self._crcs)
        items = []
        for i, (payload, mm) in enumerate(zip(record.payloads, record.below_vertex_mm)):
            body = _RECORD.pack(0, len(self._scans), mm)[4:] + payload
            self._crcs.append(zlib.crc32(body))
            items.append((_key(first + i), struct.pack("<I", self._crcs[-1]) + body))
        self._put(items)
        self._scans.append({"scan_id": record.scan_id, "patient": patient, "split": split,
                            "source": record.source, "first": first, "slices": list(record.slices),
                            "below_vertex_mm": [None if math.isnan(mm) else mm for mm in record.below_vertex_mm],
                            "notes": list(record.notes)})

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.manifest = self._manifest()
                self._put([(_MANIFEST, json.dumps(self.manifest).encode())])
                with self._space([]):
                    self._env.sync(True)
            self._env.close()
            if kind is None:
                with self._space([]):
                    _seal(self._partial)
                self._put_in_place()
        finally:
            self._env.close()                          # again: nothing but the first time does anything
            self._partial.unlink(missing_ok=True)
            os.close(self._lock)

    def _put_in_place(self) -> None:
        """Moves what is complete to `path`; DatasetError where that has been taken since, with the name it is kept by.
        """
        try:
            if self._overwrite:
                os.replace(self._partial, self.path)
            else:
                _move_to_new(self._partial, self.path)
        except (FileExistsError, IsADirectoryError) as error:
            # Not by its hidden name, under which the next writer would remove it
            kept = self.path.with_name(f"{self.path.stem}.{uuid.uuid4().hex[:8]}{self.path.suffix}")
            os.replace(self._partial, kept)
            raise DatasetError(f"{self.path} has been taken by another run since this one began. Its own "
                               f"database is complete and kept as {kept}: use it there or rename it, and give each "
                               f"run a {self._flag} of its own") from error

    def _put(self, items: list[tuple[bytes, bytes]]) -> None:
        while True:
            try:
                with self._space(items), self._env.begin(write=True) as transaction:
                    for key, value in items:
                        transaction.put(key, value, append=key != _MANIFEST)
                return
            except lmdb.MapFullError:              # the map only reserves addresses: double it and repeat
                self._env.set_mapsize(2 * self._env.info()["map_size"])

    def _space(self, items: list[tuple[bytes, bytes]]) -> contextlib.AbstractContextManager:
        """Names a full disk. A transaction writes whole pages: records, and on the way to them the tree."""
        return full_disk_named(self.path, sum(len(value) + 2 * _PAGE for _, value in items) + 8 * _PAGE)

    def _manifest(self) -> dict:
        counts = {split: {"scans": 0, "slices": 0, "loose": 0} for split in SPLITS}      # loose: of the slices
        for scan in self._scans:
            count, loose = counts[scan["split"]], scan["below_vertex_mm"].count(None)
            count["scans"] += loose == 0
            count["slices"] += len(scan["slices"])
            count["loose"] += loose
        held_out = [crc for scan in self._scans if scan["split"] == "val"
                    for crc in self._crcs[scan["first"]:scan["first"] + len(scan["slices"])]]
        return {"format": "ct-slices", "format_version": FORMAT_VERSION, "size": self._size,
                "settings": self.settings, "counts": counts, "scans": self._scans, **self.facts,
                "digest": _digest(self._crcs), "val_digest": _digest(held_out)}


def _move_to_new(file: Path, path: Path) -> None:
    """Rename a file to a path that is not there yet; FileExistsError where it is: os.rename would replace it."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:                                    # a file system without hard links: an empty file takes the name
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(file, path)
    else:
        file.unlink()


def _key(index: int) -> bytes:
    return b"%08d" % index


def _digest(crcs: list[int]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(crcs)}I", *crcs)).hexdigest()


def _file_crc(path: Path, length: int) -> int:
    crc = 0
    with open(path, "rb") as file:
        while length > 0 and (chunk := file.read(min(_CHUNK, length))):
            crc = zlib.crc32(chunk, crc)
            length -= len(chunk)
    return crc


def _seal(path: Path) -> None:
    length = path.stat().st_size
    crc = _file_crc(path, length)
    with open(path, "ab") as file:
        file.write(_SEAL.pack(_SEAL_MAGIC, length, crc))
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------
# Reading

_environments: dict[str, lmdb.Environment] = {}   # LMDB allows one environment a file and process: shared


def _environment(path: Path) -> lmdb.Environment:
    key = str(path.resolve())
    if key not in _environments:
        _environments[key] = lmdb.open(os.fsencode(key), subdir=False, readonly=True, lock=False, readahead=False,
                                       map_size=path.stat().st_size)
    return _environments[key]


def _forget_environment(path: Path) -> None:
    environment = _environments.pop(str(path.resolve()), None)
    if environment is not None:
        environment.close()


def _forget_all() -> None:
    while _environments:
        _environments.popitem()[1].close()


os.register_at_fork(after_in_child=_forget_all)   # an environment must not be used across a fork (DataLoader)


def check_seal(path: str | os.PathLike, whole: bool = True) -> None:
    """Raises DatasetError unless `path` is complete and (whole=True: every byte is read) unaltered."""
    path = Path(path)
    if path.is_dir():
        raise DatasetError(f"{path}: a folder; expected a database, which prepare.py makes of scans: python prepare.py "
                           f"{path} --out healthy.lmdb")
    if not path.is_file():
        raise DatasetError(f"{path}: no such file; make it with: python prepare.py SCANS --out {path}")
    length = path.stat().st_size - _SEAL.size
    with open(path, "rb") as file:
        head = file.read(20)
        file.seek(max(length, 0))
        tail = file.read()
    magic, sealed, crc = _SEAL.unpack(tail) if length >= 0 else (b"", 0, 0)
    if magic != _SEAL_MAGIC or sealed != length:
        if head[16:20] == _LMDB_MAGIC:
            raise DatasetError(f"{path}: an LMDB without the seal prepare.py puts at its end: truncated (it "
                               f"has {length + _SEAL.size} bytes; copy it again) or made by another program")
        raise DatasetError(f"{path}: not a slice database; expected a file made by prepare.py")
    if whole and _file_crc(path, length) != crc:
        raise DatasetError(f"{path}: altered since it was written (CRC-32 mismatch): copy it again")


def read_manifest(path: str | os.PathLike) -> dict:
    """The manifest of a database whose seal has been checked."""
    path = Path(path)
    _forget_environment(path)                            # the file may have been replaced since it was mapped
    with _environment(path).begin() as transaction:
        stored = transaction.get(_MANIFEST)
    if stored is None:
        raise DatasetError(f"{path}: no manifest inside; expected a file made by prepare.py")
    manifest = json.loads(stored)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise DatasetError(f"{path}: format version {manifest.get('format_version')}, this program reads "
                           f"{FORMAT_VERSION}: prepare it anew with prepare.py")
    return manifest


def _read_record(path: Path, index: int) -> tuple[int, int, float, bytes]:
    """(CRC, index of the scan, mm below the vertex, payload) of one record, its CRC checked."""
    with _environment(path).begin(buffers=True) as transaction:
        stored = transaction.get(_key(index))
        if stored is None:
            raise DatasetError(f"{path}: record {index} is missing: prepare it anew with prepare.py")
        crc, scan, mm = _RECORD.unpack_from(stored)
        if zlib.crc32(stored[4:]) != crc:
            raise DatasetError(f"{path}: record {index} is altered (CRC-32 mismatch): copy the file again")
        return crc, scan, mm, bytes(stored[_RECORD.size:])


def verify(path: str | os.PathLike) -> dict:
    """Reads and decodes everything in the file; returns its manifest, or raises DatasetError."""
    path = Path(path)
    check_seal(path)
    manifest = read_manifest(path)
    crcs = []
    for number, scan in enumerate(manifest["scans"]):
        for i in range(len(scan["slices"])):
            crc, owner, mm, payload = _read_record(path, scan["first"] + i)
            decode_slice(payload, manifest["size"])
            if (owner, None if math.isnan(mm) else mm) != (number, scan["below_vertex_mm"][i]):
                raise DatasetError(f"{path}: record {scan['first'] + i} is not where the manifest has it")
            crcs.append(crc)
    if _digest(crcs) != manifest["digest"]:
        raise DatasetError(f"{path}: the records are not those the manifest was written for")
    return manifest


class SliceDataset(Dataset):
    """The slices of one split ('train', 'val' or 'all') of a database made by prepare.py.

    [i]        dict(hu int16 tensor [N, N] in HU, brain bool tensor [N, N], below_vertex_mm float, scan int);
               below_vertex_mm is NaN for a loose slice (ct.loose), which is a scan of its own here
    scan(s)    dict(hu int16 [S, N, N], brain bool [S, N, N], below_vertex_mm float64 [S]): one whole scan,
               inferior to superior
    scan_ids   the scans of this split; the `scan` of a slice counts in this list
    patients   whose these are, a patient of each
    manifest   the database's manifest

    scans: ids; of the split these scans alone. The whole file is read once on opening (check=False: only its length is
    looked at), so that damage shows before training starts. It may be pickled and forked: every process opens the file
    at its own first read.
    """

    def __init__(self, path: str | os.PathLike, split: str = "train", check: bool = True,
                 scans: Collection[str] | None = None):
        if split not in (*SPLITS, "all"):
            raise DatasetError(f"split must be 'train', 'val' or 'all', got '{split}'")
        self.path = Path(path)
        check_seal(self.path, whole=check)
        self.manifest = read_manifest(self.path)
        self._scans = [scan for scan in self.manifest["scans"]
                       if split in ("all", scan["split"]) and (scans is None or scan["scan_id"] in scans)]
        if not any(scan["slices"] for scan in self._scans):
            raise DatasetError(f"{self.path}: no slices in split '{split}' ({self.manifest['counts']}): "
                               "prepare it with more scans, or another --val-fraction or --split")
        self.scan_ids = [scan["scan_id"] for scan in self._scans]
        self.patients = [scan["patient"] for scan in self._scans]
        self._records = np.array([(s, scan["first"] + i) for s, scan in enumerate(self._scans)
                                  for i in range(len(scan["slices"]))])              # [len, 2]: scan, record

    def __len__(self) -> int:
        return len(self._records)

    @property
    def size(self) -> int:
        """N: slices are N x N."""
        return self.manifest["size"]

    @property
    def prepared(self) -> PreprocessSettings:
        """How its slices were prepared. ValueError where another version did it."""
        return PreprocessSettings.from_json(self.manifest["settings"])

    def __getitem__(self, index: int) -> dict:
        scan, record = (int(v) for v in self._records[index])
        _, _, mm, payload = _read_record(self.path, record)
        hu, brain = decode_slice(payload, self.size)
        return {"hu": torch.from_numpy(hu), "brain": torch.from_numpy(brain), "below_vertex_mm": mm,
                "scan": scan}

    @property
    def below_vertex_mm(self) -> np.ndarray:
        """float64 [len]: of every slice, without reading it; NaN where unknown, of loose slices."""
        return np.array([mm for scan in self._scans for mm in scan["below_vertex_mm"]], float)

    def facts(self) -> dict:
        """What a bundle says of a database: digests and counts, no ids."""
        return facts_of(self.manifest)

    def known(self) -> dict:
        """What a run keeps of a database: facts() and settings, JSON."""
        return self.facts() | {"settings": self.manifest["settings"]}

    def told(self) -> str:
        """How much there is, for people to read; loose slices apart: '171 slices of 7 scans and 40 loose ones'."""
        loose = int(np.isnan(self.below_vertex_mm).sum())
        scans = sum(None not in scan["below_vertex_mm"] for scan in self._scans)
        if not scans:
            return f"{loose} loose slices"
        return f"{len(self) - loose} slices of {scans} scans" + f" and {loose} loose ones" * bool(loose)

    def unlike(self, meta: dict) -> str | None:
        """What of the database that a run was trained on, as its meta has it, is not this one's; None: all is.

        One of the keys of meta["data"], or 'held_out', which older runs do not have.
        """
        for key, trained_on in comparable(meta["data"]).items():
            if self.manifest[key] != trained_on:
                return key
        return "held_out" if meta.get("held_out", self.held_out_ids()) != self.held_out_ids() else None

    def held_out_ids(self) -> list[str]:
        """Ids of the database's validation scans, whichever split this is."""
        return [scan["scan_id"] for scan in self.manifest["scans"] if scan["split"] == "val"]

    def of_same_patient(self, scans: Collection[str]) -> dict[str, set[str]]:
        """For each of these scans of the database, of either split, those of them that are of its patient."""
        chosen, alike = set(scans), defaultdict(set)
        patient = {scan["scan_id"]: scan["patient"] for scan in self.manifest["scans"] if scan["scan_id"] in chosen}
        for one, whose in patient.items():
            alike[whose].add(one)
        return {one: alike[whose] for one, whose in patient.items()}

    def scan(self, scan: int) -> dict:
        """All slices of scan_ids[scan] as one stack."""
        slices = [self[int(i)] for i in np.flatnonzero(self._records[:, 0] == scan)]
        stacked = {key: torch.stack([one[key] for one in slices]) for key in ("hu", "brain")}
        mm = torch.tensor([one["below_vertex_mm"] for one in slices], dtype=torch.float64)
        return {**stacked, "below_vertex_mm": mm}


def facts_of(known: dict) -> dict:
    """Of a manifest, or of what a run or a bundle knows of a database, what SliceDataset.facts() tells."""
    return {key: known[key] for key in FACTS if key in known}


def comparable(known: dict) -> dict:
    """What a run knows of its database, to be compared with what others know: without the val_digest, which those of
    earlier versions do not have. The ids of the held-out scans, which a run keeps as well, tell more."""
    return {key: value for key, value in known.items() if key != "val_digest"}


def is_same(one: dict, other: dict, split: str | None = None) -> bool:
    """Whether two databases, by facts() of each, hold the same scans: in both of their splits alike, or in one.

    By as many scans and slices, which hardly ever are another database's. By the digest alone it cannot be told: of the
    same scans split otherwise it is the same, with another val_digest, and of the same ones prepared anew, by another
    version or on another CPU, it is another. Databases of earlier versions, and the bundles that tell of them, have no
    val_digest: of these the counts decide. Nor do some count loose slices: they hold none.
    """
    def counts(facts: dict, side: str) -> dict[str, int]:
        return {"loose": 0, **facts["counts"].get(side, {})}

    held_out = {facts["val_digest"] for facts in (one, other) if "val_digest" in facts}
    if one["digest"] == other["digest"] and len(held_out) == 2:
        return False                                           # the same scans, and others of them held out
    return all(counts(one, side) == counts(other, side) for side in ([split] if split else SPLITS))
