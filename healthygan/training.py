"""One step of HealthyGAN's training: the critic's, and every critic_steps-th time the generator's."""

from __future__ import annotations

import copy
import hashlib
import math
from functools import partial

import torch

import distributed
from gan.averaging import follow
from gan.snapshots import load_optimiser
from healthygan import losses
from healthygan.model import BF16_UNITS, Translation
from healthygan.settings import TrainConfig

MASK_LIMITS = (0.001, 0.95)              # a mean mask beyond them ...
COLLAPSED_AFTER = 500                    # ... for as many iterations has collapsed


class Trainer:
    """Both networks, their optimisers, and a step.

    Draws come from a generator seeded by (seed, iteration, purpose) for the global batch, of which a rank takes
    every world-th row: the number of ranks does not change them, and a resumed run needs only the iteration.
    """

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config, self.device = config, device
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.iteration = 0
        self.images_seen = 0                                       # of each set, over all ranks
        self.highest_aucp = -math.inf                              # of the generators so far, on rank 0
        self.reseed(config.seed)
        torch.backends.cudnn.benchmark = True                      # every step has the same shapes
        torch.manual_seed(config.seed)                             # the same weights on every rank
        self.g = config.model().generator().to(device)
        self.d = config.model().critic().to(device)
        self.g_ema = copy.deepcopy(self.g).requires_grad_(False) if config.ema_iterations else None
        dtype = distributed.pick_precision(config.precision, device, BF16_UNITS)
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
        self.images_seen += len(a) * self.world
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

    def _update_ema(self, iterations: int) -> None:
        """iterations: since the generator's last step."""
        if self.g_ema is not None:
            follow(self.g_ema, self.g, iterations, self.config.ema_iterations, self.iteration + 1,
                   self.config.ema_rampup)

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
                "images_seen": self.images_seen, "collapsed": self.collapsed.cpu(), "highest_aucp": self.highest_aucp}

    def load_state(self, state: dict) -> None:
        load_optimiser(self.g_opt, state["g_opt"])
        load_optimiser(self.d_opt, state["d_opt"])
        self.iteration, self.collapsed = state["iteration"], state["collapsed"].to(self.device)
        self.highest_aucp = state["highest_aucp"]
        self.images_seen = state.get("images_seen", self.iteration * self.config.batch * self.world)   # an older run
