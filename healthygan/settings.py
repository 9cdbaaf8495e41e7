"""The settings of HealthyGAN's training, and its presets."""

from __future__ import annotations

from dataclasses import dataclass

from config import MOST_SEED, check_range, option
from healthygan import losses
from healthygan.model import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    # Networks
    size: int = option(256, "side of the images; a database's slices are shrunk to it by a whole factor")
    width: int = option(64, "the generator's channels: width, 2 width, 4 width")
    blocks: int = option(6, "residual blocks of the generator")
    critic_width: int = option(64, "the critic's first channels, doubled by every layer")
    critic_max: int = option(2048, "the critic's most channels")
    critic_layers: int = option(6, "halvings of the critic")
    # Length and batch
    iterations: int = option(400_000, "steps of the critic")
    batch: int = option(16, "images of each set a step, on each rank")
    # Losses
    penalty: float = option(losses.PENALTY_WEIGHT, "weight of the critic's gradient penalty")
    identity: float = option(losses.IDENTITY_WEIGHT, "weight of mean |b - t_b|")
    reconstruction: float = option(losses.RECONSTRUCTION_WEIGHT, "weight of mean |a - (m a + (1-m) t_a)|")
    mask: float = option(losses.MASK_WEIGHT, "weight of the mask's size and indecision")
    mask_rampup: float = option(0.0, "part of the iterations after --translate-first over which that weight rises from "
                                     "0: until it is there, neither side attracts the mask")
    copy_first: int = option(0, "iterations at the start with the identity term alone: a translation that cannot copy "
                                "yet teaches the critic blur, and the mask to close")
    translate_first: int = option(0, "iterations after those in which t is y and the mask is left alone: closing it "
                                     "wins nothing, and t learns to take something away")
    indecision: float = option(1.0, "the indecision's part in --mask; 0: size alone, and the mask can change its mind")
    # Optimisation
    lr: float = option(1e-4, "Adam's learning rate; betas are 0.5 and 0.999")
    decay: float = option(0.25, "last part of the iterations over which the rate falls evenly to 0; 0, none, is in "
                                "effect as the released code")
    critic_steps: int = option(2, "steps of the critic for one of the generator")
    ema_iterations: float = option(1000, "half-life of the averaged generator; 0: the generator itself is kept")
    ema_rampup: float = option(0.05, "the half-life is at most this part of the iterations so far; 0: no ramp")
    # Images
    flip: bool = option(True, "mirror half of the images")
    shift: int = option(0, "move images by up to so many whole pixels each way, edges repeated: few are learnt by rote")
    crop_top: float = option(0.08, "part of an image's rows dropped at the top (burnt-in text); not for databases")
    white_16bit: int = option(65535, "value that is white in 16-bit images: 4095 for 12 bits stored in 16")
    val_fraction: float = option(0.1, "part of the healthy images kept aside for the threshold; databases have a "
                                      "validation split of their own")
    fpr: float = option(0.05, "the threshold's false-positive rate on those")
    # Running
    seed: int = option(0, "seed of everything random")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))
    tick: int = option(100, "iterations between lines of statistics")
    choose: int = option(5000, "iterations between sample grids and the choice of the best generator by AUCp")
    choose_after: float = option(0.25, "part of the iterations before which none is chosen: a generator that can "
                                       "do nothing yet may differ between the sets by chance")
    snapshot: int = option(5000, "iterations between snapshots")

    def __post_init__(self):
        check_range(self, ("iterations", "batch", "critic_steps", "tick", "choose", "snapshot"), 1)
        check_range(self, ("lr",), 0, above=True)
        check_range(self, ("penalty", "identity", "reconstruction", "mask", "indecision", "copy_first",
                           "translate_first", "ema_iterations", "ema_rampup", "shift"), 0)
        check_range(self, ("seed",), 0, MOST_SEED)
        check_range(self, ("shift",), 0, self.size - 1)
        check_range(self, ("decay",), 0, 1)
        check_range(self, ("white_16bit",), 1, 65535)
        for name in ("val_fraction", "crop_top", "choose_after", "mask_rampup", "fpr"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        if self.copy_first + self.translate_first >= self.iterations:
            raise ValueError(f"--copy-first {self.copy_first} and --translate-first {self.translate_first} leave "
                             f"nothing of --iterations {self.iterations}: together they must be less")
        if self.critic_steps > self.iterations - self.copy_first:
            raise ValueError(f"--critic-steps {self.critic_steps}: the generator would never take a step in the "
                             f"{self.iterations - self.copy_first} iterations that --copy-first leaves of --iterations")
        self.model()

    def model(self) -> ModelConfig:
        return ModelConfig(self.size, self.width, self.blocks, self.critic_width, self.critic_max, self.critic_layers)

    def learning_rate(self, iteration: int) -> float:
        """The rate of step `iteration`, from 0: constant, then straight down to 0, which comes after the last step."""
        return self.lr * min(1.0, (self.iterations - iteration) / max(1, round(self.decay * self.iterations)))

    def mask_weight(self, iteration: int) -> float:
        """The weight of the mask's term at step `iteration`, from 0."""
        begin = self.copy_first + self.translate_first
        ramp = self.mask_rampup * (self.iterations - begin)
        return self.mask * (min(1.0, max(0, iteration - begin) / ramp) if ramp else 1.0)


PRESETS = {
    "full256": TrainConfig(),
    # As released: full width, no averaged generator, a rate that in effect never falls, no images kept aside
    "faithful": TrainConfig(decay=0, ema_iterations=0, val_fraction=0, precision="fp32"),
    # Narrow and short, some 20 minutes on one CPU core with bf16. So few steps need an identity that weighs more than
    # the published 1, and a start on the right side of the mask (healthygan/README.md)
    "cpu128": TrainConfig(size=128, width=16, blocks=4, critic_width=24, critic_max=256, iterations=750, batch=8,
                          lr=4e-4, identity=100, seed=3, decay=1 / 3, ema_iterations=100, tick=50, choose=125,
                          snapshot=125),
    "smoke32": TrainConfig(size=32, width=8, blocks=2, critic_width=8, critic_max=32, critic_layers=4, iterations=20,
                           batch=4, ema_iterations=5, val_fraction=0.25, fpr=0.25, tick=5,
                           choose=10, snapshot=10),
}
