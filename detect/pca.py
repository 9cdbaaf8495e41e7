"""Principal components by position: what those of healthy slices at the same height cannot draw is anomalous."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from config import check_range, option
from dataset import SliceDataset
from detect.fitted import RANGE_HU, Fitted, NoSettings

OUTSIDE_HU = 30.0               # what is seen outside the brain: bone must not take up the components


@dataclass(frozen=True)
class PcaFit:
    components: int = option(32, "principal components at each height")
    step_mm: float = option(10.0, "a model every so many mm below the vertex, of the slices up to this far away")

    def __post_init__(self):
        check_range(self, ("components",), 1)
        check_range(self, ("step_mm",), 0, above=True)


class PositionPca(Fitted):
    """For each height the mean slice and the components of its neighbours; what they cannot draw is anomalous."""

    name, Settings, Fit = "pca", NoSettings, PcaFit

    def _fit(self, data: SliceDataset) -> None:
        k, step = self.fitting.components, self.fitting.step_mm
        heights = data.below_vertex_mm
        if unknown := int(np.isnan(heights).sum()):
            print(f"pca: {unknown} loose slices without a position are left out", flush=True)
        centres = np.unique(np.rint(heights[~np.isnan(heights)] / step)) * step
        near = [np.flatnonzero(np.abs(heights - c) <= step) for c in centres]
        enough = [i for i, slices in enumerate(near) if len(slices) > k]
        if not enough:
            raise ValueError(f"{data.path}: at most {max(map(len, near))} slices lie within {step:g} mm of one height, "
                             f"too few for {k} components: give more scans, or fewer --components")
        self.centres = torch.from_numpy(centres[enough])
        models = [_components(torch.stack([_brain_alone(**data[int(i)]) for i in near[n]]), k) for n in enough]
        self.mean, self.basis = (torch.stack(part) for part in zip(*models))      # [C, N, N], [C, k, N, N]

    def _draw(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        nearest = (torch.from_numpy(np.ascontiguousarray(below_vertex_mm))[:, None] - self.centres).abs().argmin(1)
        return torch.stack([self._nearest_normal(image, int(c)) for image, c in zip(_brain_alone(hu, brain), nearest)])

    def _nearest_normal(self, image: torch.Tensor, centre: int) -> torch.Tensor:
        basis = self.basis[centre].float().flatten(1)                              # [k, N * N], orthonormal rows
        return self.mean[centre] + ((image - self.mean[centre]).flatten() @ basis.T @ basis).view_as(image)

    def state(self) -> dict[str, torch.Tensor]:
        return {"centres": self.centres, "mean": self.mean, "basis": self.basis.half()}

    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        self.centres, self.mean, self.basis = state["centres"], state["mean"], state["basis"]


def _brain_alone(hu: torch.Tensor, brain: torch.Tensor, **_) -> torch.Tensor:
    return torch.where(brain, hu.float().clamp(*RANGE_HU), OUTSIDE_HU)


def _components(slices: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [N, N] and the first k principal components [k, N, N], orthonormal, of slices [n, N, N] with n > k."""
    mean = slices.mean(0)
    centred = (slices - mean).flatten(1)
    variance, weights = torch.linalg.eigh(centred @ centred.T)                     # n x n: n is less than N * N
    basis = weights[:, -k:].T @ centred / variance[-k:].clamp(min=1e-6).sqrt()[:, None]
    return mean, basis.view(k, *mean.shape)
