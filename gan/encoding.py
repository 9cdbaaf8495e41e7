"""Training of the inversion encoder, image to W+ code (in-domain inversion, Zhu et al. 2020, ECCV): its step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import distributed
from common.weights import CheckpointError, load_strictly
from ct.picture import save_hu_grid
from ct.settings import PreprocessSettings
from ct.window import decode, encode
from dataset import SliceDataset
from detect.inpainting import Inpainting
from detect.inversion import EncoderMethod, Inversion
from detect.perceptual import build_perceptual
from gan.augment import coarse_noise, erase, random_flip, random_rotation
from gan.losses import d_logistic, frozen, g_nonsaturating, in_domain, r1_penalty
from gan.quality import MOST_HELD_OUT, Measured, errors_hu, evenly, means
from gan.settings import EncoderConfig
from gan.snapshots import Snapshot, load_optimiser
from gan.training import tell_of_groups
from model import MAPPING, NETWORKS, Discriminator, Generator, ModelConfig, build_encoder, has_mapping


@dataclass(frozen=True)
class FirstNetworks:
    """Networks whose weights are the first ones, of a run of train_encoder.py or of a model bundle.

    folder    that --init names
    weights   by network; a bundle may hold no discriminator, and holds averaged ones under the plain names
    model     what it takes to rebuild them
    prepared  how the slices that they learnt from were prepared
    known     how they were taught: what a run that begins with them keeps of that, JSON (gan.lineage)
    """

    folder: Path
    weights: Mapping[str, Mapping[str, torch.Tensor]]
    model: ModelConfig
    prepared: PreprocessSettings
    known: dict[str, Any]

    def restore(self, name: str, module: torch.nn.Module) -> None:
        """Load the weights of a network, strictly. Raises CheckpointError."""
        load_strictly(module, self.weights[name], f"{self.folder} ({name})")


class EncoderTrainer:
    """Encoder and discriminator against a generator (frozen, as published), and the two phases of a step."""

    BETAS = (0.9, 0.999)                 # Adam's
    PREPARE = None                       # what makes a step's examples of a batch from the database (gan.batches)

    def __init__(self, config: EncoderConfig, gan: Snapshot | None, range_hu: tuple[float, float],
                 device: torch.device, vgg16=None, lpips=None, first: FirstNetworks | None = None):
        """range_hu: what the slices to train on are cut to; the GAN may have learnt from others.

        Without a GAN the networks are those of `first`, whose weights come with start_from().
        """
        self.config, self.device, self.range_hu = config, device, tuple(range_hu)
        self.prepare = self.PREPARE and self.PREPARE(config, self.range_hu)
        torch.manual_seed(config.seed)                            # the same weights on every rank
        model = self.model = config.networks(gan.meta["model"]) if gan else config.networks(asdict(first.model), False)
        begun = None if config.halved else gan                    # whose weights go on; the halved ones begin anew
        self.g, self.d, critic = self.build_generator(begun), Discriminator(model), Discriminator(model)
        if begun:
            begun.restore({"discriminator": self.d})
            begun.restore({"discriminator": critic})
        elif first and "discriminator" in first.weights:
            first.restore("discriminator", critic)
        self.g.requires_grad_(config.lr_generator > 0)
        self.e = build_encoder(model)
        dtype = distributed.pick_precision(config.precision, device)
        for net in (self.g, self.d, self.e, critic):
            net.to(device).compute_dtype = dtype
        # The features that measure distance stay as they are; the discriminator itself goes on learning.
        self.perceptual = self.build_perceptual(critic, vgg16, lpips)
        trunk = dict(self.e.named_parameters())
        last = [trunk.pop(name) for name in list(trunk) if name.startswith("final_linear")]
        groups = [{"params": list(trunk.values()), "lr": config.lr_trunk}, {"params": last, "lr": config.lr}]
        if config.lr_generator > 0:
            groups.append({"params": self.g.parameters(), "lr": config.lr_generator})
        self.e_opt = torch.optim.Adam(groups, betas=self.BETAS)
        self.d_opt = torch.optim.Adam(self.d.parameters(), lr=config.lr_discriminator, betas=self.BETAS)
        self.rates = [group["lr"] for group in (*self.e_opt.param_groups, *self.d_opt.param_groups)]
        self.images_seen = 0                                      # over all ranks
        self.rng = torch.Generator()
        self.reseed(config.seed)
        if config.has_adversary(1):
            tell_of_groups(self.d, config.batch)

    def build_generator(self, gan: Snapshot | None) -> Generator:
        generator = Generator(self.model)
        if gan:
            gan.restore({"generator_ema": generator})
        return generator

    def build_perceptual(self, critic: Discriminator, vgg16, lpips) -> torch.nn.Module | None:
        """What measures distance here; None where the objective has a distance of its own, and needs no weights."""
        config = self.config
        return build_perceptual(config.perceptual, critic, config.pixels, config.knee, vgg16, lpips).to(self.device)

    def reseed(self, seed: int) -> None:
        """Random numbers from here on, of (seed, rank, images seen): later in a run none of its first steps' again."""
        self.seed = seed
        self.rng.manual_seed(distributed.seed_for_rank(seed, distributed.get_rank(), self.images_seen))

    def set_rates(self, done: float) -> None:
        """The rates for a training that is done to this part, 0 to 1."""
        factor = min(1.0, (1 - done) / self.config.decay) if self.config.decay else 1.0
        for group, rate in zip([*self.e_opt.param_groups, *self.d_opt.param_groups], self.rates):
            group["lr"] = rate * factor

    def reconstruct(self, images: torch.Tensor, alone: torch.Tensor | None = None
                    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and reconstructions; alone, bool [B], marks the images that are drawn from their code alone.

        Without predicted noise, the generator's own noise buffers are used: they are part of the model.
        """
        w_plus, noise = self.e.invert(images, self.g)
        if alone is not None:
            own = self.g.noise_maps("const")
            noise = [torch.where(alone[:, None, None, None], mine, found) for mine, found in zip(own, noise)]
        return w_plus, self.g.synthesis(w_plus, noise)

    @property
    def global_batch(self) -> int:
        return self.config.batch * distributed.get_world_size()

    def learn(self, slices: dict[str, torch.Tensor], index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on slices of the database: hu [B, N, N] and brain bool [B, N, N]."""
        return self.step(encode(slices["hu"].to(self.device).float()), index, full)

    def step(self, real: torch.Tensor, index: int, full: bool) -> dict[str, torch.Tensor]:
        """One step on real [B, 3, N, N]; `full` adds the adversarial and in-domain terms to the perceptual one."""
        if self.config.flip:
            real = random_flip(real, self.rng)
        real = random_rotation(real, self.config.rotate, self.config.rotate_deg, self.rng)
        stats = self._encoder_step(real, full)
        if full:
            stats |= self._discriminator_step(real, index)
        self.images_seen += self.global_batch
        return stats

    def _encoder_step(self, real, full):
        corrupted = coarse_noise(erase(real, self.config.erase, self.rng), self.config.coarse, self.rng)
        alone = None
        if self.config.noise:
            alone = (torch.rand(len(real), generator=self.rng) < self.config.code_alone).to(self.device)
        w_plus, fake = self.reconstruct(corrupted, alone)
        with torch.no_grad():
            query = self.perceptual.features(self._reduced(real))
        distance = self.perceptual.distance(query, self.perceptual.features(self._reduced(fake))).mean()
        loss, stats = distance, {"perceptual": distance}
        if full:
            with frozen(self.d):
                adversarial = g_nonsaturating(self.d(fake))
            domain = in_domain(w_plus, self.e(fake))
            loss = loss + self.config.adversarial * adversarial + self.config.domain * domain
            stats |= {"adversarial": adversarial, "domain": domain}
        self._update(self.e_opt, loss)
        return stats

    def _discriminator_step(self, real, index, fake=None):
        if fake is None:
            with torch.no_grad():
                _, fake = self.reconstruct(real)
        loss = d_logistic(self.d(real), self.d(fake))
        self._update(self.d_opt, loss)
        if self.config.r1_every and index % self.config.r1_every == 0:
            real = real.detach().requires_grad_(True)
            penalty = r1_penalty(self.d(real), real)
            self._update(self.d_opt, penalty * (self.config.r1_gamma / 2 * self.config.r1_every))
        return {"loss_d": loss}

    def _update(self, optimiser, loss):
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        distributed.average_gradients(p for group in optimiser.param_groups for p in group["params"])
        optimiser.step()

    def _reduced(self, images: torch.Tensor) -> torch.Tensor:
        """LPIPS looks at images reduced twofold, as released; the discriminator only knows its own size."""
        return F.avg_pool2d(images, 2) if self.config.perceptual == "lpips" else images

    @torch.no_grad()
    def validate(self, dataset: SliceDataset, out: Path, number: int) -> dict[str, float]:
        """Mean PSNR (dB, over the three windows) and HU error in the brain, by scan; a grid of pairs as PNG, with
        this number in its name.

        No more than MOST_HELD_OUT slices are drawn; of as many scans as make so many pictures the grid shows pairs.
        """
        dataset, psnr, error, pairs = Measured(dataset), [], [], []
        shown = set(evenly(range(len(dataset.scan_ids)), MOST_HELD_OUT // 16))
        for s in range(len(dataset.scan_ids)):
            scan = dataset.scan(s)
            hu, brain = scan["hu"].float(), scan["brain"]
            real = encode(hu)
            fake = torch.cat([self.reconstruct(x.to(self.device))[1].cpu() for x in real.split(16)])
            recon = decode(fake)
            psnr.append((10 * torch.log10(4 / (fake.clamp(-1, 1) - real).square().mean((1, 2, 3)))).mean())
            # The generator cannot draw beyond its windows: neither can the scan it is held against.
            error += errors_hu(recon, decode(real), brain)
            if s in shown:
                pick = torch.linspace(0, len(hu) - 1, 8).long()
                pairs += [hu[pick], recon[pick]]
        save_hu_grid(out / f"reconstructions-{number:03d}.png", torch.cat(pairs).numpy(), columns=8)
        return means({"val_psnr_db": psnr, "val_error_hu": error})

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"encoder": self.e, "discriminator": self.d, "generator": self.g}

    def start_from(self, first: FirstNetworks) -> None:
        """Its weights. The encoder may lack the noise head: then that starts from nothing. Without a discriminator in
        it, or a mapping network, the GAN's goes on, and without a GAN a new one."""
        for name, module in self.modules().items():
            stored = name if name in first.weights else name.removesuffix("_ema")
            if stored not in first.weights:
                continue
            weights = dict(first.weights[stored])
            if name == "generator" and not has_mapping(weights):
                weights |= {key: t for key, t in module.state_dict().items() if key.startswith(MAPPING)}
            if name == "encoder" and self.model.encoder_noise and not first.model.encoder_noise:
                weights |= {key: t for key, t in module.state_dict().items() if key.startswith("noise_head.")}
            load_strictly(module, weights, f"{first.folder} ({stored})")

    def state(self) -> dict:
        """Collective."""
        return {"e_opt": self.e_opt.state_dict(), "d_opt": self.d_opt.state_dict(), "images_seen": self.images_seen,
                "rng": distributed.gather(self.rng.get_state())}

    def load_state(self, state: dict) -> None:
        load_optimiser(self.e_opt, state["e_opt"])
        load_optimiser(self.d_opt, state["d_opt"])
        self.images_seen = state["images_seen"]
        if len(state["rng"]) == distributed.get_world_size():
            self.rng.set_state(state["rng"][distributed.get_rank()])
        else:
            self.reseed(self.seed)


def has_taught_discriminator(snapshot: Snapshot) -> bool:
    """Whether the discriminator of an encoder's run has learnt anything: before the part with an adversary a new one
    has not."""
    return not snapshot.meta.get("new_discriminator") or bool(snapshot.state["d_opt"]["state"])


def restore(snapshot: Snapshot, device: torch.device, dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """The three networks of an encoder run, by their names, in eval mode and frozen."""
    model = snapshot.model()
    networks = {name: build(model) for name, build in NETWORKS.items()}
    averaged = [name for name in networks if f"{name}_ema" in snapshot.weights]       # of a run that keeps an average
    snapshot.restore({f"{name}_ema" if name in averaged else name: network for name, network in networks.items()})
    for net in networks.values():
        net.eval().requires_grad_(False).to(device).compute_dtype = dtype
    return networks


def method_of(snapshot: Snapshot, settings: Any | None, device: torch.device, dtype: torch.dtype,
              surroundings: Snapshot | None = None) -> EncoderMethod:
    """The networks of an encoder run as the method whose settings these are, inpainting's or inversion's.

    settings      None: with the defaults of the one that the encoder is for, inpainting if it was trained with --hide
    surroundings  a run with --halved, whose networks draw for inpainting what surroundings call for

    Raises CheckpointError where surroundings are not for that.
    """
    networks = restore(snapshot, device, dtype)
    generator, encoder = networks["generator"], networks["encoder"]
    if settings is None:
        settings = (Inpainting if snapshot.meta["model"]["encoder_masks"] else Inversion).Settings()
    if isinstance(settings, Inversion.Settings):
        if surroundings:
            raise CheckpointError(f"{surroundings.path.parent}: a run with --halved: of use to method inpainting alone")
        return Inversion(settings, generator, encoder)
    range_hu = snapshot.meta["data"]["settings"]["standardise"]["hu_clip"]
    halves = surroundings and method_of(surroundings, None, device, dtype).painter
    return Inpainting(settings, generator, encoder, range_hu, surroundings=halves)
