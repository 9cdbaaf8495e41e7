"""Train HealthyGAN (Rahman Siddiquee et al. 2022): translate images to their healthy version, without labels.

    python -m healthygan.train --data cxr --out runs/healthygan --preset full256
    python -m healthygan.train --healthy b.lmdb --mixed a.lmdb b.lmdb --mixed-scans a.txt --preset cpu128
    torchrun --nproc-per-node=8 -m healthygan.train --data cxr --out runs/healthygan

Set B is known to be healthy, set A is unannotated: healthy and diseased mixed. --data holds train/healthy and
train/mixed; --healthy and --mixed name folders of images, or databases of head-CT slices made by prepare.py.
Writes to --out: config.json, stats.jsonl, sample grids (x, t, y, m, |x-y|), TensorBoard curves, snapshots, and in
best/ the generator with the highest AUCp (unannotated against known healthy: no labels) with its frozen threshold.
Run the same command again to go on from the last snapshot. SIGINT, SIGTERM and SIGUSR1 end it with a snapshot after
the step in progress. Exit codes: 0 done, 2 wrong usage, 4 diverged again after going back to the last snapshot (which
is kept), 130 or 143 stopped by a signal.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

import distributed
from config import check_range, option, parse
from dataset import DatasetError
from evaluation import metrics
from gan.runlog import Run, load_optimiser, run_command
from healthygan import losses
from healthygan.data import ImageSettings, TrainingData, batches, class_folders, is_database, load_training
from healthygan.model import ModelConfig, Translation
from healthygan.pictures import save_grid
from healthygan.scoring import aucp, image_scores, unit_scores
from healthygan.weights import save_model
from op import memory

MASK_LIMITS = (0.001, 0.95)              # a mean mask beyond them ...
COLLAPSED_AFTER = 500                    # ... for as many iterations has collapsed


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
                           "translate_first", "ema_iterations", "ema_rampup", "shift", "seed"), 0)
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


# ---------------------------------------------------------------------------------------------------------------
# One step

class Trainer:
    """Both networks, their optimisers, and a step.

    Draws come from a generator seeded by (seed, iteration, purpose) for the global batch, of which a rank takes
    every world-th row: the number of ranks does not change them, and a resumed run needs only the iteration.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.iteration = 0
        self.highest_aucp = -math.inf                              # of the generators so far, on rank 0
        self.reseed(config.seed)
        torch.backends.cudnn.benchmark = True                      # every step has the same shapes
        torch.manual_seed(config.seed)                             # the same weights on every rank
        self.g = config.model().generator().to(device)
        self.d = config.model().critic().to(device)
        self.g_ema = copy.deepcopy(self.g).requires_grad_(False) if config.ema_iterations else None
        dtype = distributed.pick_precision(config.precision, device)
        for net in (self.g, self.d, self.best):
            net.compute_dtype = dtype
        self.g_opt, self.d_opt = (torch.optim.Adam(net.parameters(), lr=config.lr, betas=(0.5, 0.999), fused=True)
                                  for net in (self.g, self.d))
        self.collapsed = torch.zeros(2, dtype=torch.int64, device=device)   # iterations a mask was too small, large

    def reseed(self, seed: int) -> None:
        self.seed = seed

    @property
    def whole_until(self) -> int:
        """The iteration from which on the mask takes part."""
        return self.config.copy_first + self.config.translate_first

    @property
    def best(self) -> torch.nn.Module:
        """The generator to keep: the averaged one where there is one."""
        return self.g if self.g_ema is None else self.g_ema

    def step(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        """One step on images a, b [batch, 3, N, N]; returns scalars for the log."""
        a, b = (self._shift(self._flip(x, f"flip {name}"), f"shift {name}") for x, name in ((a, "a"), (b, "b")))
        for optimiser in (self.g_opt, self.d_opt):
            for group in optimiser.param_groups:
                group["lr"] = self.config.learning_rate(self.iteration)
        if self.iteration in (self.config.copy_first, self.whole_until):
            self.g_opt.state.clear()           # after thousands of zeros, Adam's first step at the mask would be 16 lr
        if self.iteration < self.config.copy_first:
            stats = self._step_copy(b)
            self.iteration += 1
            return stats
        # The generator does not change between its use as the critic's opponent and its own step: one pass serves both.
        with_generator = (self.iteration + 1) % self.config.critic_steps == 0
        if with_generator:
            both = self._translate(torch.cat([a, b]))
            of_a, of_b = (type(both)(*parts) for parts in zip(*(part.chunk(2) for part in both)))
        else:
            with torch.no_grad():
                of_a = self._translate(a)
        stats = self._step_critic(b, of_a.y.detach())
        if with_generator:
            stats |= self._step_generator(a, b, of_a, of_b)
        self.iteration += 1
        return stats

    def _translate(self, x: torch.Tensor) -> Translation:
        """The generator's, with t for y in the first iterations."""
        of_x = self.g(x)
        return of_x._replace(y=of_x.t) if self.iteration < self.whole_until else of_x

    def _step_copy(self, b: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = losses.identity(b, self.g(b))
        self._update(self.g, self.g_opt, self.config.identity * loss)     # weighted: Adam remembers gradients' size
        self._update_ema(1)
        return {"g_identity": loss.detach()}

    def _step_critic(self, b: torch.Tensor, y_a: torch.Tensor) -> dict[str, torch.Tensor]:
        share = self._draw("share", lambda g, n: torch.rand(n, generator=g)).reshape(-1, 1, 1, 1)
        # Most of the critic's time goes to its weights, so both passes share one cast of them.
        weights = {name: p.to(self.d.compute_dtype) for name, p in self.d.named_parameters()}
        critic = partial(torch.func.functional_call, self.d, weights)
        values_b, values_a = critic(torch.cat([b, y_a])).chunk(2)
        distance = losses.wasserstein(values_b, values_a)
        penalty = losses.gradient_penalty(critic, b, y_a, share)
        self._update(self.d, self.d_opt, self.config.penalty * penalty - distance)
        return {"wasserstein": distance.detach(), "d_b": values_b.detach().mean(), "d_y": values_a.detach().mean(),
                "penalty": penalty.detach()}

    def _step_generator(self, a, b, of_a, of_b) -> dict[str, torch.Tensor]:
        self.d.requires_grad_(False)
        values_a, values_b = self.d(torch.cat([of_a.y, of_b.y])).chunk(2)
        terms = {"adversarial": -values_a.mean() - values_b.mean(), "identity": losses.identity(b, of_b),
                 "reconstruction": losses.reconstruction(a, of_a),
                 "mask": sum(losses.focus(of_x.m, self.config.indecision) for of_x in (of_a, of_b)) / 2}
        weights = {"adversarial": 1.0, "identity": self.config.identity, "reconstruction": self.config.reconstruction,
                   "mask": self.config.mask_weight(self.iteration)}
        if self.iteration < self.whole_until:
            weights |= {"reconstruction": 0.0, "mask": 0.0}
        self._update(self.g, self.g_opt, sum(weights[name] * term for name, term in terms.items()))
        self.d.requires_grad_(True)
        self._update_ema(self.config.critic_steps)
        m_a, m_b = of_a.m.detach().mean(), of_b.m.detach().mean()
        self._watch_mask(m_a)
        return {f"g_{name}": value.detach() for name, value in terms.items()} | {"mask_a": m_a, "mask_b": m_b}

    @staticmethod
    def _update(net, optimiser, loss) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(net.parameters())
        optimiser.step()

    @torch.no_grad()
    def _update_ema(self, iterations: int) -> None:
        """iterations: since the generator's last step."""
        if self.g_ema is None:
            return
        half_life = self.config.ema_iterations
        if self.config.ema_rampup:
            half_life = min(half_life, (self.iteration + 1) * self.config.ema_rampup)
        keep = 0.5 ** (iterations / max(half_life, 1e-8))
        torch._foreach_lerp_(list(self.g_ema.parameters()), list(self.g.parameters()), 1 - keep)

    def _watch_mask(self, mean: torch.Tensor) -> None:
        low, high = MASK_LIMITS
        beyond = torch.stack([mean < low, mean > high])
        self.collapsed = (self.collapsed + self.config.critic_steps) * beyond

    def collapse(self) -> str | None:
        """What is wrong with the mask and what to change, once it has been so for COLLAPSED_AFTER iterations."""
        low, high = self.collapsed.tolist()
        advice = f"raise --mask (now {self.config.mask:g})"
        if low >= COLLAPSED_AFTER:
            advice = f"lower --mask (now {self.config.mask:g}) or --identity (now {self.config.identity:g})"
        elif high < COLLAPSED_AFTER:
            return None
        side = f"under {MASK_LIMITS[0]}" if low >= COLLAPSED_AFTER else f"over {MASK_LIMITS[1]}"
        return (f"the mask has collapsed: its mean has been {side} for {max(low, high)} iterations; {advice}, lower "
                "--lr, or start with another --seed")

    # ---- Draws

    def _draw(self, purpose: str, draw) -> torch.Tensor:
        """This rank's rows of draw(generator, global batch), the same whatever the number of ranks."""
        key = f"{self.seed} {self.iteration} {purpose}".encode()
        stream = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))
        return draw(stream, self.config.batch * self.world)[self.rank::self.world].to(self.device, non_blocking=True)

    def _flip(self, images: torch.Tensor, purpose: str) -> torch.Tensor:
        if not self.config.flip:
            return images
        flip = self._draw(purpose, lambda g, n: torch.rand(n, generator=g) < 0.5)
        return torch.where(flip.reshape(-1, 1, 1, 1), images.flip(-1), images)

    def _shift(self, images: torch.Tensor, purpose: str) -> torch.Tensor:
        if not self.config.shift:
            return images
        most, side = self.config.shift, images.shape[-1]
        moves = self._draw(purpose, lambda g, n: torch.randint(-most, most + 1, (n, 2), generator=g))
        rows, columns = (moves.T[..., None] + torch.arange(side, device=self.device)).clamp(0, side - 1)
        whole = torch.arange(len(images), device=self.device)[:, None, None, None]
        channels = torch.arange(3, device=self.device)[:, None, None]
        return images[whole, channels, rows[:, None, :, None], columns[:, None, None, :]]

    # ---- State

    def modules(self) -> dict[str, torch.nn.Module]:
        averaged = {} if self.g_ema is None else {"generator_ema": self.g_ema}
        return {"generator": self.g, "critic": self.d, **averaged}

    def state(self) -> dict:
        """Everything but the weights that a resumed run needs."""
        return {"g_opt": self.g_opt.state_dict(), "d_opt": self.d_opt.state_dict(), "iteration": self.iteration,
                "collapsed": self.collapsed.cpu(), "highest_aucp": self.highest_aucp}

    def load_state(self, state: dict) -> None:
        load_optimiser(self.g_opt, state["g_opt"])
        load_optimiser(self.d_opt, state["d_opt"])
        self.iteration, self.collapsed = state["iteration"], state["collapsed"].to(self.device)
        self.highest_aucp = state["highest_aucp"]


