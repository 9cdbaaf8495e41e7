"""The rows of the speed table that need a GPU. On random data: no files, no weights.

    python -m benchmarks.gpu --limit-s 150 --out gpu.json
    python -m benchmarks.gpu --only styled512,median512

Rows are written as soon as they are there: what ends early leaves those that it has. A row that fails says why, and the
others follow. Every function takes the device and its sizes, so that the tests run them on the CPU with tiny ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import distributed
import train
from benchmarks.measure import REFERENCE, Row, bandwidth, machine, medians, operations, rate, side_by_side, table
from benchmarks.reference import ReferenceDiscriminator, ReferenceGenerator
from detect.latent import LatentStats
from detect.measure import Votes
from detect.projection import project_frame
from detect.search import Search, SearchSettings
from gan import training
from model import Discriminator, Encoder, Generator, ModelConfig
from op import bias_act, binomial_kernel, set_impl, styled_act, upfirdn2d
from op.median import median2d

ADA_P = 0.5                                  # all augmentations at work, as late in a training
LEAST_S = 15                                 # a row is not begun with less of the time limit left


@contextmanager
def plain_ops() -> Iterator[None]:
    """Every op in its plain PyTorch form, for the reference."""
    set_impl("ref")
    try:
        yield
    finally:
        set_impl("auto")


# ---------------------------------------------------------------------------------------------------------------
# Training

def make_trainer(config: training.TrainConfig, device: torch.device, reference: bool = False) -> training.Trainer:
    """A trainer of random weights; the reference has the published forward passes, in float32."""
    ours = training.Generator, training.Discriminator
    if reference:
        training.Generator, training.Discriminator = ReferenceGenerator, ReferenceDiscriminator
        config = dataclasses.replace(config, precision="fp32")
    try:
        trainer = training.Trainer(config, device)
    finally:
        training.Generator, training.Discriminator = ours
    if trainer.ada:
        trainer.ada.p = ADA_P
    return trainer


def average_step(seconds: dict[str, float], config: training.TrainConfig) -> float:
    """Of a step without regularisers, with the path length's, and with all: the mean over many steps."""
    path, r1 = (1 / every if every else 0 for every in (config.path_every, config.r1_every))
    return seconds["plain"] + path * (seconds["path"] - seconds["plain"]) + r1 * (seconds["all"] - seconds["path"])


def training_row(name: str, config: training.TrainConfig, device: torch.device, repeats: int, goal: str,
                 most_s_per_kimg: float | None = None, least_ratio: float = 0, precisions=("auto",),
                 reference_batch: int | None = None) -> list[Row]:
    """Whole steps of Trainer: augmentation, all phases at their average frequency, optimisers, EMA.

    A row for each precision, seconds a thousand images; real images lie on the device. reference_batch: of the
    reference's steps, where those of the whole batch would not fit the card.
    """
    real = torch.rand(config.batch, 3, config.size, config.size, device=device) * 2 - 1
    few = dataclasses.replace(config, batch=reference_batch or config.batch)
    trainers = {REFERENCE: make_trainer(few, device, reference=True)}
    trainers |= {p: make_trainer(dataclasses.replace(config, precision=p), device) for p in precisions}
    # Step numbers that call for: no regulariser, the path length's alone, both.
    kinds = {"plain": 1, "path": config.path_every, "all": 0}

    def step(who, kind):
        if who == REFERENCE:
            with plain_ops():
                trainers[who].step(real[:few.batch], kinds[kind])
        else:
            trainers[who].step(real, kinds[kind])

    samples = {who: {} for who in trainers}
    for kind in kinds:
        runs = {who: (lambda who=who, kind=kind: step(who, kind)) for who in trainers}
        for who, times in side_by_side(runs, device, repeats).items():
            samples[who][kind] = times
    kimg = 1000 / config.batch
    spent = {who: (1000 / few.batch if who == REFERENCE else kimg) * average_step(medians(by_kind), config)
             for who, by_kind in samples.items()}
    smaller = f"; the reference's batch {few.batch}" if few.batch != config.batch else ""
    rows = []
    for precision in precisions:
        trainer = trainers[precision]
        dtype = trainer.g.compute_dtype
        counted = {kind: operations(lambda kind=kind, p=precision: step(p, kind)) for kind in kinds}
        floor = kimg * average_step(counted, config) / rate(device, dtype)
        met = spent[REFERENCE] / spent[precision] >= least_ratio
        met &= most_s_per_kimg is None or spent[precision] <= most_s_per_kimg
        note = f"batch {config.batch}, {_short(dtype)}, ADA p {ADA_P:g}{smaller}"
        rows.append(Row(name if len(precisions) == 1 else f"{name}, {_short(dtype)}", "s/kimg", goal, spent[REFERENCE],
                        spent[precision], floor, met, note,
                        {f"{who} {kind}": times for who in (REFERENCE, precision)
                         for kind, times in samples[who].items()}))
    return rows


