"""Training of a generator that draws heads from random codes on few slices and little time: a VAE-GAN.

A GAN alone has to find out what a head is from an adversary's hints. Here the generator learns to draw the training
slices from a small code in space that an encoder makes of them (model.SpatialEncoder), as a variational autoencoder
whose information is held at code_nats (Burgess et al. 2018, arXiv:1804.03599); a prior over these codes
(model.CodePrior) then gives new ones. In the last part an adversary asks for reconstructions as sharp as slices (Larsen
et al. 2016, ICML, arXiv:1512.09300), and what draws these draws samples, too. Asked of the samples themselves, they
become alike: nothing holds them to their codes (docs/RESULTS.md).
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch

import distributed
from ct.picture import save_hu_grid
from ct.window import decode, encode
from dataset import SliceDataset
from gan.averaging import follow
from gan.inpainting import Augmentation, InpaintingTrainer, weighted_distance
from gan.losses import frozen, g_nonsaturating
from gan.prior import fit
from gan.quality import errors_hu, every_fourth, means, sliced_wasserstein
from gan.snapshots import Snapshot
from model import Generator, build_generator

OUTSIDE, INSIDE = 0.5, 3.0               # weight of a pixel outside and inside the brain
STAGES = slice(1, 4)                     # of the discriminator, in which features of slices and reconstructions match
RECENT = 6144                            # codes that the prior is fitted to
AVERAGE = 3000                           # images, half-life of the averaged weights that samples are drawn with ...
AVERAGE_RAMP = 0.05                      # ... at most this part of the images so far
PACE = 0.01                              # per step, of the rate at which nats cost
SHEET = 64


class CodeTrainer(InpaintingTrainer):
    """A step of it, with the rates and snapshots of EncoderTrainer."""

    PREPARE = Augmentation
    BETAS = (0.0, 0.99)                  # without memory, as StyleGAN2's, against an adversary

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.g_ema, self.e_ema = (copy.deepcopy(net).requires_grad_(False) for net in (self.g, self.e))
        self.low, self.high = encode(torch.tensor(self.range_hu)[:, None, None]).to(self.device)    # each [3, 1, 1]
        self.rate = 5e-6                                             # what a nat costs
        self.recent = torch.empty(2, 0, math.prod(self.model.code_shape))     # means and variances, over all ranks
        self.fitted = self.recent                                    # those that the prior is of

    def build_generator(self, gan: Snapshot | None) -> Generator:
        """The GAN's weights, if there is one; what reads the code is new."""
        plain, generator = super().build_generator(gan), build_generator(self.model)
        generator.load_state_dict({**generator.state_dict(), **plain.state_dict()})
        return generator

    def learn(self, examples: dict[str, torch.Tensor], index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on what self.prepare makes of a batch; `full` adds the adversary."""
        hu, brain = (examples[name].to(self.device, non_blocking=True) for name in ("hu", "brain"))
        real, inside = encode(hu), brain.float()
        mean, log_variance = self.e.distribution(real)
        code = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=self.rng).to(mean)
        nats = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2)).mean()
        fake = self.g.synthesis(code, self.g.random_maps(len(code), self.rng) if full else "const")
        weight = OUTSIDE + (INSIDE - OUTSIDE) * inside
        distance = weighted_distance(self.reached(real, fake), fake, weight, self.config.knee, self.config.gradient)
        loss, stats = distance + self.rate * nats, {"distance": distance, "nats": nats}
        if full:
            fake = fake.clamp(self.low, self.high)
            adversarial, features = self._looked_at(real, fake)
            loss = loss + self.config.adversarial * (adversarial + features)
            stats |= {"adversarial": adversarial, "features": features}
        self._update(self.e_opt, loss)
        if full:
            stats |= self._discriminator_step(real, index, fake.detach())
        self.images_seen += self.global_batch
        self._after(mean.detach(), log_variance.detach(), nats.detach())
        return stats

    def reached(self, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """`real` [B, 3, N, N], but `fake` where that goes beyond an end of the HU range at which the slice was cut.

        Most of a slice is air or bone, and so at an end. Who is to meet a cut value exactly draws air too dense and
        bone not dense enough.
        """
        beyond = ((real <= self.low) & (fake < self.low)) | ((real >= self.high) & (fake > self.high))
        return torch.where(beyond, fake.detach(), real)

    def _looked_at(self, real: torch.Tensor, fake: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The adversary's view on reconstructions, and how far features of these are from the slices'."""
        with torch.no_grad():            # while it is not frozen: else what is made of its weights would be kept
            wanted = self.d.features(real)               # (op.layers.Kept), and a fused optimiser changes them unseen
        with frozen(self.d):
            stages = self.d.features(fake)
            logits = self.d.final_linear(self.d.summary(stages))
            apart = [(mine.float() - theirs.float()).abs().mean()
                     for mine, theirs in zip(stages[STAGES], wanted[STAGES])]
        return g_nonsaturating(logits), torch.stack(apart).mean()

    def _after(self, mean: torch.Tensor, log_variance: torch.Tensor, nats: torch.Tensor) -> None:
        """Collective. The rate, the codes that the prior is fitted to, and the averaged weights."""
        nats = distributed.all_reduce_sum(nats).item() / distributed.get_world_size()
        self.rate *= math.exp(PACE * min(1.0, max(-1.0, nats / self.config.code_nats - 1)))
        found = torch.stack([mean, log_variance.exp()]).flatten(2).cpu()
        self.recent = torch.cat([self.recent, *distributed.gather(found)], 1)[:, -RECENT:]
        for averaged, net in ((self.g_ema, self.g), (self.e_ema, self.e)):
            follow(averaged, net, self.global_batch, AVERAGE, self.images_seen, AVERAGE_RAMP)

    def _fit_prior(self) -> None:
        """To the recent codes; one alone has no spread, and of diverged ones the run tells at its next tick."""
        if self.fitted is not self.recent and self.recent.shape[1] > 1 and self.recent.isfinite().all():
            fit(self.g_ema.prior, *self.recent)                      # takes seconds
            self.fitted = self.recent

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, number: int) -> dict[str, float]:
        """HU error in the brain of held-out scans, `swd` of as many samples to their slices; grids of both as PNG."""
        self._fit_prior()
        slices = [dataset[i] for i in every_fourth(dataset)]
        hu, brain = (torch.stack([one[key] for one in slices]) for key in ("hu", "brain"))
        hu = hu.float().clamp(*self.range_hu)
        found = torch.cat([self.reconstruction(x.to(self.device)).cpu() for x in encode(hu).split(16)])
        pick = torch.linspace(0, len(hu) - 1, 16).long()
        save_hu_grid(out / f"reconstructions-{number:03d}.png", torch.cat([hu[pick], found[pick]]).numpy(), columns=16)
        drawn = decode(self.g_ema.sample(max(SHEET, len(hu)))).clamp(*self.range_hu)
        save_hu_grid(out / f"samples-{number:03d}.png", drawn[:SHEET].numpy())
        return {**means({"val_error_hu": errors_hu(found, hu, brain)}),
                "swd": sliced_wasserstein(hu, drawn[: len(hu)])}

    def reconstruction(self, images: torch.Tensor) -> torch.Tensor:
        """HU [B, N, N] of images [B, 3, N, N], drawn from their codes with the averaged weights."""
        return decode(self.g_ema.synthesis(self.e_ema(images), "const")).clamp(*self.range_hu)

    def modules(self) -> dict[str, torch.nn.Module]:
        return super().modules() | {"generator_ema": self.g_ema, "encoder_ema": self.e_ema}

    def state(self) -> dict:
        """Collective. Before a snapshot, which is to hold the prior of its weights: no step needs it."""
        self._fit_prior()
        return super().state() | {"rate": self.rate, "recent": self.recent}

    def load_state(self, state: dict) -> None:
        super().load_state(state)
        self.rate, self.recent = state["rate"], state["recent"]
