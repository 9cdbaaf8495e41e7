"""The settings of the trainings. On their own, so that a command line is read before torch is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config import MOST_SEED, check_range, option
from detect.options import KNEE, PERCEPTUAL

if TYPE_CHECKING:
    from model import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """The defaults are the paper's, but for `noise`, which the released code keeps fixed, `ema_rampup` and `ada_max`.

    Three things no flag makes the paper's: augmentation is chosen for CT (gan.augment.AugmentSettings), styles are
    mixed in each image by itself, and path lengths are held against their mean before the step.
    """

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
    accumulate: int = option(1, "micro-batches a step is split into, each of 4, 8, 12, ... images, of which the "
                                "discriminator compares 4 at a time")
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
    ada_max: float = option(0.85, "its probability goes no higher. Published is 1: the nearer to it, the more of the "
                                  "transforms leaks into what is drawn")
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
        check_range(self, ("size", "fold", "style_dim", "channel_base", "channel_max", "batch", "accumulate",
                           "path_shrink"), 1)
        check_range(self, ("channel_multiplier", "kimg", "lr", "ada_kimg", "tick_kimg", "grid_kimg", "snapshot_kimg"),
                    0, above=True)
        check_range(self, ("r1_gamma", "r1_every", "path_weight", "path_every", "ema_kimg", "ema_rampup", "workers"), 0)
        check_range(self, ("seed",), 0, MOST_SEED)
        check_range(self, ("path_decay", "mixing", "ada_max", "ada_cutout"), 0, 1)
        check_range(self, ("ada_target",), -2, 1)            # of a mean sign; below -1 the probability always rises
        if self.batch % self.accumulate:
            raise ValueError(f"--batch {self.batch} must be divisible by --accumulate {self.accumulate}")
        if self.accumulate > 1 and self.batch // self.accumulate % 4:
            raise ValueError(f"--accumulate {self.accumulate}: leaves micro-batches of {self.batch // self.accumulate} "
                             "images, and the discriminator compares 4 at a time: it would be another training; give a "
                             "--batch that leaves 4, 8, 12, ...")

    def model(self) -> ModelConfig:
        from model import ModelConfig

        return ModelConfig(self.size, self.style_dim, channel_base=self.channel_base,
                           channel_multiplier=self.channel_multiplier, channel_max=self.channel_max,
                           fold=self.fold)


@dataclass(frozen=True)
class ReaderConfig:
    epochs: float = option(20, "passes over the training slices")
    hours: float = option(0.0, "end after so long, all sessions together, however many epochs are done, with rates "
                               "that have fallen as at the end of them; 0: no limit")
    snapshot_epochs: float = option(1.0, "epochs between snapshots, at which held-out scans are read")
    batch: int = option(16, "images a step on each rank")
    lr: float = option(1e-3, "AdamW's learning rate, which falls to a fiftieth along a cosine")
    warm_up: int = option(1600, "images over which it rises at the start")
    weight_decay: float = option(1e-3, "AdamW's")
    ema_images: float = option(5000, "half-life of the averaged weights, which are what is used; at most a twentieth "
                                     "of the images so far")
    width: int = option(48, "channels at half the frame's resolution, a multiple of 24; more at each coarser one")
    depth: int = option(4, "resolutions, each half of the one before, 6 at most")
    shapes: float = option(0.8, "probability of shapes in a slice")
    mirrored: bool = option(True, "a second step on each batch, with its mirror images")
    seed: int = option(0, "seed of everything random")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))
    workers: int = option(2, "loader processes a rank; 0 decodes in the main process")

    def __post_init__(self):
        check_range(self, ("batch", "depth"), 1)
        check_range(self, ("epochs", "snapshot_epochs", "lr", "ema_images"), 0, above=True)
        check_range(self, ("hours", "warm_up", "weight_decay", "workers"), 0)
        check_range(self, ("seed",), 0, MOST_SEED)
        check_range(self, ("shapes",), 0, 1)
        if self.depth > 6:
            raise ValueError(f"--depth must be at most 6, got {self.depth}")
        if self.width < 24 or self.width % 24:
            raise ValueError(f"--width {self.width}: must be a multiple of 24")

    def widths(self) -> tuple[int, ...]:
        """Channels of a reader at each of its resolutions: 48, 64, 96, 128 and so on."""
        return tuple(round(self.width * factor) for factor in (1, 4 / 3, 2, 8 / 3, 4, 16 / 3)[:self.depth])


@dataclass(frozen=True)
class EveryNth:
    """Of patients every parts-th, from the number-th on, counted from 1: one fold of several."""

    number: int
    parts: int

    def __post_init__(self):
        if not 1 <= self.number <= self.parts or self.parts < 2:
            raise ValueError(f"fold {self}: there is none")

    def of(self, scan_ids: Sequence[str], patients: Sequence[str]) -> list[str]:
        """The scans of every parts-th patient, in the order in which patients first come."""
        found = set(list(dict.fromkeys(patients))[self.number - 1::self.parts])
        return [scan for scan, patient in zip(scan_ids, patients, strict=True) if patient in found]

    def __str__(self) -> str:
        return f"{self.number}:{self.parts}"


@dataclass(frozen=True)
class EncoderConfig:
    """The defaults are the paper's, but for `perceptual`: its LPIPS needs weights that do not come with the program."""

    epochs: float = option(65, "passes over the training slices")
    hours: float = option(0.0, "end after so long, all sessions together, however many epochs are done, with rates "
                               "that have fallen as at the end of them; 0: no limit")
    snapshot_epochs: float = option(1.0, "epochs between snapshots, at which held-out scans are drawn")
    perceptual_epochs: float = option(5, "of these, first with the perceptual loss alone")
    batch: int = option(8, "images a step on each rank")
    lr: float = option(1e-4, "Adam's learning rate of the encoder's last layer, a plain one that cannot bear more, and "
                             "of the one before it that --encoder-code asks for")
    lr_trunk: float = option(1e-4, "of the encoder's other layers, which have the equalised learning rate")
    lr_discriminator: float = option(1e-5, "of the discriminator")
    lr_generator: float = option(0.0, "of the generator; 0, as published, leaves it as the GAN training left it. A "
                                 "generator cut short learns here to draw the healthy slices it is shown")
    decay: float = option(0.0, "last part of the training over which all rates fall evenly to 0; published is 0, none")
    adversarial: float = option(0.05, "weight of the adversarial loss; 0: no adversary, but for --domain or, with "
                                      "--hide, --gated; with --code-channels none at all")
    domain: float = option(1.0, "weight of the in-domain loss: code of the image against code of its reconstruction")
    r1_gamma: float = option(10, "weight of the R1 penalty")
    r1_every: int = option(16, "steps between R1 penalties; 0: never")
    perceptual: str = option("discriminator", "the trained discriminator's features, LPIPS-VGG (needs --vgg16), or "
                             "the pixels alone", PERCEPTUAL)
    pixels: float = option(5.0, "weight of the pixels' own difference in --perceptual discriminator")
    knee: float = option(KNEE, "difference below which the pixels' difference is rounded off, in [-1, 1]")
    noise: bool = option(False, "the encoder predicts the generator's noise maps, too: what is fine in a head and fits "
                                "in no code")
    code_alone: float = option(0.25, "with --noise: part of the images drawn without them, so that the code keeps "
                                     "what it can hold")
    erase: float = option(0.25, "probability of a random rectangle blanked in the encoder's input only")
    coarse: float = option(0.0, "probability of coarse noise, hyperdense and hypodense blobs, in the "
                                "encoder's input only: it learns to look past them")
    hide: float = option(0.0, "probability that parts of an image are hidden from the encoder, which draws with the "
                              "generator what is there (gan/inpainting.py). Above 0 this is the objective: --shapes to "
                              "--encoder-code have a part in it, --domain, --perceptual, --pixels, --noise, "
                              "--code-alone, --erase and --coarse none")
    halved: bool = option(False, "with --hide: new networks of half the GAN's size and channels, to be the ones that "
                                 "draw what surroundings call for, which is blurred anyway, in a quarter of the time")
    gated: float = option(0.0, "with --hide, in the part with the adversary: of this part of the images is hidden what "
                               "the networks find anomalous in them, as in a new scan")
    shapes: float = option(0.5, "probability of shapes that do not belong there, to be drawn without them")
    hidden: float = option(2.0, "additional weight of a hidden pixel")
    changed: float = option(2.0, "additional weight of a pixel that a shape changed")
    gradient: float = option(0.5, "weight of the difference of the images' gradients")
    jitter_hu: float = option(2.0, "standard deviation of a shift of all HU above 0, and in per cent of a gain: of "
                                   "scanners")
    rotate_deg: float = option(45.0, "largest rotation, degrees")
    encoder_width: float = option(1.0, "the encoder's channels over the generator's")
    encoder_code: int = option(0, "numbers that the W+ code goes through; 0: one plain layer")
    code_channels: int = option(0, "channels of a code in space of 8 x 8 pixels, from which the generator learns to "
                                   "draw slices, and new ones from random codes (gan/coding.py). Above 0 this is the "
                                   "objective, with the adversary after --perceptual-epochs; --lr, --encoder-code, "
                                   "--domain, --perceptual, --pixels and what is for --hide or --noise have no part in "
                                   "it, nor have --erase and --coarse")
    code_nats: float = option(800.0, "information that the code holds of a slice, nats")
    rotate: float = option(0.25, "probability of a rotation")
    flip: bool = option(True, "mirror half of the images")
    seed: int = option(0, "seed of everything random")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))
    workers: int = option(2, "loader processes a rank; 0 decodes in the main process")

    def __post_init__(self):
        check_range(self, ("batch",), 1)
        check_range(self, ("epochs", "snapshot_epochs", "knee", "lr", "lr_trunk"), 0, above=True)
        check_range(self, ("hours", "perceptual_epochs", "lr_discriminator", "lr_generator", "adversarial", "domain",
                           "r1_gamma", "r1_every", "pixels", "workers"), 0)
        check_range(self, ("seed",), 0, MOST_SEED)
        check_range(self, ("decay", "code_alone", "erase", "coarse", "rotate", "hide", "gated", "shapes"), 0, 1)
        check_range(self, ("hidden", "changed", "gradient", "jitter_hu", "rotate_deg", "encoder_code"), 0)
        check_range(self, ("encoder_width", "code_nats"), 0, above=True)
        check_range(self, ("code_channels",), 0)
        if self.code_channels and (self.hide or self.noise):
            raise ValueError("--code-channels: an objective of its own; leave out --hide and --noise")
        if self.halved and not (self.hide and self.lr_generator):
            raise ValueError("--halved: its networks are new, and learn to draw what is hidden: give --hide and "
                             "--lr-generator above 0, or a preset that does (half128)")
        if self.code_channels and not self.lr_generator:
            raise ValueError(f"--code-channels {self.code_channels}: the generator's layers that read the code are new "
                             "and would never learn with --lr-generator 0; give a rate above 0, such as 1e-3")

    def has_adversary(self, done: float) -> bool:
        """Whether the adversary and what comes with it have a part once this part of the training, 0 to 1, is done."""
        needing = 0 if self.code_channels else self.gated if self.hide else self.domain
        if not (self.adversarial or needing):
            return False
        return done * self.epochs >= self.perceptual_epochs

    def networks(self, model: dict[str, Any], of_gan: bool = True) -> ModelConfig:
        """The networks of a run on the GAN's, whose ModelConfig this is, or on those of another run like it."""
        from model import ModelConfig

        if self.halved and of_gan:
            model = model | {key: model[key] // 2 for key in ("size", "channel_base", "channel_max")}
        return ModelConfig(**{**model, "encoder_noise": self.noise or self.hide > 0, "noise_channels": self.hide > 0,
                              "encoder_masks": self.hide > 0, "encoder_width": self.encoder_width,
                              "encoder_code": self.encoder_code, "code_channels": self.code_channels})
