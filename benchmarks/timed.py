"""Rows of the speed table, timed beside the reference: a training, a projection, an op. On random data.

Every function takes the device and its sizes, so that the tests run them on the CPU with tiny ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import torch

import distributed
from benchmarks.measure import (
    REFERENCE,
    Row,
    bandwidth,
    medians,
    operations,
    phase,
    plain_ops,
    rate,
    seconds_to_start,
    side_by_side,
)
from benchmarks.reference import ReferenceDiscriminator, ReferenceGenerator
from detect.latent import LatentStats
from detect.projection import project_frame
from detect.search import Search, SearchSettings
from detect.votes import Votes
from gan import training
from model import Discriminator, Encoder, Generator, ModelConfig
from op import bias_act, binomial_kernel, styled_act, upfirdn2d
from op.median import median2d

ADA_P = 0.5                                  # all augmentations at work, as late in a training


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
                 reference_batch: int | None = None, reference: bool = True) -> list[Row]:
    """Whole steps of Trainer: augmentation, all phases at their average frequency, optimisers, EMA.

    A row for each precision, seconds a thousand images; real images lie on the device. reference_batch: of the
    reference's steps, where those of the whole batch would not fit the card. Without the reference no ratio is judged.
    """
    real = torch.rand(config.batch, 3, config.size, config.size, device=device) * 2 - 1
    few = dataclasses.replace(config, batch=reference_batch or config.batch)
    with phase("build"):
        trainers = {REFERENCE: make_trainer(few, device, reference=True)} if reference else {}
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
        for who, times in side_by_side(runs, device, repeats, label=f"{kind} step").items():
            samples[who][kind] = times
    kimg = 1000 / config.batch
    spent = {who: (1000 / few.batch if who == REFERENCE else kimg) * average_step(medians(by_kind), config)
             for who, by_kind in samples.items()}
    smaller = f"; the reference's batch {few.batch}" if few.batch != config.batch else ""
    rows = []
    for precision in precisions:
        trainer = trainers[precision]
        dtype = trainer.g.compute_dtype
        with phase("operations"):
            counted = {kind: operations(lambda kind=kind, p=precision: step(p, kind)) for kind in kinds}
        floor = kimg * average_step(counted, config) / rate(device, dtype)
        met = most_s_per_kimg is None or spent[precision] <= most_s_per_kimg
        if least_ratio:
            met = met and spent[REFERENCE] / spent[precision] >= least_ratio if reference else None
        note = f"batch {config.batch}, {_short(dtype)}, ADA p {ADA_P:g}{smaller}"
        rows.append(Row(name if len(precisions) == 1 else f"{name}, {_short(dtype)}", "s/kimg", goal,
                        spent.get(REFERENCE), spent[precision], floor, met, note,
                        {f"{who} {kind}": times for who in (REFERENCE, precision) if who in samples
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
                   repeats: int, goal: str, most_s: float, parts: tuple[int, int] = (10, 1),
                   reference: bool = True) -> Row:
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
    with phase("build"):
        searches = {who: random_search(config, device, who == REFERENCE)
                    for who in ((REFERENCE, "ours") if reference else ("ours",))}
        searches["ours"].set_precision(dtype)

    def run(who, part=1, batch=32):
        fewer = dataclasses.replace(settings, steps_latent=max(1, settings.steps_latent // part),
                                    steps_noise=max(1, settings.steps_noise // part), batch=batch)
        project_frame(searches[who].with_settings(fewer), Votes(), hu, brain, below_vertex_mm)

    def published():
        with plain_ops():
            run(REFERENCE, parts[0], batch=8)             # 32 slices of its activations may not fit the card

    samples = side_by_side(_variants(published, lambda: run("ours", parts[1]), reference), device, repeats,
                           label="projection")
    spent = {who: seconds * parts[who == "ours"] for who, seconds in medians(samples).items()}
    with phase("operations"):
        per_step = operations(lambda: run("ours", settings.steps_latent))      # one step of each kind
    floor = per_step * settings.steps_latent / rate(device, dtype)
    return Row(name, "s", goal, spent.get(REFERENCE), spent["ours"], floor, spent["ours"] <= most_s,
               f"{slices} slices, {settings.steps_latent} + {settings.steps_noise} steps, {_short(dtype)}; the "
               f"reference ran one step in {parts[0]}, ours one in {parts[1]}, and they count as often; random weights",
               samples)


# ---------------------------------------------------------------------------------------------------------------
# Ops

def op_row(name: str, ours: Callable[[], object], published: Callable[[], object], moved: int, goal: float,
           device: torch.device, repeats: int, calls: int, reference: bool) -> Row:
    """Milliseconds a call. moved: bytes read and written, of which the floor is made; goal: times the floor."""
    samples = side_by_side(_variants(published, ours, reference), device, repeats, calls)
    spent = medians(samples, scale=1e3)
    floor = 1e3 * moved / bandwidth(device)
    note = f"{1e3 * seconds_to_start(ours, device, calls):.2g} ms to start a call" if device.type == "cuda" else ""
    return Row(name, "ms", f"{goal:g}x floor", spent.get(REFERENCE), spent["ours"], floor,
               spent["ours"] <= goal * floor, note, samples)


def median_row(shape: tuple[int, int, int], size: int, device: torch.device, repeats: int, reference: bool = True
               ) -> Row:
    x = torch.randn(shape, device=device)
    return op_row(f"gpu median {size}x{size}, {_by(shape)}", lambda: median2d(x, size),
                  lambda: median2d(x, size, impl="ref"), 2 * _bytes(x), 5, device, repeats, 1, reference)


def op_rows(batch: int, levels: tuple[tuple[int, int], ...], device: torch.device, repeats: int,
            calls: int = 20, reference: bool = True) -> Iterator[Row]:
    """upfirdn2d and bias_act at (channels, side) of the networks' layers, bf16 and channels-last as in the networks."""
    kernel = binomial_kernel(gain=4).to(device)
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
            yield op_row(f"gpu {name} {_by(x.shape)}", lambda run=run: run("auto"), lambda run=run: run("ref"),
                         _bytes(x) + _bytes(run("ref")), 1.3, device, repeats, calls, reference)


def styled_rows(batch: int, levels: tuple[tuple[int, int], ...], device: torch.device, repeats: int,
                calls: int = 20, reference: bool = True) -> Iterator[Row]:
    """What follows a generator's convolution (op.styled_act), at (channels, side) of its layers, bf16, channels-last.

    Without a gradient; with those that the projection asks for (activations and code); with those of a training.
    """
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

            def published(run=run):
                with plain_ops():
                    run()

            yield op_row(f"gpu styled_act, {name} {_by(y.shape)}", run, published, tensors * _bytes(y), 1.3, device,
                         repeats, calls, reference)


def _variants(published: Callable[[], object], ours: Callable[[], object], reference: bool
              ) -> dict[str, Callable[[], object]]:
    return {REFERENCE: published, "ours": ours} if reference else {"ours": ours}


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _by(shape) -> str:
    return " x ".join(map(str, shape))


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