# ---------------------------------------------------------------------------------------------------------------
# The choice of a generator

class Chooser:
    """Keeps the generator with the highest AUCp in out/best, on rank 0. No label of a diseased image is used."""

    def __init__(self, data: TrainingData, out: Path, meta: dict, device: torch.device):
        self.data, self.out, self.meta, self.device = data, out, meta, device
        count = min(6, len(data.mixed), len(data.healthy))       # spread: neighbours are slices of one scan
        self.shown = torch.cat([part[[i * len(part) // count for i in range(count)]]
                                for part in (data.mixed, data.healthy)])

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """`aucp` of the training images, and their mean scores; writes a sample grid, and out/best if it is better."""
        with torch.no_grad():
            x = self.shown.to(self.device)
            save_grid(self.out / f"samples-{trainer.iteration:06d}.png", x, trainer.best(x))
        sets = (self.data.mixed, self.data.healthy)
        mixed, healthy = (image_scores(trainer.best, part, self.device) for part in sets)
        row = {"aucp": aucp(mixed, healthy), "score_mixed": float(mixed.mean()), "score_healthy": float(healthy.mean())}
        mature = trainer.iteration >= trainer.config.choose_after * trainer.config.iterations
        if mature and row["aucp"] > trainer.highest_aucp:
            trainer.highest_aucp = row["aucp"]
            chosen = {"iteration": trainer.iteration, **row}
            save_model(self.out / "best", trainer.best, {**self.meta, "chosen": chosen, **self._calibrate(trainer)})
        return row

    def _calibrate(self, trainer: Trainer) -> dict:
        """Scores of the healthy units kept aside, and the threshold they give; both None where none were."""
        if self.data.held_out is None:
            return {"validation_scores": None, "threshold": None}
        scores = image_scores(trainer.best, self.data.held_out, self.device)
        by_unit = sorted(unit_scores(scores, self.data.held_out.units).values())
        return {"validation_scores": by_unit, "threshold": metrics.empirical_threshold(by_unit, trainer.config.fpr)}


# ---------------------------------------------------------------------------------------------------------------
# The loop

def train(config: TrainConfig, data: TrainingData, out: Path, device: torch.device, rollback: bool = False) -> None:
    """Train until config.iterations. Raises CheckpointError; FloatingPointError when a loss is not finite.

    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    trainer = Trainer(config, device)
    facts = data.facts()
    meta = {"kind": "healthygan", "config": dataclasses.asdict(config),
            "model": dataclasses.asdict(config.model()), "data": facts, "digest": data.digest()}
    # Without a digest nobody knows which images the run there has kept aside
    with Run(out, meta, trainer, config.seed, rollback, told=("digest",)) as run:
        chooser = None
        if distributed.is_main():
            chooser = Chooser(data, out, {"model": meta["model"], "image_settings": facts["image_settings"],
                                          "training": {"config": meta["config"], "counts": facts["counts"]}}, device)
        if run.resumed:
            distributed.print0(f"Resuming at iteration {trainer.iteration}")
        distributed.check_same_state(trainer.g)
        batch = config.batch * trainer.world
        streams = [batches(part, config.batch, 2 * run.seed + i, trainer.iteration * batch, device)
                   for i, part in enumerate((data.mixed, data.healthy))]
        distributed.print0(f"{len(data.healthy)} healthy images, {len(data.mixed)} unannotated, "
                           f"{len(data.held_out) if data.held_out else 0} healthy kept aside; 2 x {trainer.world} x "
                           f"{config.batch} images a step in {trainer.g.compute_dtype} on {device}")

        # ---- Train
        while trainer.iteration < config.iterations:
            run.log.add(batch, **trainer.step(*(next(stream) for stream in streams)))

            def due(every):
                return trainer.iteration % every == 0 or trainer.iteration == config.iterations

            if due(config.tick) or due(config.choose):
                extra = {}
                if due(config.choose):
                    extra = distributed.gather(chooser.measure(trainer) if chooser else None)[0]
                run.tick(trainer.iteration, device, **extra)
                if (problem := trainer.collapse()) and distributed.is_main():
                    warnings.warn(problem, stacklevel=1)
            run.end_step(trainer.iteration, snapshot=due(config.snapshot))


# ---------------------------------------------------------------------------------------------------------------
# Command

def read_data(config: TrainConfig, args) -> TrainingData:
    """What --data or --healthy and --mixed name. Raises DatasetError."""
    healthy, mixed = args.healthy, args.mixed
    if args.data is not None:
        healthy, mixed = ([folder] for folder in class_folders(args.data, "train", ("healthy", "mixed")))
    for path in (*healthy, *mixed):
        if not path.exists():
            raise DatasetError(f"{path}: no such file or folder")
    kind = "slices" if is_database(healthy[0]) else "images"
    if kind == "images" and (args.healthy_scans or args.mixed_scans):
        raise DatasetError("--healthy-scans and --mixed-scans choose scans of databases, found folders of images")
    if kind == "slices" and args.patients:
        raise DatasetError("--patients is for images; a database is split by patient already (prepare.py --patients)")
    settings = ImageSettings(kind, config.size, config.crop_top, config.white_16bit)
    data = load_training(healthy, mixed, settings, config.val_fraction, config.seed, args.patients,
                         args.healthy_scans, args.mixed_scans)
    for part in (data.healthy, data.mixed):
        for name, reason in part.unreadable.items():
            distributed.print0(f"skipped: {name}: {reason}")
    skipped = len(data.healthy.unreadable) + len(data.mixed.unreadable)
    if skipped:
        distributed.print0(f"{skipped} images could not be read and were skipped")
    return data


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", type=Path, help="folder with train/healthy and train/mixed (or healthy, mixed)")
        parser.add_argument("--healthy", type=Path, nargs="+", help="set B: folders of images, or databases")
        parser.add_argument("--mixed", type=Path, nargs="+", help="set A: folders of images, or databases")
        parser.add_argument("--healthy-scans", type=Path, help="of --healthy's databases take these scans: ids by line")
        parser.add_argument("--mixed-scans", type=Path, help="of --mixed's databases take these scans: ids by line")
        parser.add_argument("--patients", type=Path, help="CSV with image (healthy/NAME) and patient: one patient's "
                                                          "images are kept aside together")
        parser.add_argument("--out", type=Path, default=Path("runs/healthygan"),
                            help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return 0
    if (args.data is None) == (args.healthy is None) or (args.healthy is None) != (args.mixed is None):
        print("error: give --data FOLDER, or --healthy and --mixed", file=sys.stderr)
        return 2

    def work(device, rollback):
        memory.keep_freed()
        train(config, read_data(config, args), args.out, device, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
