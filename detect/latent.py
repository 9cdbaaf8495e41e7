"""Latent statistics of healthy slices by position below the vertex: the coordinates p of the projection.

Lee et al., Nature Communications 13:4251 (2022): the encoder's codes of healthy slices are taken back before
their last activation (leaky_5, the inverse of leaky_0.2) and described by a mean and principal components for
each position and style layer. A code becomes

    p = (leaky_5(w) - mean) @ components / sqrt(variance)
    w = leaky_0.2(mean + (p * sqrt(variance)) @ components^T)

so that each number of p has variance 1 over healthy slices. Codes that have gone through no activation (a code in
space, model.SpatialEncoder) are taken as they are: slope 1 in the place of 0.2. The paper keeps all 512 components.
With few healthy scans most of those are noise, so here K of D may be kept; the D - K directions left then share one
variance (probabilistic PCA, Tipping and Bishop 1999), and p = [c, r] has K + D numbers a layer:

    c = U^T x / sqrt(variance)      r = (I - U U^T) x / sqrt(remainder_variance)      x = leaky_5(w) - mean

No D x D matrix is formed for K < D. With K = D, p = c, the paper's formula; the variances of a fit are shrunk even
then (LatentStats.fit), those of the released file are as they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import torch.nn.functional as F

SLOPE = 0.2                      # of the encoder's last leaky ReLU, as published
RELEASED_SPACING_MM = 5.0        # the released statistics go by slice number, 0 at the vertex
VARIANCE_FLOOR = 1e-4            # of a layer's average variance: keeps p finite along directions never seen
MEND = "fetch the file again, or fit the statistics anew (latent_stats.py)"
ORTHONORMAL = 1e-2               # so far components' overlap may be from the identity: float16 leaves 5e-4


@dataclass(frozen=True)
class SliceStats:
    """Statistics for S slices, gathered once and used at every step of a projection.

    mean [S, L, D], components [S, L, D, K] (columns are directions), std [S, L, K], remainder_std [S, L, 1]; slope of
    the activation that the codes have gone through, 1 for none
    """

    mean: torch.Tensor
    components: torch.Tensor
    std: torch.Tensor
    remainder_std: torch.Tensor
    slope: float = SLOPE

    @property
    def p_dim(self) -> int:
        """Numbers a layer in p: D for a full set of components, K + D otherwise."""
        dim, kept = self.components.shape[-2:]
        return dim if kept == dim else kept + dim

    def to_p(self, w_plus: torch.Tensor) -> torch.Tensor:
        """Codes w_plus [S, L, D] to p float32 [S, L, p_dim]. Differentiable; never in reduced precision."""
        self._check(w_plus, self.mean.shape[-1], "w_plus")
        with torch.autocast(w_plus.device.type, enabled=False):
            x = F.leaky_relu(w_plus.float(), 1 / self.slope) - self.mean
            along = self._project(x)
            if self._full:
                return along / self.std
            rest = x - self._expand(along)
            return torch.cat([along / self.std, rest / self.remainder_std], dim=-1)

    def to_w(self, p: torch.Tensor) -> torch.Tensor:
        """p [S, L, p_dim] to codes w_plus float32 [S, L, D]; the inverse of to_p. Differentiable."""
        self._check(p, self.p_dim, "p")
        with torch.autocast(p.device.type, enabled=False):
            p = p.float()
            kept = self.std.shape[-1]
            along = p[..., :kept] * self.std
            if self._full:
                x = self._expand(along)
            else:
                rest = p[..., kept:] * self.remainder_std
                x = rest + self._expand(along - self._project(rest))       # U a + (I - U U^T) r
            return F.leaky_relu(self.mean + x, self.slope)

    @property
    def _full(self) -> bool:
        return self.components.shape[-1] == self.components.shape[-2]

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("sld,sldk->slk", x, self.components)

    def _expand(self, along: torch.Tensor) -> torch.Tensor:
        return torch.einsum("slk,sldk->sld", along, self.components)

    def _check(self, codes: torch.Tensor, last: int, name: str) -> None:
        expected = (*self.mean.shape[:2], last)
        if tuple(codes.shape) != expected:
            raise ValueError(f"{name}: these statistics expect {list(expected)}, got {list(codes.shape)}")


@dataclass(frozen=True)
class LatentStats:
    """Latent statistics at P positions, for L style layers of D numbers, K components kept; float32.

    positions_mm       [P], mm below the vertex, bin centres, increasing; 0 is the vertex
    mean               [P, L, D], of leaky_5(w)
    components         [P, L, D, K], orthonormal columns, by falling variance (an imported set: in the order it has)
    variance           [P, L, K], along the components, after shrinkage
    remainder_variance [P, L], of each of the D - K directions left; 0 for K = D
    n_codes            [P] int64, codes used; 0 where not known (imported)
    reach_mm           [P], how far from the position codes were taken; more than asked for where borrowed
    shrinkage          [P, L], share of the average variance in every variance
    slope              float32 [], of the activation that the codes have gone through; 1 for none

    Raises ValueError for shapes that do not fit together, numbers that are not finite, variances that are not above 0,
    and components that are no basis: p and back would be another code.
    """

    positions_mm: torch.Tensor
    mean: torch.Tensor
    components: torch.Tensor
    variance: torch.Tensor
    remainder_variance: torch.Tensor
    n_codes: torch.Tensor
    reach_mm: torch.Tensor
    shrinkage: torch.Tensor
    slope: torch.Tensor = field(default_factory=lambda: torch.tensor(SLOPE))

    def __post_init__(self):
        if self.components.ndim != 4:
            raise ValueError(f"components: expected [P, L, D, K], got {list(self.components.shape)}")
        P, L, D, K = self.components.shape
        expected = dict(positions_mm=(P,), mean=(P, L, D), variance=(P, L, K), remainder_variance=(P, L),
                        n_codes=(P,), reach_mm=(P,), shrinkage=(P, L), slope=())
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name}: expected {list(shape)} beside components {[P, L, D, K]}, "
                                 f"got {list(found)}")
        if not 1 <= K <= D:
            raise ValueError(f"components: between 1 and {D} can be kept of codes of {D} numbers, got {K}")
        if odd := [f.name for f in fields(self) if not getattr(self, f.name).isfinite().all()]:
            raise ValueError(f"{', '.join(odd)}: every number must be finite; {MEND}")
        if not (self.positions_mm.diff() > 0).all():
            raise ValueError("positions_mm: must increase, from the vertex down")
        spread = [self.variance] if K == D else [self.variance, self.remainder_variance]
        if not all((torch.isfinite(v) & (v > 0)).all() for v in spread):
            raise ValueError("variance: every variance must be finite and above 0, or p is not defined; "
                             "fit the statistics on more codes, or keep fewer components")
        if not 0 < float(self.slope) <= 1:
            raise ValueError(f"slope: expected one above 0, at most 1, got {float(self.slope):g}")
        _check_orthonormal(self.components)

    # ------------------------------------------------------------------ use

    def at(self, below_vertex_mm: torch.Tensor | np.ndarray | Sequence[float]) -> SliceStats:
        """The statistics of the nearest position for slices at below_vertex_mm [S]; clamped at both ends."""
        mm = torch.as_tensor(below_vertex_mm, dtype=torch.float32, device=self.positions_mm.device)
        if mm.ndim != 1 or not torch.isfinite(mm).all():
            raise ValueError(f"below_vertex_mm: expected finite millimetres [S], got {mm.tolist()}")
        nearest = (mm[:, None] - self.positions_mm).abs().argmin(dim=1)
        return SliceStats(self.mean[nearest], self.components[nearest], self.variance[nearest].sqrt(),
                          self.remainder_variance[nearest, :, None].sqrt(), float(self.slope))

    def explained(self) -> torch.Tensor:
        """Share of the total variance along the kept components, [P, L]."""
        dim, kept = self.components.shape[-2:]
        total = self.variance.sum(dim=-1)
        return total / (total + (dim - kept) * self.remainder_variance)

    def to(self, device: torch.device | str) -> LatentStats:
        """The same statistics on another device."""
        return LatentStats(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    # ------------------------------------------------------------------ make

    @classmethod
    def fit(cls, w_plus: torch.Tensor, below_vertex_mm: torch.Tensor, positions_mm: Sequence[float],
            components: int,                        # kept of the D of a full set
            neighbour_mm: float = 7.5,              # positions f-1, f, f+1 when these are 5 mm apart
            passes: int = 1,                        # augmented copies of each slice among the codes
            slope: float = SLOPE,                   # of the activation that the codes have gone through; 1: none
            *,
            min_codes: int,                         # at a position, more than components
            max_reach_mm: float,                    # borrow no further
            ) -> LatentStats:
        """Statistics of the codes w_plus [M, L, D] of healthy slices at below_vertex_mm [M].

        A position uses every code within neighbour_mm. One with fewer than min_codes borrows: it takes its
        min_codes nearest codes instead, and says how far it went in reach_mm. Variances are drawn towards the
        layer's average by the share `shrinkage`, which OAS (Chen et al. 2010) sets from the number of slices,
        copies counted once. Raises ValueError where there are too few codes within max_reach_mm.
        """
        if w_plus.ndim != 3 or tuple(below_vertex_mm.shape) != (len(w_plus),):
            raise ValueError(f"w_plus: expected codes [M, L, D] and positions [M], got {list(w_plus.shape)} "
                             f"and {list(below_vertex_mm.shape)}")
        if not torch.isfinite(w_plus).all():
            raise ValueError("w_plus: codes must be finite; the encoder has diverged")
        if not 1 <= components <= w_plus.shape[-1]:
            raise ValueError(f"components: expected 1 to {w_plus.shape[-1]}, got {components}")
        if min_codes <= components:
            raise ValueError(f"min_codes: {components} components need more codes than that, got {min_codes}")

        positions = torch.as_tensor(positions_mm, dtype=torch.float32, device=w_plus.device)
        x = F.leaky_relu(w_plus.float(), 1 / slope)
        mm = below_vertex_mm.to(x)
        rows = []
        for position in positions:
            chosen, reach = _nearby(mm, float(position), neighbour_mm, min_codes, max_reach_mm)
            spectrum = _principal(x[chosen].transpose(0, 1), components)
            n = int(chosen.sum())
            rows.append((*spectrum.shrunk(n / passes), torch.tensor(n), torch.tensor(reach)))
        mean, basis, variance, remainder, share, n_codes, reach = (torch.stack(c) for c in zip(*rows))
        return cls(positions, mean, basis, variance, remainder, n_codes.to(x.device), reach.to(x), share,
                   torch.tensor(slope, device=x.device))

    @classmethod
    def from_released(cls, arrays: Mapping[str, np.ndarray]) -> LatentStats:
        """The paper's own: mean [P, L, D], pca_components [P, L, D, D], pca_explained_variance [P, L, D].

        Slice number f becomes 5 f mm below the vertex. The paper's formula multiplies by pca_components from
        the right, so its COLUMNS act as directions, while scikit-learn's components_ are rows. They are used
        as stored: the matrix is orthogonal either way, so the map is invertible, and p is what the formula
        says. `std` is in the file but in no formula, and is left out. Raises ValueError on missing or
        misshapen arrays, and as LatentStats.
        """
        wanted = ("mean", "pca_components", "pca_explained_variance")
        missing = [name for name in wanted if name not in arrays]
        if missing:
            raise ValueError(f"latent statistics: no {', '.join(missing)}; the file holds {sorted(arrays)}")
        mean, components, variance = (torch.from_numpy(np.array(arrays[n], dtype=np.float32)) for n in wanted)
        if components.ndim != 4 or components.shape[-1] != components.shape[-2]:
            raise ValueError(f"pca_components: expected [P, L, D, D], got {list(components.shape)}")
        P, L = components.shape[:2]
        positions = RELEASED_SPACING_MM * torch.arange(P, dtype=torch.float32)
        return cls(positions, mean, components, variance, remainder_variance=torch.zeros(P, L),
                   n_codes=torch.zeros(P, dtype=torch.int64),
                   reach_mm=torch.full((P,), 1.5 * RELEASED_SPACING_MM), shrinkage=torch.zeros(P, L))

    # ------------------------------------------------------------------ store

    def to_tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
        """A flat dict for safetensors: components (entries within [-1, 1]) in dtype, the rest in float32.

        In float16 a full set (K = D) comes back orthonormal to 1e-4 only, so w to p and back is exact to about
        1e-3; a reduced one is made orthonormal again by from_tensors.
        """
        tensors = {f.name: getattr(self, f.name).detach().cpu() for f in fields(self)}
        tensors["components"] = tensors["components"].to(dtype)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> LatentStats:
        """Back from to_tensors. Raises ValueError on missing tensors, and as LatentStats.

        Statistics made before there was a slope are of SLOPE.
        """
        tensors = {"slope": torch.tensor(SLOPE)} | dict(tensors)
        missing = [f.name for f in fields(cls) if f.name not in tensors]
        if missing:
            raise ValueError(f"latent statistics: no {', '.join(missing)}")
        values = {f.name: tensors[f.name] for f in fields(cls)}
        stored = values["components"]
        values["components"] = stored.float()
        if stored.dtype != torch.float32 and stored.ndim == 4 and stored.shape[-1] < stored.shape[-2]:
            _check_orthonormal(stored.float())              # the step would take any column's length for the fault
            values["components"] = _nearest_orthonormal(stored.float())
        return cls(**values)


@dataclass(frozen=True)
class _Spectrum:
    mean: torch.Tensor           # [L, D]
    basis: torch.Tensor          # [L, D, K]
    variance: torch.Tensor       # [L, K], of the sample
    total: torch.Tensor          # [L], trace of the sample covariance S
    squares: torch.Tensor        # [L], trace of S^2

    def shrunk(self, n: float) -> tuple[torch.Tensor, ...]:
        """(mean, basis, variance, remainder variance, share) with variances drawn towards their average."""
        dim, kept = self.basis.shape[-2:]
        average = self.total / dim
        share = self._oas(n)
        floor = (VARIANCE_FLOOR * average).clamp(min=1e-12)
        variance = torch.lerp(self.variance, average[:, None], share[:, None]).maximum(floor[:, None])
        if kept == dim:
            return self.mean, self.basis, variance, torch.zeros_like(average), share
        rest = (self.total - self.variance.sum(dim=-1)).clamp(min=0) / (dim - kept)
        return self.mean, self.basis, variance, torch.lerp(rest, average, share).maximum(floor), share

    def _oas(self, n: float) -> torch.Tensor:
        # Chen, Wiesel, Eldar and Hero, 'Shrinkage Algorithms for MMSE Covariance Estimation' (2010), eq. 23.
        dim = self.basis.shape[-2]
        spread = self.squares - self.total**2 / dim
        rho = ((1 - 2 / dim) * self.squares + self.total**2) / ((n + 1 - 2 / dim) * spread)
        return torch.where(spread > 0, rho, 1.0).clamp(0, 1)


def _nearby(mm: torch.Tensor, position: float, neighbour_mm: float, min_codes: int,
            max_reach_mm: float) -> tuple[torch.Tensor, float]:
    """Which codes [M] a position uses, and how far away the farthest may be, in mm."""
    distance = (mm - position).abs()
    reach = neighbour_mm
    if int((distance <= reach).sum()) < min_codes:
        near = int((distance <= max_reach_mm).sum())
        if near < min_codes:
            raise ValueError(f"position {position:g} mm below the vertex: {near} codes within "
                             f"{max_reach_mm:g} mm, {min_codes} needed. Keep fewer components, add healthy "
                             "scans that reach there, or leave the position out (its slices use the nearest)")
        reach = float(distance.sort().values[min_codes - 1])
    return distance <= reach, reach


def _principal(x: torch.Tensor, components: int) -> _Spectrum:
    """Leading principal components of x [L, n, D], n > components, layer by layer."""
    n, dim = x.shape[1:]
    mean = x.mean(dim=1)
    centred = x - mean[:, None]
    if n > dim:
        centred = torch.linalg.qr(centred, mode="r").R         # same singular values and directions, D rows
    _, singular, rows = torch.linalg.svd(centred, full_matrices=False)
    variance = singular**2 / (n - 1)
    return _Spectrum(mean, rows[:, :components].transpose(1, 2).contiguous(), variance[:, :components],
                     variance.sum(dim=-1), (variance**2).sum(dim=-1))


def _check_orthonormal(components: torch.Tensor) -> None:
    """ValueError unless the columns of components [P, L, D, K] are orthonormal to ORTHONORMAL, NaN included."""
    identity = torch.eye(components.shape[-1], device=components.device)
    for p, bases in enumerate(components):               # one position at a time: overlaps take up to as much memory
        away = (bases.transpose(-1, -2) @ bases - identity).abs().amax((-2, -1))
        if not (away <= ORTHONORMAL).all():
            layer = int((~(away <= ORTHONORMAL)).nonzero()[0])
            raise ValueError(f"components: expected orthonormal columns, but at position {p}, layer {layer} their "
                             f"products are up to {float(away[layer]):.2g} away from those of such columns; {MEND}")


def _nearest_orthonormal(basis: torch.Tensor) -> torch.Tensor:
    # Half precision leaves columns orthonormal to 1e-4 only, and c and r would then leak into each
    # other. One Newton step towards the polar factor squares that error.
    overlap = basis.transpose(-1, -2) @ basis
    return 1.5 * basis - 0.5 * basis @ overlap
