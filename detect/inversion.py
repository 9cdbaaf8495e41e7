"""Inversion: the encoder's code and noise maps of a slice, drawn by the generator. No search.

The encoder was shown healthy slices with coarse noise in them and asked for the slices without (train_encoder.py
--coarse --noise), so one pass leaves lesions out and draws sulci and ventricles that no code holds.
Where the model holds a reader (reader.py), it says besides what it makes of the slice beside that.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.weights import CheckpointError, compact, load_strictly, load_tensors
from config import check_range, option
from ct.window import BONE_HU, decode, encode
from detect.reader import Reader, config_of, load_reader
from detect.reconstruct import Reconstruction, Reconstructor, Stages, Watch, error_hu
from model import NETWORKS, Encoder, Generator, ModelConfig, has_mapping, without_mapping

TOP_HU = 0.5                    # so near to the highest value lies what was clipped to it, and interpolated since
CLIPPED_SHARE = 0.01            # of the slices at least that is skull: in the canonical frame it takes 0.07 of them


@dataclass(frozen=True)
class InversionSettings:
    predicted_noise: bool = option(True, "noise maps that the encoder predicts, if it does; else the generator's own")
    batch: int = option(32, "slices in the generator at a time: memory, not results", stored=False)

    def __post_init__(self):
        check_range(self, ("batch",), 1, flags=False)


class EncoderMethod(Reconstructor):
    """Base of the methods that are a generator and an encoder of one run, with or without a reader."""

    def __init__(self, settings: Any, generator: Generator, encoder: Encoder, reader: Reader | None = None):
        self.settings, self.generator, self.encoder, self.reader = settings, generator, encoder, reader
        self.size, self.device = generator.config.size, generator.input.input.device

    @abstractmethod
    def expected(self, hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        """What a reader compares slices with: hu float32 [S, N, N], HU, and bone bool -> float32 [S, N, N], HU."""

    def read(self, query_hu: torch.Tensor, expected_hu: torch.Tensor, brain: torch.Tensor, bone: torch.Tensor
             ) -> torch.Tensor | None:
        """The reader's output (Reader.read), on the CPU; None without a reader."""
        return self.reader.read(query_hu, expected_hu, brain, bone).cpu() if self.reader else None

    def config(self) -> dict[str, Any]:
        return asdict(self.encoder.config) | ({"reader": config_of(self.reader)} if self.reader else {})

    def drawing(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        """The weights of tensors() but for the reader's."""
        return compact_pair(self.generator, self.encoder, dtype)

    def expecting(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        """Of drawing() the weights that expected() hangs on: a reader is at home beside these."""
        return self.drawing(dtype)

    def tensors(self, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
        reader = {"reader": compact(self.reader.state_dict(), dtype, "reader")} if self.reader else {}
        return self.drawing(dtype) | reader

    def set_precision(self, dtype: torch.dtype) -> None:
        super().set_precision(dtype)
        for network in filter(None, (self.generator, self.encoder, self.reader)):
            network.compute_dtype = dtype

    @staticmethod
    def networks(folder: Path, config: Mapping[str, Any], device: torch.device) -> dict[str, torch.nn.Module | None]:
        """Generator, encoder and reader, None without one, from a bundle's folder. Raises CheckpointError."""
        config = dict(config)
        reader = config.pop("reader", None)
        return {**load_networks(folder, config, ("generator", "encoder"), device),
                "reader": None if reader is None else load_reader(folder, reader, device)}


class Inversion(EncoderMethod):
    name, Settings = "inversion", InversionSettings

    def closest_normal(self, hu: torch.Tensor, brain: torch.Tensor, below_vertex_mm: np.ndarray,
                       watch: Watch | None = None) -> Reconstruction:
        self.check_shapes(hu, brain, below_vertex_mm)
        stages, query = Stages(), encode(hu.to(self.device))
        query_hu, brain = decode(query), brain.to(self.device)     # what the windows can show: it can draw no more
        with stages.stage("reconstruct", lambda: error_hu(query_hu, normal_hu, brain)):
            normal_hu = decode(self.invert(query))
            read = self.read(query_hu, normal_hu, brain, bone_mask(query_hu))
        if watch:
            watch(query_hu, normal_hu)
        return Reconstruction(query_hu.cpu(), normal_hu.cpu(), stages.error_hu, stages.seconds, read=read)

    def expected(self, hu: torch.Tensor, bone: torch.Tensor) -> torch.Tensor:
        return decode(self.invert(encode(hu)))

    @torch.no_grad()
    def invert(self, query: torch.Tensor) -> torch.Tensor:
        """Images [S, 3, N, N] -> the generator's images of their codes."""
        # In one batch: an imported encoder's statistic is taken over the whole scan, as released.
        w_plus, noise = self.encoder.invert(query, self.generator)
        if not self.settings.predicted_noise:
            noise = self.generator.noise_maps("const")
        return draw(self.generator, w_plus, noise, self.settings.batch)

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any], settings: InversionSettings,
             device: torch.device) -> Inversion:
        return cls(settings, **cls.networks(folder, config, device))


def bone_mask(hu: torch.Tensor, top_hu: float | None = None) -> torch.Tensor:
    """Bone, metal and calcifications of slices [S, N, N], HU, bool: what is denser than blood can be.

    Slices that were clipped below BONE_HU, as loose ones are, do not tell the two apart: all that was is bone. top_hu:
    what they were clipped to, where that is known. Else it shows: a skull that was cut off is large and flat, and so a
    CLIPPED_SHARE of the slices reaches their highest value; of a bleed in slices without bone hardly a pixel does.
    """
    if top_hu is None:
        highest = float(hu.max())
        clipped = highest - TOP_HU < BONE_HU and (hu >= highest - TOP_HU).float().mean() > CLIPPED_SHARE
        top_hu = highest if clipped else math.inf
    return hu >= min(BONE_HU, top_hu - TOP_HU)


def draw(generator: Generator, w_plus: torch.Tensor, noise: list[torch.Tensor], batch: int) -> torch.Tensor:
    """Images [S, 3, N, N] of codes [S, L, D] and noise maps [S or 1, 1, r, r], `batch` at a time."""
    noise = [m.expand(len(w_plus), -1, -1, -1) for m in noise]
    return torch.cat([generator.synthesis(w_plus[i:i + batch], [m[i:i + batch] for m in noise])
                      for i in range(0, len(w_plus), batch)])


def compact_networks(networks: Mapping[str, torch.nn.Module], dtype: torch.dtype
                     ) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of networks of model.py, for a bundle. Raises CheckpointError unless they belong together."""
    # The stddev channel is the encoder's own choice; the generator and discriminator do not look at it.
    config = networks["encoder"].config
    for name, network in networks.items():
        if asdict(network.config) | {"encoder_stddev": config.encoder_stddev} != asdict(config):
            raise CheckpointError(f"the {name}'s {network.config} is not the encoder's {config}; use one run")
    return {name: compact(network.state_dict(), dtype, name) for name, network in networks.items()}


def compact_pair(generator: Generator, encoder: Encoder, dtype: torch.dtype) -> dict[str, dict[str, torch.Tensor]]:
    """The same of a generator that draws from an encoder's codes alone: it needs no mapping network."""
    found = compact_networks({"generator": generator, "encoder": encoder}, dtype)
    return found | {"generator": without_mapping(found["generator"])}


def load_networks(folder: Path, config: Mapping[str, Any], names: Sequence[str], device: torch.device,
                  files: str = "") -> dict[str, torch.nn.Module]:
    """Networks of model.py from a bundle's folder, in eval mode and frozen. Raises CheckpointError naming the file.

    files: what the names of their files begin with.
    """
    try:
        shape = ModelConfig(**config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'model.json'}: config: {error}") from error
    networks = {}
    for name in names:
        network = NETWORKS[name](shape)
        path = folder / f"{files}{name}.safetensors"
        weights = load_tensors(path)
        if name == "generator" and not has_mapping(weights):
            network.style = None
        load_strictly(network, weights, path)
        networks[name] = network.eval().requires_grad_(False).to(device)
    return networks
