"""Run folders, model bundles, and the paper's released files.

A run folder holds snapshots, `snapshot-00012000/`: weights as safetensors, one file a network; optimisers,
RNGs and the like in state.pt (tensors and plain Python values only); meta.json with a SHA-256 of each file. A
snapshot is written beside its place and renamed, so a killed run leaves the one before it whole.

A model bundle is what a projection needs, in one folder: generator, discriminator, encoder and latent
statistics as safetensors, and model.json with configuration, preprocessing, calibration and provenance.

    python checkpoint.py import-released --ckpt checkpoint.pth --latent-statistics latent_statistics.pkl --out DIR
    python checkpoint.py show DIR

Nothing here unpickles code. In a distributed run, save on rank 0 only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latent import LatentStats
from model import Discriminator, Encoder, Generator, ModelConfig
from normative import Normal
from released import STATE_DICTS, CheckpointError, read_networks, read_statistics

FORMAT_VERSION = 1                       # of snapshots and bundles; newer ones are refused
NETWORKS = {"generator": Generator, "discriminator": Discriminator, "encoder": Encoder}
BUNDLE_META = ("preprocessing", "projection", "calibration", "provenance")     # required; may be None
_PLAIN = (bool, int, float, str, bytes, type(None))


# ------------------------------------------------------------------------------------------------------------
# Run folders

@dataclass(frozen=True)
class Snapshot:
    """One moment of a training run, on the CPU."""

    step: int
    path: Path
    weights: dict[str, dict[str, torch.Tensor]]      # by network name
    state: dict[str, Any]                            # optimisers, RNGs, ...: as it was saved
    meta: dict[str, Any]

    def restore(self, modules: Mapping[str, nn.Module]) -> None:
        """Load the weights into modules, strictly. Raises CheckpointError when names or shapes do not fit."""
        for name, module in modules.items():
            if name not in self.weights:
                raise CheckpointError(f"{self.path}: no network '{name}', only {sorted(self.weights)}")
            _load_strictly(module, self.weights[name], self.path / f"{name}.safetensors")


def snapshot_steps(run: str | Path) -> list[int]:
    """Steps of the finished snapshots of a run folder, ascending; empty for a new or missing folder."""
    names = (path.name for path in Path(run).glob("snapshot-*"))
    return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"snapshot-(\d+)", name)))


def save_snapshot(run: str | Path, step: int, modules: Mapping[str, nn.Module], state: Mapping[str, Any],
                  meta: Mapping[str, Any], keep: int = 2, milestone: bool = False) -> Path:
    """Write a snapshot atomically, then drop all but the newest `keep` and the milestones. Returns its folder.

    modules  networks by name; each becomes NAME.safetensors
    state    tensors, numbers, strings, None, and dicts, lists and tuples of these; anything else is refused,
             so that it can be read back without unpickling code
    meta     anything JSON can hold
    """
    run = Path(run)
    _check_plain(state, "state")
    for leftover in [*run.glob(".snapshot-*.writing"), *run.glob(".snapshot-*.replaced")]:
        shutil.rmtree(leftover)

    writing = run / f".snapshot-{step:08d}.writing"
    writing.mkdir(parents=True)
    for name, module in modules.items():
        save_file(_portable(module.state_dict()), writing / f"{name}.safetensors")
    torch.save(dict(state), writing / "state.pt")
    files = {path.name: _sha256(path) for path in sorted(writing.iterdir())}
    content = dict(format_version=FORMAT_VERSION, step=step, milestone=milestone, files=files, meta=dict(meta))
    (writing / "meta.json").write_text(_to_json(content, run), encoding="utf-8")
    for path in [*writing.iterdir(), writing]:
        _flush(path)

    final = _snapshot_path(run, step)
    if final.exists():
        final.rename(run / f".{final.name}.replaced")
    writing.rename(final)
    _flush(run)
    shutil.rmtree(run / f".{final.name}.replaced", ignore_errors=True)
    _prune(run, keep)
    return final


def load_snapshot(run: str | Path, step: int | str = "latest") -> Snapshot:
    """Read a snapshot, checked against its hashes.

    'latest' falls back to the newest whole one, with a warning for each that had to be passed over.
    Raises CheckpointError when there is none, or when the step asked for is missing or damaged.
    """
    run = Path(run)
    steps = snapshot_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: no snapshot here; check the folder, or start the run anew")
    if step != "latest":
        if step not in steps:
            raise CheckpointError(f"{run}: no snapshot of step {step}; there are {steps}")
        return _read_snapshot(_snapshot_path(run, step))

    for leftover in run.glob(".snapshot-*.writing"):
        warnings.warn(f"{leftover}: left half-written when the run stopped; not used", stacklevel=2)
    for candidate in reversed(steps):
        try:
            return _read_snapshot(_snapshot_path(run, candidate))
        except CheckpointError as error:
            warnings.warn(f"{error}; falling back to the snapshot before it", stacklevel=2)
    raise CheckpointError(f"{run}: all {len(steps)} snapshots are damaged; start the run anew")


def _read_snapshot(folder: Path) -> Snapshot:
    content = _read_json(folder / "meta.json", "the snapshot is not whole; use another")
    _verify(folder, content["files"], "the file was altered or cut short; use another snapshot")
    networks = [name for name in content["files"] if name.endswith(".safetensors")]
    weights = {name.removesuffix(".safetensors"): _load_tensors(folder / name) for name in networks}
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    return Snapshot(content["step"], folder, weights, state, content["meta"])


def _prune(run: Path, keep: int) -> None:
    for step in snapshot_steps(run)[:-max(keep, 1)]:
        folder = _snapshot_path(run, step)
        try:
            milestone = _read_json(folder / "meta.json", "damaged")["milestone"]
        except CheckpointError:
            milestone = False
        if not milestone:
            shutil.rmtree(folder)


def _snapshot_path(run: Path, step: int) -> Path:
    return run / f"snapshot-{step:08d}"


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif type(value) not in _PLAIN and not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{where}: a {type(value).__module__}.{type(value).__name__} cannot be saved; "
                              "store a tensor, number, string, dict, list or tuple")


# ------------------------------------------------------------------------------------------------------------
# Model bundles

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
    _to_json(meta, folder)
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
        _flush(writing)
        writing.replace(path)
        files[path.name] = _sha256(path)
    content = dict(meta) | dict(format_version=FORMAT_VERSION, config=asdict(config), files=files)
    writing = folder / ".model.writing"
    writing.write_text(_to_json(content, folder), encoding="utf-8")
    _flush(writing)
    writing.replace(folder / "model.json")
    return folder


def read_bundle_meta(folder: str | Path) -> tuple[dict[str, Any], str]:
    """model.json of a bundle and its weights hash, after checking that every file is there and unaltered."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a model bundle")
    content = _read_json(folder / "model.json", "not a model bundle; latent_stats.py writes one")
    expected = [f"{name}.safetensors" for name in (*NETWORKS, "latent")]
    if isinstance(content.get("files"), dict) and "normal.safetensors" in content["files"]:
        expected.append("normal.safetensors")
    absent = [key for key in ("config", "files") if not isinstance(content.get(key), dict)]
    absent += [key for key in BUNDLE_META if not isinstance(content.get(key, ""), dict | None)]
    if absent or sorted(content["files"]) != sorted(expected):
        wanted = ", ".join(absent) or "the hash of each weight file"
        raise CheckpointError(f"{folder / 'model.json'}: must say {wanted}; fetch the bundle again")
    _verify(folder, content["files"], "not the file the bundle was made with; fetch the bundle again")
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
        _load_strictly(network, _load_tensors(path), path)
        networks[name] = network.eval().requires_grad_(False).to(device)
    try:
        latent = LatentStats.from_tensors(_load_tensors(folder / "latent.safetensors"))
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
        return Normal.from_tensors(_load_tensors(path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _check_latent(latent: LatentStats, config: ModelConfig, folder: Path) -> None:
    expected, found = (config.n_latent, config.style_dim), tuple(latent.mean.shape[1:])
    if found != expected:
        raise CheckpointError(f"{folder / 'latent.safetensors'}: [layers, style_dim] {list(found)}, but the "
                              f"networks have {list(expected)}; fit the statistics on this encoder's codes")


def _compact(state: Mapping[str, torch.Tensor], dtype: torch.dtype, network: str) -> dict[str, torch.Tensor]:
    compact = {}
    for name, tensor in _portable(state).items():
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
        _load_strictly(network, state, f"{path} ({key})")
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
                      files={Path(path).name: _sha256(Path(path)) for path in (ckpt, statistics)})
    meta = dict(preprocessing=None, projection=None, calibration=None, provenance=provenance)
    return save_bundle(out, generator, discriminator, encoder, latent, meta, dtype, overwrite)


# ------------------------------------------------------------------------------------------------------------
# Files and tensors

def _portable(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # safetensors wants contiguous tensors that share no memory.
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); fetch or write it again") from error


def _load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not known" for name in state if name not in own]
    wrong += [f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: does not fit this {type(module).__name__}: {'; '.join(wrong[:3])}"
                              f"{more}. Use the configuration it was trained with")
    module.load_state_dict(state)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, files: Mapping[str, str], mend: str) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {mend}")
        if (found := _sha256(path)) != expected:
            raise CheckpointError(f"{path}: SHA-256 {found[:12]}, expected {expected[:12]}: {mend}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _to_json(content: Mapping[str, Any], folder: Path) -> str:
    try:
        return json.dumps(content, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: meta must be plain JSON without NaN: {error}") from error


def _read_json(path: Path, mend: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: {mend}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}): {mend}") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{path}: no format_version: {mend}")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version}, this code reads up to {FORMAT_VERSION}; update it")
    return content


