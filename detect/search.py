"""The closest normal image of every slice of a scan, and the votes for what it cannot explain (Lee et al. 2022).

project() is the paper's algorithm on standardised slices: start at the encoder's code, optimise the code, then the
noise maps, and at each step let pixels vote that stay away from the reconstruction. All slices advance together, in
chunks that fit the memory; each slice's optimisation is its own, so a result does not depend on the chunks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from config import option
from ct.window import decode, encode
from detect import measure, normative
from detect.bundle import Bundle
from detect.measure import SCAN_SCORES
from detect.perceptual import KNEE, PERCEPTUAL, build_perceptual, prior_excess

MEASURES = ("votes", "surprise")
POOLS = ("area", "peak")
PEAK_AT_512 = 12.0      # standard deviation of the Gaussian that --pool peak takes a mean with, pixels at 512


@dataclass(frozen=True)
class ProjectionSettings:
    """Kept in a bundle's model.json: the calibration holds for these alone.

    Steps, rates, threshold, median and component size are the paper's. Its perceptual distance is LPIPS; ours needs
    no download. The weight of the in-domain term and the scan score are not published: 1 is a guess, and 'mean' the
    best of three on 6 scans with haemorrhage against 5 healthy ones, too few to settle it (README, Results).
    """

    steps_latent: int = option(100, "steps on the code")
    steps_noise: int = option(100, "steps on the noise maps; 0: none")
    predicted_noise: bool = option(True, "start from the noise maps that the encoder predicts, if it does; else from "
                                         "the generator's own")
    lr_latent: float = option(0.1, "peak rate of Adam on the code")
    lr_noise: float = option(2.0, "peak rate of Adam on the noise maps")
    domain: float = option(1.0, "weight of the in-domain term against the perceptual distance")
    perceptual: str = option("discriminator", "distance between query and reconstruction", PERCEPTUAL)
    pixels: float = option(5.0, "weight of the pixels' own difference in --perceptual discriminator")
    knee: float = option(KNEE, "difference below which the pixels' difference is rounded off, in [-1, 1]")
    threshold_hu: float = option(5.0, "a pixel votes when its filtered residual exceeds this, HU")
    median_at_512: int = option(19, "side of the residual's median filter, pixels at 512; scales with the frame")
    component_at_512: int = option(600, "smaller predicted components are dropped, pixels at 512; scales with area")
    max_gap_mm: float = option(7.5, "slices further apart than this, mm, and than 1.5 times the scan's usual spacing "
                                    "are no neighbours")
    measure: str = option("votes", "what a map shows and a score sums: votes times residual, as published, or how "
                                   "surprising the residual is at its place, for a bundle that knows", MEASURES)
    filter: str = option("median", "fine scale of the residual in --measure surprise: the median-filtered residual, or "
                                   "a band of it away from bone", normative.FILTERS)
    scale: str = option("both", "scale of the residual in --measure surprise; sides: dense at the fine scale, thin at "
                                "the coarse one", normative.COMBINED)
    thin: float = option(1.0, "weight of the surprise of what is thin in --scale sides")
    pool: str = option("area", "a slice's score in --measure surprise: mean over the brain, or the highest mean about "
                               "any place (peak)", POOLS)
    surprise_above: float = option(2.5, "surprise (-log10 of the share of healthy brain) that a score counts from")
    surprise_mask: float = option(3.0, "surprise from which a pixel is predicted anomalous")
    scan_score: str = option("mean", "how slice scores become the scan's score", SCAN_SCORES)

    def __post_init__(self):
        steps = self.steps_latent + self.steps_noise
        if self.steps_latent < 0 or self.steps_noise < 0 or (steps < 1 and self.measure == "votes"):
            raise ValueError("steps must not be negative, and --measure votes needs one at least, got "
                             f"{self.steps_latent} latent and {self.steps_noise} noise")
        if self.median_at_512 < 1:
            raise ValueError(f"--median-at-512 must be at least 1, got {self.median_at_512}")
        for name in ("lr_latent", "lr_noise", "domain", "pixels", "threshold_hu", "component_at_512", "max_gap_mm",
                     "knee", "thin", "surprise_above", "surprise_mask"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0, got {getattr(self, name):g}")


# The published search and score, whatever a bundle is calibrated for (projector.py --preset faithful): the defaults of
# these. The distance stays the bundle's: its encoder and generator were trained with it.
PUBLISHED = ("steps_latent", "steps_noise", "lr_latent", "lr_noise", "domain", "threshold_hu", "median_at_512",
             "component_at_512", "measure", "scan_score")
FAITHFUL = {name: getattr(ProjectionSettings(), name) for name in PUBLISHED} | {"predicted_noise": False}


@dataclass(frozen=True)
class FrameProjection:
    """What project() returns, on the CPU, in the standard frame; S slices inferior to superior.

    reconstruction  float32 [S, N, N], HU: the closest normal slice
    residual        float32 [S, N, N], HU: query minus reconstruction in the brain, median-filtered, signed
    scales          float32 [S, 2, N, N], HU: the residual at the scales of normative.py
    judged          bool [S, N, N]: the brain, or the part of it in which --filter looks for surprises
    votes           int32 [S, N, N], over `steps` steps, at most two a step; none where only surprise was asked for
    anomaly         float32 [S, N, N], signed: residual weighted by its votes (HU), or its surprise, as measured
    predicted       bool [S, N, N]: votes exceed the steps, or the surprise exceeds --surprise-mask
    lesion          bool [S, N, N]: predicted without small components
    slice_scores    float32 [S]: HU times votes a step, or surprise beyond --surprise-above, mean over the brain
    error_hu        mean absolute difference from the query in the brain after each stage. That after 'latent' tells
                    how close the normal comes; the noise stage copies texture and makes it look better
    seconds         by stage
    """

    reconstruction: torch.Tensor
    residual: torch.Tensor
    scales: torch.Tensor
    judged: torch.Tensor
    votes: torch.Tensor
    anomaly: torch.Tensor
    predicted: torch.Tensor
    lesion: torch.Tensor
    slice_scores: torch.Tensor
    steps: int
    error_hu: dict[str, float]
    seconds: dict[str, float]

    def scan_score(self, how: str) -> float:
        return measure.scan_score(self.slice_scores, how)


def project(
    hu: torch.Tensor,
    brain: torch.Tensor,
    below_vertex_mm: np.ndarray,
    bundle: Bundle,
    perceptual: torch.nn.Module,
    settings: ProjectionSettings,
    batch: int = 32,
    tell: bool = True,
) -> FrameProjection:
    """Project the slices of one scan (all of them, in order, so that neighbours can vote).

    hu              float32 [S, N, N], standardised as the bundle's preprocessing says
    brain           bool [S, N, N]; below_vertex_mm [S], monotonic
    perceptual      perceptual_for(bundle, settings)
    batch           slices that pass through the networks at a time: memory, not results
    tell            False leaves the surprise untold, for a bundle that does not know it yet: the anomaly is then the
                    residual, nothing is predicted and the scores are 0
    """
    n = bundle.config.size
    if tell and settings.measure == "surprise" and bundle.normal is None:
        raise ValueError("--measure surprise: this model holds no statistics of healthy residuals; make it anew with "
                         "latent_stats.py and at least 3 held-out scans, or use --measure votes")
    if hu.shape[1:] != (n, n) or brain.shape != hu.shape or len(below_vertex_mm) != len(hu):
        raise ValueError(f"project: expected hu and brain [S, {n}, {n}] and S positions, got {list(hu.shape)}, "
                         f"{list(brain.shape)} and {len(below_vertex_mm)}")
    search = _Search(hu, brain, below_vertex_mm, bundle, perceptual, settings, batch)
    errors, seconds, start = {}, {}, time.perf_counter()
    for stage, run in (("encode", search.encode), ("latent", search.optimise_latent), ("noise", search.optimise_noise)):
        run()
        errors[stage] = search.error_hu()                                # waits for the device, too
        seconds[stage] = time.perf_counter() - start
        start = time.perf_counter()
    return search.result(errors, seconds, tell)


def ramp(t: float, up: float = 0.05, down: float = 0.25) -> float:
    """Learning-rate factor at t in [0, 1): linear up, then flat, then half a cosine down (Karras et al. 2020, D.1)."""
    factor = min(1.0, (1.0 - t) / down)
    return (0.5 - 0.5 * np.cos(factor * np.pi)) * min(1.0, t / up)


class _Search:
    """The state of one scan's projection: code p and noise maps of every slice, and the votes so far."""

    def __init__(self, hu, brain, below_vertex_mm, bundle, perceptual, settings, batch):
        self.bundle, self.perceptual, self.settings = bundle, perceptual, settings
        self.device = bundle.generator.input.input.device
        self.query = encode(hu.to(self.device))
        # What the three windows can show of the query: the generator can draw no more.
        self.query_hu, self.brain = decode(self.query), brain.to(self.device)
        self.positions = np.ascontiguousarray(below_vertex_mm)          # torch takes no reversed views
        usual_mm = np.median(np.abs(np.diff(self.positions))) if len(hu) > 1 else 0
        self.max_gap_mm = max(settings.max_gap_mm, 1.5 * usual_mm)       # thick slices have neighbours, too
        self.chunks = [slice(i, min(i + batch, len(hu))) for i in range(0, len(hu), batch)]
        self.stats = bundle.latent.at(torch.as_tensor(self.positions))
        self.counter = measure.VoteCounter(hu.shape, self.device)
        self.median = measure.scale_median_size(hu.shape[-1], settings.median_at_512)
        self.image = torch.empty_like(self.query)                        # the reconstruction at the last step
        # The noise stage must know what is anomalous before a surprise can be told.
        self._needs_votes = settings.measure == "votes" or settings.steps_noise > 0

    @torch.no_grad()
    def encode(self):
        # In one batch: an imported encoder's statistic is taken over the whole scan, as released.
        w_plus, noise = self.bundle.encoder.invert(self.query, self.bundle.generator)
        if not self.settings.predicted_noise:
            noise = self.bundle.generator.noise_maps("const")
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
                image = self.bundle.generator.synthesis(w, [m[chunk] for m in self.noise])
                # Sums over slices: no slice's gradient may depend on how many others there are.
                self.perceptual.distance(features, self.perceptual.features(image)).sum().backward()
                gradient[chunk] = w.grad
                self.image[chunk] = image.detach()
            w_plus.backward(gradient)
            (self.settings.domain * len(self.p) * prior_excess(self.p, self.p_encoder)).backward()
            if self._needs_votes:
                self._vote()
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
        normal = self.image.clone()
        for step in range(self.settings.steps_noise):
            self._set_rate(optimiser, self.settings.lr_noise, step / self.settings.steps_noise)
            optimiser.zero_grad(set_to_none=True)
            target = torch.where(self.counter.predicted[:, None], normal, self.query)
            for chunk in self.chunks:
                image = self.bundle.generator.synthesis(self.w_plus[chunk], [m[chunk] for m in self.noise])
                (image - target[chunk]).abs().mean((1, 2, 3)).sum().backward()
                self.image[chunk] = image.detach()
            self._vote()
            optimiser.step()
        self.noise = [m.detach() for m in self.noise]
        self._draw()

    @torch.no_grad()
    def error_hu(self) -> float:
        return (self.query_hu - decode(self.image)).abs()[self.brain].mean().item()

    @torch.no_grad()
    def result(self, errors: dict[str, float], seconds: dict[str, float], tell: bool) -> FrameProjection:
        reconstruction, brain = decode(self.image), self.brain.cpu()
        residual = self._residual(reconstruction).cpu()
        scales, judged = residual_scales(self.query_hu.cpu(), reconstruction.cpu(), residual, brain, self.settings)
        votes, steps = self.counter.votes.cpu(), self.counter.steps
        if self.settings.measure == "surprise" and tell:
            surprise = self.bundle.normal.surprise(scales, judged, self.positions)
            shown, predicted, scores = judge(surprise, judged, self.settings)
        elif self.settings.measure == "surprise":
            shown, predicted, scores = residual, torch.zeros_like(brain), torch.zeros(len(brain))
        else:
            shown, predicted = measure.anomaly_map(votes, residual, steps), self.counter.predicted.cpu()
            scores = measure.slice_scores(votes, steps, residual.abs(), brain)
        return FrameProjection(
            reconstruction=reconstruction.cpu(), residual=residual, scales=scales, judged=judged, votes=votes,
            anomaly=shown, predicted=predicted,
            lesion=measure.lesion_mask(predicted, predicted.shape[-1], self.settings.component_at_512),
            slice_scores=scores, steps=steps, error_hu=errors, seconds=seconds)

    @staticmethod
    def _set_rate(optimiser, peak, t):
        optimiser.param_groups[0]["lr"] = peak * ramp(t)

    @torch.no_grad()
    def _draw(self):
        for chunk in self.chunks:
            self.image[chunk] = self.bundle.generator.synthesis(self.w_plus[chunk], [m[chunk] for m in self.noise])

    def _residual(self, reconstruction):
        return measure.residual(self.query_hu, reconstruction, self.brain, self.median)

    @torch.no_grad()
    def _vote(self):
        votes = measure.frame_votes(self._residual(decode(self.image)).abs(), self.settings.threshold_hu,
                                    self.positions, self.max_gap_mm)
        self.counter.add(votes)


