"""Throughput of projector.py over a folder of scans: time per scan, scans an hour, memory all along.

    python -m benchmarks.cohort SCANS                                # models/head-128, each scan once
    python -m benchmarks.cohort SCANS --times 10 --out cohort.json   # each scan ten times, under ten names
    python -m benchmarks.cohort SCANS --model models/head-256 -- --no-dicom-out      # flags of projector.py

Time is from the start of the process to its end, with the report; CPU time and memory are of all its threads and
processes (-- --jobs 1 has one). Memory is the most held while the first tenth of the scans was done, and the last
tenth: a leak shows as a difference; what processes share is counted in each. Scans given
several times are links. Results are made in a temporary folder and removed.
Exit codes: 0 done, 2 wrong usage, or projector.py failed, 3 some scans failed: they count in the time, too.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import new_file

ROOT = Path(__file__).parent.parent
POLL_S = 0.05
SOME_FAILED = 3                                          # of projector.py, and of this
DONE = re.compile(r"^\d+/\d+ ")                          # what projector.py prints of a scan that is through
FAILED = re.compile(r"^\d+/\d+ .*: FAILED, ")


@dataclass(frozen=True)
class Run:
    """A process that has ended well. memory: (scans done by then, GB held), every POLL_S; peak_gb: the most ever."""

    seconds: float
    cpu_seconds: float
    peak_gb: float
    done: int
    memory: list[tuple[int, float]] = field(repr=False)
    failed: int = 0                                      # of those done

    def held_gb(self, tenth: int) -> float:
        """The most held while a tenth of the scans was done, from 0 to 9; of the whole run with too few samples."""
        first, last = self.done * tenth / 10, self.done * (tenth + 1) / 10
        held = [gb for done, gb in self.memory if first <= done < last]
        return max(held, default=self.peak_gb)


def watched(command: list[str], accepted: tuple[int, ...] = (0,)) -> Run:
    """Runs a command, watching memory and the scans that it says are done.

    RuntimeError with its output where it ends with an exit code that is not accepted.
    """
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    lines, memory, peak, done = [], [], 0.0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        reader = threading.Thread(target=lambda: lines.extend(process.stdout))
        reader.start()
        while process.poll() is None:
            done = sum(bool(DONE.match(line)) for line in lines[:])
            now, most = held_gb(process.pid)
            peak = max(peak, most)
            if now:
                memory.append((done, now))
            time.sleep(POLL_S)
        reader.join()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode not in accepted:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{''.join(lines)[-2000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    done, failed = (sum(bool(pattern.match(line)) for line in lines) for pattern in (DONE, FAILED))
    return Run(seconds, cpu, peak, done, memory, failed)


def held_gb(pid: int) -> tuple[float, float]:
    """What a running process and those that it has started hold now, and the sum of what each has held at most, GB.

    Zeros where it has just ended. Not wait4's ru_maxrss: that counts what the parent held when it started the process.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        children = [child for path in Path(f"/proc/{pid}/task").glob("*/children")       # of whichever thread
                    for child in path.read_text(encoding="ascii").split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("VmRSS", "VmHWM")))
    own = [int(found.get(key, "0").split()[0]) / 2**20 for key in ("VmRSS", "VmHWM")]     # kB; a zombie has none
    return tuple(map(sum, zip(own, *(held_gb(int(child)) for child in children))))


def projector(scans: Path, model: Path, out: Path, flags: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, str(ROOT / "projector.py"), str(scans), "--model", str(model), "--out", str(out),
            "--device", "cpu", *flags]


def repeated(scans: Path, times: int, folder: Path) -> Path:
    """A folder of links to every file under `scans`, `times` times over."""
    for number in range(times):
        for path in sorted(path for path in scans.rglob("*") if path.is_file()):
            link = folder / f"{number:03d}" / path.relative_to(scans)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return folder


def facts(run: Run) -> dict[str, float]:
    return {"scans": run.done, "failed": run.failed, "seconds_per_scan": run.seconds / run.done,
            "scans_per_hour": 3600 * run.done / run.seconds, "cpu_seconds_per_scan": run.cpu_seconds / run.done,
            "peak_gb": run.peak_gb,
            "gb_by_tenth": [round(run.held_gb(tenth), 3) for tenth in range(10)]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path, help="folder of scans, as of projector.py")
    parser.add_argument("--model", type=Path, default=ROOT / "models/head-128", help="default: %(default)s")
    parser.add_argument("--times", type=int, default=1, help="how often each scan is projected, under another name")
    parser.add_argument("--out", type=new_file, help="JSON file for the figures and the memory's curve")
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    if args.times < 1:
        parser.error(f"--times must be at least 1, got {args.times}")
    if not args.scans.is_dir():
        parser.error(f"{args.scans}: no such folder; give a folder of scans")
    with tempfile.TemporaryDirectory() as folder:
        scans = args.scans if args.times == 1 else repeated(args.scans, args.times, Path(folder) / "scans")
        try:
            run = watched(projector(scans, args.model, Path(folder) / "results", tuple(flags)), (0, SOME_FAILED))
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    found = facts(run)
    cores = len(os.sched_getaffinity(0))
    print(f"{found['scans']} scans on {cores} cores: {found['seconds_per_scan']:.2f} s per scan, "
          f"{found['scans_per_hour']:.0f} an hour; CPU time {found['cpu_seconds_per_scan']:.2f} s per scan; memory "
          f"{found['gb_by_tenth'][0]:.2f} GB in the first tenth, {found['gb_by_tenth'][-1]:.2f} GB in the last, "
          f"{found['peak_gb']:.2f} GB at most" + (f"; {found['failed']} failed" if found["failed"] else ""))
    if args.out:
        found |= {"model": args.model.name, "flags": flags, "memory": run.memory}
        args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return SOME_FAILED if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
