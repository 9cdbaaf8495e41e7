"""The closest normal slice by any method: the interface of all methods, and the methods by name.

A new method is one file with a Reconstructor in it and one entry in METHODS; calibration, projection, comparison and
bundles then know it.
"""

from __future__ import annotations

import copy
import importlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

METHODS = {
    "inpainting": ("detect.inpainting", "Inpainting"),
    "inversion": ("detect.inversion", "Inversion"),
    "search": ("detect.search", "Search"),
    "autoencoder": ("detect.autoencoder", "Autoencoder"),
    "pca": ("detect.pca", "PositionPca"),
    "healthygan": ("healthygan.reconstruct", "Translator"),
}

# watch(query_hu, normal_hu), float [S, N, N]: called with the reconstruction at every step of a method that has steps,
# and with the only one otherwise. Returns what is predicted anomalous so far, bool [S, N, N]
Watch = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """S slices and their closest normal ones, on the CPU.

    query_hu     float32 [S, N, N], HU: the slices as the method sees them: what it cannot see is no anomaly
    normal_hu    float32 [S, N, N], HU
    error_hu     mean absolute difference in the brain, HU, after each stage of the method, in order
    seconds      by stage
    expected_hu  float32 [S, N, N], HU: what the slices are judged against where that is not normal_hu; None: normal_hu
    read         float32 [S, 2, N, N]: a reader's log odds less their median in the slice (Reader.read): channel 0 above
                 0 where too dense, channel 1 below 0 where not dense enough; None without a reader
    drawn_hu     float32 [S, N, N], HU: the normal before texture was copied into it, as the noise stage of the search
                 does; None: normal_hu

    Raises ValueError where the slices, or what was drawn or read, are not finite: nothing is surprising about NaN, and
    the scan would pass for healthy.
    """

    query_hu: torch.Tensor
    normal_hu: torch.Tensor
    error_hu: dict[str, float]
    seconds: dict[str, float]
    expected_hu: torch.Tensor | None = None
    read: torch.Tensor | None = None
    drawn_hu: torch.Tensor | None = None

    def __post_init__(self):
        if not self.query_hu.isfinite().all():
            raise ValueError("closest normal: the slices hold values that are no numbers; give HU")
        for name in ("normal_hu", "expected_hu", "read", "drawn_hu"):
            values = getattr(self, name)
            if values is not None and not values.isfinite().all():
                raise ValueError(f"closest normal: {name} is not finite: the networks cannot draw this scan; try "
                                 "--precision fp32")

    @property
    def difference_hu(self) -> torch.Tensor:
        """What a measure judges, float32 [S, N, N], HU: the slices less what is expected."""
        return self.query_hu - (self.normal_hu if self.expected_hu is None else self.expected_hu)

    @property
    def error(self) -> float:
        """How close the normal comes, HU: the error of the last stage before texture is copied (drawn_hu)."""
        return self.last_error(self.error_hu)

    def error_in(self, where: torch.Tensor) -> float:
        """`error` in a part of the brain, bool [S, N, N]; that of the whole brain where the part is empty."""
        if not where.any():
            return self.error
        return error_hu(self.query_hu, self.normal_hu if self.drawn_hu is None else self.drawn_hu, where)

    @staticmethod
    def last_error(error_hu: dict[str, float]) -> float:
        """`error` from errors by stage: the search's code is the stage 'latent'."""
        return error_hu.get("latent", list(error_hu.values())[-1])


class Reconstructor(ABC):
    """A method with its weights and settings, on one device.

    settings is a dataclass of config.option fields; those that are not `stored` (memory, paths) leave results alone.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    settings: Any
    size: int                                    # N, the side of the slices it takes
    device: torch.device
    precision: torch.dtype = torch.float32       # what the networks compute in

    @abstractmethod
    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        """The closest normal slice of every slice of one scan.

        hu float32 [S, N, N], HU, standardised as the model's preprocessing says; brain bool [S, N, N];
        below_vertex_mm [S], monotonic. Raises ValueError for other shapes.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON that rebuilds the networks, apart from their weights."""

    @abstractmethod
    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        """The weights, by file of the bundle and name, in dtype where they allow it."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: Any, device: torch.device) -> Reconstructor:
        """From a bundle's folder. Raises CheckpointError naming the file."""

    @classmethod
    def from_training(cls, path: Path, device: torch.device) -> tuple[Reconstructor, dict[str, Any]]:
        """A method of one file, from what its training left at `path`, and facts about that training.

        These are `data` (digest, counts and settings of the database, as far as known), `held_out` (ids of the scans
        held out) and `trained` (for the provenance). Raises ValueError naming the file. Methods of an encoder's run
        are built by latent_stats.py instead.
        """
        raise ValueError(f"method {cls.name}: has no weights of its own; give the run of train_encoder.py")

    def set_precision(self, dtype: torch.dtype) -> None:
        """Let the networks compute in torch.float32 or torch.bfloat16."""
        self.precision = dtype

    def with_settings(self, settings: Any) -> Reconstructor:
        """The same weights with other settings."""
        other = copy.copy(self)
        other.settings = settings
        return other

    def check(self) -> None:  # noqa: B027 - most methods lack nothing
        """ValueError where a file is missing that no bundle holds and the settings must name."""

    def check_shapes(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> None:
        n = self.size
        if hu.shape[1:] != (n, n) or brain.shape != hu.shape or len(below_vertex_mm) != len(hu):
            raise ValueError(f"{self.name}: expected hu and brain [S, {n}, {n}] and S positions, got {list(hu.shape)}, "
                             f"{list(brain.shape)} and {len(below_vertex_mm)}")


def method(name: str) -> type[Reconstructor]:
    """The class of a method. ValueError naming the methods there are."""
    if name not in METHODS:
        raise ValueError(f"method {name!r}: expected one of {', '.join(METHODS)}")
    module, cls = METHODS[name]
    return getattr(importlib.import_module(module), cls)


@dataclass
class Stages:
    """Seconds and errors of a method's stages, as Reconstruction holds them."""

    error_hu: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, error: Callable[[], float]):
        """Times a block; error() is taken, and the device waited for, at its end."""
        started = time.perf_counter()
        yield
        self.error_hu[name] = error()
        self.seconds[name] = time.perf_counter() - started


def error_hu(query_hu: torch.Tensor, normal_hu: torch.Tensor, brain: torch.Tensor) -> float:
    """Mean absolute difference in the brain, HU. All [S, N, N] on one device."""
    return (query_hu - normal_hu).abs()[brain].mean().item()
