"""Denoising autoencoder: a U-Net that takes coarse noise off healthy brain takes lesions off, too.

Kascenas, Pugeault and O'Neil, Denoising autoencoders for unsupervised anomaly detection in brain MRI, MIDL 2022.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import distributed
from common.sampler import InfiniteSampler
from common.weights import compact
from config import check_range, option
from dataset import SliceDataset
from detect.fitted import RANGE_HU, Fitted

_MIDDLE, _HALF_RANGE = sum(RANGE_HU) / 2, (RANGE_HU[1] - RANGE_HU[0]) / 2


@dataclass(frozen=True)
class AutoencoderSettings:
    batch: int = option(32, "slices in the network at a time: memory, not results", stored=False)

    def __post_init__(self):
        check_range(self, ("batch",), 1, flags=False)


@dataclass(frozen=True)
class AutoencoderFit:
    width: int = option(32, "channels at half the resolution; doubled with each further halving")
    depth: int = option(3, "how often the resolution is halved further")
    noise_hu: float = option(24.0, "standard deviation of the noise, HU: the paper's 0.2 of the intensity range")
    noise_size: int = option(16, "side of the noise before it is enlarged, pixels")
    steps: int = option(2500, "training steps")
    batch: int = option(16, "slices a step")
    lr: float = option(1e-3, "first rate of Adam; a cosine takes it to 0")
    seed: int = option(0, "of weights, order and noise")

    def __post_init__(self):
        check_range(self, ("width", "depth", "noise_hu", "noise_size", "steps", "batch", "lr"), 0, above=True)
        check_range(self, ("seed",), 0)


def coarse_noise(shape: tuple[int, int, int], coarse: int, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise of `coarse` pixels a side, enlarged to [B, N, N] and shifted at random (Kascenas 2022, 2.1).

    The shift, one for each slice and around the edges, keeps the coarse grid from being learnt.
    """
    small = torch.randn(shape[0], 1, coarse, coarse, generator=generator)
    large = F.interpolate(small, size=shape[1:], mode="bilinear", align_corners=False)[:, 0]
    shifts = torch.randint(shape[-1], (shape[0], 2), generator=generator).tolist()
    return torch.stack([image.roll(shift, (0, 1)) for image, shift in zip(large, shifts)])


class Autoencoder(Fitted):
    """Trained to take coarse noise off the brain of healthy slices, it takes lesions off, too."""

    name, Settings, Fit = "autoencoder", AutoencoderSettings, AutoencoderFit

    def __init__(self, fitting: AutoencoderFit | None = None, settings: AutoencoderSettings | None = None,
                 device: torch.device | str = "cpu"):
        super().__init__(fitting, settings, device)
        self.set_precision(distributed.pick_precision("auto", self.device))
        with torch.random.fork_rng():
            torch.manual_seed(self.fitting.seed)
            self.net = UNet(self.fitting.width, self.fitting.depth)
        self.net.to(self.device, memory_format=torch.channels_last)

    def _fit(self, data: SliceDataset) -> None:
        s = self.fitting
        if data.size % (2 << s.depth):
            raise ValueError(f"{data.path}: slices of {data.size} pixels cannot be halved {s.depth + 1} times; give "
                             "a smaller --depth")
        sampler = InfiniteSampler(len(data), s.seed)
        batches = iter(DataLoader(data, s.batch, sampler=sampler, generator=torch.Generator()))
        optimiser = torch.optim.Adam(self.net.parameters(), lr=s.lr, amsgrad=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, s.steps)
        noise, losses, started = torch.Generator().manual_seed(s.seed), [], time.perf_counter()
        every = max(1, s.steps // 20)
        for step in range(1, s.steps + 1):
            losses.append(self._step(next(batches), optimiser, noise))
            schedule.step()
            if step % every == 0:
                seconds = time.perf_counter() - started
                print(f"autoencoder: step {step}/{s.steps}, error {np.mean(losses):.2f} HU (root of the mean square), "
                      f"{seconds / step * (s.steps - step) / 60:.1f} min left", flush=True)
                losses = []

    def _step(self, batch: dict, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> float:
        """One step on dict(hu, brain); the mean square error counts in the brain alone. Returns its root, HU."""
        clean, brain = batch["hu"].float().clamp(*RANGE_HU), batch["brain"]
        noise = coarse_noise(clean.shape, self.fitting.noise_size, generator) * self.fitting.noise_hu
        clean, noisy, brain = (t.to(self.device) for t in (clean, clean + noise * brain, brain))
        error = ((self._denoised(noisy) - clean) ** 2 * brain).sum() / brain.sum().clamp(min=1)
        optimiser.zero_grad(set_to_none=True)
        (error / _HALF_RANGE**2).backward()
        optimiser.step()
        return error.item() ** 0.5

    def _denoised(self, hu: torch.Tensor) -> torch.Tensor:
        """HU [B, N, N] -> HU."""
        x = ((hu - _MIDDLE) / _HALF_RANGE)[:, None].contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            return self.net(x)[:, 0].float() * _HALF_RANGE + _MIDDLE

    def _draw(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        return torch.cat([self._denoised(part.to(self.device)).cpu() for part in hu.split(self.settings.batch)])

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        return {self.name: compact(self.state(), dtype, self.name)}

    def state(self) -> dict[str, torch.Tensor]:
        return self.net.state_dict()

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.net.load_state_dict(state)


class UNet(nn.Module):
    """[B, 1, N, N] -> [B, 1, N, N]; N a multiple of 2^(depth + 1).

    2 x 2 pixels are folded into channels first: a CPU spends most of its time at the full resolution.
    """

    def __init__(self, width: int, depth: int):
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_convolutions(a, b) for a, b in zip([4, *widths], widths))
        self.narrow = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_convolutions(2 * a, a) for a in widths[:-1])
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, x = [], F.pixel_unshuffle(x, 2)
        for level in self.down[:-1]:
            kept.append(level(x))
            x = F.avg_pool2d(kept[-1], 2)
        x = self.down[-1](x)
        for narrow, level, skip in zip(reversed(self.narrow), reversed(self.up), reversed(kept)):
            x = F.interpolate(narrow(x), scale_factor=2.0)
            x = level(torch.cat([x, skip], 1))
        return F.pixel_shuffle(self.last(x), 2)


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    groups = math.gcd(max(1, outputs // 8), outputs)          # of 8 channels where that divides them
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1), nn.GroupNorm(groups, outputs), nn.SiLU()]
    return nn.Sequential(*layers)
