"""Training of an encoder that draws, with the generator, what is hidden from it: the masked form of inversion.

Parts of a healthy slice are hidden, in others something is put that does not belong there (gan/corrupt.py), and code
and noise maps must bring back the slice as it was. Hidden or not, what is healthy comes back; what is seen and
belongs is drawn as it is. So the same networks give, for a new scan, a prediction of every place from its surroundings
alone, and, once it is known what is anomalous, the closest normal: the slice itself around, and within what could have
been there (detect/inpainting.py). Encoder and generator train together, the generator from its GAN training; with an
adversary in the last part, so that what is drawn is as sharp as what is seen.

Ventricles and sulci, whose width no surroundings tell, are found anomalous in healthy heads as well, and drawn as the
mean of what could be there: filled. But where they are found, their shape is known. So in the last part, what is hidden
of some images is what the networks themselves find anomalous: they learn that a hole of the shape of a ventricle is a
ventricle, with fluid in it or blood, and that one of the shape of a lesion is none.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import distributed
from ct.halves import halved
from ct.picture import save_hu_grid
from ct.window import decode, encode
from dataset import SliceDataset
from detect.inpainting import Inpainting, InpaintingSettings
from detect.inversion import bone_mask
from detect.painter import block_sides
from gan.augment import random_flip, random_rotation
from gan.corrupt import draw_shapes, hide
from gan.encoding import EncoderTrainer
from gan.losses import frozen, g_nonsaturating
from gan.quality import MOST_HELD_OUT, Measured, errors_hu, evenly, means
from gan.settings import EncoderConfig
from model import Generator

OUTSIDE = 0.1                            # weight of a pixel that is no brain; one in the brain weighs 1 and more
ROUNDING = 1e-6                          # a part of some images that is whole but for a computer's rounding is whole


@dataclass(frozen=True)
class Augmentation:
    """A batch from the database, hu [B, N, N] and brain bool [B, N, N], after flip, rotation and another scanner's
    calibration: hu float32, brain and bone bool."""

    config: EncoderConfig
    range_hu: tuple[float, float]

    def __call__(self, slices: dict[str, torch.Tensor], rng: torch.Generator) -> dict[str, torch.Tensor]:
        hu, (low, high) = slices["hu"].float(), self.range_hu
        both = torch.stack([(hu - low) / (high - low), slices["brain"].float(), bone_mask(hu, high).float()], 1)
        both = 2 * both - 1                                                                        # outside is -1
        if self.config.flip:
            both = random_flip(both, rng)
        both = random_rotation(both, self.config.rotate, self.config.rotate_deg, rng)
        hu = low + (both[:, 0] + 1) * ((high - low) / 2)
        shift, gain = torch.randn(2, len(hu), 1, 1, generator=rng) * self.config.jitter_hu
        return {"hu": (hu * (1 + gain / 100) + shift * (hu > 0)).clamp(low, high), "brain": both[:, 1] > 0,
                "bone": both[:, 2] > 0}


class Corruption(Augmentation):
    """And query, the slices with shapes that do not belong there; where these are, changed, 0 to 1; what is hidden."""

    def __call__(self, slices: dict[str, torch.Tensor], rng: torch.Generator) -> dict[str, torch.Tensor]:
        found = super().__call__(slices, rng)
        if self.config.halved:
            found = halved_slices(found)
        seed, hu = int(torch.randint(2**31, (), generator=rng)), found["hu"]
        query, changed = draw_shapes(hu, found["brain"] & ~found["bone"], self.config.shapes,
                                     np.random.default_rng(seed))
        return found | {"query": query.clamp(*self.range_hu), "changed": changed,
                        "hidden": hide_for(self.config, len(hu), hu.shape[-1], self.config.hide, rng)}


def hide_for(config: EncoderConfig, *args) -> torch.Tensor:
    """What is hidden for the networks of a run: hide_blocks() for those of half the size, hide() for others."""
    return (hide_blocks if config.halved else hide)(*args)


def hide_blocks(batch: int, size: int, p: float, generator: torch.Generator) -> torch.Tensor:
    """What is hidden of each image with probability p, bool [B, N, N]: blocks as Inpainting hides them, anywhere."""
    hidden, centre = block_sides(size, InpaintingSettings().hidden)
    start = torch.randint(2 * centre, (2, batch, 1, 1), generator=generator)
    place = torch.arange(size)
    rows, columns = ((axis - first) % (2 * centre) < hidden for axis, first in zip((place[:, None], place), start))
    return rows & columns & (torch.rand(batch, 1, 1, generator=generator) < p)


def halved_slices(slices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Slices with brain and bone, as networks of half their size are shown them (ct/halves.py)."""
    hu, bone = halved(slices["hu"], slices["bone"])
    return {"hu": hu, "brain": F.avg_pool2d(slices["brain"].float(), 2) >= 0.5, "bone": bone}


