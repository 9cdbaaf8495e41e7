"""Model bundles: what a projection needs, in one folder.

Generator, discriminator, encoder and latent statistics as safetensors, and model.json with configuration,
preprocessing, calibration and provenance. The paper's released files become one with import_released.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from detect.latent import LatentStats
from detect.normative import Normal
from detect.released import STATE_DICTS, read_networks, read_statistics
from model import Discriminator, Encoder, Generator, ModelConfig
from weights import (
    FORMAT_VERSION,
    CheckpointError,
    flush,
    load_strictly,
    load_tensors,
    portable,
    read_json,
    sha256,
    to_json,
    verify,
)

NETWORKS = {"generator": Generator, "discriminator": Discriminator, "encoder": Encoder}
BUNDLE_META = ("preprocessing", "projection", "calibration", "provenance")     # required; may be None


@dataclass(frozen=True)
class Bundle:
    """A model ready to project: networks in eval mode with frozen float32 weights, on one device."""

    generator: Generator
    discriminator: Discriminator
    encoder: Encoder
    latent: LatentStats
    normal: Normal | None         # of healthy residuals; None where nothing was calibrated
    meta: dict[str, Any]          # model.json: the keys BUNDLE_META, config, files, format_version
    weights_hash: str             # SHA-256 over all weight files: names the weights a result was made with

    @property
    def config(self) -> ModelConfig:
        return self.generator.config


def save_bundle(folder: str | Path, generator: Generator, discriminator: Discriminator, encoder: Encoder,
                latent: LatentStats, meta: Mapping[str, Any], dtype: torch.dtype = torch.float16,
                overwrite: bool = False, normal: Normal | None = None) -> Path:
    """Write a model bundle; model.json comes last, so a bundle with one is whole.

    Weights and principal components are stored in dtype; a tensor with values beyond its range, or not a
    float, stays as it is. meta needs the keys BUNDLE_META. The generator's noise buffers are part of the bundle.
    Raises CheckpointError for weights that are not finite, parts that do not fit together, and a folder that
    holds a bundle already, unless overwrite.
    """
    folder = Path(folder)
    networks = dict(generator=generator, discriminator=discriminator, encoder=encoder)
    if (folder / "model.json").exists() and not overwrite:
        raise CheckpointError(f"{folder}: holds a model bundle; overwrite it, or choose another folder")
    if missing := [key for key in BUNDLE_META if key not in meta]:
        raise CheckpointError(f"{folder}: meta must say {', '.join(missing)} (None where there is none)")
    # The stddev channel is the encoder's own choice; the generator and discriminator do not look at it.
    config = networks["encoder"].config
    for name, network in networks.items():
        if asdict(network.config) | {"encoder_stddev": config.encoder_stddev} != asdict(config):
            raise CheckpointError(f"{folder}: the {name}'s {network.config} is not the encoder's {config}; use one run")
    _check_latent(latent, config, folder)
    to_json(meta, folder)
    tensors = {name: _compact(network.state_dict(), dtype, name) for name, network in networks.items()}
    tensors["latent"] = latent.to_tensors(dtype)
    if normal is not None:
        tensors["normal"] = normal.to_tensors()

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").unlink(missing_ok=True)
    (folder / "normal.safetensors").unlink(missing_ok=True)             # an earlier bundle's
    files = {}
    for name in tensors:
        path, writing = folder / f"{name}.safetensors", folder / f".{name}.writing"
        save_file(tensors[name], writing)
        flush(writing)
        writing.replace(path)
        files[path.name] = sha256(path)
    content = dict(meta) | dict(format_version=FORMAT_VERSION, config=asdict(config), files=files)
    writing = folder / ".model.writing"
    writing.write_text(to_json(content, folder), encoding="utf-8")
    flush(writing)
    writing.replace(folder / "model.json")
    return folder


def read_bundle_meta(folder: str | Path) -> tuple[dict[str, Any], str]:
    """model.json of a bundle and its weights hash, after checking that every file is there and unaltered."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a model bundle")
    content = read_json(folder / "model.json", "not a model bundle; latent_stats.py writes one")
    expected = [f"{name}.safetensors" for name in (*NETWORKS, "latent")]
    if isinstance(content.get("files"), dict) and "normal.safetensors" in content["files"]:
        expected.append("normal.safetensors")
    absent = [key for key in ("config", "files") if not isinstance(content.get(key), dict)]
    absent += [key for key in BUNDLE_META if not isinstance(content.get(key, ""), dict | None)]
    if absent or sorted(content["files"]) != sorted(expected):
        wanted = ", ".join(absent) or "the hash of each weight file"
        raise CheckpointError(f"{folder / 'model.json'}: must say {wanted}; fetch the bundle again")
    verify(folder, content["files"], "not the file the bundle was made with; fetch the bundle again")
    listing = "".join(f"{name} {content['files'][name]}\n" for name in expected)
    return content, hashlib.sha256(listing.encode()).hexdigest()


