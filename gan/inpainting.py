"""Training of an encoder that draws, with the generator, what is hidden from it: the masked form of inversion.

Parts of a healthy slice are hidden, in others something is put that does not belong there (gan/corrupt.py), and code
and noise maps must bring back the slice as it was. Hidden or not, what is healthy comes back; what is seen and
belongs is drawn as it is. So the same networks give, for a new scan, a prediction of every place from its surroundings
alone, and, once it is known what is anomalous, the closest normal: the slice itself around, and within what could have
been there (detect/inversion.py). Encoder and generator train together, the generator from its GAN training; with an
adversary in the last part, so that what is drawn is as sharp as what is seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ct.picture import save_hu_grid
from ct.window import BONE_HU, decode, encode
from dataset import SliceDataset
from gan.augment import random_flip, random_rotation
from gan.corrupt import draw_shapes, hide
from gan.encoding import EncoderTrainer
from gan.losses import frozen, g_nonsaturating
from model import Generator

OUTSIDE = 0.1                            # weight of a pixel that is no brain; one in the brain weighs 1 and more


class InpaintingTrainer(EncoderTrainer):
    """A step of it, with the phases, rates and snapshots of EncoderTrainer."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        open_noise(self.g)

    def learn(self, slices: dict[str, torch.Tensor], index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on hu [B, N, N], of the database, and brain bool [B, N, N]; `full` adds the adversary."""
        hu, brain, bone = self.augmented(slices["hu"].float(), slices["brain"])
        seed = int(torch.randint(2**31, (), generator=self.rng))
        query, changed = draw_shapes(hu, brain & ~bone, self.config.shapes, np.random.default_rng(seed))
        hidden = hide(len(hu), hu.shape[-1], self.config.hide, self.rng)
        real, query, hidden, bone, brain, changed = (
            t.to(self.device) for t in (encode(hu), encode(query.clamp(*self.range_hu)), hidden, bone, brain, changed))
        fake = self.draw(query, hidden, bone)
        weight = self.weight(brain, hidden, bone, changed)
        distance = weighted_distance(real, fake, weight, self.config.knee, self.config.gradient)
        loss, stats = distance, {"distance": distance}
        if full:
            with frozen(self.d):
                adversarial = g_nonsaturating(self.d(fake))
            loss = loss + self.config.adversarial * adversarial
            stats |= {"adversarial": adversarial}
        self._update(self.e_opt, loss)
        if full:
            stats |= self._discriminator_step(real, index, fake.detach())
        self.images_seen += self.global_batch
        return stats

    def augmented(self, hu: torch.Tensor, brain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """HU, brain and bone after flip, rotation and another scanner's calibration."""
        (low, high), bone = self.range_hu, self.bone(hu)
        both = 2 * torch.stack([(hu - low) / (high - low), brain.float(), bone.float()], 1) - 1     # outside is -1
        if self.config.flip:
            both = random_flip(both, self.rng)
        both = random_rotation(both, self.config.rotate, self.config.rotate_deg, self.rng)
        hu = low + (both[:, 0] + 1) * ((high - low) / 2)
        shift, gain = torch.randn(2, len(hu), 1, 1, generator=self.rng) * self.config.jitter_hu
        return (hu * (1 + gain / 100) + shift * (hu > 0)).clamp(low, high), both[:, 1] > 0, both[:, 2] > 0

    def bone(self, hu: torch.Tensor) -> torch.Tensor:
        """bool [B, N, N]; where slices end below BONE_HU, all that reaches their end: in healthy heads nothing else."""
        return hu >= min(BONE_HU, self.range_hu[1] - 0.5)

    def weight(self, brain: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor, changed: torch.Tensor
               ) -> torch.Tensor:
        """Of each pixel in the distance [B, N, N], 1 in the mean. Bone is never hidden."""
        inside = (brain & ~bone).float()
        weight = OUTSIDE + inside * (1 + self.config.hidden * hidden + self.config.changed * changed)
        return weight / weight.mean()

    def draw(self, images: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, N, N] of which `hidden` is not seen, bool [B, N, N], as generator and encoder draw them."""
        return self.g.synthesis(*self.e.invert(self.e.masked(images, hidden, bone), self.g))

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, epoch: int) -> dict[str, float]:
        """HU error in the brain of held-out scans, where it is hidden and where nothing is; a grid of both as PNG."""
        generator, seen, hidden_from, rows = torch.Generator().manual_seed(0), [], [], []
        for s in range(len(dataset.scan_ids)):
            scan = dataset.scan(s)
            hu, brain = (scan[key][::4] for key in ("hu", "brain"))
            hu = hu.float().clamp(*self.range_hu)
            bone, hidden = self.bone(hu), hide(len(hu), hu.shape[-1], 1.0, generator)
            inside, masks = brain & ~bone, (torch.zeros_like(hidden), hidden)
            whole, parts = (decode(self.draw(*(t.to(self.device) for t in (encode(hu), mask, bone))).cpu())
                            for mask in masks)
            seen.append((whole - hu).abs()[inside].mean())
            hidden_from.append((parts - hu).abs()[inside & hidden].mean())
            middle = len(hu) // 2
            rows += [hu[middle], torch.where(hidden & ~bone, 0.0, hu)[middle], parts[middle], whole[middle]]
        save_hu_grid(out / f"reconstructions-{epoch:03d}.png", torch.stack(rows).numpy(), columns=8)
        return {"val_error_hu": torch.stack(seen).mean().item(),
                "val_hidden_hu": torch.stack(hidden_from).mean().item()}


@torch.no_grad()
def open_noise(generator: Generator) -> None:
    """Noise strengths of 1 with the own maps scaled instead: the same images, and a way in for the encoder's maps.

    A GAN on few pixels learns to do without noise: its strengths end near 0, and so would the gradients.
    """
    for i, layer in enumerate([generator.conv1, *generator.convs]):
        getattr(generator.noises, f"noise_{i}").mul_(layer.noise.weight)
        layer.noise.weight.fill_(1)


def weighted_distance(real: torch.Tensor, fake: torch.Tensor, weight: torch.Tensor, knee: float, gradient: float
                      ) -> torch.Tensor:
    """Mean of weight times the rounded absolute difference (Charbonnier), plus `gradient` times that of its gradients.

    real, fake [B, 3, N, N]; weight [B, N, N].
    """
    difference, weight = fake - real, weight[:, None]

    def mean(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight * ((x.square() + knee**2).sqrt() - knee)).mean()

    total = mean(difference, weight)
    for axis in (-2, -1) if gradient else ():
        total = total + gradient * mean(difference.diff(dim=axis), weight.narrow(axis, 1, weight.shape[axis] - 1))
    return total
