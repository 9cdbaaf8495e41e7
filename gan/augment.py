"""Adaptive discriminator augmentation for head CT.

Karras et al., 'Training Generative Adversarial Networks with Limited Data', NeurIPS 2020 (ADA). The
discriminator sees real and generated images through the same random transforms, each applied with
probability p; p rises while the discriminator's verdict on real images is too sure (overfitting) and falls
otherwise.

What differs from photographs: rotation is small (no quarter turns), what comes in from outside the frame is
air, and brightness, contrast and noise are changes of the HU, so that the three windows keep telling the same
story. All offsets are Gaussian or uniform about zero and a flip has probability p/2, so that while p < 1 the
transforms do not leak into what the generator draws (ADA, section 2.2 and appendix C).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ct.window import WINDOWS_HU, decode, encode

AIR = -1.0            # air in every window
RAMP_HU = 20.0        # intensity changes fade out over this distance from the ends of the widest window


@dataclass(frozen=True)
class AugmentSettings:
    """Strengths of the transforms; 0 turns one off. Lengths are fractions of the image's side."""

    integer_shift: float = 1 / 16        # uniform up to this, rounded to whole pixels, per axis
    scale_std: float = 0.15              # of log2 of the isotropic scale
    rotation_std_deg: float = 10.0       # so that 19 of 20 heads stay within 20 degrees
    aniso_std: float = 0.1               # of log2 of the ratio width : height
    shift_std: float = 0.05              # fractional translation, per axis
    brightness_std_hu: float = 4.0       # of a shift common to the image
    contrast_std: float = 0.1            # of the natural logarithm of the gain
    contrast_pivot_hu: float = 35.0      # the HU a gain leaves alone: between white and grey matter
    noise_std_hu: float = 3.0            # the noise's standard deviation is |N(0, this)|
    cutout: float = 0.5                  # side of the square that becomes air
    windows_hu: tuple[tuple[float, float], ...] = WINDOWS_HU


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors each image [B, ..., W] left to right with probability 1/2."""
    flip = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    return torch.where(flip.to(images.device).view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def random_rotation(images: torch.Tensor, p: float, max_deg: float, generator: torch.Generator) -> torch.Tensor:
    """Turns each image [B, 3, H, W] with probability p by up to max_deg either way; stays within [-1, 1]."""
    on = torch.rand(len(images), generator=generator) < p
    if not on.any():
        return images
    angle = (2 * torch.rand(len(images), generator=generator) - 1) * math.radians(max_deg)
    zero = torch.zeros_like(angle)
    turn = _matrix([[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]]).to(images.device)
    turned = warp(images, turn).clamp(-1, 1)                              # bicubic overshoots at the skull
    return torch.where(on.to(images.device)[:, None, None, None], turned, images)


def augment(images: torch.Tensor, p: float, generator: torch.Generator,
            settings: AugmentSettings = AugmentSettings()) -> torch.Tensor:
    """Each transform of `settings` with probability p to each image; p = 0 returns the images themselves.

    images [B, 3, H, W] in [-1, 1] as made by ct.window.encode; the same shape, type, device and memory format
    come out. Differentiable twice with respect to the images (R1 on augmented images needs it). Randomness
    comes from `generator`, on its own device, which need not be the images'.
    Raises ValueError for p outside [0, 1] or a wrong number of channels.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"augmentation probability: expected 0 to 1, got {p}")
    if images.ndim != 4 or images.shape[1] != len(settings.windows_hu):
        raise ValueError(f"expected images [B, {len(settings.windows_hu)}, H, W], got {list(images.shape)}")
    if p == 0:
        return images
    batch, _, height, width = images.shape
    full = images if images.dtype == torch.float64 else images.float()
    device, draws = images.device.type, generator.device.type
    with torch.autocast(device, enabled=False), torch.autocast(draws, enabled=False):
        forward = _draw_affine(batch, height, width, p, generator, settings)
        intensity = _draw_intensity(batch, height, width, p, generator, settings)
        hole = _draw_hole(batch, height, width, p, generator, settings).to(images.device)
        out = change_intensity(warp(full, forward), *(t.to(full) for t in intensity), settings)
        out = torch.where(hole[:, None], AIR, _clamp_to_range(out, full))
    channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return out.to(images.dtype, memory_format=layout)