def load_bundle(folder: str | Path, device: torch.device | str = "cpu") -> Bundle:
    """Read a model bundle onto a device. Raises CheckpointError naming the file and the mend."""
    folder = Path(folder)
    meta, weights_hash = read_bundle_meta(folder)
    try:
        config = ModelConfig(**meta["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'model.json'}: config: {error}") from error
    networks = {}
    for name, build in NETWORKS.items():
        path = folder / f"{name}.safetensors"
        network = build(config)
        load_strictly(network, load_tensors(path), path)
        networks[name] = network.eval().requires_grad_(False).to(device)
    try:
        latent = LatentStats.from_tensors(load_tensors(folder / "latent.safetensors"))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'latent.safetensors'}: {error}") from error
    _check_latent(latent, config, folder)
    return Bundle(**networks, latent=latent.to(device), normal=_load_normal(folder, meta), meta=meta,
                  weights_hash=weights_hash)


def _load_normal(folder: Path, meta: Mapping[str, Any]) -> Normal | None:
    path = folder / "normal.safetensors"
    if path.name not in meta["files"]:
        return None
    try:
        return Normal.from_tensors(load_tensors(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_latent(latent: LatentStats, config: ModelConfig, folder: Path) -> None:
    expected, found = (config.n_latent, config.style_dim), tuple(latent.mean.shape[1:])
    if found != expected:
        raise CheckpointError(f"{folder / 'latent.safetensors'}: [layers, style_dim] {list(found)}, but the "
                              f"networks have {list(expected)}; fit the statistics on this encoder's codes")


def _compact(state: Mapping[str, torch.Tensor], dtype: torch.dtype, network: str) -> dict[str, torch.Tensor]:
    compact = {}
    for name, tensor in portable(state).items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{network}: {name} is not finite: it diverged; use an earlier snapshot")
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        compact[name] = stored if stored.isfinite().all() else tensor
    return compact


# ------------------------------------------------------------------------------------------------------------
# The paper's released files

def load_released(path: str | Path) -> tuple[Generator, Discriminator, Encoder]:
    """The released networks exactly as released (size and channels from the weights), in eval mode.

    The file is read with weights_only; its optimisers are left aside. The encoder keeps its batch statistic:
    a code depends on the other slices in the batch. Raises CheckpointError when something is missing, does not
    fit, or would need code to be unpickled.
    """
    config, states = read_networks(path)
    networks = tuple(build(config) for build in NETWORKS.values())
    for network, state, key in zip(networks, states, STATE_DICTS):
        load_strictly(network, state, f"{path} ({key})")
    return tuple(network.eval() for network in networks)


def import_released(ckpt: str | Path, statistics: str | Path, out: str | Path,
                    dtype: torch.dtype = torch.float16, overwrite: bool = False) -> Path:
    """Turn the paper's released checkpoint and latent statistics into a model bundle at `out`."""
    generator, discriminator, encoder = load_released(ckpt)
    arrays = read_statistics(statistics)
    try:
        latent = LatentStats.from_released(arrays)
    except ValueError as error:
        raise CheckpointError(f"{statistics}: {error}") from error
    provenance = dict(source="the released files of Lee et al., Nature Communications 13:4251 (2022)",
                      files={Path(path).name: sha256(Path(path)) for path in (ckpt, statistics)})
    meta = dict(preprocessing=None, projection=None, calibration=None, provenance=provenance)
    return save_bundle(out, generator, discriminator, encoder, latent, meta, dtype, overwrite)