# ---------------------------------------------------------------------------------------------------------------
# Projection

def random_search(config: ModelConfig, device: torch.device, reference: bool = False) -> Search:
    """The published search with random weights; statistics of 32 components at every 5 mm."""
    torch.manual_seed(0)
    networks = ReferenceGenerator if reference else Generator, ReferenceDiscriminator if reference else Discriminator
    generator, discriminator, encoder = (
        net(config).eval().requires_grad_(False).to(device) for net in (*networks, Encoder))
    positions, layers, dim = 32, config.n_latent, config.style_dim
    kept = min(32, dim)
    basis = torch.linalg.qr(torch.randn(layers, dim, kept)).Q.expand(positions, -1, -1, -1).contiguous()
    latent = LatentStats(
        5.0 * torch.arange(positions), torch.zeros(positions, layers, dim), basis, torch.ones(positions, layers, kept),
        torch.ones(positions, layers), torch.full((positions,), 100), torch.full((positions,), 7.5),
        torch.zeros(positions, layers))
    return Search(SearchSettings(), generator, encoder, latent.to(device), discriminator)


def projection_row(name: str, config: ModelConfig, slices: int, settings: SearchSettings, device: torch.device,
                   repeats: int, goal: str, most_s: float, parts: tuple[int, int] = (10, 1)) -> Row:
    """The published search and votes on a scan, as projector.py runs them: all but reading and writing files.

    The reference runs one of parts[0] of the steps, ours one of parts[1], and each counts as often: the time is all in
    the steps.
    """
    hu = torch.rand(slices, config.size, config.size) * 80
    brain = torch.zeros_like(hu, dtype=torch.bool)
    margin = config.size // 4
    brain[:, margin:-margin, margin:-margin] = True
    below_vertex_mm = 5.0 * np.arange(slices)[::-1]
    dtype = distributed.pick_precision("auto", device)
    searches = {REFERENCE: random_search(config, device, reference=True), "ours": random_search(config, device)}
    searches["ours"].set_precision(dtype)

    def run(who, part=1, batch=32):
        fewer = dataclasses.replace(settings, steps_latent=max(1, settings.steps_latent // part),
                                    steps_noise=max(1, settings.steps_noise // part), batch=batch)
        project_frame(searches[who].with_settings(fewer), Votes(), hu, brain, below_vertex_mm)

    def reference():
        with plain_ops():
            run(REFERENCE, parts[0], batch=8)             # 32 slices of its activations may not fit the card

    samples = side_by_side({REFERENCE: reference, "ours": lambda: run("ours", parts[1])}, device, repeats)
    spent = {who: part * seconds for part, (who, seconds) in zip(parts, medians(samples).items())}
    per_step = operations(lambda: run("ours", settings.steps_latent))          # one step of each kind
    floor = per_step * settings.steps_latent / rate(device, dtype)
    return Row(name, "s", goal, spent[REFERENCE], spent["ours"], floor, spent["ours"] <= most_s,
               f"{slices} slices, {settings.steps_latent} + {settings.steps_noise} steps, {_short(dtype)}; the "
               f"reference ran one step in {parts[0]}, ours one in {parts[1]}, and they count as often; random weights",
               samples)


# ---------------------------------------------------------------------------------------------------------------
# Ops

def median_row(shape: tuple[int, int, int], size: int, device: torch.device, repeats: int) -> Row:
    x = torch.randn(shape, device=device)
    samples = side_by_side({REFERENCE: lambda: median2d(x, size, impl="ref"), "ours": lambda: median2d(x, size)},
                           device, repeats)
    spent = medians(samples, scale=1e3)
    floor = 1e3 * 2 * x.numel() * 4 / bandwidth(device)
    return Row(f"gpu median {size}x{size}, {_by(shape)}", "ms", "5x floor", spent[REFERENCE], spent["ours"], floor,
               spent["ours"] <= 5 * floor, samples=samples)


def op_rows(batch: int, levels: tuple[tuple[int, int], ...], device: torch.device, repeats: int,
            calls: int = 20) -> list[Row]:
    """upfirdn2d and bias_act at (channels, side) of the networks' layers, bf16 and channels-last as in the networks."""
    kernel = binomial_kernel(gain=4).to(device)
    rows = []
    for channels, side in levels:
        big, odd, image = (
            torch.randn(batch, c, s, s, device=device).to(dtype, memory_format=torch.channels_last)
            for c, s, dtype in ((channels, side, torch.bfloat16), (channels, side + 1, torch.bfloat16),
                                (3, side // 2, torch.float32)))
        bias = torch.randn(channels, device=device)
        ops = {
            "blur after upsampling": (odd, lambda impl, x=odd: upfirdn2d(x, kernel, pad=(1, 1), impl=impl)),
            "blur before downsampling": (big, lambda impl, x=big: upfirdn2d(x, kernel, pad=(2, 2), impl=impl)),
            "blur, every second": (big, lambda impl, x=big: upfirdn2d(x, kernel, down=2, pad=(1, 1), impl=impl)),
            "image up": (image, lambda impl, x=image: upfirdn2d(x, kernel, up=2, pad=(2, 1), impl=impl)),
            "bias_act": (big, lambda impl, x=big, b=bias: bias_act(x, b, impl=impl)),
        }
        for name, (x, run) in ops.items():
            y = run("ref")
            samples = side_by_side({REFERENCE: lambda run=run: run("ref"), "ours": lambda run=run: run("auto")}, device,
                                   repeats, calls)
            spent = medians(samples, scale=1e3)
            floor = 1e3 * (x.numel() * x.element_size() + y.numel() * y.element_size()) / bandwidth(device)
            rows.append(Row(f"gpu {name} {_by(x.shape)}", "ms", "1.3x floor", spent[REFERENCE], spent["ours"], floor,
                            spent["ours"] <= 1.3 * floor, samples=samples))
    return rows


def styled_rows(batch: int, levels: tuple[tuple[int, int], ...], device: torch.device, repeats: int,
                calls: int = 20) -> list[Row]:
    """What follows a generator's convolution (op.styled_act), at (channels, side) of its layers, bf16, channels-last.

    Without a gradient; with those that the projection asks for (activations and code); with those of a training.
    """
    rows = []
    for channels, side in levels:
        y, above = (torch.randn(batch, channels, side, side, device=device).to(
            torch.bfloat16, memory_format=torch.channels_last) for _ in range(2))
        factor = torch.randn(batch, channels, 1, 1, device=device).to(torch.bfloat16)
        noise = torch.randn(batch, 1, side, side, device=device).to(torch.bfloat16)
        strength, bias = torch.full((1,), 0.1, device=device), torch.randn(channels, device=device)
        passes = {"no gradient": ([], 2), "gradient by code": ([y, factor], 6),
                  "gradient in training": ([y, factor, strength, bias], 6)}
        for name, (leaves, tensors) in passes.items():
            def run(leaves=leaves, parts=(y, factor, noise, strength, bias), above=above):
                for leaf in leaves:
                    leaf.requires_grad_()
                out = styled_act(*parts)
                if leaves:
                    torch.autograd.grad(out, leaves, above)
                for leaf in leaves:
                    leaf.requires_grad_(False)

            def reference(run=run):
                with plain_ops():
                    run()

            samples = side_by_side({REFERENCE: reference, "ours": run}, device, repeats, calls)
            spent = medians(samples, scale=1e3)
            floor = 1e3 * tensors * y.numel() * y.element_size() / bandwidth(device)
            rows.append(Row(f"gpu styled_act, {name} {_by(y.shape)}", "ms", "1.3x floor", spent[REFERENCE],
                            spent["ours"], floor, spent["ours"] <= 1.3 * floor, samples=samples))
    return rows


def _by(shape) -> str:
    return " x ".join(map(str, shape))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


# ---------------------------------------------------------------------------------------------------------------
# The sizes of the table, and the command

LEVELS = ((64, 512), (128, 256), (256, 128), (512, 64))      # where paper512's layers are large


def paper512(device: torch.device, repeats: int) -> list[Row]:
    # R1 of 16 images in float32, whose published passes keep some 5 GB an image, would not fit 80 GB
    return training_row("gpu training, paper512", train.PRESETS["paper512"], device, repeats, "6 s/kimg; 3x", 6, 3,
                        reference_batch=4)


def ct256(device: torch.device, repeats: int) -> list[Row]:
    return training_row("gpu training, ct256", train.PRESETS["ct256"], device, repeats, "2 s/kimg", 2)


def projection512(device: torch.device, repeats: int) -> list[Row]:
    return [projection_row("gpu projection of a scan, 512", ModelConfig(size=512), 32, SearchSettings(), device,
                           repeats, "8 s", 8, (50, 10))]


def median512(device: torch.device, repeats: int) -> list[Row]:
    return [median_row((32, 512, 512), 19, device, repeats)]


def ops512(device: torch.device, repeats: int) -> list[Row]:
    return op_rows(16, LEVELS, device, repeats)


def styled512(device: torch.device, repeats: int) -> list[Row]:
    return styled_rows(16, LEVELS, device, repeats)


# In the order they are measured in: seconds first, then what takes longest to set up
GPU_ROWS: dict[str, Callable[[torch.device, int], list[Row]]] = {
    "median512": median512, "styled512": styled512, "paper512": paper512, "projection512": projection512,
    "ops512": ops512, "ct256": ct256,
}


def measure(names: list[str], device: torch.device, repeats: int, limit_s: float, save: Callable[[list[Row]], None]
            ) -> list[Row]:
    """The rows of `names`; save(rows so far) after each. What fails or has no time left is a row that says so."""
    start, rows = time.monotonic(), []
    for name in names:
        left = limit_s - (time.monotonic() - start)
        if left < LEAST_S:
            rows.append(Row(f"gpu {name}", "", "-", note=f"not begun: {left:.0f} s of the time limit left"))
        else:
            print(f"{name} ... ({left:.0f} s left)", file=sys.stderr, flush=True)
            try:
                rows += _with_memory(GPU_ROWS[name], device, repeats)
            except Exception as error:                  # no memory, build or launch, a torch that lacks something
                first = (str(error).strip() or repr(error)).splitlines()[0]
                rows.append(Row(f"gpu {name}", "", "-", note=f"failed: {first[:300]}"))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        save(rows)
    return rows


def _with_memory(row: Callable[[torch.device, int], list[Row]], device: torch.device, repeats: int) -> list[Row]:
    """The rows, with the GPU memory that measuring them took, reference and ours together, in their notes."""
    if device.type != "cuda":
        return row(device, repeats)
    torch.cuda.reset_peak_memory_stats(device)
    found = row(device, repeats)
    peak = f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB at most"
    return [dataclasses.replace(one, note="; ".join(filter(None, (one.note, peak)))) for one in found]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"rows to measure, comma-separated, in this order: {', '.join(GPU_ROWS)}")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of a figure; their median counts")
    parser.add_argument("--limit-s", type=float, default=540, help="no row is begun in the last seconds of this time")
    parser.add_argument("--out", type=Path, help="JSON file for the rows, every sample and the machine")
    args = parser.parse_args(argv)
    names = args.only.split(",") if args.only else list(GPU_ROWS)
    if unknown := sorted(set(names) - set(GPU_ROWS)):
        parser.error(f"--only: no row {', '.join(unknown)}; there are {', '.join(GPU_ROWS)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    try:
        device = distributed.pick_device("cuda")
    except ValueError as error:
        parser.error(str(error))
    facts = machine(device)

    def save(rows):
        if args.out:
            found = [dataclasses.asdict(row) | {"ratio": row.ratio} for row in rows]
            args.out.write_text(json.dumps({"machine": facts, "rows": found}, indent=1) + "\n", encoding="utf-8")

    rows = measure(names, device, args.repeats, args.limit_s, save)
    print(f"{facts['date']}, {facts['gpu']}, torch {facts['torch']}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