def _clamp_to_range(out: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Takes away bicubic overshoot (up to 0.5 at the skull): real images end within [-1, 1].

    A generated image that leaves [-1, 1] keeps its own range: clamped, it would escape the discriminator.
    """
    low, high = images.detach().flatten(2).aminmax(dim=2)             # [B, C]
    return out.clamp(low.clamp(max=-1)[..., None, None], high.clamp(min=1)[..., None, None])


# ---- The transforms

def warp(images: torch.Tensor, forward: torch.Tensor) -> torch.Tensor:
    """Moves images [B, C, H, W] by one affine map each; outside is air.

    forward [B, 3, 3] takes a point (x, y, 1) of the input to its place in the output, in pixels from the
    image's centre, x to the right, y downwards.

    One bicubic resampling for the whole chain: half way between pixels it keeps 97 % of the contrast at half
    the Nyquist frequency, where bilinear keeps 71 %, so CT noise survives. No low-pass: scales stay near 1.
    """
    height, width = images.shape[2:]
    half = torch.tensor([width / 2, height / 2, 1.0], device=forward.device, dtype=forward.dtype)
    # Pixels to grid_sample's [-1, 1]. Without inv()'s test for singular matrices, for which it waits for the GPU.
    to_input = torch.linalg.inv_ex(forward).inverse * half / half[:, None]
    grid = F.affine_grid(to_input[:, :2].to(images), list(images.shape), align_corners=False)
    return _Resampled.apply(images - AIR, grid) + AIR


class _Resampled(torch.autograd.Function):
    """F.grid_sample, bicubic, without a gradient for the grid: linear in the images, so its gradient of any order is
    itself or its transpose. PyTorch has no second one before 2.14, and R1 through an augmentation needs it (Karras et
    al. 2020, NeurIPS, have their own for the same reason).
    """

    @staticmethod
    def forward(ctx, images: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.size = images.shape
        return F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _ResampledTransposed.apply(gradient, *ctx.saved_tensors, ctx.size), None


class _ResampledTransposed(torch.autograd.Function):
    BICUBIC, ZEROS = 2, 0                                             # as ATen counts them

    @staticmethod
    def forward(ctx, gradient: torch.Tensor, grid: torch.Tensor, size: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        unread = gradient.new_empty(()).expand(size)                  # what the grid's gradient would need
        return torch.ops.aten.grid_sampler_2d_backward(
            gradient, unread, grid, _ResampledTransposed.BICUBIC, _ResampledTransposed.ZEROS, False, (True, False))[0]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _Resampled.apply(gradient, *ctx.saved_tensors), None, None


def change_intensity(images: torch.Tensor, gain: torch.Tensor, shift_hu: torch.Tensor, noise_hu: torch.Tensor,
                     settings: AugmentSettings = AugmentSettings()) -> torch.Tensor:
    """HU -> pivot + gain (HU - pivot) + shift + noise, seen through all windows.

    images [B, 3, H, W]; gain and shift_hu [B]; noise_hu broadcasts to [B, H, W].
    The HU is read from the widest window, which must contain the others, and each window gets the difference
    of the two encodings. So a real image stays exactly what ct.window.encode makes of some HU, and where a
    generated image's windows contradict each other or leave [-1, 1], they do so afterwards, for the
    discriminator to see. What the widest window has clipped (air, bone) is unknown and stays as it is.
    """
    low, high = max(settings.windows_hu, key=lambda window: window[1] - window[0])
    widest = images[:, settings.windows_hu.index((low, high))]
    hu = low + (widest.clamp(-1, 1) + 1) * ((high - low) / 2)
    known = (torch.minimum(hu - low, high - hu) / RAMP_HU).clamp(0, 1)
    gain, shift_hu = gain[:, None, None], shift_hu[:, None, None]
    change = (gain - 1) * (hu - settings.contrast_pivot_hu) + shift_hu + noise_hu
    before, after = (_encode(t, settings.windows_hu) for t in (hu, hu + known * change))
    return images + (after - before)


def _encode(hu: torch.Tensor, windows_hu: tuple[tuple[float, float], ...]) -> torch.Tensor:
    return torch.stack([(2 * (hu - low) / (high - low) - 1).clamp(-1, 1) for low, high in windows_hu], dim=1)


# ---- The draws, on the generator's device, in float32

def _draw_affine(batch: int, height: int, width: int, p: float, generator: torch.Generator,
                 settings: AugmentSettings) -> torch.Tensor:
    """Flip, whole-pixel shift, scale, rotation, width-to-height ratio, fractional shift: one [B, 3, 3]."""
    device = generator.device
    on = (torch.rand(6, batch, generator=generator, device=device) < p).float()
    uniform = 2 * torch.rand(3, batch, generator=generator, device=device) - 1
    normal = torch.randn(5, batch, generator=generator, device=device)
    side = torch.tensor([[width], [height]], device=device)

    mirror = 1 - 2 * on[0] * (uniform[0] < 0)
    whole = on[1] * torch.round(uniform[1:] * settings.integer_shift * side)                   # [2, B]
    scale = torch.exp2(on[2] * normal[0] * settings.scale_std)
    angle = on[3] * normal[1] * math.radians(settings.rotation_std_deg)
    ratio = torch.exp2(on[4] * normal[2] * settings.aniso_std / 2)
    shift = on[5] * normal[3:] * settings.shift_std * side                                     # [2, B]

    one, zero = torch.ones_like(mirror), torch.zeros_like(mirror)
    first = _matrix([[mirror, zero, whole[0]], [zero, one, whole[1]]])
    cos, sin = scale * angle.cos(), scale * angle.sin()
    turn = _matrix([[cos, -sin, zero], [sin, cos, zero]])
    last = _matrix([[ratio, zero, shift[0]], [zero, 1 / ratio, shift[1]]])
    return last @ turn @ first


def _matrix(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Two rows of [B] entries, and the row 0 0 1, as [B, 3, 3]."""
    zero = torch.zeros_like(rows[0][0])
    return torch.stack([torch.stack(row, dim=-1) for row in (*rows, [zero, zero, zero + 1])], dim=-2)


def _draw_intensity(batch: int, height: int, width: int, p: float, generator: torch.Generator,
                    settings: AugmentSettings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gain [B], shift in HU [B] and noise in HU [B, H, W]."""
    device = generator.device
    on = (torch.rand(3, batch, generator=generator, device=device) < p).float()
    normal = torch.randn(3, batch, generator=generator, device=device)
    noise = torch.randn(batch, height, width, generator=generator, device=device)
    noise_std = on[2] * normal[2].abs() * settings.noise_std_hu
    gain = torch.exp(on[0] * normal[0] * settings.contrast_std)
    return gain, on[1] * normal[1] * settings.brightness_std_hu, noise_std[:, None, None] * noise


def _draw_hole(batch: int, height: int, width: int, p: float, generator: torch.Generator,
               settings: AugmentSettings) -> torch.Tensor:
    """bool [B, H, W]: a square (of the frame's proportions) about a uniform centre, cut off at the frame."""
    device = generator.device
    on = torch.rand(batch, generator=generator, device=device) < p
    centre = torch.rand(2, batch, generator=generator, device=device)
    row = (torch.arange(height, device=device) + 0.5) / height
    column = (torch.arange(width, device=device) + 0.5) / width
    rows = (row - centre[0, :, None]).abs() < settings.cutout / 2
    columns = (column - centre[1, :, None]).abs() < settings.cutout / 2
    return on[:, None, None] & rows[:, :, None] & columns[:, None, :]


# ---- The adaptive probability

class AdaptiveAugment:
    """augment() with a p steered by how sure the discriminator is of real images (ADA, section 3.1).

    Every `interval` discriminator steps, r_t = E[sign(D(real))] over the logits since the last time moves p: up
    if r_t > target, down if r_t < target, by images seen / (1000 speed_kimg), so that p needs speed_kimg
    thousand images from 0 to 1. It ends at p_max: the nearer to 1, as published, the more of the transforms leaks into
    what is drawn (section 2.2). In the loop, for each discriminator step, on every rank:

        ada.observe(real_logits)                       # for each micro-batch
        ada.step(distributed.all_reduce_sum)
    """

    def __init__(self, target: float = 0.6, speed_kimg: float = 500, interval: int = 4, p_max: float = 0.85,
                 settings: AugmentSettings = AugmentSettings()):
        self.target, self.speed_kimg, self.interval, self.p_max = target, speed_kimg, interval, p_max
        self.settings = settings
        self.p = 0.0
        self.r_t = 0.0                       # of the last full interval, for the log
        self.steps = 0                       # discriminator steps since then
        self.signs = torch.zeros(2)          # sum of signs and number of logits since then

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return augment(images, self.p, generator, self.settings)

    def observe(self, real_logits: torch.Tensor) -> None:
        """Counts the signs of D(augmented real images), any shape; stays on the logits' device."""
        signs = real_logits.detach().sign().float().sum()
        count = torch.full_like(signs, real_logits.numel())
        self.signs = self.signs.to(signs.device) + torch.stack([signs, count])

    def step(self, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda total: total) -> None:
        """Ends a discriminator step; at an interval's end moves p. Raises ValueError if none was observed."""
        self.steps += 1
        if self.steps < self.interval:
            return
        signs, count = all_reduce_sum(self.signs).tolist()
        if count == 0:
            raise ValueError("AdaptiveAugment.step: no real logits were given to observe() in this interval")
        self.r_t = signs / count
        direction = (self.r_t > self.target) - (self.r_t < self.target)
        self.p = min(max(self.p + direction * count / (1000 * self.speed_kimg), 0.0), self.p_max)
        self.steps, self.signs = 0, torch.zeros_like(self.signs)

    def state_dict(self, all_reduce_sum: Callable[[torch.Tensor], torch.Tensor] = lambda total: total
                   ) -> dict[str, float | int | list[float]]:
        """JSON-able, the same on every rank: the running sums are those of all ranks."""
        return {"p": self.p, "r_t": self.r_t, "steps": self.steps, "signs": all_reduce_sum(self.signs).tolist()}

    def load_state_dict(self, state: dict[str, float | int | list[float]], main: bool = True) -> None:
        """main: one rank, of however many, takes the running sums; the others begin theirs at 0."""
        self.p, self.r_t, self.steps = state["p"], state["r_t"], state["steps"]
        self.signs = torch.tensor(state["signs"] if main else [0, 0], dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------------
# What an encoder's input goes through: it is to draw what was there before

SOFT_TISSUE_HU = (-5.0, 95.0)     # what a lesion may change: not air, fat or bone


def erase(images: torch.Tensor, p: float, rng: torch.Generator) -> torch.Tensor:
    """Random erasing (Zhong et al. 2020): with probability p a rectangle of 2-33 % of the area, sides up to 3.3:1,
    is set to 0, the middle of every window. images [B, 3, N, N]."""
    batch, _, height, width = images.shape
    on, area, aspect, y, x = torch.rand(5, batch, generator=rng)
    area = 0.02 + 0.31 * area
    aspect = torch.exp((2 * aspect - 1) * math.log(3.3))
    half_h = (area * aspect).sqrt().clamp(max=1) / 2
    half_w = (area / aspect).sqrt().clamp(max=1) / 2
    rows, cols = (torch.arange(n).add(0.5) / n for n in (height, width))
    inside_y = (rows - (half_h + y * (1 - 2 * half_h))[:, None]).abs() < half_h[:, None]
    inside_x = (cols - (half_w + x * (1 - 2 * half_w))[:, None]).abs() < half_w[:, None]
    hole = (on < p)[:, None, None] & inside_y[:, :, None] & inside_x[:, None, :]
    return images.masked_fill(hole[:, None].to(images.device), 0)


def coarse_noise(images: torch.Tensor, p: float, rng: torch.Generator) -> torch.Tensor:
    """With probability p, smooth random blobs added to the soft tissue of images [B, 3, N, N] (Kascenas et al. 2022).

    Normal noise on a grid of 4 to 16 cells a side, drawn up to the image's size; what is under a random level is
    cut off, so that some images get a few blobs and others unrest all over; scaled to 5 to 50 HU of deviation. Air and
    bone, which no lesion of the brain changes, stay as they are.
    """
    if p <= 0:
        return images
    batch, size = len(images), images.shape[-1]
    on, level, amplitude = torch.rand(3, batch, 1, 1, generator=rng)
    cells = int(torch.randint(4, 17, (), generator=rng))
    noise = F.interpolate(torch.randn(batch, 1, cells, cells, generator=rng), size=size, mode="bicubic")[:, 0]
    noise = noise.sign() * (noise.abs() - 2 * level).clamp(min=0) * (5 + 45 * amplitude.square()) * (on < p)
    hu = decode(images)
    tissue = (hu > SOFT_TISSUE_HU[0]) & (hu < SOFT_TISSUE_HU[1])
    return encode(hu + noise.to(images.device) * tissue).to(images.dtype)
