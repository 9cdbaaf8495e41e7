"""The rows of the speed table that need a GPU. On random data: no files, no weights.

    python -m benchmarks.gpu --limit-s 150 --out gpu.json
    python -m benchmarks.gpu --only styled512,median512
    python -m benchmarks.gpu --only paper512 --ours       without the reference, which may take most of the time

Every row is measured in a process of its own, which is stopped at its time limit, quick ones first; the slow ones first
without the reference. Rows are written as soon as they are there: what ends early leaves those that it has. A row that
fails or is stopped says why and where, and the others follow; what took how long is told on the way. What is timed is
in timed.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection

import torch

import train
from benchmarks import new_file
from benchmarks.measure import LOG, Row, machine, table
from benchmarks.timed import median_row, op_rows, projection_row, styled_rows, training_row
from detect.search import SearchSettings
from model import ModelConfig

LEAST_S = 15                                 # a row is not begun with less of the time limit left
LEVELS = ((64, 512), (128, 256), (256, 128), (512, 64))      # where paper512's layers are large


def median512(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    return [median_row((32, 512, 512), 19, device, repeats, reference)]


def styled512(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    return styled_rows(16, LEVELS, device, repeats, reference=reference)


def ops512(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    return op_rows(16, LEVELS, device, repeats, reference=reference)


def ct256(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    return training_row("gpu training, ct256", train.PRESETS["ct256"], device, repeats, "2 s/kimg", 2,
                        reference=reference)


def projection512(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    return [projection_row("gpu projection of a scan, 512", ModelConfig(size=512), 32, SearchSettings(), device,
                           repeats, "8 s", 8, (50, 10), reference)]


def paper512(device: torch.device, repeats: int, reference: bool = True) -> Iterable[Row]:
    # R1 of 16 images in float32, whose published passes keep some 5 GB an image, would not fit 80 GB
    return training_row("gpu training, paper512", train.PRESETS["paper512"], device, repeats, "6 s/kimg; 3x", 6, 3,
                        reference_batch=4, reference=reference)


GpuRow = Callable[[torch.device, int, bool], Iterable[Row]]
GPU_ROWS: dict[str, GpuRow] = {                              # in the order of what they cost
    "median512": median512, "styled512": styled512, "ops512": ops512, "ct256": ct256, "projection512": projection512,
    "paper512": paper512,
}
SLOW = ("ct256", "projection512", "paper512")                # of an unknown time on a card that none has run on
ROW_S = {**dict.fromkeys(GPU_ROWS, 60.0), **dict.fromkeys(SLOW, 120.0)}    # limits, of a row that others follow


def in_turn(names: list[str], ours: bool) -> list[tuple[str, bool]]:
    """(row, whether beside the reference), of a row what matters most first: that it is there, then how it compares."""
    if ours:
        return [(name, False) for name in names]
    quick, slow = ([name for name in names if (name in SLOW) == is_slow] for is_slow in (False, True))
    return [(name, True) for name in quick] + [(name, beside) for beside in (False, True) for name in slow]


def measure(names: list[str], device: torch.device, repeats: int, limit_s: float, save: Callable[[list[Row]], None],
            ours: bool = False) -> list[Row]:
    """The rows of `names`; save(rows so far) after each. What fails or has no time left is a row that says so.

    A row of the same name measured once more, beside the reference, takes the place of the first.
    """
    start, rows = time.monotonic(), {}
    turns = in_turn(names, ours)
    for number, (name, reference) in enumerate(turns, 1):
        left = limit_s - (time.monotonic() - start)
        title = f"gpu {name}" if reference else f"gpu {name}, without the reference"
        if left < LEAST_S:
            found = [Row(title, "", "-", note=f"not begun: {left:.0f} s of the time limit left")]
        else:
            print(f"{title} ... ({left:.0f} s left)", file=sys.stderr, flush=True)
            most = left if number == len(turns) else min(left, ROW_S[name])
            found = in_a_process(title, GPU_ROWS[name], device, repeats, reference, most)
        for row in found:
            rows[row.name] = row
            save(list(rows.values()))
    return list(rows.values())


def in_a_process(title: str, job: GpuRow, device: torch.device, repeats: int, reference: bool, limit_s: float
                 ) -> Iterator[Row]:
    """job's rows as they come, from a process of its own, killed after limit_s; a last one if something failed."""
    context = multiprocessing.get_context("spawn")           # a GPU in use does not survive a fork
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=tell_rows, args=(send, title, job, device, repeats, reference), daemon=True)
    start, doing = time.monotonic(), "start"
    process.start()
    send.close()
    try:
        while (left := start + limit_s - time.monotonic()) > 0 and receive.poll(left):
            try:
                message = receive.recv()
            except EOFError:
                process.join()
                if process.exitcode:
                    yield Row(title, "", "-", note=f"failed: its process ended with {process.exitcode}, last: {doing}")
                return
            if isinstance(message, Row):
                yield message
            else:
                doing = message
                print(f"{time.monotonic() - start:7.1f} s  {doing}", file=sys.stderr, flush=True)
        yield Row(title, "", "-", note=f"stopped after {limit_s:.0f} s, last: {doing}")
    finally:
        process.kill()
        process.join()
        receive.close()


