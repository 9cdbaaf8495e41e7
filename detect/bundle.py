"""Model bundles: a method's files, the settings it is calibrated for, and the calibration, in one folder.

Weights are safetensors, one file per network; model.json holds settings, versions, preprocessing, calibration and
provenance. A bundle names its method (detect.reconstruct.METHODS) and holds only the files that this one uses. The
paper's released files become one with import_released.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import distributed
from common.files import flush, replacing, sha256
from common.version import VERSION
from common.weights import (
    CheckpointError,
    holds_healthygan,
    load_strictly,
    load_tensors,
    read_json,
    refuse_healthygan,
    save_tensors,
    sealed,
    to_json,
    verify,
)
from common.wording import some
from ct import frame
from ct.frame import PreprocessSettings
from detect import measure
from detect.latent import LatentStats
from detect.measure import MEASURES, Measure
from detect.normative import Normal
from detect.reconstruct import Reconstructor, method
from detect.released import STATE_DICTS, read_networks, read_statistics
from detect.search import Search, SearchSettings
from detect.settings import Settings
from model import NETWORKS, Discriminator, Encoder, Generator

FORMAT_VERSION = 2                             # the only one that is read
BUNDLE_META = ("preprocessing", "calibration", "provenance")        # required; may be None
FILES = {"inpainting": ("generator", "encoder"), "inversion": ("generator", "encoder"),      # others: one of their name
         "search": ("generator", "encoder", "latent"), "healthygan": ("generator",)}


@dataclass(frozen=True)
class Bundle:
    """A model ready to project: networks in eval mode with frozen float32 weights, on one device.

    settings      those that it is calibrated for, or given to with_settings()
    meta          model.json: the keys BUNDLE_META, settings, versions, config, files, format_version
    weights_hash  SHA-256 over the hashes of all weight files
    """

    reconstructor: Reconstructor
    measure: Measure
    settings: Settings
    meta: dict[str, Any]
    weights_hash: str
    folder: Path

    @property
    def preprocessing(self) -> PreprocessSettings | None:
        """How its scans were prepared; None in an imported bundle."""
        stored = self.meta["preprocessing"]
        return None if stored is None else PreprocessSettings.from_json(stored)

    def with_settings(self, settings: Settings) -> Bundle:
        """The same weights with other settings. Raises CheckpointError for another method that lacks its files here."""
        if settings.method == self.settings.method:
            reconstructor = self.reconstructor.with_settings(settings.reconstruction)
        else:
            refused = (f"{self.folder}: is a model of method {self.settings.method} and does not hold what "
                       f"{settings.method} needs; give one that does")
            if absent := absent_files(self.meta, settings):
                raise CheckpointError(f"{refused} (it lacks {', '.join(absent)})")
            try:
                reconstructor = _load_method(self.folder, self.meta, settings, self.reconstructor.device)
            except CheckpointError as error:
                raise CheckpointError(f"{refused} ({error})") from error
            reconstructor.set_precision(self.reconstructor.precision)
        fitted = MEASURES[settings.measure](settings.scoring, settings.mask, self.measure.normal)
        return replace(self, reconstructor=reconstructor, measure=fitted, settings=settings)

    def published(self) -> Settings:
        """Settings of the published search and votes, whatever the bundle is calibrated for."""
        return published_settings(self.meta, self.settings)


def published_settings(meta: Mapping[str, Any], settings: Settings) -> Settings:
    """Settings of the published search and votes for a bundle with this model.json and these settings.

    The perceptual distance is the bundle's own if it is one of a search, else that of its encoder's training. So is
    the rate on the noise maps, which hangs on how the generator holds them.
    """
    if settings.method == "search":
        known = asdict(settings.reconstruction)
    else:
        known = ((meta["provenance"] or {}).get("encoder") or {}).get("config", {})
    own = {name: known[name] for name in ("perceptual", "pixels", "knee", "lr_noise") if name in known}
    return Settings("search", SearchSettings(predicted_noise=False, **own))


def files_of_method(settings: Settings) -> list[str]:
    """Names of the files that every bundle with these settings has its method's weights in."""
    parts = FILES.get(settings.method, (settings.method,))
    if settings.method == "search" and settings.reconstruction.perceptual == "discriminator":
        parts = (*parts, "discriminator")
    return [f"{part}.safetensors" for part in parts]


def absent_files(meta: Mapping[str, Any], settings: Settings) -> list[str]:
    """Those of files_of_method() that a bundle with this model.json does not hold."""
    return [name for name in files_of_method(settings) if name not in meta["files"]]


def versions() -> dict[str, Any]:
    """Versions of program, preprocessing and measures; scores compare only where the last two are the same."""
    return {"program": VERSION, "preprocessing": frame.VERSION, "measure": measure.VERSION}


