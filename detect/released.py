"""Reading the paper's released files without executing anything in them.

checkpoint.pth            torch file with the state dicts g_ema, d and e (and optimisers, left aside)
latent_statistics.pkl     pickle of a dict of NumPy arrays: mean, std, pca_components, pca_explained_variance

Every function raises CheckpointError naming the file, what is wrong with it, and the mend.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from common.weights import CheckpointError
from model import ModelConfig

STATE_DICTS = ("g_ema", "d", "e")        # generator, discriminator, encoder
CHANNEL_BASE = 16384                     # channels at resolution r: at most base * multiplier / r


# ------------------------------------------------------------------------------------------------------------
# Networks

def read_networks(path: str | Path) -> tuple[ModelConfig, list[dict[str, torch.Tensor]]]:
    """The configuration the weights imply, and the state dicts of generator, discriminator and encoder."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the released checkpoint (a .pth or .pt)")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):      # training flags: no code
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:       # of text or damaged bytes the unpickler raises whatever the first odd one leads to
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        said = f"it asks for {forbidden[1]}, not executed" if forbidden else f"{type(error).__name__}: {error}"
        reason = said.splitlines()[0]
        raise CheckpointError(f"{path}: not a checkpoint of tensors and plain values, or damaged ({reason}); "
                              "fetch it again") from error
    missing = [key for key in STATE_DICTS if not isinstance(content, dict) or key not in content]
    if missing:
        raise CheckpointError(f"{path}: no {', '.join(missing)} in it; generator (g_ema), discriminator (d) "
                              "and encoder (e) are needed, as in the checkpoint of the encoder's training")
    states = [{name.removeprefix("module."): tensor for name, tensor in content[key].items()}
              for key in STATE_DICTS]
    states[2] = _name_last_layer(states[2])
    return infer_config(states[0], path), states


def _name_last_layer(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's state dict with its one linear layer called final_linear, wherever a Sequential has put it."""
    trunk = ("convs.", "final_conv.")
    return {name if name.startswith(trunk) else "final_linear." + name.rsplit(".", 1)[-1]: tensor
            for name, tensor in encoder.items()}


def infer_config(g_ema: Mapping[str, torch.Tensor], path: str | Path) -> ModelConfig:
    """The configuration that a released generator's state dict implies; lr_mlp leaves no trace: the paper's."""
    blocks = sum(re.fullmatch(r"to_rgbs\.\d+\.bias", name) is not None for name in g_ema)
    mapping = sum(re.fullmatch(r"style\.\d+\.weight", name) is not None for name in g_ema)
    size = 4 * 2**blocks
    try:
        style_dim = g_ema["style.1.weight"].shape[1]
        channel_max = g_ema["input.input"].shape[1]
        finest = g_ema[f"convs.{2 * blocks - 1}.conv.weight"].shape[1]
        return ModelConfig(size=size, style_dim=style_dim, n_mlp=mapping, channel_base=CHANNEL_BASE,
                           channel_multiplier=finest * size / CHANNEL_BASE, channel_max=channel_max,
                           encoder_stddev=True)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} (g_ema): not a StyleGAN2 generator with the released names ({error}); "
                              "give the released checkpoint") from error


# ------------------------------------------------------------------------------------------------------------
# Latent statistics

def read_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of latent_statistics.pkl by name. A pickle that names anything but arrays is refused."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the released latent_statistics.pkl")
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file).load()
    except _ForbiddenError as error:
        raise CheckpointError(f"{path}: {error}; it was not executed. Use the file as released") from error
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise CheckpointError(f"{path}: not a pickle of arrays; fetch it again ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of arrays, found a {type(content).__name__}")
    arrays = {str(name): np.asarray(value) for name, value in content.items()}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise CheckpointError(f"{path}: '{name}' is not an array of numbers ({array.dtype})")
    return arrays


class _ForbiddenError(Exception):
    """The pickle asks for more than arrays."""


def _latin1(text: str, encoding: str) -> bytes:
    # How pickle protocols 0 to 2 spell bytes. No other codec: some decompress or decode, and none is needed.
    if encoding != "latin1":
        raise _ForbiddenError(f"the pickle asks for the codec {encoding!r}, which arrays do not need")
    return text.encode("latin1")


def _allowed_globals() -> dict[tuple[str, str], Callable]:
    core = np._core                                                  # numpy.core in the pickles of NumPy 1
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               ("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): _latin1}
    for name in ("numpy.core", "numpy._core"):
        allowed[f"{name}.multiarray", "_reconstruct"] = core.multiarray._reconstruct
        allowed[f"{name}.multiarray", "scalar"] = core.multiarray.scalar
        allowed[f"{name}.numeric", "_frombuffer"] = core.numeric._frombuffer           # protocol 5
    return allowed


class _ArrayUnpickler(pickle.Unpickler):
    """Knows only what it takes to rebuild NumPy arrays; any other name is refused before it is looked up."""

    _allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Callable:
        if (module, name) not in self._allowed:
            raise _ForbiddenError(f"the pickle asks for {module}.{name}, which arrays do not need")
        return self._allowed[module, name]
