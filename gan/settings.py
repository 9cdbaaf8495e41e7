"""The settings of the GAN's training. On their own, so that a command line is read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from config import check_range, option

if TYPE_CHECKING:
    from model import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    # Networks
    size: int = option(512, "side of the images; must equal the database's")
    style_dim: int = option(512, "length of z and of a style vector")
    channel_base: int = option(16384, "channels at resolution r: min(max, base * multiplier / r)")
    channel_multiplier: float = option(2, "see --channel-base")
    channel_max: int = option(512, "see --channel-base")
    fold: int = option(1, "2: the finest layers draw 2 x 2 pixels at once; a CPU spends most of its time there", (1, 2))
    # Length and batch
    kimg: float = option(25000, "length of the training, in thousands of real images seen")
    batch: int = option(16, "images a step on each rank")
    accumulate: int = option(1, "micro-batches a step is split into; the batch must be divisible")
    # Optimisation
    lr: float = option(0.002, "Adam's learning rate, before the lazy correction")
    r1_gamma: float = option(10, "weight of the R1 penalty")
    r1_every: int = option(16, "discriminator steps between R1 penalties; 0: never")
    path_weight: float = option(2, "weight of the path-length penalty")
    path_every: int = option(4, "generator steps between path-length penalties; 0: never")
    path_shrink: int = option(2, "the path-length penalty takes this part of the batch")
    path_decay: float = option(0.01, "rate of the running mean of path lengths")
    mixing: float = option(0.9, "probability of mixing two styles")
    ema_kimg: float = option(10, "half-life of the averaged generator, in thousands of images")
    ema_rampup: float = option(0.05, "the half-life is at most this part of the images seen so far; 0: no ramp")
    noise: str = option("random", "noise in training; 'const' trains on the buffers, as the released code",
                        ("random", "const"))
    # Augmentation
    flip: bool = option(True, "mirror half of the real images")
    ada_target: float = option(0.6, "sign of the real logits that adaptive augmentation aims at; 0: none")
    ada_kimg: float = option(500, "thousands of images in which its probability can go from 0 to 1")
    ada_cutout: float = option(0.5, "side of the square cut out, as a part of the image; 0: none. With few scans the "
                                    "probability climbs high, and the generator learns to cut heads itself")
    # Running
    seed: int = option(0, "seed of everything random")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))
    workers: int = option(2, "loader processes a rank; 0 decodes in the main process")
    tick_kimg: float = option(4, "thousands of images between lines of statistics")
    grid_kimg: float = option(20, "between sample grids and sliced Wasserstein distances")
    snapshot_kimg: float = option(40, "between snapshots")

    def __post_init__(self):
        check_range(self, ("batch", "accumulate", "path_shrink"), 1)
        check_range(self, ("kimg", "lr", "ada_kimg", "tick_kimg", "grid_kimg", "snapshot_kimg"), 0, above=True)
        check_range(self, ("r1_gamma", "r1_every", "path_weight", "path_every", "ema_kimg", "ema_rampup", "workers"), 0)
        check_range(self, ("path_decay", "mixing", "ada_cutout"), 0, 1)
        if self.batch % self.accumulate:
            raise ValueError(f"--batch {self.batch} must be divisible by --accumulate {self.accumulate}")

    def model(self) -> ModelConfig:
        from model import ModelConfig

        return ModelConfig(self.size, self.style_dim, channel_base=self.channel_base,
                           channel_multiplier=self.channel_multiplier, channel_max=self.channel_max,
                           fold=self.fold)
