"""Find the scans under a folder and read them: the one door for DICOM, NIfTI and folders of slices.

A format is a module with what Format says: its name and three functions. FORMATS lists them; a new format is a module
and an entry.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from common.wording import some
from ct import archive, dicom, nifti, slices
from ct.dicom_header import MACHINE_FAILED, is_of_machine
from ct.plausible import coarse_steps, refuse_odd_slices, without_blanks
from ct.scan import Found, Scan, ScanError, ScanSource, printable
from ct.settings import UNKNOWN_SLICE_SPACING_MM
from ct.whole_head import upright


class Format(Protocol):
    """What a format's module offers. What read needs besides a scan's files, find gives it as Found.options."""

    KIND: str                                         # its name, that of Found.kind

    def claims(self, path: Path, head: bytes) -> bool:
        """Whether a file is its own, by its name and first bytes: HEAD_BYTES, none where it cannot be opened."""

    def find(self, paths: Sequence[Path]) -> list[Found]:
        """The scans that the claimed files make up, of what is searched or of one archive; only headers are read."""

    def read(self, source: ScanSource) -> Scan:
        """One of them. Raises ScanError with the reason where it cannot be used."""


FORMATS: tuple[Format, ...] = (nifti, slices, dicom)  # the first that claims a file has it
LOOKED_FOR = (
    "DICOM CT series, NIfTI files (.nii, .nii.gz, .hdr with .img), folders of PNG or JPEG slices with a scan.json, "
    "<case>/png/*.png, and zip files of these"
)
# And hidden ones: copies of file attributes; what a disk's own check has saved, for nobody but root to see
SKIPPED_FOLDERS = ("__MACOSX", "lost+found")
HEAD_BYTES = 600                                      # of a file, for claims
IDS = ("path", "uid")
SEPARATOR = "--"                                      # of folders in an id
LONGEST_ID = 120                                      # bytes: ids become folder names
# What else lies in a folder of results, in which each id is the name of a folder
RESERVED = {"scans", ".work", ".parts", "run.json", "scores.csv", "slices.csv", "seconds.csv", "report.html"}
MAPS = {"reconstruction.nii.gz", "residual.nii.gz", "anomaly.nii.gz"}


def find_scans(folder: Path, unknown_slice_spacing_mm: float = UNKNOWN_SLICE_SPACING_MM, ids: str = "path",
               log: Callable[[str], None] = print) -> list[ScanSource]:
    """All scans under a folder (or one file), sorted by scan_id; only headers are read.

    Looks for DICOM at any nesting and however mixed, NIfTI files, folders of pictures with a scan.json, the original's
    <case>/png/*.png with an optional <case>/BrainExtraction/bet.npy, and zip files of all these. What looks like a
    scan but cannot be one (pictures without a scan.json, broken DICOM files, links that lead nowhere), or may hold some
    but cannot be looked into (a broken zip file, one within another, another kind of archive, a folder without the
    right to read it), is a source too: read_scan raises its reason. A
    study's localisers, reports and other series without axial CT are a note on the study's scans. Folders with results
    of this program are left aside. That, and files that are nothing of the kind, goes to `log` in one line each.

    unknown_slice_spacing_mm: for folders of slices that do not tell theirs; 0 refuses them (when read).
    ids: 'path', from the scan's place under the folder (several series in one folder add a hash of their UID); 'uid',
    from the series UID or the files' content, wherever they lie. An id by uid stays whatever other scans come; one by
    path, unless a second scan comes to the same name, as a second series in the folder or a file beside it: then both
    have new ones, so that none means another scan.
    With ids by uid no name of a file or folder goes to `log`, or into reasons and notes (without_names).
    What else lies in a folder of results is no id: a scan in a folder called scans is scans-HASH. A link counts by its
    own name, with a slash behind it or without.
    What killed runs have left of archives in the temporary folder is removed.
    Raises ScanError where the folder does not exist or holds nothing of the kind.
    """
    archive.remove_abandoned()
    folder = Path(folder)
    if ids not in IDS:
        raise ValueError(f"ids must be one of {', '.join(IDS)}, got {ids!r}")
    if not folder.exists():
        raise ScanError(f"{folder}: no such file or folder; expected {LOOKED_FOR}")
    if folder.is_file() and folder.suffix.lower() in slices.SUFFIXES:
        raise ScanError(f"{folder}: one picture is not a scan; give the folder of slices, with its scan.json")
    root = as_given(folder)
    search = _Search(root, unknown_slice_spacing_mm, ids == "uid")
    search.add_folder(root)
    for line in search.remarks():
        log(line)
    if not search.sources and folder.name.lower().endswith(nifti.VALUES):
        raise ScanError(f"{folder}: the values of a NIfTI pair without their header; put "
                        f"{nifti.stem(folder)}.hdr beside them")
    if not search.sources:
        raise ScanError(f"{folder}: no scans found; looked for {LOOKED_FOR}"
                        + "".join(f"; {line}" for line in search.remarks()))
    return sorted(_with_ids(_with_other_parts(search.sources, ids), root, ids), key=lambda source: source.scan_id)


def as_given(path: Path) -> Path:
    """Absolute, without '..', and by the link's own name where it is one: scans are named after what was given."""
    path = Path.cwd() / path
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def find_all(inputs: Sequence[Path], unknown_slice_spacing_mm: float = UNKNOWN_SLICE_SPACING_MM, ids: str = "path",
             log: Callable[[str], None] = print) -> list[ScanSource]:
    """find_scans of one input or several; of several, each id by path begins with its input's name, or is it.

    Raises ScanError as find_scans does, and where two inputs give the same id or the same scan.
    """
    if len(inputs) == 1:
        return find_scans(inputs[0], unknown_slice_spacing_mm, ids, log)
    several = []
    for folder in inputs:
        name, sources = printable(as_given(folder).name), find_scans(folder, unknown_slice_spacing_mm, ids, log)
        is_scan = len(sources) == 1 and (Path(folder).is_file() or sources[0].scan_id in (name, _hashed(name, ())))
        if not is_scan and ids == "path":
            sources = [replace(source, scan_id=_within(name, source.scan_id)) for source in sources]
        several.append(sources)
    found = [source for sources in several for source in sources]
    refuse_shared_ids(found)
    refuse_twice(several)
    return sorted(found, key=lambda source: source.scan_id)


def refuse_shared_ids(sources: Iterable[ScanSource]) -> None:
    """ScanError naming the ids that several sources have."""
    count = Counter(source.scan_id for source in sources)
    if twice := sorted(scan_id for scan_id in count if count[scan_id] > 1):
        raise ScanError(f"{some(twice)}: found more than once; leave one out or, if these are different scans, rename "
                        "one or give the folder above them")


def refuse_twice(inputs: Iterable[Sequence[ScanSource]]) -> None:
    """ScanError naming two sources, of two inputs, that are one scan: of one DICOM series, or of the same file."""
    known: dict[tuple, ScanSource] = {}
    for sources in inputs:
        own = {_which(source): source for source in sources}
        if twice := known.keys() & own.keys():
            first, second = min((known[same].scan_id, own[same].scan_id) for same in twice)
            raise ScanError(f"{first} and {second}: one scan, given twice; leave one of them out")
        known |= own


def _which(source: ScanSource) -> tuple:
    """Equal for two sources of one scan. Careless anonymisers give one series UID to several patients."""
    if source.whose:
        return source.uid, source.whose
    return os.path.realpath(source.files[0]), source.archive and source.paths[0], source.options.get("frames")


@contextmanager
def open_scan(source: ScanSource) -> Iterator[Scan]:
    """read_scan, with the scan's files there while the block lasts: those in an archive lie unpacked for so long."""
    try:
        if source.error is not None:
            raise ScanError(source.error)
        if source.archive is None:
            yield _read(source)
            return
        names = [*source.paths, *(value for value in source.options.values() if isinstance(value, Path))]
        with archive.unpacked(source.archive, {name.as_posix() for name in names}) as folder:
            yield _read(_moved(source, lambda path: folder / path))
    except ScanError as error:
        told = without_names(str(error), source)
        if told == str(error):
            raise
        raise ScanError(told) from error.__cause__        # by which a failing machine is known


def _read(source: ScanSource) -> Scan:
    """With its format's reader. The system's errors quote whole paths, whose folders may be named after patients."""
    read = next(module.read for module in FORMATS if module.KIND == source.kind)
    try:
        scan = without_blanks(read(source))
        refuse_odd_slices(scan)
        scan = upright(scan)
        notes = (*source.notes, *scan.notes, *coarse_steps(scan))
        return replace(scan, notes=tuple(without_names(note, source) for note in notes))
    except OSError as error:
        name = Path(error.filename).name if isinstance(error.filename, str) else source.paths[0].name
        raise ScanError(f"{name}: cannot be read ({error.strerror or type(error).__name__})") from error


def read_scan(source: ScanSource) -> Scan:
    """Read a scan that find_scans found. Raises ScanError with the reason where it cannot be used."""
    with open_scan(source) as scan:
        return scan


def without_names(text: str, source: ScanSource) -> str:
    """A reason or note, in which 'file 3 of 28' stands for the names of a scan's files, where its id is by uid.

    Whoever asks for such ids wants no name of a file or folder in any output. The numbers count source.paths, which
    SECURITY.md tells how to list. Numbers of up to four digits stay: they tell of nobody, and are in many a text.
    """
    if not source.scan_id.startswith(_id_by_uid(source)):
        return text
    words: dict[str, str] = {}

    def put(name: str, instead: str) -> None:
        for written in (name,) if name.isprintable() else (name, printable(name)):
            if written in text and not (written.isdecimal() and len(written) < 5):
                words.setdefault(written, instead)

    kind = "folder" if source.kind == "folder" else "file"
    for number, path in enumerate(source.paths, 1):
        for name in (str(path), path.name, *([path.stem] if any(map(str.isdigit, path.stem)) else [])):
            put(name, f"{kind} {number} of {len(source.paths)}")
    if source.archive is not None:
        put(str(source.archive), "its archive")
        put(source.archive.name, "its archive")
    folders = {path.parent for path in (*source.paths, *source.files)}               # few, of however many files
    for folder in {parent for inner in folders for parent in (inner, *inner.parents) if parent.name}:
        put(f"/{str(folder).lstrip('/')}", "/its folder")
    longest_first = sorted(words, key=len, reverse=True)
    either = "|".join(map(re.escape, longest_first))
    return re.sub(rf"(?<![\w.-])(?:{either})(?![\w-])", lambda match: words[match.group()], text) if words else text


# ---- search

class _Search:
    """What lies under a folder: scans, and what is to be said about the rest."""

    def __init__(self, root: Path, unknown_slice_spacing_mm: float, by_content: bool):
        self.root, self.unknown_slice_spacing_mm, self.by_content = root, unknown_slice_spacing_mm, by_content
        self.sources: list[tuple[Found, Path | None]] = []            # with the archive that holds it
        self.unread: list[Path] = []
        self.results: list[Path] = []

    def add_folder(self, folder: Path, within: Path | None = None) -> None:
        """Everything under a folder, or within an archive that was unpacked there."""
        claimed: dict[str, list[Path]] = {module.KIND: [] for module in FORMATS}
        found = []
        for path in self._files(folder):
            head = _head(path)
            owner = next((module.KIND for module in FORMATS if module.claims(path, head or b"")), None)
            if owner is None and head is None:
                owner = dicom.KIND                    # the one whose names may say nothing: it may be a slice
            if owner is not None:
                claimed[owner].append(path)
            elif reason := archive.why_closed(path, head, within is not None):
                found.append(Found("archive", (path,), path.with_suffix(""), error=reason))
            elif archive.claims(path, head):
                self._add_archive(path)
            else:
                self.unread.append(path)
        for module in FORMATS:
            found += module.find(claimed[module.KIND])
        for one in found:
            if one.kind == slices.KIND and one.error is None:         # the one format that may not tell it
                spacing = {"unknown_slice_spacing_mm": self.unknown_slice_spacing_mm}
                one = replace(one, options=one.options | spacing)
            if self.by_content and not one.uid:
                one = replace(one, uid=_content(one.paths))
            if within is not None:
                inner = one.anchor.relative_to(folder) if one.anchor.is_relative_to(folder) else Path()
                one = replace(_moved(one, lambda path: path.relative_to(folder)),
                              anchor=within.with_suffix("") / inner)
            self.sources.append((one, within))

    def _add_archive(self, path: Path) -> None:
        before = len(self.sources)
        try:
            with archive.unpacked(path) as folder:
                self.add_folder(folder.resolve(), within=path)
        except ScanError as error:
            self._add_closed("archive", path, path.with_suffix(""), str(error))
        if len(self.sources) == before:
            self.unread.append(path)

    def _add_closed(self, kind: str, path: Path, anchor: Path, error: str) -> None:
        """What may hold scans but cannot be looked into is a source with the reason, so that nobody misses its scans
        without a word."""
        uid = _content((path,)) if self.by_content else ""
        self.sources.append((Found(kind, (path,), anchor, uid=uid, error=error), None))

    def _add_closed_folder(self, error: OSError) -> None:
        folder = Path(error.filename or self.root)
        self._add_closed("folder", folder, folder, f"{folder.name}: this folder cannot be read ({error.strerror})"
                         + (MACHINE_FAILED if is_of_machine(error) else "; mend that, or leave it out"))

    def _files(self, folder: Path) -> Iterator[Path]:
        """Files, sorted, links followed but no folder twice, hidden ones and this program's results left aside.

        A link that leads nowhere is one, too: it may be a slice, as where a data set's content was not fetched.
        """
        if folder.is_file():
            yield folder
            return
        seen = set()
        for directory, subfolders, names in os.walk(folder, onerror=self._add_closed_folder, followlinks=True):
            real = os.path.realpath(directory)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            if not os.access(directory, os.X_OK):         # its names can be read, and nothing else
                self._add_closed_folder(PermissionError(errno.EACCES, os.strerror(errno.EACCES), directory))
                subfolders.clear()
                continue
            if _holds_results(Path(directory), names, is_root=Path(directory) == folder):
                self.results.append(Path(directory))
                subfolders.clear()
                continue
            subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and n not in SKIPPED_FOLDERS)
            files = [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
            yield from (path for path in files if path.is_file() or (path.is_symlink() and not path.exists()))

    def remarks(self) -> list[str]:
        """One line for the results that were left aside, one for the files that were not read; by content only counts:
        suffixes, too, are part of a name.
        """
        if self.by_content:
            return [f"{what}: {len(paths)} {kind} (named with ids by path)" for what, paths, kind in (
                ("left aside", self.results, "folders with results of this program"),
                ("not read, no scans", self.unread, "files")) if paths]
        lines = []
        if self.results:
            lines.append(f"left aside: {len(self.results)} folders with results of this program "
                         f"({self._shown(self.results[0])}{', ...' if len(self.results) > 1 else ''})")
        if self.unread:
            kinds = Counter(path.suffix.lower() or "without a suffix" for path in self.unread).most_common()
            shown = ", ".join(f"{count} {printable(kind)}" for kind, count in kinds[:8])
            lines.append(f"not read, no scans: {len(self.unread)} files ({shown}{', ...' if len(kinds) > 8 else ''}), "
                         f"the first {self._shown(min(self.unread))}")
        return lines

    def _shown(self, path: Path) -> str:
        """For the terminal: a path relative to what is searched, which says where a name alone would not."""
        inside = path != self.root and path.is_relative_to(self.root)
        return printable(str(path.relative_to(self.root)) if inside else path.name)


def _head(path: Path) -> bytes | None:
    """The first bytes of a file; None where it cannot be read: its reader says why."""
    try:
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return None


def _holds_results(directory: Path, names: list[str], is_root: bool) -> bool:
    """Whether a folder is one that projector.py wrote: a scan's, or (but for the root) a whole run's."""
    if MAPS <= set(names) or (not is_root and {"run.json", "scores.csv"} <= set(names)):
        return True
    if "result.json" not in names:
        return False
    try:
        found = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"key", "scan", "slices"} <= found.keys()


def _moved(found, move: Callable[[Path], Path]):
    """A Found or ScanSource with its paths moved."""
    options = {key: move(value) if isinstance(value, Path) else value for key, value in found.options.items()}
    return replace(found, paths=tuple(map(move, found.paths)), options=options)


def _with_other_parts(found: list[tuple[Found, Path | None]], ids: str) -> list[tuple[Found, Path | None]]:
    """With a note on scans of which a part lies in another archive: each archive is searched alone."""
    series: dict[tuple, dict[Path, set[Path]]] = {}
    for one, within in found:
        if key := _series(one, within):
            series.setdefault(key, {}).setdefault(within, set()).update(one.paths)
    noted = []
    for one, within in found:
        parts = series.get(_series(one, within), {})
        others = [printable(other.name) for other in parts if other != within and not _copies(parts, within, other)]
        if others:
            whole = "both" if len(others) == 1 else "all"
            where = some(others)
            if ids == "uid":                              # of one uid: what differs is behind it
                where = ("another archive" if len(others) == 1 else f"{len(others)} other archives") + (
                    ", with an id that begins alike")
            note = f"another part of this series lies in {where}: unpack {whole} into one folder"
            one = replace(one, notes=(*one.notes, note))
        noted.append((one, within))
    return noted


def _series(found: Found, within: Path | None) -> tuple | None:
    """Equal for the parts of one DICOM series in archives; None for anything else.

    Careless anonymisers give one series UID to several patients.
    """
    if within is None or found.kind != dicom.KIND or not found.series_uid or found.frame_of_reference is None:
        return None
    return found.series_uid, found.frame_of_reference, found.whose


def _copies(parts: dict[Path, set[Path]], *archives: Path) -> bool:
    """Whether most files of a series in one of two archives are in the other, too, whatever they are called."""
    contents = []
    for path in archives:
        with zipfile.ZipFile(path) as archived:
            contents.append({(member.CRC, member.file_size) for member in archived.infolist()
                             if Path(member.filename.replace("\\", "/")) in parts[path]})
    return len(contents[0] & contents[1]) > min(map(len, contents)) / 2


def _content(paths: tuple[Path, ...]) -> str:
    """What identifies files wherever they lie: all that is in them; of one that cannot be read, its name.

    A part would not do: two patients' volumes can begin with the same air.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError:
            digest.update(path.name.encode(errors="surrogateescape"))
    return digest.hexdigest()


# ---- names

def _with_ids(found: list[tuple[Found, Path | None]], root: Path, ids: str) -> list[ScanSource]:
    """Sources with ids: functions of the scan alone, but where two would have the same.

    By path they all have a hash of their place then, as head.nii.gz and the folder head beside it: whichever kept the
    name could lose it to the next that comes. By uid they are the same scan twice, and the first keeps its id.
    """
    order = {module.KIND: rank for rank, module in enumerate(FORMATS)}
    top = root if root.is_dir() else root.parent
    named = [(_id(one, root, ids), str(one.anchor), one, within) for one, within in found]
    count = Counter(name for name, *_ in named)
    sources, taken = [], set()
    for name, _, one, within in sorted(named, key=lambda row: (row[0], order.get(row[2].kind, len(FORMATS)), row[1],
                                                               str(row[2].paths[0]))):
        if name in taken or (ids == "path" and count[name] > 1):
            place = [str(path.relative_to(top) if path.is_relative_to(top) else path) for path in (one.paths[0], within)
                     if path is not None]
            name = f"{name}-{_short(str(place))}"
        taken.add(name)
        sources.append(ScanSource(name, one.kind, one.paths, one.options, within, uid=one.uid, whose=one.whose,
                                  error=one.error, notes=one.notes))
    return sources


def _id(found: Found, root: Path, ids: str) -> str:
    if ids == "uid":
        return _id_by_uid(found)
    top = root if root.is_dir() else root.parent
    parts = found.anchor.relative_to(top).parts if found.anchor.is_relative_to(top) else (found.anchor.name,)
    name = printable(SEPARATOR.join(parts) or top.name or "scan") + (f"-{found.suffix}" if found.suffix else "")
    odd = any(SEPARATOR in part or part != part.strip("-") for part in parts) or len(name.encode()) > LONGEST_ID
    return _hashed(name, parts) if odd or name in RESERVED else name


def _id_by_uid(found: Found | ScanSource) -> str:
    return f"{found.kind}-{_short(found.uid, 12)}"


def _within(name: str, scan_id: str) -> str:
    """The id of a scan in one of several inputs, of this name."""
    whole = name + SEPARATOR + scan_id
    return whole if len(whole.encode()) <= LONGEST_ID else _hashed(whole, (whole,))


def _hashed(name: str, parts: tuple[str, ...]) -> str:
    """An id that could be taken for another, is too long or reserved: cut, and with a hash of the scan's place."""
    return f"{name.encode()[:LONGEST_ID].decode(errors='ignore')}-{_short(str(parts))}"


def _short(text: str, length: int = 8) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:length]
