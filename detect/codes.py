"""The encoder's codes of a database's slices, and their statistics by position: where the published search starts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ct.window import encode
from dataset import SliceDataset
from detect.latent import SLOPE, LatentStats
from detect.options import CodesConfig
from model import Encoder

LEAST_CODES = 32                      # at a position, for a mean and a covariance; more of many components
MAX_REACH_MM = 20.0                   # a position with few codes borrows from no further


def fit_codes(encoder: Encoder, dataset: SliceDataset, config: CodesConfig, batch: int,
              augment: Callable[[torch.Tensor], torch.Tensor]) -> LatentStats:
    """Latent statistics of the database's training slices; batch, augment as of encode_slices."""
    loose = int(np.isnan(dataset.below_vertex_mm).sum())
    if loose == len(dataset):
        raise ValueError(f"{dataset.path}: only loose slices to train on, none with a position: the statistics by "
                         "position need scans")
    if loose:
        print(f"{loose} loose slices without a position are left out of the statistics", flush=True)
    w_plus, below_vertex_mm = encode_slices(encoder, dataset, config.passes, batch, augment)
    latent = fit(w_plus, below_vertex_mm, config, encoder.slope)
    scans = dataset.manifest["counts"]["train"]["scans"]
    print(f"{len(w_plus)} codes of {len(dataset) - loose} slices of {scans} scans; {len(latent.positions_mm)} "
          f"positions, {config.components} components hold {latent.explained().mean():.0%} of the variance", flush=True)
    return latent


@torch.no_grad()
def encode_slices(encoder: Encoder, dataset: SliceDataset, passes: int, batch: int,
                  augment: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes w_plus float32 [passes * M, L, D] of M slices, and their mm below the vertex [passes * M]; on the CPU.

    Loose slices, whose position is unknown, are left out. The first pass takes the slices as they are, because so does
    a projection; the others are augmented: augment(images [B, 3, N, N]).
    """
    device = next(encoder.parameters()).device
    codes, positions = [], []
    known = np.flatnonzero(~np.isnan(dataset.below_vertex_mm)).tolist()
    for number in range(passes):
        for first in range(0, len(known), batch):
            slices = [dataset[i] for i in known[first:first + batch]]
            images = encode(torch.stack([one["hu"] for one in slices]).to(device))
            codes.append(encoder(augment(images) if number else images).cpu())
            positions += [one["below_vertex_mm"] for one in slices]
    return torch.cat(codes), torch.tensor(positions)


def fit(w_plus: torch.Tensor, below_vertex_mm: torch.Tensor, config: CodesConfig, slope: float = SLOPE
        ) -> LatentStats:
    """Statistics at every position that has enough codes within reach; says which have not, and leaves them out.

    Slices there use the nearest position. Raises ValueError naming the flag when no position is left.
    """
    if config.components > w_plus.shape[-1]:
        raise ValueError(f"--components {config.components}: the codes of this encoder have {w_plus.shape[-1]} numbers")
    needed = max(2 * config.components, LEAST_CODES)
    positions = [i * config.spacing_mm for i in range(config.positions)]
    found = [int(((below_vertex_mm - position).abs() <= MAX_REACH_MM).sum()) for position in positions]
    kept = [position for position, codes in zip(positions, found) if codes >= needed]
    for position, codes in zip(positions, found):
        if codes < needed:
            print(f"{position:g} mm below the vertex: left out, {codes} codes within {MAX_REACH_MM:g} mm, {needed} "
                  "needed; slices there use the nearest position")
    if not kept:
        raise ValueError(f"--components {config.components}: needs {needed} codes within {MAX_REACH_MM:g} mm of a "
                         f"position, found {max(found)} at most; lower it, raise --passes, or add healthy scans")
    return LatentStats.fit(w_plus, below_vertex_mm, kept, config.components, config.neighbour_mm, config.passes,
                           slope, min_codes=needed, max_reach_mm=MAX_REACH_MM)
