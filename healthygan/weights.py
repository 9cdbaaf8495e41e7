"""A trained generator in one folder: generator.safetensors, and model.json with all that a test needs.

    python -m healthygan.weights runs/healthygan --out models/mine --note source="..." --note machine="..."

writes a run's best generator for shipping: as float16, with notes on where it comes from. Also reads the released
`<iter>-G.ckpt`. Nothing here unpickles code.
"""

from __future__ import annotations

import argparse
import dataclasses
import platform
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from common.files import read_object, replacing, sha256
from common.weights import (
    CheckpointError,
    compact,
    load_state,
    load_strictly,
    load_tensors,
    save_tensors,
    unsealed,
    verify,
    write_json,
)
from config import exit_code
from healthygan.data import FULL, ImageSettings
from healthygan.model import Generator, ModelConfig

FORMAT = "healthygan"
GENERATOR = "generator.safetensors"
RUNNING_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True)
class Model:
    """generator: float32, in eval mode; meta: model.json (threshold, validation_scores, provenance ...)."""

    generator: Generator
    settings: ImageSettings
    meta: dict
    weights_hash: str


def save_model(folder: Path, generator: Generator, meta: dict, dtype: torch.dtype = torch.float32) -> None:
    """Write a model; each file is replaced in one move, model.json last.

    meta: JSON, with `model` (ModelConfig) and `image_settings` (ImageSettings) as dicts. A tensor beyond the range of
    dtype stays as it is. Raises CheckpointError for weights that are not finite.
    """
    state = compact(generator.state_dict(), dtype, str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / GENERATOR) as writing:
        save_tensors(state, writing)
        files = {GENERATOR: sha256(writing)}
    # Without a format_version, by which latent_stats.py knows a bundle
    write_json(folder / "model.json", {"format": FORMAT, **meta, "files": files})


def load_model(folder: Path) -> Model:
    """Read a model's folder. Raises CheckpointError naming the file and the mend.

    A model.json of an earlier version has no digest of its own, but that of the weights: it is read with a warning.
    """
    path = folder / "model.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give a folder that healthygan.train has written (RUN/best)")
    mend = "fetch the model again"
    meta = read_object(path, CheckpointError, mend)
    earlier = "files" not in meta
    if not earlier:
        meta = unsealed(meta, path, mend)
    try:
        files = {GENERATOR: str(meta["sha256"] if earlier else meta["files"][GENERATOR])}
        config, settings = _described(meta)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the description of a HealthyGAN model ({error}); {mend}") from error
    verify(folder, files, f"not the file that {path} was written for; {mend}")
    if earlier:
        warnings.warn(f"{path}: of an earlier version, without a digest of itself, so that damage to its threshold or "
                      f"settings is not found; python -m healthygan.weights {folder} --out NEW writes one with it",
                      stacklevel=2)
    weights = folder / GENERATOR
    return Model(load_generator(load_tensors(weights), config, weights), settings, meta, files[GENERATOR])


def _described(meta: dict) -> tuple[ModelConfig, ImageSettings]:
    """What model.json says of network and images. Raises ValueError and its kin for what cannot be meant."""
    if strange := {key: value for key, value in meta["model"].items() if type(value) is not int}:
        raise ValueError(f"expected whole numbers for the network, found {strange!r:.80}")
    config, settings = ModelConfig(**meta["model"]), ImageSettings(**meta["image_settings"])
    threshold, scores = meta.get("threshold"), meta.get("validation_scores")
    for holds, expected, found in (
        (settings.size == config.size, f"images of the network's size, {config.size}", settings.size),
        (settings.kind in ("images", "slices"), "kind images or slices", settings.kind),
        (settings.kind == "images" or isinstance(settings.slices, dict), "the settings of the slices", settings.slices),
        (_is_part(settings.crop_top) and settings.crop_top < 1, "crop_top in [0, 1)", settings.crop_top),
        (settings.white_16bit in range(1, FULL + 1), f"white_16bit in 1..{FULL}", settings.white_16bit),
        (threshold is None or _is_part(threshold), "a threshold in [0, 1], or none", threshold),
        (scores is None or isinstance(scores, list) and all(map(_is_part, scores)),
         "validation_scores in [0, 1], or none", scores),
    ):
        if not holds:
            raise ValueError(f"expected {expected}, found {found!r:.80}")
    return config, settings


def _is_part(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def load_released(path: Path) -> Model:
    """The released `<iter>-G.ckpt`: full width, images of 256; no threshold. Raises CheckpointError."""
    config = ModelConfig()
    generator = load_generator(without_running_statistics(load_state(path)), config, path)
    settings = ImageSettings("images", config.size)
    meta = {"model": dataclasses.asdict(config), "image_settings": dataclasses.asdict(settings)}
    return Model(generator, settings, meta, sha256(path))


def without_running_statistics(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Released weights but for what that code updates and never normalises by."""
    return {name: value for name, value in state.items() if name.rpartition(".")[2] not in RUNNING_STATISTICS}


def load_generator(state: dict[str, torch.Tensor], config: ModelConfig, source: Path) -> Generator:
    """A generator with these weights. Raises CheckpointError for missing or unknown names, other shapes, and NaN."""
    generator = config.generator()
    load_strictly(generator, state, source)
    if strange := [name for name, value in state.items() if not value.isfinite().all()]:
        raise CheckpointError(f"{source}: {strange[0]} is not finite: the training diverged, or the file is damaged; "
                              "fetch it again, or use an earlier one")
    return generator.eval().requires_grad_(False)


def find_model(path: Path) -> Model:
    """A model's folder, a run's folder (its best generator), or a released *-G.ckpt. Raises CheckpointError."""
    if path.is_file():
        return load_released(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; give a model's or a run's folder")
    return load_model(path / "best" if (path / "best").is_dir() else path)


def ship(source: Path, out: Path, notes: dict[str, str]) -> Path:
    """Write a model as float16 with its provenance; returns the folder. Raises CheckpointError if one is there."""
    if (out / "model.json").exists():
        raise CheckpointError(f"{out}: holds a model; choose another folder")
    model = find_model(source)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    save_model(out, model.generator, {**model.meta, "provenance": {**notes, "versions": versions}}, torch.float16)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="healthygan.weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's folder, or a model's")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--note", action="append", default=[], metavar="KEY=TEXT", help="for the provenance; repeat")
    args = parser.parse_args(argv)
    if wrong := [note for note in args.note if "=" not in note]:
        parser.error(f"--note {wrong[0]}: expected KEY=TEXT")

    def work(args: argparse.Namespace) -> None:
        ship(args.model, args.out, dict(note.split("=", 1) for note in args.note))

    return exit_code(work, args)


if __name__ == "__main__":
    sys.exit(main())
