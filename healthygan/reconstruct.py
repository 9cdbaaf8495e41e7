"""HealthyGAN's healthy version of a slice as its closest normal, to be calibrated and projected like other methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import option
from ct.window import decode, encode
from detect.reconstruct import Reconstruction, Reconstructor, Stages, Watch, error_hu
from healthygan.model import Generator, ModelConfig
from healthygan.weights import find_model, load_generator
from weights import CheckpointError, compact, load_tensors


@dataclass(frozen=True)
class TranslatorSettings:
    batch: int = option(16, "slices in the generator at a time: memory, not results", stored=False)

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, got {self.batch}")


class Translator(Reconstructor):
    name, Settings = "healthygan", TranslatorSettings

    def __init__(self, settings: TranslatorSettings, generator: Generator, model: ModelConfig, device: torch.device):
        self.settings, self.model, self.device = settings, model, torch.device(device)
        self.generator, self.size = generator.to(device), model.size

    @torch.no_grad()
    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check_shapes(hu, brain, below_vertex_mm)
        stages, images = Stages(), encode(hu.round())                # its databases hold whole HU
        query = decode(images)
        with stages.stage("reconstruct", lambda: error_hu(query, normal, brain)):
            parts = images.to(self.device).split(self.settings.batch)
            normal = decode(torch.cat([self.generator(x).y.float().cpu() for x in parts]))
        if watch:
            watch(query, normal)
        return Reconstruction(query, normal, stages.error_hu, stages.seconds)

    def set_precision(self, dtype: torch.dtype) -> None:
        super().set_precision(dtype)
        self.generator.compute_dtype = dtype

    def config(self) -> dict[str, Any]:
        return asdict(self.model)

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        return {"generator": compact(self.generator.state_dict(), dtype, "generator")}

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: TranslatorSettings,
             device: torch.device) -> Translator:
        path = folder / "generator.safetensors"
        try:
            model = ModelConfig(**config)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / 'model.json'}: config: {error}") from error
        return cls(settings, load_generator(load_tensors(path), model, path), model, device)

    @classmethod
    def from_training(cls, path: Path, device: torch.device) -> tuple[Translator, dict[str, Any]]:
        found = find_model(path)
        if found.settings.kind != "slices":
            raise ValueError(f"{path}: learnt from images, not from the slices of a database; train it on one")
        model = ModelConfig(**found.meta["model"])
        facts = {"data": {"settings": found.settings.slices}, "trained": found.meta.get("provenance")}
        return cls(TranslatorSettings(), found.generator, model, device), facts
