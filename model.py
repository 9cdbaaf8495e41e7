"""Generator, discriminator and encoder of CN-StyleGAN (StyleGAN2: Karras et al. 2020, CVPR, arXiv:1912.04958).

Parameter and buffer names are those of the released checkpoint, so that its state dicts load strictly. Images are
[B, 3, N, N] in [-1, 1], the three HU windows of ct/window.py. Every module computes in `compute_dtype` (float32 by
default, bfloat16 where that is fast) with float32 parameters; images, codes and logits go in and out as float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from op.layers import (
    ConvLayer,
    EqualConv2d,
    EqualLinear,
    PixelNorm,
    ResBlock,
    StyledConv,
    ToRGB,
    Upsample,
    minibatch_stddev,
)

CODE_SIDE = 8                # pixels of a code in space
CODE_WIDTH = 128             # channels of the layers between it and the generator's
FIRST_FINE = 5               # the first of the generator's noise maps that no such code reaches: 4, 8, 8, 16, 16, fine


@dataclass(frozen=True)
class ModelConfig:
    """What it takes to rebuild the three networks. The defaults are the paper's at 256."""

    size: int = 256                # image side, a power of two from 16 to 1024
    style_dim: int = 512           # length of z and of each style vector w
    n_mlp: int = 8                 # mapping layers
    lr_mlp: float = 0.01           # learning-rate multiplier of the mapping
    channel_base: int = 16384      # channels at resolution r: min(channel_max, channel_base * channel_multiplier / r)
    channel_multiplier: float = 2
    channel_max: int = 512
    encoder_stddev: bool = False   # minibatch statistic in the encoder: only for imported released checkpoints
    encoder_noise: bool = False    # the encoder predicts the generator's noise maps, too
    noise_channels: bool = False   # and these have a channel for each of their layer's, not one for all
    encoder_masks: bool = False    # the encoder is told what is hidden from it, and what is bone
    encoder_width: float = 1       # the encoder's channels over the generator's
    encoder_code: int = 0          # numbers that its W+ code goes through; 0: one plain layer, as published
    code_channels: int = 0         # of a code in space, CODE_SIDE pixels wide, in place of W+; 0: none, as published
    fold: int = 1                  # 2: the finest layers draw and read 2 x 2 pixels at once, on a grid of half the size

    def __post_init__(self):
        if self.size not in (16, 32, 64, 128, 256, 512, 1024):
            raise ValueError(f"size must be a power of two from 16 to 1024, got {self.size}")
        if self.fold not in (1, 2):
            raise ValueError(f"fold must be 1 or 2, got {self.fold}")
        if not self.encoder_width > 0 or self.encoder_code < 0 or self.code_channels < 0:
            raise ValueError("encoder_width must be above 0, encoder_code and code_channels at least 0, got "
                             f"{self.encoder_width:g}, {self.encoder_code} and {self.code_channels}")

    @property
    def grid(self) -> int:
        """Side of the finest layers' feature maps."""
        return self.size // self.fold

    @property
    def n_latent(self) -> int:
        """Number of style vectors of a W+ code: 16 at 512."""
        return 2 * int(math.log2(self.grid)) - 2

    @property
    def code_shape(self) -> tuple[int, int]:
        """Of a code without its batch: W+'s [L, D], or of a code in space its channels and pixels."""
        return (self.code_channels, CODE_SIDE**2) if self.code_channels else (self.n_latent, self.style_dim)

    @property
    def resolutions(self) -> list[int]:
        return [2**i for i in range(2, int(math.log2(self.grid)) + 1)]

    def channels(self, resolution: int, width: float = 1) -> int:
        full = max(1, min(self.channel_max, int(self.channel_base * self.channel_multiplier) // resolution))
        return max(1, round(full * width))


# ---------------------------------------------------------------------------------------------------------------
# Generator

class ConstantInput(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


MAPPING = "style."           # the names of a generator's weights that random codes alone go through begin so


def has_mapping(weights: Mapping[str, torch.Tensor]) -> bool:
    return any(name.startswith(MAPPING) for name in weights)


def without_mapping(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A generator's weights without those that no code of an encoder goes through: 1 MB at 256 numbers a style."""
    return {name: tensor for name, tensor in weights.items() if not name.startswith(MAPPING)}


class Generator(nn.Module):
    """Mapping network and skip (output-sum) synthesis network."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.compute_dtype = config, torch.float32
        d, ch = config.style_dim, config.channels
        mapping = [EqualLinear(d, d, lr_mul=config.lr_mlp, activate=True) for _ in range(config.n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *mapping)
        self.input = ConstantInput(ch(4))
        self.conv1 = StyledConv(ch(4), ch(4), d)
        self.to_rgb1 = ToRGB(ch(4), d, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        for r in config.resolutions[1:]:
            self.convs += [StyledConv(ch(r // 2), ch(r), d, upsample=True), StyledConv(ch(r), ch(r), d)]
            self.to_rgbs.append(ToRGB(ch(r), d))
        if config.fold > 1:
            self.to_fine = ToRGB(ch(config.grid), d, fold=config.fold)
        for i, r in enumerate(self.noise_sizes):
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, r, r))

    @property
    def noise_sizes(self) -> list[int]:
        """Side of each noise map, in the order of the layers: 4, 8, 8, 16, 16, ..."""
        return [4] + [r for r in self.config.resolutions[1:] for _ in range(2)]

    def noise_maps(self, noise: str | list[torch.Tensor] | None, batch: int = 1) -> list[torch.Tensor | None]:
        """'const': the own buffers; 'random': fresh; None: no noise; or one map [B or 1, 1, r, r] a layer."""
        if isinstance(noise, str):
            buffers = [getattr(self.noises, f"noise_{i}") for i in range(len(self.noise_sizes))]
            if noise == "const":
                return buffers
            if noise == "random":
                return [torch.randn(batch, *b.shape[1:], device=b.device, dtype=self.compute_dtype) for b in buffers]
            raise ValueError(f"noise must be 'const', 'random', None or a list of maps, got {noise!r}")
        if noise is None:
            return [None] * len(self.noise_sizes)
        sides = [(n[0] if isinstance(n, tuple) else n).shape[-1] for n in noise]
        if sides != self.noise_sizes:
            raise ValueError(f"noise maps must have sides {self.noise_sizes}, got {sides}")
        return noise

    def mapping(self, z: torch.Tensor) -> torch.Tensor:
        """z [B, style_dim] -> w [B, style_dim]. ValueError where its weights were left out (without_mapping)."""
        if self.style is None:
            raise ValueError("this generator draws from an encoder's codes: it was kept without its mapping network")
        return self.style(z)

    def mean_latent(self, n: int = 4096, generator: torch.Generator | None = None) -> torch.Tensor:
        """Mean of w over n random z: [1, style_dim], the centre for truncation."""
        z = torch.randn(n, self.config.style_dim, generator=generator)
        with torch.no_grad():
            return self.mapping(z.to(self.input.input.device)).mean(0, keepdim=True)

    def mix_styles(self, w: torch.Tensor, w2: torch.Tensor, crossover: torch.Tensor) -> torch.Tensor:
        """W+ codes [B, L, D] that take w [B, D] before layer crossover[b] and w2 from there on."""
        first = torch.arange(self.config.n_latent, device=w.device)[None] < crossover[:, None]
        return torch.where(first[:, :, None], w[:, None], w2[:, None])

    def synthesis(self, w_plus: torch.Tensor, noise: str | list[torch.Tensor] | None = "random") -> torch.Tensor:
        """w_plus [B, n_latent, style_dim] (or w [B, style_dim] for all layers) -> images [B, 3, N, N], float32."""
        if w_plus.ndim == 2:
            w_plus = w_plus[:, None].expand(-1, self.config.n_latent, -1)
        if w_plus.shape[1:] != (self.config.n_latent, self.config.style_dim):
            raise ValueError(f"w_plus must be [B, {self.config.n_latent}, {self.config.style_dim}], "
                             f"got {list(w_plus.shape)}")
        batch, w = w_plus.shape[0], w_plus.unbind(1)
        maps = self.noise_maps(noise, batch)
        x = self.input.input.to(self.compute_dtype).expand(batch, -1, -1, -1)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.conv1(x, self.conv1.style(w[0]), maps[0])
        image = self.to_rgb1(x, w[1], None)
        for i, to_rgb in enumerate(self.to_rgbs):
            enlarge, conv = self.convs[2 * i:2 * i + 2]
            style = conv.style(w[2 * i + 2])
            x = enlarge(x, enlarge.style(w[2 * i + 1]), maps[2 * i + 1], then=style)
            x = conv(x, style, maps[2 * i + 2], modulated=True)
            image = to_rgb(x, w[2 * i + 3], image)
        return image if self.config.fold == 1 else self.to_fine(x, w[-1], image)

    def forward(self, z: torch.Tensor, truncation_psi: float = 1.0, noise="random") -> torch.Tensor:
        """z [B, style_dim] -> images [B, 3, N, N]; truncation_psi < 1 draws codes towards the mean.

        The mean is over the same random codes each time: a code gives one image.
        """
        w = self.mapping(z)
        if truncation_psi != 1:
            mean = self.mean_latent(generator=torch.Generator().manual_seed(0))
            w = mean + truncation_psi * (w - mean)
        return self.synthesis(w, noise)


# ---------------------------------------------------------------------------------------------------------------
# Discriminator and encoder

class _Trunk(nn.Module):
    """The residual stack that discriminator and encoder share, down to 4x4. inputs: channels of the images."""

    def __init__(self, config: ModelConfig, stddev: bool, width: float = 1, inputs: int = 3):
        super().__init__()
        self.config, self.stddev, self.compute_dtype, self.inputs = config, stddev, torch.float32, inputs
        ch = functools.partial(config.channels, width=width)
        blocks = [ResBlock(ch(r), ch(r // 2)) for r in reversed(config.resolutions[1:])]
        self.convs = nn.Sequential(ConvLayer(inputs * config.fold**2, ch(config.grid), 1), *blocks)
        self.final_conv = ConvLayer(ch(4) + int(stddev), ch(4), 3)

    def stddev_group(self, batch: int) -> int:
        """Images that the minibatch statistic compares at a time: 4 of a multiple of 4, else 3, 2 or, of 1, 5, 7 and 11
        say, 1, which turns it off."""
        return next(g for g in (4, 3, 2, 1) if batch % g == 0)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """images [B, C, N, N] -> the outputs of every stage, [B, C', N, N] down to [B, C', 4, 4], in compute_dtype.

        C is 3, but 5 for an encoder with config.encoder_masks (Encoder.masked).
        """
        n = self.config.size
        if images.shape[1:] != (self.inputs, n, n):
            raise ValueError(f"images must be [B, {self.inputs}, {n}, {n}], got {list(images.shape)}")
        x = F.pixel_unshuffle(images.to(self.compute_dtype), self.config.fold)
        x, stages = x.contiguous(memory_format=torch.channels_last), []
        for block in self.convs:
            x = block(x)
            stages.append(x)
        return stages

    def summary(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """features(images) -> flat features [B, 16 * channels(4)], float32."""
        x = stages[-1]
        if self.stddev:
            x = minibatch_stddev(x, self.stddev_group(x.shape[0]))
        return self.final_conv(x).float().flatten(1)


class Discriminator(_Trunk):
    def __init__(self, config: ModelConfig):
        super().__init__(config, stddev=True)
        c = config.channels(4)
        self.final_linear = nn.Sequential(EqualLinear(c * 16, c, activate=True), EqualLinear(c, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, N, N] -> logits [B, 1]."""
        return self.final_linear(self.summary(self.features(images)))


class NoiseHead(nn.Module):
    """Noise maps from the encoder's stages, coarse to fine, each stage told what the coarser ones saw (a U-Net's way
    up, Ronneberger et al. 2015). What is fine in a head and no two heads share, sulci above all, fits in no code.

    With config.noise_channels a map has as many channels as its layer, and the generator is the way up of a U-Net (GAN
    prior embedded network: Yang et al. 2021, CVPR, arXiv:2105.06070).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        ch = functools.partial(config.channels, width=config.encoder_width)
        self.upsample = Upsample()
        self.mixes = nn.ModuleList(ConvLayer(ch(r // 2) + ch(r), ch(r), 3) for r in config.resolutions[1:])
        self.maps = nn.ModuleList(EqualConv2d(ch(r), 2 * (config.channels(r) if config.noise_channels else 1), 1)
                                  for r in config.resolutions[1:])
        for layer in self.maps:
            nn.init.zeros_(layer.weight)                             # a trained generator starts from its own buffers

    def forward(self, stages: list[torch.Tensor]) -> list[torch.Tensor]:
        """_Trunk.features -> a map [B, 1 or C, r, r] for each of Generator.noise_sizes but the first."""
        x, found = stages[-1], []
        for stage, mix, maps in zip(reversed(stages[:-1]), self.mixes, self.maps):
            x = mix(self.upsample.beside(x, stage))
            found += maps.parts(x, 2)
        return found


class Encoder(_Trunk):
    """Image to W+ code and, with config.encoder_noise, to noise maps.

    With config.encoder_stddev as released: its statistic spans the whole batch, a defect. With config.encoder_masks it
    takes images of 5 channels, those of masked().
    """

    slope = 0.2                        # of the activation that its codes have gone through

    def __init__(self, config: ModelConfig):
        super().__init__(config, config.encoder_stddev, config.encoder_width, 5 if config.encoder_masks else 3)
        features, numbers = config.channels(4, config.encoder_width) * 16, config.n_latent * config.style_dim
        self.final_linear = nn.Linear(features, numbers) if not config.encoder_code else nn.Sequential(
            EqualLinear(features, config.encoder_code, activate=True), nn.Linear(config.encoder_code, numbers))
        if config.encoder_noise:
            self.noise_head = NoiseHead(config)

    def stddev_group(self, batch: int) -> int:
        return batch

    @staticmethod
    def masked(images: torch.Tensor, hidden: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, N, N] without what is hidden, and both masks, bool [B, N, N]: [B, 5, N, N]. Bone stays."""
        hidden = (hidden & ~bone)[:, None]
        return torch.cat([images * ~hidden, hidden.to(images), bone[:, None].to(images)], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3 or 5, N, N] -> w_plus [B, n_latent, style_dim]."""
        return self.code(self.features(images))

    def code(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """features(images) -> w_plus [B, n_latent, style_dim]."""
        w = F.leaky_relu(self.final_linear(self.summary(stages)), self.slope)
        return w.reshape(-1, self.config.n_latent, self.config.style_dim)

    def invert(self, images: torch.Tensor, generator: Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """images [B, 3 or 5, N, N] -> w_plus [B, n_latent, style_dim] and the noise maps that go with it, one a layer.

        These are the generator's own buffers; with config.encoder_noise, what the images call for beside them.
        """
        code, found, own = self._invert(images, generator)
        return code, [own[0], *(more.to(noise.dtype) + noise for more, noise in zip(found, own[1:]))] if found else own

    def redraw(self, images: torch.Tensor, generator: Generator) -> torch.Tensor:
        """generator.synthesis(*invert(images, generator)), though noise maps are added up where they are used."""
        code, found, own = self._invert(images, generator)
        return generator.synthesis(code, [own[0], *zip(found, own[1:])] if found else own)

    def _invert(self, images, generator):
        stages = self.features(images)
        found = self.noise_head(stages) if self.config.encoder_noise else []
        return self.code(stages), found, generator.noise_maps("const")


# ---------------------------------------------------------------------------------------------------------------
# A code in space

class SpatialEncoder(_Trunk):
    """Image to a code in space, [B, code_channels, 8, 8], flat as [B, code_channels, 64].

    What is where in a head is hard to say in one style vector, and easy in a small picture. A variational autoencoder's
    encoder (Kingma and Welling 2014, arXiv:1312.6114), whose decoder SpatialGenerator is.
    """

    slope = 1.0                        # of the activation that its codes have gone through: none

    def __init__(self, config: ModelConfig):
        super().__init__(config, stddev=False, width=config.encoder_width)
        del self.final_conv                                          # of a summary: this code has a place
        stage = functools.partial(config.channels, width=config.encoder_width)
        numbers = config.code_channels
        self.gather = ConvLayer(stage(4) + stage(CODE_SIDE), stage(CODE_SIDE), 3)
        self.to_code = EqualConv2d(stage(CODE_SIDE), 2 * numbers, 1)
        # Codes start with little variance: nothing is learnt from noise alone
        self.code_bias = nn.Parameter(torch.tensor([0.0] * numbers + [-3.0] * numbers)[:, None, None])

    def distribution(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, 3, N, N] -> mean and logarithm of the variance of each's code, [B, code_channels, 64]."""
        *_, middle, deep = self.features(images)
        x = self.gather(torch.cat([F.interpolate(deep.float(), scale_factor=2), middle.float()], 1))
        mean, log_variance = (self.to_code(x) + self.code_bias).flatten(2).chunk(2, 1)
        return mean, log_variance.clamp(-8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, N, N] -> codes [B, code_channels, 64]."""
        return self.distribution(images)[0]

    def invert(self, images: torch.Tensor, generator: Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As Encoder.invert: codes, and the generator's own noise maps."""
        return self(images), generator.noise_maps("const")


class SpatialGenerator(Generator):
    """A generator of codes in space: W+ and what is added to its noise maps of 8 and 16 pixels follow from the code.

    Finer maps are noise. `prior` is what random codes are drawn from.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        width = CODE_WIDTH
        self.read = nn.ModuleList([ConvLayer(config.code_channels, width, 3), ConvLayer(width, width, 3)])
        self.to_w = nn.Sequential(EqualLinear(width * (CODE_SIDE // 2) ** 2, 256, activate=True),
                                  EqualLinear(256, config.n_latent * config.style_dim))
        self.enlarge = nn.ModuleList([ConvLayer(width, width, 3), ConvLayer(width, width, 3)])
        self.maps = nn.ModuleList(EqualConv2d(width, 2 * config.channels(r), 1) for r in (CODE_SIDE, 2 * CODE_SIDE))
        self.fine_noise = nn.Parameter(torch.full((len(self.noise_sizes) - FIRST_FINE,), 0.02))
        self.prior = CodePrior(config.code_channels * CODE_SIDE**2)

    def random_maps(self, batch: int, rng: torch.Generator | None = None) -> list[torch.Tensor]:
        """The own maps, with new noise in those finer than 16 pixels; rng is one of the CPU."""
        maps = list(self.noise_maps("const"))
        for i, strength in enumerate(self.fine_noise, FIRST_FINE):
            noise = torch.randn(batch, *maps[i].shape[1:], generator=rng)
            maps[i] = maps[i] + noise.to(maps[i].device) * strength
        return maps

    def synthesis(self, code: torch.Tensor, noise: str | list[torch.Tensor] | None = "random") -> torch.Tensor:
        """code [B, code_channels, 64] -> images [B, 3, N, N]; noise as in Generator, but 'random' is random_maps()."""
        if code.shape[1:] != self.config.code_shape:
            raise ValueError(f"code must be [B, {self.config.code_shape[0]}, {self.config.code_shape[1]}], "
                             f"got {list(code.shape)}")
        if noise == "random":
            maps = self.random_maps(len(code))
        elif noise is None:
            maps = [torch.zeros_like(own) for own in self.noise_maps("const")]
        else:
            maps = list(self.noise_maps(noise))
        x = self.read[0](code.unflatten(2, (CODE_SIDE, CODE_SIDE)))
        x = self.read[1](x) + x
        w = F.leaky_relu(self.to_w(F.avg_pool2d(x, 2).flatten(1)), 0.2)
        finer = self.enlarge[0](F.interpolate(x, scale_factor=2, mode="bilinear"))
        finer = self.enlarge[1](finer) + finer
        found = [*self.maps[0](x).chunk(2, 1), *self.maps[1](finer).chunk(2, 1)]
        for i, more in enumerate(found, 1):
            maps[i] = maps[i] + more
        return super().synthesis(w.reshape(-1, self.config.n_latent, self.config.style_dim), maps)

    @torch.no_grad()
    def sample(self, count: int, psi: float = 1.0, seed: int = 0) -> torch.Tensor:
        """Images [count, 3, N, N], on the CPU, of random codes; psi below 1 draws these towards the middle of their
        component. The same for the same seed."""
        rng, place = torch.Generator().manual_seed(seed), self.input.input.device
        codes = self.prior.draw(count, rng, psi).reshape(count, *self.config.code_shape).to(place)
        return torch.cat([self.synthesis(part, self.random_maps(len(part), rng)).cpu() for part in codes.split(32)])


class CodePrior(nn.Module):
    """What codes look like: share [K], mean [K, D] and factor [K, D, D] of K normal distributions.

    factor is the Cholesky factor of the covariance. Fitted to the codes of healthy slices after the fact, as for a
    regularised autoencoder (Ghosh et al. 2020, ICLR, arXiv:1903.12436): they are nowhere near the standard normal
    distribution, and a generator that draws from that one leaves what it has learnt from slices behind. gan/prior.py
    fits it.
    """

    def __init__(self, numbers: int, components: int = 6):
        super().__init__()
        self.register_buffer("share", torch.full((components,), 1 / components))
        self.register_buffer("mean", torch.zeros(components, numbers))
        self.register_buffer("factor", torch.eye(numbers).repeat(components, 1, 1))

    @torch.no_grad()
    def draw(self, count: int, rng: torch.Generator, psi: float = 1.0) -> torch.Tensor:
        """New codes [count, D], on the CPU; psi below 1 draws them towards the middle of their component."""
        which = torch.multinomial(self.share.float().cpu(), count, replacement=True, generator=rng)
        deviates = psi * torch.randn(count, self.mean.shape[1], 1, generator=rng)
        return self.mean.float().cpu()[which] + (self.factor.float().cpu()[which] @ deviates)[..., 0]


def build_generator(config: ModelConfig) -> Generator:
    return (SpatialGenerator if config.code_channels else Generator)(config)


def build_encoder(config: ModelConfig) -> Encoder | SpatialEncoder:
    return (SpatialEncoder if config.code_channels else Encoder)(config)


NETWORKS = {"generator": build_generator, "discriminator": Discriminator, "encoder": build_encoder}