def save_bundle(folder: str | Path, reconstructor: Reconstructor, settings: Settings, meta: Mapping[str, Any],
                normal: Normal | None = None, dtype: torch.dtype = torch.float16, overwrite: bool = False) -> Path:
    """Write a model bundle. An earlier one stays until all is written; then the files are moved, model.json last.

    If the move is interrupted, the hashes do not fit and load_bundle refuses the bundle.
    Weights and principal components are stored in dtype; a tensor with values beyond its range, or not of floats,
    stays as it is. meta needs the keys BUNDLE_META. normal: of healthy residuals; None without a calibration. Raises
    CheckpointError for weights and statistics that are not finite, parts that do not fit together, settings other than
    those of the calibration in meta or of normal, and a folder that holds a bundle already, unless overwrite.
    """
    folder = Path(folder)
    refuse_healthygan(folder, str(folder))
    if (folder / "model.json").exists() and not overwrite:
        raise CheckpointError(f"{folder}: holds a model bundle; overwrite it, or choose another folder")
    if missing := [key for key in BUNDLE_META if key not in meta]:
        raise CheckpointError(f"{folder}: meta must say {', '.join(missing)} (None where there is none)")
    if meta["calibration"] and "settings" in meta and (others := settings.other_than(meta["settings"])):
        raise CheckpointError(f"{folder}: the calibration in meta is of other settings ({', '.join(others)}): "
                              "calibrate anew (latent_stats.py --encoder BUNDLE --set ...), or save without it")
    to_json(meta, folder)
    tensors = reconstructor.tensors(dtype)
    if normal is not None:
        try:
            MEASURES[settings.measure](settings.scoring, settings.mask, normal).check()
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from error
        tensors["normal"] = normal.to_tensors()
    for name, content in tensors.items():                 # what is no network has not gone through compact()
        if odd := [key for key, tensor in content.items() if not tensor.isfinite().all()]:
            raise CheckpointError(f"{folder}: {name}: {some(odd, 3)} not finite as stored; fit or train it anew")

    folder.mkdir(parents=True, exist_ok=True)
    earlier, files = _files_of_bundle(folder), {}
    with contextlib.ExitStack() as places:                # what comes first is moved last
        model_json = places.enter_context(replacing(folder / "model.json"))
        for name, content in tensors.items():
            path = folder / f"{name}.safetensors"
            writing = places.enter_context(replacing(path, sum(tensor.nbytes for tensor in content.values())))
            save_tensors(content, writing)
            flush(writing)
            files[path.name] = sha256(writing)
        content = dict(meta) | dict(format_version=FORMAT_VERSION, settings=settings.to_json(),
                                    versions=versions() | _of_calibration(meta), config=reconstructor.config(),
                                    files=files)
        model_json.write_text(sealed(content, folder), encoding="utf-8")
    for name in earlier - files.keys():
        (folder / name).unlink(missing_ok=True)
    return folder


def _of_calibration(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The versions of a loaded bundle's calibration: it is no newer for being saved again."""
    if not meta["calibration"] or "versions" not in meta:
        return {}
    return {what: meta["versions"][what] for what in ("preprocessing", "measure")}


def _files_of_bundle(folder: Path) -> set[str]:
    """Names of the files of the bundle in `folder`; none where its model.json is not there, or cannot be read."""
    try:
        content = read_json(folder / "model.json", "", FORMAT_VERSION)
    except CheckpointError:
        return set()
    return {Path(name).name for name in content["files"]}


def read_bundle_meta(folder: str | Path) -> tuple[dict[str, Any], str]:
    """model.json of a bundle and its weights hash. Raises CheckpointError unless every file is there and unaltered."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a model bundle")
    path = folder / "model.json"
    if holds_healthygan(folder):
        raise CheckpointError(f"{path}: a model of HealthyGAN, for python -m healthygan.test (healthygan/README.md)")
    content = read_json(path, "not a model bundle; latent_stats.py writes one", FORMAT_VERSION)
    kinds = dict.fromkeys(("settings", "versions", "config", "files"), dict) | dict.fromkeys(BUNDLE_META, dict | None)
    if absent := [key for key, kind in kinds.items() if not isinstance(content.get(key, ""), kind)]:
        raise CheckpointError(f"{path}: must say {', '.join(absent)}; fetch the bundle again")
    verify(folder, content["files"], "not the file the bundle was made with; fetch the bundle again")
    listing = "".join(f"{name} {content['files'][name]}\n" for name in sorted(content["files"]))
    return content, hashlib.sha256(listing.encode()).hexdigest()


def read_settings(folder: Path, meta: Mapping[str, Any]) -> Settings:
    """The settings in the model.json of a bundle. Raises CheckpointError for those of another version."""
    try:
        return Settings.from_json(meta["settings"])
    except ValueError as error:
        raise CheckpointError(f"{folder / 'model.json'}: {error}: run latent_stats.py again") from error


def load_bundle(folder: str | Path, device: torch.device | str = "cpu", precision: str = "auto") -> Bundle:
    """Read a model bundle onto a device. Raises CheckpointError naming the file and the fix.

    precision: 'bf16', 'fp32', or 'auto', which is bf16 where the device is good at it.
    """
    folder, device = Path(folder), torch.device(device)
    meta, weights_hash = read_bundle_meta(folder)
    settings = read_settings(folder, meta)
    reconstructor = _load_method(folder, meta, settings, device)
    reconstructor.set_precision(distributed.pick_precision(precision, device))
    has_normal = "normal.safetensors" in meta["files"]
    normal = _load_normal(folder / "normal.safetensors", settings) if has_normal else None
    fitted = MEASURES[settings.measure](settings.scoring, settings.mask, normal)
    return Bundle(reconstructor, fitted, settings, meta, weights_hash, folder)


@torch.inference_mode(False)                              # a search takes gradients, also of what was loaded within it
def _load_method(folder: Path, meta: Mapping[str, Any], settings: Settings, device: torch.device) -> Reconstructor:
    try:
        return method(settings.method).load(folder, meta["config"], settings.reconstruction, device)
    except (KeyError, TypeError) as error:                # what a method calls the config of another
        raise CheckpointError(f"{folder / 'model.json'}: config: not of method {settings.method} ({error})") from error


def _load_normal(path: Path, settings: Settings) -> Normal:
    try:
        return Normal.from_tensors(load_tensors(path), settings.scoring)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


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
    meta = dict(preprocessing=None, calibration=None, provenance=provenance)
    search = Search(SearchSettings(), generator, encoder, latent, discriminator)
    return save_bundle(out, search, Settings("search", search.settings), meta, dtype=dtype, overwrite=overwrite)
