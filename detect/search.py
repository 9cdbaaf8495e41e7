"""The published search for the closest normal slice (Lee et al. 2022).

Start at the encoder's code, optimise the code, then the noise maps. All slices advance together, in chunks that fit the
memory; each slice's optimisation is its own, so a result does not depend on the chunks. Coordinates and the healthy
range are those of latent.py; votes are cast at every step by the watch (votes.VoteWatch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import known_sha256
from common.weights import CheckpointError, load_tensors
from config import check_choices, check_range, option
from ct.window import decode, encode
from detect.inversion import compact_networks, draw, load_networks
from detect.latent import LatentStats
from detect.options import KNEE, OF_FILE, PERCEPTUAL
from detect.perceptual import build_perceptual, prior_excess
from detect.reconstruct import Reconstruction, Reconstructor, Stages, Watch, error_hu
from detect.votes import VoteWatch
from model import Discriminator, Encoder, Generator

RAMP_UP, RAMP_DOWN = 0.05, 0.25                 # shares of a stage's steps over which the rate rises and falls


@dataclass(frozen=True)
class SearchSettings:
    """Steps and rates are the paper's. Its perceptual distance is LPIPS; ours needs no download. The weight of the
    in-domain term is not published: 1 is a guess."""

    steps_latent: int = option(100, "steps on the code")
    steps_noise: int = option(100, "steps on the noise maps; 0: none")
    predicted_noise: bool = option(True, "start from the noise maps that the encoder predicts, if it does; else from "
                                         "the generator's own")
    lr_latent: float = option(0.1, "peak rate of Adam on the code")
    lr_noise: float = option(2.0, "peak rate of Adam on the noise maps, in their own units: 2 for maps of variance 1 "
                                  "times a strength of hundredths, as a GAN leaves them; 0.02 where the training of "
                                  "the encoder has taken the strengths into the maps")
    domain: float = option(1.0, "weight of the in-domain term against the perceptual distance")
    perceptual: str = option("discriminator", "distance between query and reconstruction", PERCEPTUAL)
    pixels: float = option(5.0, "weight of the pixels' own difference in perceptual=discriminator")
    knee: float = option(KNEE, "difference below which the pixels' difference is rounded off, in [-1, 1]")
    vgg16: str = option("", "file: torchvision's vgg16 state dict, for perceptual=lpips", stored=False)
    lpips: str = option("", "file: the published linear weights of LPIPS-VGG", stored=False)
    batch: int = option(32, "slices in the networks at a time: memory, not results", stored=False)

    def __post_init__(self):
        if self.steps_latent < 0 or self.steps_noise < 0 or self.steps_latent + self.steps_noise < 1:
            raise ValueError("steps must not be negative, and a search needs one at least, got "
                             f"{self.steps_latent} latent and {self.steps_noise} noise")
        check_range(self, ("lr_latent", "lr_noise", "domain", "pixels"), 0, flags=False)
        check_range(self, ("knee",), 0, above=True, flags=False)
        check_range(self, ("batch",), 1, flags=False)
        check_choices(self)

    def of_files(self) -> dict[str, str | None]:
        """SHA-256 of the files that scores hang on, wherever they lie; None where one is not given."""
        if self.perceptual != "lpips":
            return {}
        return {f"{name}{OF_FILE}": known_sha256(Path(path)) if path else None
                for name, path in (("vgg16", self.vgg16), ("lpips", self.lpips))}


class Search(Reconstructor):
    """discriminator: for perceptual=discriminator; None where a bundle without one is used with another distance."""

    name, Settings = "search", SearchSettings

    def __init__(self, settings: SearchSettings, generator: Generator, encoder: Encoder, latent: LatentStats,
                 discriminator: Discriminator | None = None):
        self.generator, self.encoder, self.latent, self.discriminator = generator, encoder, latent, discriminator
        self.size, self.device = generator.config.size, generator.input.input.device
        self._take(settings)

    @torch.inference_mode(False)                                       # whose tensors take part in no gradient
    def _take(self, settings: SearchSettings) -> None:
        self.settings = settings
        if settings.perceptual == "discriminator" and self.discriminator is None:
            raise ValueError("perceptual=discriminator: this model holds no discriminator; use perceptual=pixels")
        given = {"vgg16": settings.vgg16, "lpips": settings.lpips} if settings.perceptual == "lpips" else {}
        if gone := [f"{name}={path}" for name, path in given.items() if path and not Path(path).is_file()]:
            raise ValueError(f"{', '.join(gone)}: no such file; give that of the perceptual distance")
        self.perceptual = None
        if settings.perceptual != "lpips" or settings.vgg16:     # else its files are yet to come, with_settings()
            self.perceptual = build_perceptual(settings.perceptual, self.discriminator, settings.pixels, settings.knee,
                                               settings.vgg16 or None, settings.lpips or None).to(self.device)

    def check(self) -> None:
        if self.perceptual is None:
            raise ValueError("perceptual=lpips: the weights of VGG16 come with no model: give vgg16=FILE (--set, or "
                             "settings.replace), torchvision's vgg16 state dict (vgg16-397923af.pth), and lpips=FILE "
                             "where the model is calibrated with it; or use another perceptual, which needs no files")

    def with_settings(self, settings: SearchSettings) -> Search:
        other = super().with_settings(settings)
        other._take(settings)
        return other

    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check()
        self.check_shapes(hu, brain, below_vertex_mm)
        with torch.inference_mode(False), torch.enable_grad():         # gradients, also for a caller who wants none
            return self._search(hu.clone(), brain, below_vertex_mm, watch)

    def _search(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                watch: Watch | None) -> Reconstruction:
        # The noise stage copies the query but where an anomaly is predicted: it needs votes, whoever counts them.
        if watch is None and self.settings.steps_noise:
            watch = VoteWatch(brain, below_vertex_mm)
        run, stages, inside = _Run(self, hu, below_vertex_mm, watch), Stages(), brain.to(self.device)

        def error() -> float:
            return error_hu(run.query_hu, decode(run.image), inside)
        with stages.stage("encode", error):
            run.encode()
        with stages.stage("latent", error):
            run.optimise_latent()
        by_code = decode(run.image).cpu()
        with stages.stage("noise", error):
            run.optimise_noise()
        return Reconstruction(run.query_hu.cpu(), decode(run.image).cpu(), stages.error_hu, stages.seconds,
                              drawn_hu=by_code)

    def config(self) -> dict[str, Any]:
        return asdict(self.encoder.config)

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        networks = {"generator": self.generator, "encoder": self.encoder}
        if self.settings.perceptual == "discriminator":
            networks["discriminator"] = self.discriminator
        check_latent(self.latent, self.encoder, Path("latent.safetensors"))
        return compact_networks(networks, dtype) | {"latent": self.latent.to_tensors(dtype)}

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: SearchSettings, device: torch.device) -> Search:
        names = ["generator", "encoder", *(["discriminator"] if settings.perceptual == "discriminator" else [])]
        networks = load_networks(folder, config, names, device)
        return cls(settings, latent=load_latent(folder, networks["encoder"]).to(device), **networks)

    def set_precision(self, dtype: torch.dtype) -> None:
        super().set_precision(dtype)
        for network in (self.generator, self.encoder, self.discriminator):
            if network is not None:
                network.compute_dtype = dtype


def load_latent(folder: Path, encoder: Encoder) -> LatentStats:
    """The latent statistics of a bundle. Raises CheckpointError unless they are of this encoder's codes."""
    path = folder / "latent.safetensors"
    try:
        latent = LatentStats.from_tensors(load_tensors(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    check_latent(latent, encoder, path)
    return latent


def check_latent(latent: LatentStats, encoder: Encoder, path: Path) -> None:
    """CheckpointError unless the statistics have the shape of the encoder's codes."""
    expected, found = encoder.config.code_shape, tuple(latent.mean.shape[1:])
    if found != expected:
        raise CheckpointError(f"{path}: [layers, style_dim] {list(found)}, but the networks have {list(expected)}; fit "
                              "the statistics on this encoder's codes")


def ramp(t: float) -> float:
    """Learning-rate factor at t in [0, 1): linear up, then flat, then half a cosine down (Karras et al. 2020, D.1)."""
    factor = min(1.0, (1.0 - t) / RAMP_DOWN)
    return (0.5 - 0.5 * np.cos(factor * np.pi)) * min(1.0, t / RAMP_UP)


class _Run:
    """The state of one scan's search: code p and noise maps of every slice."""

    def __init__(self, search: Search, hu: torch.Tensor, below_vertex_mm: np.ndarray, watch: Watch | None):
        self.search, self.settings, self.watch = search, search.settings, watch
        self.generator, self.perceptual = search.generator, search.perceptual
        self.query = encode(hu.to(search.device))
        self.query_hu = decode(self.query)                  # what the windows can show: the generator can draw no more
        batch = self.settings.batch
        self.chunks = [slice(i, min(i + batch, len(hu))) for i in range(0, len(hu), batch)]
        positions = np.ascontiguousarray(below_vertex_mm)                # torch takes no reversed views
        self.stats = search.latent.at(torch.as_tensor(positions))
        self.image = torch.empty_like(self.query)                        # the reconstruction at the last step
        self.predicted = torch.zeros(hu.shape, dtype=torch.bool, device=search.device)      # anomalous, so far

    @torch.no_grad()
    def encode(self):
        # In one batch: an imported encoder's statistic is taken over the whole scan, as released.
        w_plus, noise = self.search.encoder.invert(self.query, self.generator)
        if not self.settings.predicted_noise:
            noise = self.generator.noise_maps("const")
        self.p_encoder = self.stats.to_p(w_plus)
        self.p = self.p_encoder.clone()
        self.w_plus = self.stats.to_w(self.p)
        self.noise = [m.expand(len(self.query), -1, -1, -1).clone() for m in noise]
        self._draw()

    def optimise_latent(self):
        """Step 1: the perceptual distance, and a price for leaving the normal mean further than the encoder did."""
        if not self.settings.steps_latent:
            return
        with torch.no_grad():
            query_features = [self.perceptual.features(self.query[c]) for c in self.chunks]
        self.p.requires_grad_(True)
        optimiser = torch.optim.Adam([self.p], lr=self.settings.lr_latent, betas=(0.9, 0.999))
        for step in range(self.settings.steps_latent):
            self._set_rate(optimiser, self.settings.lr_latent, step / self.settings.steps_latent)
            optimiser.zero_grad(set_to_none=True)
            w_plus = self.stats.to_w(self.p)
            gradient = torch.empty_like(w_plus)
            for chunk, features in zip(self.chunks, query_features):
                w = w_plus[chunk].detach().requires_grad_(True)
                image = self.generator.synthesis(w, [m[chunk] for m in self.noise])
                # Sums over slices: no slice's gradient may depend on how many others there are.
                self.perceptual.distance(features, self.perceptual.features(image)).sum().backward()
                gradient[chunk] = w.grad
                self.image[chunk] = image.detach()
            w_plus.backward(gradient)
            (self.settings.domain * len(self.p) * prior_excess(self.p, self.p_encoder)).backward()
            self._step_done()
            optimiser.step()
        with torch.no_grad():
            self.p = self.p.detach()
            self.w_plus = self.stats.to_w(self.p)
        self._draw()

    def optimise_noise(self):
        """Step 2: L1 to the query, and to the drawn normal where an anomaly is predicted: texture, not lesion."""
        if not self.settings.steps_noise:
            return
        for m in self.noise:
            m.requires_grad_(True)
        optimiser = torch.optim.Adam(self.noise, lr=self.settings.lr_noise, betas=(0.9, 0.999))
        # As the steps draw it: its difference from itself is then 0, without a slope. Other kernels draw without
        # gradients, and of what they differ by in the last digit Adam would take the sign for a direction.
        normal = torch.cat([self._image(chunk).detach() for chunk in self.chunks])
        for step in range(self.settings.steps_noise):
            self._set_rate(optimiser, self.settings.lr_noise, step / self.settings.steps_noise)
            optimiser.zero_grad(set_to_none=True)
            target = torch.where(self.predicted[:, None], normal, self.query)
            for chunk in self.chunks:
                image = self._image(chunk)
                (image - target[chunk]).abs().mean((1, 2, 3)).sum().backward()
                self.image[chunk] = image.detach()
            self._step_done()
            optimiser.step()
        self.noise = [m.detach() for m in self.noise]
        self._draw()

    @staticmethod
    def _set_rate(optimiser, peak, t):
        optimiser.param_groups[0]["lr"] = peak * ramp(t)

    def _image(self, chunk: slice) -> torch.Tensor:
        return self.generator.synthesis(self.w_plus[chunk], [m[chunk] for m in self.noise])

    @torch.no_grad()
    def _draw(self):
        self.image = draw(self.generator, self.w_plus, self.noise, self.settings.batch)

    @torch.no_grad()
    def _step_done(self):
        if self.watch:
            self.predicted = self.watch(self.query_hu, decode(self.image))
