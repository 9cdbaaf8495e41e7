"""How far a reconstruction is from the query, and how far a code may leave the healthy range.

Perceptual distances: distance(features(x), features(y)) -> [B]; the query's features are computed once.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.weights import load_state
from detect.options import KNEE, PERCEPTUAL


def pixel_distance(query: torch.Tensor, other: torch.Tensor, knee: float = KNEE) -> torch.Tensor:
    """Mean absolute difference [B] of images [B, 3, N, N], rounded off below `knee` (Charbonnier).

    At the least, since the sign of a difference near 0 would amplify the rounding of a batch. With a knee above the
    noise of the images (0.2 is 5 HU in the narrowest window) what is larger than noise leads the search, and not the
    noise's sign at every pixel.
    """
    return (((query.detach() - other).square() + knee**2).sqrt() - knee).mean((1, 2, 3))


class PixelDistance(nn.Module):
    """The pixels' own difference alone: the cheapest distance, and one that noise cannot lead astray."""

    def __init__(self, knee: float = KNEE):
        super().__init__()
        self.knee = knee

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images]

    def distance(self, query: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
        return pixel_distance(query[0], other[0], self.knee)


class DiscriminatorPerceptual(nn.Module):
    """Distance in the features of a trained discriminator: no download, made for head CT.

    Each stage's squared difference is taken relative to the query's mean squared activation there, so that the
    stages weigh alike; stages are averaged. The discriminator's last stage (4x4) is left out: it judges, it does
    not describe. The images' own mean absolute difference, in [-1, 1], is added with weight `pixels`: a discriminator
    listens to noise, which no code can match, and by its features alone a reconstruction may lose the skull.
    """

    def __init__(self, discriminator: nn.Module, pixels: float, knee: float = KNEE):
        super().__init__()
        self.discriminator, self.pixels, self.knee = discriminator.requires_grad_(False), pixels, knee

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [images, *self.discriminator.features(images)[:-1]]

    def distance(self, query: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
        (image, *query), (other_image, *other) = query, other
        total = 0
        for q, o in zip(query, other):
            q, o = q.detach().float(), o.float()
            total = total + (q - o).square().mean((1, 2, 3)) / (q.square().mean((1, 2, 3)) + 1e-8)
        return total / len(query) + self.pixels * pixel_distance(image, other_image, self.knee)


class LpipsPerceptual(nn.Module):
    """LPIPS with VGG16 (Zhang et al. 2018, CVPR): unit-normalised features after five ReLUs, weighted per channel.

    vgg16: file with torchvision's vgg16 state dict. lpips: file with the published linear weights
    (`lin0.model.1.weight` ...); None weighs all channels alike. Images over 256 px are reduced to 256 first.
    """

    STAGES = (3, 8, 15, 22, 29)

    def __init__(self, vgg16: Path | str | None, lpips: Path | str | None = None):
        super().__init__()
        if vgg16 is None or not Path(vgg16).is_file():
            raise ValueError(
                f"--perceptual lpips needs the weights of VGG16: give --vgg16 FILE with torchvision's vgg16 state "
                f"dict (vgg16-397923af.pth), found {vgg16 or 'no flag'}; or use --perceptual discriminator, which "
                "needs none"
            )
        from torchvision.models import vgg16 as build_vgg16
        with torch.device("meta"):                                   # drawing 138 M initial weights takes seconds
            net = build_vgg16(weights=None)
        try:
            net.load_state_dict(load_state(vgg16, "--vgg16"), assign=True)
        except RuntimeError as error:
            raise ValueError(f"--vgg16 {vgg16}: not the state dict of torchvision's vgg16") from error
        self.net = net.features[: self.STAGES[-1] + 1].float().eval().requires_grad_(False)
        for layer in self.net:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.weights = None
        if lpips is not None:
            state = load_state(lpips, "--lpips")
            shapes = {f"lin{i}.model.1.weight": (1, self.net[stage - 1].out_channels, 1, 1)
                      for i, stage in enumerate(self.STAGES)}         # LPIPS of other networks has the same names
            if missing := [f"{name} of shape {list(shape)}" for name, shape in shapes.items()
                           if getattr(state.get(name), "shape", None) != shape]:
                raise ValueError(f"--lpips {lpips}: no {', '.join(missing)}; give the linear weights of LPIPS-VGG")
            self.weights = nn.ParameterList(nn.Parameter(state[name], requires_grad=False) for name in shapes)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        if images.shape[-1] > 256:
            images = F.interpolate(images, size=256, mode="area")
        x, stages = (images - self.shift) / self.scale, []
        for i, layer in enumerate(self.net):
            x = layer(x)
            if i in self.STAGES:
                stages.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10))
        return stages

    def distance(self, query: list[torch.Tensor], other: list[torch.Tensor]) -> torch.Tensor:
        total = 0
        for i, (q, o) in enumerate(zip(query, other)):
            d = (q.detach() - o).square()
            d = d.mean(1) if self.weights is None else (d * self.weights[i]).sum(1)
            total = total + d.mean((1, 2))
        return total


def build_perceptual(kind: str, discriminator: nn.Module, pixels: float, knee: float = KNEE, vgg16=None,
                     lpips=None) -> nn.Module:
    """kind: one of PERCEPTUAL. Raises ValueError naming the flag that is missing."""
    if not knee > 0:
        raise ValueError(f"--knee must be above 0, got {knee:g}")
    if kind == "discriminator":
        return DiscriminatorPerceptual(discriminator, pixels, knee)
    if kind == "lpips":
        return LpipsPerceptual(vgg16, lpips)
    if kind == "pixels":
        return PixelDistance(knee)
    raise ValueError(f"--perceptual must be one of {', '.join(PERCEPTUAL)}, got {kind!r}")


def prior_excess(p: torch.Tensor, p_encoder: torch.Tensor) -> torch.Tensor:
    """Squared distance from the encoder's normalised code, counted only where |p| exceeds the encoder's |p|.

    The code may move towards the normal mean (p = 0) freely, but pays for moving away. Mean over all elements of
    p [S, L, K].
    """
    return ((p - p_encoder).square() * (p.abs() > p_encoder.abs())).mean()
