"""A folder of scans projected into a folder of results: what is finished is skipped, what fails is a row."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

import distributed
from ct.read import ScanSource, read_scan
from ct.scan import ScanError
from detect.outputs import OUTPUTS, Writer, scan_row, slice_rows, write_tables
from detect.projection import Projector
from files import replace_text


def project_scan(projector: Projector, source: ScanSource, folder: Path, writers: Mapping[str, Writer] = OUTPUTS
                 ) -> dict:
    """Project one scan and write its folder; returns its rows. Raises ScanError."""
    started = time.perf_counter()
    scan = read_scan(source)
    seconds = {"read": time.perf_counter() - started}
    projection = projector(scan)
    seconds |= projection.seconds
    writing, notes = time.perf_counter(), []
    for write in writers.values():
        notes += write(folder, projection)
    seconds["write"] = time.perf_counter() - writing
    return {"scan": scan_row(projection, time.perf_counter() - started, notes), "slices": slice_rows(projection),
            "seconds": seconds}


def finished(folder: Path) -> dict | None:
    """The result.json of a scan's folder; None where there is none, or it is damaged."""
    try:
        return json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def fingerprint(source: ScanSource) -> str:
    """Changes with the scan's files (names, sizes, times), scan.json included, and with how they are read."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
    read_as = {k: v for k, v in source.options.items() if not isinstance(v, Path)}
    return hashlib.sha256(repr((source.kind, facts, read_as)).encode()).hexdigest()


def project_all(projector: Projector, sources: list[ScanSource], out: Path, writers: Mapping[str, Writer] = OUTPUTS
                ) -> tuple[list[dict], list[dict]]:
    """Collective. Project this rank's share of the scans; returns all finished and all failed rows, on every rank.

    A scan is finished when its folder holds result.json, which is written last; its key says what with, and its
    fingerprint that the files have not changed since. writers: what is written, by name; other ones, another result.
    """
    done, failed, key, outputs = [], [], projector.key(), sorted(writers)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    for number, source in enumerate(sources):
        if number % world != rank:
            continue
        folder = out / source.scan_id
        marker = folder / "result.json"
        earlier, files = finished(folder), fingerprint(source)
        if earlier and (earlier["key"], earlier.get("files"), earlier.get("outputs")) == (key, files, outputs):
            done.append(earlier)
            print(f"{number + 1}/{len(sources)} {source.scan_id}: finished before, skipped", flush=True)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
        try:
            rows = {"key": key, "files": files, "outputs": outputs,
                    **project_scan(projector, source, folder, writers)}
            replace_text(marker, json.dumps(rows))
        except Exception as error:       # a scan that breaks us must not cost the others their results
            reason = str(error)
            if not isinstance(error, ScanError):
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}"
            failed.append({"scan_id": source.scan_id, "status": "failed", "reason": reason})
            outcome = f"FAILED, {reason}"
        else:
            done.append(rows)
            outcome = f"score {rows['scan']['score']:.3f}, {rows['scan']['seconds']:.1f} s"
        print(f"{number + 1}/{len(sources)} {source.scan_id}: {outcome}", flush=True)
        if world == 1:
            write_tables(out, done, failed)
    shares = distributed.gather((done, failed))
    return [d for share in shares for d in share[0]], [f for share in shares for f in share[1]]


def make_writable(out: Path) -> None:
    """Makes the folder. ValueError where nothing can be written there, before hours of work for it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from error


def refuse_other_results(out: Path, sources: list[ScanSource], key: dict) -> None:
    """ValueError if a scan's results there were made with another model, other settings or another version."""
    for source in sources:
        earlier = finished(out / source.scan_id)
        if earlier and earlier["key"] != key:
            raise ValueError(f"--out {out}: holds results of {source.scan_id} made with another model, other settings "
                             "or another version of this program; choose another folder, or --overwrite")
