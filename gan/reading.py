"""Training of a reader: a network that tells, of a slice and what its surroundings call for, what is not in place.

Random shapes of other densities are drawn into healthy slices (gan/corrupt.py), and the reader is to find them. There
is no lesion among them and no label. What scanners do to a whole head, and what a shape's drawing leaves behind, are in
slices with and without shapes alike, so that neither tells anything.

What surroundings call for is drawn by a generator and an encoder that stay as they are, for each slice as it is shown;
by those of an encoder that was trained against noise, its closest normal is (detect/inversion.py).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

import distributed
from ct.picture import save_hu_grid
from dataset import SliceDataset
from detect.inversion import EncoderMethod, bone_mask
from detect.reader import Reader, grainless, reader_input
from gan.augment import random_flip
from gan.averaging import follow
from gan.corrupt import draw_grained, scanner
from gan.quality import Measured
from gan.settings import ReaderConfig
from gan.snapshots import load_optimiser

CHANGED_HU, SAME_HU = 4.0, 1.5           # a pixel that differs by more is to be found; by less, it is not
PRESENT = 2.0                            # weight of a pixel that is to be found
OVERLAP, FEW = 0.3, 20.0                 # weight of the overlap's part of the loss; pixels by which it is rounded
LAST_RATE = 0.02                         # of the first one: the rate falls to it along a cosine
LONGEST = 1.0                            # a step's gradient is made no longer
AVERAGED = 0.05                          # the average's half-life is no more than this part of the images so far


@dataclass(frozen=True)
class Examples:
    """A batch from the database, hu [B, N, N] and brain bool [B, N, N], as a reader is to see it.

    query_hu float32 [B, N, N], brain and bone bool, and change_hu float32 [B, N, N]: by what shapes differ from what
    was there, 0 outside soft brain.
    """

    config: ReaderConfig
    range_hu: tuple[float, float]

    def __call__(self, slices: dict[str, torch.Tensor], rng: torch.Generator) -> dict[str, torch.Tensor]:
        hu, brain = slices["hu"].float().clamp(*self.range_hu), slices["brain"]
        both = random_flip(torch.stack([hu, brain.float()], dim=1), rng)
        hu, brain = both[:, 0], both[:, 1] > 0
        bone = bone_mask(hu, self.range_hu[1])
        soft = brain & ~bone
        seed = int(torch.randint(2**31, (), generator=rng))
        query = draw_grained(hu, soft, self.config.shapes, np.random.default_rng(seed))
        return {"query_hu": scanner(query, soft, bone, rng), "brain": brain, "bone": bone,
                "change_hu": (query - hu) * soft}


class ReadingTrainer:
    """A reader, its running average and its optimiser, with a method whose networks stay as they are."""

    def __init__(self, config: ReaderConfig, method: EncoderMethod, range_hu: tuple[float, float],
                 device: torch.device):
        self.config, self.method, self.device = config, method, device
        self.prepare = Examples(config, range_hu)
        torch.manual_seed(config.seed)                            # the same weights on every rank
        self.reader = Reader(config.widths()).to(device)
        self.average = copy.deepcopy(self.reader).requires_grad_(False)
        for network in (self.reader, self.average):
            network.compute_dtype = distributed.pick_precision(config.precision, device)
        self.optimiser = torch.optim.AdamW(self.reader.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.images_seen = 0                                      # over all ranks
        self.held_out: list | None = None                         # of validate()

    @property
    def global_batch(self) -> int:
        return self.config.batch * distributed.get_world_size()

    def set_rates(self, done: float) -> None:
        """The rate for a training that is done to this part, 0 to 1."""
        fallen = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(done, 1))) / 2
        risen = min(1.0, (self.images_seen + self.global_batch) / self.config.warm_up) if self.config.warm_up else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = self.config.lr * fallen * risen

    def learn(self, examples: dict[str, torch.Tensor], index: int, done: float) -> dict[str, torch.Tensor]:
        """A step on what self.prepare makes of a batch, and, if `mirrored`, another on its mirror images.

        Most of the time goes into what surroundings call for, so that the second step is cheap.
        """
        examples = {name: t.to(self.device, non_blocking=True) for name, t in examples.items()}
        shown = self.images(examples), *targets(examples["change_hu"], examples["brain"] & ~examples["bone"])
        losses = [self._step(*shown)]
        if self.config.mirrored:
            losses.append(self._step(*(t.flip(-1) for t in shown)))
        self.images_seen += self.global_batch
        follow(self.average, self.reader, self.global_batch, self.config.ema_images, self.images_seen, AVERAGED)
        return {"loss": torch.stack(losses).mean()}

    def _step(self, images: torch.Tensor, present: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
        pixels = distributed.all_reduce_sum(counted.sum()) / distributed.get_world_size()
        loss = reading_loss(self.reader(images), present, counted, pixels)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(self.reader.parameters())
        torch.nn.utils.clip_grad_norm_(self.reader.parameters(), LONGEST)
        self.optimiser.step()
        return loss.detach()

    def images(self, examples: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the reader sees of examples, [B, 6, N, N]."""
        query, brain, bone = (examples[name] for name in ("query_hu", "brain", "bone"))
        return reader_input(query, self.method.expected(query, bone), brain, bone)

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, number: int) -> dict[str, float]:
        """Loss and average precision by pixel of the average on held-out slices with shapes; a picture of some."""
        self.held_out = self.held_out or self._examples(dataset)          # they and their surroundings stay the same
        losses, precisions, rows = [], [], []
        for examples, images in self.held_out:
            found = self.average(images)
            present, counted = targets(examples["change_hu"], examples["brain"] & ~examples["bone"])
            losses.append(reading_loss(found, present, counted))          # not finite, where found is not
            if (present * counted).any() and found.isfinite().all():
                where = counted.expand_as(present) > 0
                precisions.append(average_precision_score(present[where].cpu(), found[where].cpu()))
            middle = len(found) // 2
            rows += [examples["query_hu"][middle].cpu(), 30 + examples["change_hu"][middle].cpu(),
                     *(80 * found[middle].sigmoid().cpu())]
        save_hu_grid(out / f"read-{number:03d}.png", torch.stack(rows).numpy(), columns=8)
        return {"val_loss": torch.stack(losses).mean().item(),
                "val_ap": float(np.mean(precisions)) if precisions else 0.0}

    def _examples(self, dataset: SliceDataset) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Of each scan every fourth slice (Measured) with what is drawn into it, and what the reader sees of it."""
        measured, generator, found = Measured(dataset, 4), torch.Generator().manual_seed(0), []
        for s in range(len(measured.scan_ids)):
            examples = {name: t.to(self.device) for name, t in self.prepare(measured.scan(s), generator).items()}
            found.append((examples, self.images(examples)))
        return found

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"reader": self.reader, "reader_ema": self.average}

    def start_from(self, weights: dict[str, torch.Tensor]) -> None:
        """The average of another run."""
        for network in (self.reader, self.average):
            network.load_state_dict(weights)

    def reseed(self, seed: int) -> None:
        """All that is drawn is drawn by the loader's processes, from the seed of the run."""

    def state(self) -> dict:
        return {"optimiser": self.optimiser.state_dict(), "images_seen": self.images_seen}

    def load_state(self, state: dict) -> None:
        load_optimiser(self.optimiser, state["optimiser"])
        self.images_seen = state["images_seen"]