class InpaintingTrainer(EncoderTrainer):
    """A step of it, with the phases, rates and snapshots of EncoderTrainer."""

    PREPARE = Corruption

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        open_noise(self.g)

    def build_perceptual(self, *weights) -> None:
        pass                                                      # weighted_distance is what counts here

    @functools.cached_property
    def method(self) -> Inpainting:
        """As the networks are to be used."""
        return Inpainting(InpaintingSettings(), self.g, self.e, self.range_hu)

    def learn(self, examples: dict[str, torch.Tensor], index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on what self.prepare makes of a batch; `full` adds the adversary."""
        examples = {name: t.to(self.device, non_blocking=True) for name, t in examples.items()}
        hidden, bone, real = examples["hidden"], examples["bone"], encode(examples["hu"])
        if full:
            found = self.found_anomalous(examples, self._gated(len(hidden)))
            hidden = torch.cat([found, hidden[len(found):]])
        fake = self.draw(encode(examples["query"]), hidden, bone)
        weight = self.weight(examples["brain"], hidden, bone, examples["changed"])
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

    def _gated(self, batch: int) -> int:
        """Of how many of this rank's images in this step: over ranks and steps together, of --gated of all."""
        first = self.images_seen + distributed.get_rank() * batch
        before, after = (math.floor(self.config.gated * seen + ROUNDING) for seen in (first, first + batch))
        return after - before

    def found_anomalous(self, examples: dict[str, torch.Tensor], count: int) -> torch.Tensor:
        """What the networks, as they are, would hide of the first `count` queries as anomalous: bool [count, N, N]."""
        query, brain, bone = (examples[name][:count] for name in ("query", "brain", "bone"))
        return self.method.find_anomalous(query, brain & ~bone, bone).hidden if count else bone

    def weight(self, brain: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor, changed: torch.Tensor
               ) -> torch.Tensor:
        """Of each pixel in weighted_distance, [B, N, N]. Bone is never hidden."""
        inside = (brain & ~bone).float()
        return OUTSIDE + inside * (1 + self.config.hidden * hidden + self.config.changed * changed)

    def draw(self, images: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, N, N] of which `hidden` is not seen, bool [B, N, N], as generator and encoder draw them."""
        return self.e.redraw(self.e.masked(images, hidden, bone), self.g)

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, number: int) -> dict[str, float]:
        """HU error in the brain of held-out scans, where it is hidden and where nothing is; a grid of both as PNG.

        A scan whose brain happens to be hidden nowhere counts for the second alone; without any other the first is
        left out. Every fourth slice is drawn, but no more than MOST_HELD_OUT; the grid shows as many scans as make so
        many pictures.
        """
        dataset = Measured(dataset, 4)
        generator, seen, hidden_from, rows = torch.Generator().manual_seed(0), [], [], []
        shown = set(evenly(range(len(dataset.scan_ids)), MOST_HELD_OUT // 4))
        for s in range(len(dataset.scan_ids)):
            scan = dataset.scan(s)
            hu, brain = scan["hu"].float().clamp(*self.range_hu), scan["brain"]
            bone = bone_mask(hu, self.range_hu[1])
            if self.config.halved:
                hu, brain, bone = halved_slices({"hu": hu, "brain": brain, "bone": bone}).values()
            hidden = hide_for(self.config, len(hu), hu.shape[-1], 1.0, generator)
            inside, masks = brain & ~bone, (torch.zeros_like(hidden), hidden)
            whole, parts = (decode(self.draw(*(t.to(self.device) for t in (encode(hu), mask, bone))).cpu())
                            for mask in masks)
            seen += errors_hu(whole, hu, inside)
            hidden_from += errors_hu(parts, hu, inside & hidden)
            if s in shown:
                middle = len(hu) // 2
                rows += [hu[middle], torch.where(hidden & ~bone, 0.0, hu)[middle], parts[middle], whole[middle]]
        save_hu_grid(out / f"reconstructions-{number:03d}.png", torch.stack(rows).numpy(), columns=8)
        return means({"val_error_hu": seen, "val_hidden_hu": hidden_from})


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

    real, fake [B, 3, N, N]; weight [B, N, N], taken over its mean over all ranks, so that a pixel weighs the same on
    each. Collective.
    """
    weight = weight / (distributed.all_reduce_sum(weight.mean()) / distributed.get_world_size())
    difference, weight = fake - real, weight[:, None]

    def mean(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (weight * ((x.square() + knee**2).sqrt() - knee)).mean()

    total = mean(difference, weight)
    for axis in (-2, -1) if gradient else ():
        total = total + gradient * mean(difference.diff(dim=axis), weight.narrow(axis, 1, weight.shape[axis] - 1))
    return total
