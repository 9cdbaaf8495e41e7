"""HealthyGAN's healthy version of a slice as its closest normal, to be calibrated and projected like other methods.

A generator that was trained on shrunk slices (healthygan/data.py) translates shrunk ones; what it changes, in HU, is
enlarged and added to the slice, which stays as sharp as it was wherever the mask is closed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from common.weights import CheckpointError, compact, load_tensors
from config import check_range, option
from ct.window import WINDOWS_HU, decode, encode
from detect.reconstruct import Reconstruction, Reconstructor, Stages, Watch, error_hu
from healthygan.data import shrink
from healthygan.model import Generator, ModelConfig
from healthygan.weights import find_model, load_generator


@dataclass(frozen=True)
class TranslatorSettings:
    batch: int = option(16, "slices in the generator at a time: memory, not results", stored=False)

    def __post_init__(self):
        check_range(self, ("batch",), 1, flags=False)


class Translator(Reconstructor):
    name, Settings = "healthygan", TranslatorSettings

    def __init__(self, settings: TranslatorSettings, generator: Generator, model: ModelConfig, size: int,
                 range_hu: tuple[float, float], device: torch.device):
        """size: side of the slices, a multiple of model.size; range_hu: what they were clipped to in training."""
        self.settings, self.model, self.device = settings, model, torch.device(device)
        self.generator, self.size, self.range_hu = generator.to(device), size, tuple(range_hu)

    @torch.no_grad()
    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check_shapes(hu, brain, below_vertex_mm)
        stages, query = Stages(), decode(encode(hu.float()))
        small = shrink(hu.float().clamp(*self.range_hu), self.model.size).round()         # its databases hold whole HU
        with stages.stage("reconstruct", lambda: error_hu(query, normal, brain)):
            parts = encode(small).to(self.device).split(self.settings.batch)
            healthy = decode(torch.cat([self.generator(x).y.float().cpu() for x in parts]))
            change = healthy - small.clamp(*WINDOWS_HU[-1])                               # the widest ends what it sees
            change = F.interpolate(change[:, None], size=hu.shape[1:], mode="bilinear", align_corners=False)[:, 0]
            normal = query + change
        if watch:
            watch(query, normal)
        return Reconstruction(query, normal, stages.error_hu, stages.seconds)

    def set_precision(self, dtype: torch.dtype) -> None:
        super().set_precision(dtype)
        self.generator.compute_dtype = dtype

    def config(self) -> dict[str, Any]:
        return {"model": asdict(self.model), "size": self.size, "range_hu": list(self.range_hu)}

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        return {"generator": compact(self.generator.state_dict(), dtype, "generator")}

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: TranslatorSettings,
             device: torch.device) -> Translator:
        path = folder / "generator.safetensors"
        try:
            model, size, (low, high) = ModelConfig(**config["model"]), config["size"], config["range_hu"]
            if set(config) != {"model", "size", "range_hu"} or size % model.size:
                raise ValueError(f"expected model, size (a multiple of {model.size}) and range_hu, got {dict(config)}")
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / 'model.json'}: config: {error}") from error
        return cls(settings, load_generator(load_tensors(path), model, path), model, size, (low, high), device)

    @classmethod
    def from_training(cls, path: Path, device: torch.device) -> tuple[Translator, dict[str, Any]]:
        found = find_model(path)
        if found.settings.kind != "slices":
            raise ValueError(f"{path}: learnt from images, not from the slices of a database; train it on one")
        model, seen = ModelConfig(**found.meta["model"]), found.settings.slices["standardise"]
        facts = {"data": {"settings": found.settings.slices}, "trained": found.meta.get("provenance")}
        return cls(TranslatorSettings(), found.generator, model, seen["size"], seen["hu_clip"], device), facts
