"""Weights in files: safetensors with a SHA-256 each, read strictly; what run folders and model bundles share.

Nothing here unpickles code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from common.files import read_object, replace_text, sha256
from common.wording import some

SEAL = "sha256"                          # a JSON file's key for the digest of the rest


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message names the file and the fix."""


def portable(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, contiguous and sharing no memory, as safetensors requires."""
    return {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()}


def compact(state: Mapping[str, torch.Tensor], dtype: torch.dtype, network: str) -> dict[str, torch.Tensor]:
    """portable(state) in dtype; a tensor with values beyond its range, or not a float, stays as it is.

    Raises CheckpointError for values that are not finite.
    """
    found = {}
    for name, tensor in portable(state).items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{network}: {name} is not finite: it diverged; use an earlier snapshot")
        stored = tensor.to(dtype) if tensor.is_floating_point() else tensor
        found[name] = stored if stored.isfinite().all() else tensor
    return found


def digest(networks: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 of weights by network and name, on any device."""
    found = hashlib.sha256()
    for network, tensors in sorted(networks.items()):
        for name, tensor in sorted(tensors.items()):
            found.update(f"{network} {name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_tensors(state: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write portable tensors as a safetensors file with the usual permissions: save_file's is for its owner alone."""
    Path(path).write_bytes(save(dict(state), metadata))


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; the model was made without it") from error
    except OSError as error:                              # a folder, or not for this user
        raise CheckpointError(f"{path}: cannot be read ({error}); give a safetensors file") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}); fetch or write it again") from error
    except TypeError as error:                            # torch's, with its own stack in the message
        raise CheckpointError(f"{path}: has a tensor of a shape that torch cannot hold; fetch or write it "
                              "again") from error


def load_state(path: str | Path, flag: str = "") -> dict[str, torch.Tensor]:
    """The state dict in a file of torch.save, of others' making. Raises CheckpointError naming it and its flag."""
    where = f"{flag} {path}".strip()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:       # of text or damaged bytes the unpickler raises whatever the first odd one leads to
        raise CheckpointError(f"{where}: cannot be read as a state dict ({type(error).__name__})") from error
    return check_state(state, where)


def check_state(state: Any, where: str) -> dict[str, torch.Tensor]:
    """`state`, if it is a dict of tensors by name. Raises CheckpointError that says where it is from."""
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: expected a state dict, found a {type(state).__name__}")
    if unnamed := [name for name in state if not isinstance(name, str)]:
        raise CheckpointError(f"{where}: expected a state dict, found a {type(unnamed[0]).__name__}, {unnamed[0]!r}, "
                              "for a name")
    if strange := [name for name, value in state.items() if not torch.is_tensor(value)]:
        raise CheckpointError(f"{where}: expected a state dict, found a {type(state[strange[0]]).__name__} at "
                              f"{strange[0]!r}, no tensor")
    return state


def load_strictly(module: nn.Module, state: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Load a state dict whose names and shapes must be the module's. Raises CheckpointError naming `source`."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is not known" for name in state if name not in own]
    wrong += [f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
              for name in own if name in state and state[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(f"{source}: does not fit this {type(module).__name__}: {some(wrong, 3, '; ')}. Use the "
                              "configuration it was trained with")
    module.load_state_dict(state)


def holds_bundle(folder: str | Path) -> bool:
    """Whether a folder holds a model bundle, whole or not: HealthyGAN's runs have a model.json of their own."""
    path = Path(folder) / "model.json"
    return path.is_file() and b'"format_version"' in path.read_bytes()


def holds_healthygan(folder: Path) -> bool:
    """Whether a folder holds a model of HealthyGAN, whole or not, by its model.json."""
    path = folder / "model.json"
    return path.is_file() and b'"format": "healthygan"' in path.read_bytes()


def refuse_healthygan(folder: Path, named: str) -> None:
    """CheckpointError, about the folder as it is named, where a bundle would be written over a model of HealthyGAN."""
    if holds_healthygan(folder):
        raise CheckpointError(f"{named}: holds a model of HealthyGAN; choose another folder")


def verify(folder: Path, files: Mapping[str, str], mend: str) -> None:
    """CheckpointError, ending with `mend`, unless every file is there with its SHA-256."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; {mend}")
        if (found := sha256(path)) != expected:
            raise CheckpointError(f"{path}: SHA-256 {found[:12]}, expected {expected[:12]}: {mend}")


def to_json(content: Mapping[str, Any], folder: Path) -> str:
    """JSON of meta data. Raises CheckpointError naming the folder for what JSON cannot hold, NaN included."""
    try:
        return _laid_out(content, "\n") + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: meta must be plain JSON without NaN: {error}") from error


def _laid_out(value: Any, line: str) -> str:
    """JSON with one line for each innermost list or object, so that thousands of numbers stay readable."""
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if not any(isinstance(item, (Mapping, list, tuple)) for item in items):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, Mapping):
        parts, ends = [f"{json.dumps(str(key))}: {_laid_out(item, line + ' ')}" for key, item in value.items()], "{}"
    else:
        parts, ends = [_laid_out(item, line + " ") for item in value], "[]"
    return ends[0] + ",".join(f"{line} {part}" for part in parts) + line + ends[1]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, replaced in one move, with a SHA-256 of its content by which read_json finds any change."""
    replace_text(path, sealed(content, path.parent))


def sealed(content: Mapping[str, Any], folder: Path) -> str:
    """The text that write_json writes. Raises CheckpointError as to_json does."""
    content = json.loads(to_json({key: value for key, value in content.items() if key != SEAL}, folder))
    return to_json(content | {SEAL: _digest(content)}, folder)


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, mend: str, version: int) -> dict[str, Any]:
    """A JSON file of this format version. Raises CheckpointError, ending with `mend` where that helps."""
    try:
        content = read_object(path, CheckpointError, mend)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file: {mend}") from error
    found = content.get("format_version")
    if not isinstance(found, int):
        raise CheckpointError(f"{path}: no format_version: {mend}")
    if found != version:
        raise CheckpointError(f"{path}: format version {found}, this program reads {version}: "
                              + ("update it" if found > version else mend))
    return unsealed(content, path, mend)


def unsealed(content: dict[str, Any], path: Path, mend: str) -> dict[str, Any]:
    """What write_json was given, of what it wrote to `path`. Raises CheckpointError, ending with `mend`."""
    if content.pop(SEAL, None) != _digest(content):
        raise CheckpointError(f"{path}: altered since it was written (its own SHA-256 is another): {mend}")
    return content