def targets(change_hu: torch.Tensor, soft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is to be found of a change [B, N, N], HU, in soft brain, bool [B, N, N]: float32 [B, 2, N, N], denser and
    less dense; and which pixels count, float32 [B, 1, N, N]: those of soft brain that clearly changed, or did not.

    The change is what a reader sees of it, without grain.
    """
    change = grainless(change_hu, soft)
    present = torch.stack([change > CHANGED_HU, change < -CHANGED_HU], dim=1).float()
    counted = soft & ((change.abs() > CHANGED_HU) | (change.abs() < SAME_HU))
    return present, counted[:, None].float()


def reading_loss(found: torch.Tensor, present: torch.Tensor, counted: torch.Tensor,
                 pixels: torch.Tensor | None = None) -> torch.Tensor:
    """Cross-entropy over the pixels that count, and how little found and present overlap in each image (Dice).

    found: log odds [B, 2, N, N]; present and counted as of targets(). pixels: how many count, in the mean over ranks,
    so that a pixel weighs the same on all of them; None: those of counted.
    """
    pixels = counted.sum() if pixels is None else pixels
    weight = torch.tensor(PRESENT, device=found.device)
    entropy = F.binary_cross_entropy_with_logits(found, present, reduction="none", pos_weight=weight)
    share, present = found.sigmoid() * counted, present * counted
    overlap = (2 * (share * present).sum((2, 3)) + FEW) / (share.sum((2, 3)) + present.sum((2, 3)) + FEW)
    return (entropy * counted).sum() / pixels.clamp(min=1) / 2 + OVERLAP * (1 - overlap).mean()
