"""How close generated slices are to real ones: sliced Wasserstein distance, and FID where its network is given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F

from common.weights import load_state
from dataset import SliceDataset
from op import binomial_kernel, upfirdn2d

Item = TypeVar("Item")
MOST_HELD_OUT = 1024                     # held-out slices that a training measures itself on: at 512 pixels 0.5 GB


def sliced_wasserstein(real_hu: torch.Tensor, fake_hu: torch.Tensor, patches: int = 64, patch: int = 7,
                       projections: int = 128, seed: int = 0) -> float:
    """Sliced Wasserstein distance of Laplacian-pyramid patches (Karras et al. 2018, section 5), in HU.

    real_hu, fake_hu [M, N, N], the same number of slices. At each level of the pyramid down to 16 pixels, 7x7
    patches at the same random places in both sets are projected on random unit directions; the distance of the
    sorted projections is averaged over directions and levels. Unlike the published figure, patches are not
    normalised: a wrong brightness counts, and the unit stays HU.
    """
    if real_hu.shape != fake_hu.shape:
        raise ValueError(f"both sets must have the same shape, got {list(real_hu.shape)}, {list(fake_hu.shape)}")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for real, fake in zip(laplacian_pyramid(real_hu), laplacian_pyramid(fake_hu)):
        directions = torch.randn(patch * patch, projections, generator=generator)
        directions /= directions.norm(dim=0)
        size = real.shape[-1] - patch + 1
        places = torch.randint(size * size, (len(real), patches), generator=generator)
        a, b = (_patches(x, places, patch) @ directions for x in (real, fake))
        distances.append((a.sort(0).values - b.sort(0).values).abs().mean())
    return torch.stack(distances).mean().item()


def laplacian_pyramid(hu: torch.Tensor, smallest: int = 16) -> list[torch.Tensor]:
    """[M, N, N] -> band-passed levels [M, N, N], [M, N/2, N/2], ..., and the smallest low-pass level."""
    kernel, levels, x = binomial_kernel((1, 4, 6, 4, 1)), [], hu[:, None].float()
    while x.shape[-1] > smallest:
        low = upfirdn2d(x, kernel, down=2, pad=(2, 2))
        back = upfirdn2d(low, kernel * 4, up=2, pad=(2, 2))
        levels.append((x - back)[:, 0])
        x = low
    return [*levels, x[:, 0]]


def evenly(items: Sequence[Item], most: int) -> list[Item]:
    """Of items at most so many, evenly spaced."""
    count = min(len(items), most)
    return [items[i * len(items) // count] for i in range(count)]


def every_nth(dataset: SliceDataset, n: int) -> list[tuple[str, int]]:
    """Scan and index of every n-th slice of each scan, but of no more than MOST_HELD_OUT, evenly spaced."""
    counts, first, found = {scan["scan_id"]: len(scan["slices"]) for scan in dataset.manifest["scans"]}, 0, []
    for scan_id in dataset.scan_ids:
        found += [(scan_id, index) for index in range(first, first + counts[scan_id], n)]
        first += counts[scan_id]
    return evenly(found, MOST_HELD_OUT)


def every_fourth(dataset: SliceDataset) -> list[int]:
    """Indices of every_nth() for 4."""
    return [index for _, index in every_nth(dataset, 4)]


class Measured:
    """What every_nth() takes of a database, scan by scan. Of the others nothing is read: all ranks wait meanwhile.

    scan_ids  the scans that something is taken of
    scan(s)   dict(hu int16 [M, N, N], brain bool [M, N, N]): what is taken of one of them
    """

    def __init__(self, dataset: SliceDataset, n: int = 1):
        self.dataset, self._taken = dataset, {}
        for scan_id, index in every_nth(dataset, n):
            self._taken.setdefault(scan_id, []).append(index)
        self.scan_ids = list(self._taken)

    def scan(self, s: int) -> dict[str, torch.Tensor]:
        slices = [self.dataset[index] for index in self._taken[self.scan_ids[s]]]
        return {key: torch.stack([one[key] for one in slices]) for key in ("hu", "brain")}


def errors_hu(drawn: torch.Tensor, hu: torch.Tensor, where: torch.Tensor) -> list[torch.Tensor]:
    """Mean absolute difference of drawn and hu [B, N, N] where bool [B, N, N] says, in a list; none if that is nowhere.

    What isn't finite in a drawing counts wherever it is: the training has diverged.
    """
    error = (drawn - hu).abs()
    if not error.isfinite().all():
        return [error.sum()]
    return [error[where].mean()] if where.any() else []


def means(lists: dict[str, list[torch.Tensor]]) -> dict[str, float]:
    """The mean of each list under its name; a name without values is left out, as the mean of nothing is NaN."""
    return {name: torch.stack(values).mean().item() for name, values in lists.items() if values}


def _patches(x: torch.Tensor, places: torch.Tensor, patch: int) -> torch.Tensor:
    """The patches of x [M, N, N] at places [M, P] of the top left corners: [M * P, patch * patch]."""
    columns = x.shape[-1] - patch + 1
    rows, cols = places // columns, places % columns
    offset = torch.arange(patch)
    index = (rows[..., None, None] + offset[:, None]) * x.shape[-1] + cols[..., None, None] + offset   # (M, P, k, k)
    return x.flatten(1).gather(1, index.flatten(1)).reshape(-1, patch * patch)


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet distance of two sets of features [M, D] (Heusel et al. 2017)."""
    mean_a, mean_b = real.double().mean(0), fake.double().mean(0)
    cov_a, cov_b = torch.cov(real.double().t()), torch.cov(fake.double().t())
    # tr sqrt(A B) from the eigenvalues of A B, which are real and not negative but for rounding
    root = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * root).item()


class InceptionFeatures:
    """2048 pooled features of torchvision's Inception v3, from a file with its state dict.

    These are not the weights of the original FID, so figures compare only with one another.
    """

    def __init__(self, weights: Path | str, device: torch.device):
        from torchvision.models import inception_v3
        with torch.random.fork_rng(devices=[]):          # its first weights take nothing from the training's noise maps
            net = inception_v3(weights=None, aux_logits=True, init_weights=False)
        try:
            net.load_state_dict(load_state(weights, "--inception"))
        except RuntimeError as error:
            raise ValueError(f"--inception {weights}: not the state dict of torchvision's inception_v3") from error
        net.fc = torch.nn.Identity()
        self.net, self.device = net.eval().requires_grad_(False).to(device), device

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """images [M, 3, N, N] in [-1, 1] -> [M, 2048]."""
        rows = [self.net(F.interpolate(x.to(self.device), size=299, mode="bilinear", antialias=True)).cpu()
                for x in images.split(32)]
        return torch.cat(rows)