# ------------------------------------------------------------------------------------------------------------
# Command

def describe(folder: str | Path) -> str:
    """What a bundle is, for people to read: configuration, files, statistics and provenance."""
    bundle = load_bundle(folder)
    lines = [f"{folder}: format version {bundle.meta['format_version']}, weights {bundle.weights_hash[:16]}"]
    lines += [f"  {key:20} {value}" for key, value in asdict(bundle.config).items()]
    for name in NETWORKS:
        count = sum(p.numel() for p in getattr(bundle, name).parameters())
        size = (Path(folder) / f"{name}.safetensors").stat().st_size
        lines.append(f"  {name:20} {count / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")
    stats, size = bundle.latent, (Path(folder) / "latent.safetensors").stat().st_size
    lines.append(f"  {'latent':20} {len(stats.positions_mm)} positions, {stats.positions_mm[0]:g} to "
                 f"{stats.positions_mm[-1]:g} mm below the vertex; {stats.components.shape[-1]} of "
                 f"{stats.components.shape[-2]} components, {stats.explained().mean():.0%} of the variance; "
                 f"{size / 1e6:.1f} MB")
    return "\n".join(lines + [f"  {key:20} {json.dumps(bundle.meta[key])}" for key in BUNDLE_META])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Import the paper's released files, or show a model bundle.")
    commands = parser.add_subparsers(dest="command", required=True)
    bring = commands.add_parser("import-released", help="the paper's released files to a model bundle")
    bring.add_argument("--ckpt", required=True, help="checkpoint.pth with g_ema, d and e")
    bring.add_argument("--latent-statistics", required=True, help="latent_statistics.pkl")
    bring.add_argument("--out", required=True, help="folder of the bundle")
    bring.add_argument("--fp32", action="store_true", help="store float32 (default: float16, half the size)")
    bring.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    show = commands.add_parser("show", help="check a bundle and print what it is")
    show.add_argument("folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "import-released":
            dtype = torch.float32 if args.fp32 else torch.float16
            args.folder = import_released(args.ckpt, args.latent_statistics, args.out, dtype, args.overwrite)
        print(describe(args.folder))
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