def residual_scales(query_hu: torch.Tensor, normal_hu: torch.Tensor, residual: torch.Tensor, brain: torch.Tensor,
                    settings: ProjectionSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """What --measure surprise is told of: the residual at both scales [S, 2, N, N], HU, and where, bool [S, N, N].

    query_hu and its closest normal normal_hu, residual (of measure.residual) float32 [S, N, N]; brain bool [S, N, N].
    """
    if settings.filter == "median":
        return normative.scales(query_hu - normal_hu, residual, brain), brain
    soft = normative.soft_brain(query_hu, brain)
    return normative.band_scales(query_hu - normal_hu, soft), soft


def judge(surprise: torch.Tensor, judged: torch.Tensor, settings: ProjectionSettings
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Map [S, N, N], predicted bool [S, N, N] and slice scores [S] of --measure surprise.

    surprise [S, 2, N, N], signed, of normative.Normal; judged bool [S, N, N], of residual_scales.
    """
    shown = normative.combine(surprise, settings.scale, settings.thin)
    if settings.pool == "peak":
        sigma = PEAK_AT_512 * shown.shape[-1] / measure.PAPER_SIZE
        scores = measure.peak_scores(shown, judged, settings.surprise_above, sigma)
    else:
        scores = measure.surprise_scores(shown, judged, settings.surprise_above)
    return shown, shown.abs() > settings.surprise_mask, scores


def perceptual_for(bundle: Bundle, settings: ProjectionSettings, vgg16=None, lpips=None) -> torch.nn.Module:
    """The perceptual distance of the settings on the bundle's device. ValueError when LPIPS lacks its weights."""
    module = build_perceptual(settings.perceptual, bundle.discriminator, settings.pixels, settings.knee, vgg16,
                              lpips)
    return module.to(bundle.generator.input.input.device)
