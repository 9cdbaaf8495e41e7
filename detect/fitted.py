"""Base of the methods that are fitted to a database in one go and kept in one file: autoencoder and PCA."""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from common.weights import CheckpointError, load_tensors, portable, save_tensors
from dataset import SliceDataset
from detect.reconstruct import Reconstruction, Reconstructor, Stages, Watch, error_hu

RANGE_HU = (-20.0, 100.0)       # what these methods see: brain, blood and the edge of bone, in every database alike


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Of a method of which all is chosen when it is fitted."""


class Fitted(Reconstructor):
    """fit(data), save(path), from_training(path). `Fit` is the dataclass of the settings of fitting.

    trained_on  JSON, once fitted: `data` (digest, counts and settings of the database) and the ids `held_out`
    """

    Fit: ClassVar[type]

    def __init__(self, fitting: Any = None, settings: Any = None, device: torch.device | str = "cpu"):
        self.fitting, self.settings = fitting or self.Fit(), settings or self.Settings()
        self.device = torch.device(device)
        self.size = 0                                               # until it is fitted
        self.trained_on: dict[str, Any] = {}

    def fit(self, data: SliceDataset) -> None:
        """Learn from the slices of a database's split. Raises ValueError where they are too few."""
        self._fit(data)
        self.size = data.size
        self.trained_on = {"data": data.known(), "held_out": data.held_out_ids()}

    @abstractmethod
    def _fit(self, data: SliceDataset) -> None: ...

    @abstractmethod
    def _draw(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> torch.Tensor:
        """The closest normal HU [S, N, N] of slices clipped to RANGE_HU; on the CPU."""

    @abstractmethod
    def state(self) -> dict[str, torch.Tensor]:
        """The learnt tensors by name."""

    @abstractmethod
    def set_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of state()."""

    @torch.no_grad()
    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check_shapes(hu, brain, below_vertex_mm)
        stages, clipped = Stages(), hu.float().clamp(*RANGE_HU)
        with stages.stage("reconstruct", lambda: error_hu(clipped, normal, brain)):
            normal = self._draw(clipped, brain, np.asarray(below_vertex_mm))
        # Outside the brain nothing is compared, but a measure wants to know where bone is: there the true HU.
        query, normal = (torch.where(brain, image, hu.float()) for image in (clipped, normal))
        if watch:
            watch(query, normal)
        return Reconstruction(query, normal, stages.error_hu, stages.seconds)

    def check_shapes(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray) -> None:
        if not self.size:
            raise ValueError(f"method {self.name}: not fitted; call fit(data) or from_training(path) first")
        super().check_shapes(hu, brain, below_vertex_mm)

    def config(self) -> dict[str, Any]:
        return {"size": self.size, **dataclasses.asdict(self.fitting)}

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        return {self.name: portable(self.state())}

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: Any, device: torch.device) -> Fitted:
        path = folder / f"{cls.name}.safetensors"
        return cls._rebuilt(path, config, load_tensors(path), settings, device)

    @classmethod
    def _rebuilt(cls, path: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor], settings: Any,
                 device: torch.device) -> Fitted:
        fitting = dict(config)
        size = fitting.pop("size")
        found = cls(cls.Fit(**fitting), settings, device)
        try:
            found.set_state(state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: does not fit method {cls.name} with {found.fitting}: {error}") from error
        found.size = size
        return found

    def save(self, path: Path) -> None:
        """Write one safetensors file: state(), and method, settings and trained_on as its metadata."""
        meta = {"method": self.name, "config": json.dumps(self.config()), "trained_on": json.dumps(self.trained_on)}
        save_tensors(portable(self.state()), path, metadata=meta)

    @classmethod
    def from_training(cls, path: Path, device: torch.device) -> tuple[Fitted, dict[str, Any]]:
        if path.is_dir():
            raise ValueError(f"{path}: a folder; method={cls.name} takes the file that benchmarks/baselines.py fit "
                             "writes")
        try:
            with safe_open(path, "pt") as file:
                meta, state = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error}); fit it with benchmarks/baselines.py fit") from error
        if meta.get("method") != cls.name:
            raise ValueError(f"{path}: expected method {cls.name}, found {meta.get('method')!r}")
        try:
            found = cls._rebuilt(path, json.loads(meta["config"]), state, None, device)
            found.trained_on = json.loads(meta["trained_on"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not as this version writes it ({error}); fit it anew with "
                             "benchmarks/baselines.py fit") from error
        return found, {**found.trained_on, "trained": found.config()}
