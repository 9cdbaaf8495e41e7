"""StyleGAN2's training step for head CT (Karras et al. 2020): networks, optimisers, and the four phases of a step."""

from __future__ import annotations

import copy
import hashlib
from functools import partial

import torch

import distributed
from gan.augment import AdaptiveAugment, AugmentSettings
from gan.averaging import follow
from gan.losses import d_logistic, frozen, g_nonsaturating, path_lengths, r1_penalty
from gan.settings import TrainConfig
from gan.snapshots import load_optimiser
from model import Discriminator, Generator


class Trainer:
    """The networks, their optimisers and the four phases of a step.

    All draws that must not depend on the number of ranks (codes, crossovers, flips) come from a generator seeded
    by (seed, images seen, purpose) for the global batch, of which a rank takes every world-th row. So several
    ranks with the same global batch take the step that one would, given multiples of 4 on each rank, as many images
    as the discriminator compares, and but for noise maps and augmentation, which every rank draws for itself.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.images_seen = 0                                       # over all ranks
        torch.backends.cudnn.benchmark = True                      # every step has the same shapes
        torch.manual_seed(config.seed)                             # the same weights on every rank
        self.g = Generator(config.model()).to(device)
        self.d = Discriminator(config.model()).to(device)
        self.g_ema = copy.deepcopy(self.g).requires_grad_(False)   # shares the noise buffers' values
        dtype = distributed.pick_precision(config.precision, device)
        self.g.compute_dtype = self.d.compute_dtype = self.g_ema.compute_dtype = dtype
        self.g_opt = lazy_adam(self.g, config.lr, config.path_every)
        self.d_opt = lazy_adam(self.d, config.lr, config.r1_every)
        self.path_mean = torch.zeros((), device=device)
        self.ada = AdaptiveAugment(config.ada_target, config.ada_kimg, p_max=config.ada_max, settings=AugmentSettings(
            cutout=config.ada_cutout)) if config.ada_target else None
        self.rng = torch.Generator(device)                         # augmentation: drawn where it is used
        self.reseed(config.seed)
        tell_of_groups(self.d, config.batch // config.accumulate)

    def reseed(self, seed: int) -> None:
        """Random numbers from here on, of (seed, rank, images seen): later in a run none of its first steps' again."""
        self.seed = seed
        seed_of = partial(distributed.seed_for_rank, seed, seen=self.images_seen)
        torch.manual_seed(seed_of(self.rank))                      # noise maps
        self.rng.manual_seed(seed_of(self.world + self.rank))      # which are no rank's noise maps again

    @property
    def global_batch(self) -> int:
        return self.config.batch * self.world

    def step(self, real: torch.Tensor, index: int) -> dict[str, torch.Tensor]:
        """One step on real images [batch, 3, N, N], step number index; returns scalars for the log."""
        stats = {}
        if self.config.flip:
            flip = self._draw("flip", lambda g, n: torch.rand(n, generator=g) < 0.5)
            real = torch.where(flip.reshape(-1, 1, 1, 1), real.flip(-1), real)
        phases = [
            ("d", self.d, self.d_opt, self.d_main, 1),
            ("d_reg", self.d, self.d_opt, self.d_reg, self.config.r1_every),
            ("g", self.g, self.g_opt, self.g_main, 1),
            ("g_reg", self.g, self.g_opt, self.g_reg, self.config.path_every),
        ]
        for name, net, optimiser, phase, every in phases:
            if not every or index % every:
                continue
            optimiser.zero_grad(set_to_none=True)
            for micro in range(self.config.accumulate):
                part = slice(micro, None, self.config.accumulate)
                loss, scalars = phase(real[part], part, name)
                (loss / self.config.accumulate).backward()
                for key, value in scalars.items():
                    stats.setdefault(key, []).append(value.detach())
            distributed.average_gradients(net.parameters())
            optimiser.step()
            if name == "g_reg":
                self._update_path_mean(stats["path_length"])
        self.images_seen += self.global_batch
        follow(self.g_ema, self.g, self.global_batch, self.config.ema_kimg * 1000, self.images_seen,
               self.config.ema_rampup)
        if self.ada:
            self.ada.step(distributed.all_reduce_sum)
        return {key: torch.stack(values).float().mean() for key, values in stats.items()}

    # ---- Phases: (real images of a micro-batch, its rows, purpose of the draws) -> (loss, scalars)

    def d_main(self, real, part, purpose):
        with torch.no_grad():
            fake = self.g.synthesis(self._w_plus(part, purpose), self.config.noise)
        real_logits, fake_logits = self.d(self._augment(real)), self.d(self._augment(fake))
        if self.ada:
            self.ada.observe(real_logits)
        loss = d_logistic(real_logits, fake_logits)
        return loss, {"loss_d": loss, "real": real_logits.mean(), "fake": fake_logits.mean(),
                      "real_sign": real_logits.sign().mean()}

    def d_reg(self, real, part, purpose):
        real = real.detach().requires_grad_(True)
        r1 = r1_penalty(self.d(self._augment(real)), real)
        return r1 * (self.config.r1_gamma / 2 * self.config.r1_every), {"r1": r1}

    def g_main(self, real, part, purpose):
        fake = self.g.synthesis(self._w_plus(part, purpose), self.config.noise)
        with frozen(self.d):
            loss = g_nonsaturating(self.d(self._augment(fake)))
        return loss, {"loss_g": loss}

    def g_reg(self, real, part, purpose):
        w_plus = self._w_plus(part, purpose)
        w_plus = w_plus[: max(1, len(w_plus) // self.config.path_shrink)]
        images = self.g.synthesis(w_plus, self.config.noise)
        # A stream a row, of this rank's rows alone: images for the whole global batch would be large.
        rows = range(self.rank, self.global_batch, self.world)[part][: len(w_plus)]
        streams = [self._stream(f"path {row}", self.device) for row in rows]
        noise = torch.stack([torch.randn(images.shape[1:], generator=g, device=self.device) for g in streams])
        lengths = path_lengths(images, w_plus, noise)
        penalty = (lengths - self.path_mean).square().mean()
        return penalty * (self.config.path_weight * self.config.path_every), {"path_length": lengths.mean()}

    # ---- Draws

    def _stream(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """This step's random numbers for one purpose, the same on every rank."""
        key = f"{self.seed} {self.images_seen} {purpose}".encode()
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7]))

    def _draw(self, purpose: str, draw) -> torch.Tensor:
        """This rank's rows of draw(generator, global batch), the same whatever the number of ranks."""
        drawn = draw(self._stream(purpose), self.global_batch)[self.rank::self.world]
        return drawn.to(self.device, non_blocking=True)            # a waiting copy would empty the GPU's queue

    def _w_plus(self, part: slice, purpose: str) -> torch.Tensor:
        """W+ codes [micro-batch, L, D] of random z, with the mixing of two styles.

        Each image draws for itself whether and where; the reference implementations draw once for the batch.
        """
        dim, layers = self.config.style_dim, self.config.model().n_latent
        z = self._draw(purpose + " z", lambda g, n: torch.randn(n, 2, dim, generator=g))[part]
        crossover = self._draw(purpose + " mix", lambda g, n: torch.where(
            torch.rand(n, generator=g) < self.config.mixing, torch.randint(1, layers, (n,), generator=g), layers))[part]
        return self.g.mix_styles(self.g.mapping(z[:, 0]), self.g.mapping(z[:, 1]), crossover)

    def _augment(self, images: torch.Tensor) -> torch.Tensor:
        return self.ada(images, self.rng) if self.ada else images

    def _update_path_mean(self, lengths: list[torch.Tensor]) -> None:
        """Collective. Once a step, so that neither ranks nor micro-batches change what it becomes.

        So lengths are held against the mean before the step; in the reference implementations they have moved it by
        then, by path_decay of the way.
        """
        mean = distributed.all_reduce_sum(torch.stack(lengths).mean()) / self.world
        self.path_mean = torch.lerp(self.path_mean, mean, self.config.path_decay)

    # ---- State

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"generator": self.g, "generator_ema": self.g_ema, "discriminator": self.d}

    def state(self) -> dict:
        """Collective. Everything but the weights that a resumed run needs."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"g_opt": self.g_opt.state_dict(), "d_opt": self.d_opt.state_dict(), "path_mean": self.path_mean,
                "ada": self.ada.state_dict(distributed.all_reduce_sum) if self.ada else None,
                "images_seen": self.images_seen,
                "rng": distributed.gather((self.rng.get_state(), torch.get_rng_state(), cuda))}

    def load_state(self, state: dict) -> None:
        load_optimiser(self.g_opt, state["g_opt"])
        load_optimiser(self.d_opt, state["d_opt"])
        self.path_mean = state["path_mean"].to(self.device)
        self.images_seen = state["images_seen"]
        if self.ada and state["ada"]:
            self.ada.load_state_dict(state["ada"], main=self.rank == 0)
        ours, default, cuda = state["rng"][self.rank] if len(state["rng"]) == self.world else (None, None, None)
        if ours is None or (cuda is not None) != (self.device.type == "cuda"):
            self.reseed(self.seed)                                 # of another number of ranks, or kind of device
            return
        self.rng.set_state(ours)
        torch.set_rng_state(default)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.device)


def tell_of_groups(discriminator: Discriminator, batch: int) -> None:
    """Print a note, on rank 0, where it does not compare images 4 at a time. batch: of a pass on each rank."""
    group = discriminator.stddev_group(batch)
    if group < 4:
        what = f"compares {group} at a time, not 4" if group > 1 else "compares none: its minibatch statistic is off"
        distributed.print0(f"note: --batch {batch}: the discriminator {what}; give a multiple of 4, or the training is "
                           "another")


def lazy_adam(net: torch.nn.Module, lr: float, every: int) -> torch.optim.Adam:
    """Adam (0, 0.99), corrected for the extra steps of a regulariser that runs every `every` steps (Karras 2020, B)."""
    ratio = every / (every + 1) if every else 1
    return torch.optim.Adam(net.parameters(), lr=lr * ratio, betas=(0.0, 0.99**ratio), eps=1e-8, fused=True)