def tell_rows(send: Connection, title: str, job: GpuRow, device: torch.device, repeats: int, reference: bool) -> None:
    """Sends job's rows, and as text what the log says on the way; an error is a row, too."""
    class Teller(logging.Handler):
        def emit(self, record):
            send.send(record.getMessage())

    teller = Teller()
    LOG.addHandler(teller)
    LOG.setLevel(logging.INFO)
    try:
        for row in job(device, repeats, reference):
            send.send(_with_memory(row, device))
    except Exception as error:                               # no memory, build or launch, a torch that lacks something
        first = (str(error).strip() or repr(error)).splitlines()[0]
        send.send(Row(title, "", "-", note=f"failed: {first[:300]}"))
    finally:
        LOG.removeHandler(teller)


def _with_memory(row: Row, device: torch.device) -> Row:
    """The row, with the GPU memory that measuring it took, reference and ours together, in its note."""
    if device.type != "cuda":
        return row
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at most"
    torch.cuda.reset_peak_memory_stats(device)
    return dataclasses.replace(row, note="; ".join(filter(None, (row.note, peak))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows to measure, comma-separated, in this order: {', '.join(GPU_ROWS)}")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of a figure; their median counts")
    parser.add_argument("--limit-s", type=float, default=540, help="seconds after which the row at work is stopped")
    parser.add_argument("--ours", action="store_true", help="leave out the reference, and with it the ratios")
    parser.add_argument("--out", type=new_file, help="JSON file for the rows, every sample and the machine")
    args = parser.parse_args(argv)
    wanted = args.only.split(",") if args.only else list(GPU_ROWS)
    if unknown := sorted(set(wanted) - set(GPU_ROWS)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(GPU_ROWS)}")
    names = [name for name in GPU_ROWS if name in wanted]
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if not args.limit_s > 0:
        parser.error(f"--limit-s must be above 0, got {args.limit_s:g}")
    if not torch.cuda.is_available():
        parser.error("needs a GPU, and found none that PyTorch can use (nvidia-smi must list one, and torch be a CUDA "
                     "build); python -m benchmarks.speed measures the rows of the CPU")
    device = torch.device("cuda", 0)
    facts = machine(device)

    def save(rows):
        if args.out:
            found = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
            args.out.write_text(json.dumps({"machine": facts, "rows": found}, indent=1) + "\n", encoding="utf-8")

    rows = measure(names, device, args.repeats, args.limit_s, save, args.ours)
    print(f"{facts['date']}, {facts['gpu']}, torch {facts['torch']}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
