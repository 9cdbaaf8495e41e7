"""Speed of HealthyGAN's training step: ours in float32 and bfloat16 against plain float32, side by side in one run.

    python -m benchmarks.healthygan --preset cpu128 --repeats 7

All take the same step with the same weights, images and batch: two critic steps and one of the generator. They take
turns, so that other work on the machine meets all. Plain is PyTorch's own operations, contiguous; ours keeps freed
memory (op/memory.py), as the training does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from contextlib import nullcontext

import torch

import distributed
from benchmarks.measure import REFERENCE, medians, plain_ops, side_by_side
from healthygan.settings import PRESETS, TrainConfig
from healthygan.training import Trainer

PRECISIONS = {REFERENCE: "fp32", "ours, fp32": "fp32", "ours, bf16": "bf16"}


def images(config: TrainConfig, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two batches of seeded noise in [-1, 1]."""
    stream = torch.Generator().manual_seed(0)
    shape = (2, config.batch, 3, config.size, config.size)
    return tuple((torch.rand(shape, generator=stream) * 2 - 1).to(device))


def compare(config: TrainConfig, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of a round by variant: critic_steps steps, of which the last is the generator's, too."""
    trainers = {name: Trainer(dataclasses.replace(config, precision=p), device) for name, p in PRECISIONS.items()}
    a, b = images(config, device)

    def round_of(name, trainer):
        def run():
            with plain_ops() if name == REFERENCE else nullcontext():
                for _ in range(config.critic_steps):
                    trainer.step(a, b)
        return run

    variants = {name: round_of(name, trainer) for name, trainer in trainers.items()}
    return medians(side_by_side(variants, device, repeats), 1000)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu128")
    parser.add_argument("--batch", type=int, help="default: the preset's")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each, at least 5 (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    if args.repeats < 5:
        parser.error(f"--repeats must be at least 5, got {args.repeats}")
    config = PRESETS[args.preset]
    try:
        config = config if args.batch is None else dataclasses.replace(config, batch=args.batch)
        device = distributed.pick_device(args.device)
    except ValueError as error:
        parser.error(str(error))
    ms = compare(config, device, args.repeats)
    print(f"{args.preset}, batch {config.batch}, {device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    for name, value in ms.items():
        print(f"{name:12}{value:8.0f} ms a round of {config.critic_steps} steps, {ms[REFERENCE] / value:5.2f} x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
