"""Training of networks that draw closest normals at half the size, beside those for the surroundings.

They begin as these: what could be in a place, by what is around it, they know. What does not belong in a slice is found
as it will be in new scans (detect/inpainting.py), by networks that stay as they are. They see the slice with that
replaced by what surroundings call for, and where it was denser than that and where less; and they learn to bring back
the healthy slice. Ventricles and sulci, whose width no surroundings tell, are found in healthy slices, too, so their
fluid comes back where a hole has their shape; of the random shapes that are drawn into most slices (gan/corrupt.py),
many of them blood in place of fluid, nothing does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ct.halves import halved
from ct.picture import save_hu_grid
from ct.window import encode
from dataset import SliceDataset
from detect.inpainting import OF_SURROUNDINGS, Inpainting, InpaintingSettings
from detect.painter import Found, Painter
from gan.corrupt import hide
from gan.encoding import FirstNetworks
from gan.inpainting import OUTSIDE, Augmentation, Corruption, InpaintingTrainer, weighted_distance
from gan.quality import MOST_HELD_OUT, Measured, errors_hu, evenly, means
from gan.settings import EncoderConfig
from model import NETWORKS

SHARES = (0.3, 0.25, 0.37, 0.08)         # of corrupt.KINDS: more fluid, which no shape but a ventricle's tells
GATES = (0.7, 1.05)                      # of gate_hu: where it lies in a slice, so that no one gate is learnt


class Differing(Corruption):
    """At the slices' own size; hidden: what is to be hidden besides what is found."""

    def __call__(self, slices: dict[str, torch.Tensor], rng: torch.Generator) -> dict[str, torch.Tensor]:
        found = Augmentation.__call__(self, slices, rng)
        batch, size = found["hu"].shape[:2]
        return self.with_shapes(found, rng, SHARES) | {"hidden": hide(batch, size, self.config.hide, rng)}


class ClosestTrainer(InpaintingTrainer):
    """A step of it, with the rates and snapshots of EncoderTrainer; no adversary."""

    PREPARE = Differing

    def __init__(self, config: EncoderConfig, gan: None, range_hu: tuple[float, float], device: torch.device,
                 vgg16=None, lpips=None, first: FirstNetworks | None = None, *, surroundings: FirstNetworks):
        """The first weights are those of `surroundings`; start_from() may give others, of a run like this one."""
        self.fixed: dict[str, torch.nn.Module] = {}
        super().__init__(config, gan, range_hu, device, vgg16, lpips, first or surroundings)
        self.start_from(surroundings)
        fixed, plain = {}, replace(self.model, encoder_filled=False)
        for name, network in (("generator", self.g), ("encoder", self.e)):
            fixed[name] = NETWORKS[name](plain).to(device)
            fixed[name].load_state_dict(network.state_dict())
            fixed[name].eval().requires_grad_(False).compute_dtype = network.compute_dtype
        self.fixed = {OF_SURROUNDINGS + name: network for name, network in fixed.items()}
        self.method = Inpainting(InpaintingSettings(), self.g, self.e, self.range_hu,
                                 surroundings=Painter(**fixed, range_hu=self.range_hu))

    def modules(self) -> dict[str, torch.nn.Module]:
        """With those beside which it learns: the run is of no use without them."""
        return super().modules() | self.fixed

    def learn(self, examples: dict[str, torch.Tensor], index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on what self.prepare makes of a batch."""
        examples = {name: t.to(self.device, non_blocking=True) for name, t in examples.items()}
        hu, bone, soft = examples["hu"], examples["bone"], examples["brain"] & ~examples["bone"]
        found = self.found(examples, self._gate())
        fake = self.e.redraw(self.method.painter.filled(examples["query"], found, bone)[0], self.g)
        inside, hidden, changed = (F.avg_pool2d(mask.float()[:, None], 2)[:, 0]
                                   for mask in (soft, found.hidden, examples["changed"]))
        weight = OUTSIDE + inside * (1 + self.config.hidden * hidden + self.config.changed * changed)
        loss = weighted_distance(encode(halved(hu, bone)[0]), fake, weight, self.config.knee, self.config.gradient)
        self._update(self.e_opt, loss)
        self.images_seen += self.global_batch
        return {"distance": loss}

    def _gate(self) -> float:
        low, high = GATES
        return low + (high - low) * float(torch.rand((), generator=self.rng))

    @torch.no_grad()
    def found(self, examples: dict[str, torch.Tensor], gate: float) -> Found:
        """What is anomalous in examples' queries, with the gate at this part of where it lies in use; and what is to be
        hidden besides."""
        used = InpaintingSettings()
        method = self.method.with_settings(replace(used, gate_hu=gate * used.gate_hu, grow_hu=gate * used.grow_hu))
        query, brain, bone = (examples[name] for name in ("query", "brain", "bone"))
        found = method.find_anomalous(query, brain & ~bone, bone)
        denser = torch.where(found.hidden, found.denser, query > found.expected_hu)
        return found._replace(hidden=found.hidden | examples["hidden"], denser=denser)

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, number: int) -> dict[str, float]:
        """HU error in the brain of held-out scans, where something is hidden of them, and, with shapes drawn into them,
        where these are; a grid of slices and closest normals without and with shapes as PNG.

        Every fourth slice is drawn, but no more than MOST_HELD_OUT; the grid shows as many scans as make so many
        pictures. Without the detail that is given back (detect/inpainting.py).
        """
        dataset, generator = Measured(dataset, 4), torch.Generator().manual_seed(0)
        prepare = Differing(replace(self.config, shapes=1, rotate=0, flip=False, jitter_hu=0), self.range_hu)
        seen, hidden, without, rows = [], [], [], []
        shown = set(evenly(range(len(dataset.scan_ids)), MOST_HELD_OUT // 4))
        for s in range(len(dataset.scan_ids)):
            examples = prepare(dataset.scan(s), generator)
            hu, brain, bone = (examples[name] for name in ("hu", "brain", "bone"))
            examples["hidden"] = torch.zeros_like(bone)               # nothing besides what is found
            inside, pictures = brain & ~bone, []
            for query in (hu, examples["query"]):
                found = self.found({name: t.to(self.device) for name, t in (examples | {"query": query}).items()}, 1)
                drawn = self.method.painter.closest(query.to(self.device), found, bone.to(self.device), len(hu)).cpu()
                pictures += [query, torch.where(bone, query, drawn)]
                if query is hu:
                    seen += errors_hu(drawn, hu, inside)
                    hidden += errors_hu(drawn, hu, inside & found.hidden.cpu())
            without += errors_hu(drawn, hu, inside & (examples["changed"] > 0.5))
            if s in shown:
                rows += [picture[len(hu) // 2] for picture in pictures]
        save_hu_grid(out / f"reconstructions-{number:03d}.png", torch.stack(rows).numpy(), columns=8)
        return means({"val_error_hu": seen, "val_hidden_hu": hidden, "val_changed_hu": without})
