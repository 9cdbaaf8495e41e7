"""Reading the paper's released files without executing anything in them.

checkpoint.pth            torch file with the state dicts g_ema, d and e (and optimisers, left aside)
latent_statistics.pkl     pickle of a dict of NumPy arrays: mean, std, pca_components, pca_explained_variance

Every function raises CheckpointError naming the file, what is wrong with it, and the mend.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from common.weights import CheckpointError, check_state
from model import ModelConfig

STATE_DICTS = ("g_ema", "d", "e")        # generator, discriminator, encoder
CHANNEL_BASE = 16384                     # channels at resolution r: at most base * multiplier / r
NUMBERS = re.compile("[<>=|]?[fiu][1248]")                           # of NumPy's codes
SETS = (pickle.EMPTY_SET[0], pickle.FROZENSET[0])                    # hash what is in them


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
    states = [{name.removeprefix("module."): tensor
               for name, tensor in check_state(content[key], f"{path} ({key})").items()} for key in STATE_DICTS]
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
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{path} (g_ema): not a StyleGAN2 generator with the released names ({error}); "
                              "give the released checkpoint") from error


# ------------------------------------------------------------------------------------------------------------
# Latent statistics

def read_statistics(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of latent_statistics.pkl by name, read-only. A pickle of anything but arrays of numbers is refused."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the released latent_statistics.pkl")
    try:
        content = _ArrayUnpickler(path.read_bytes()).load()
    except _ForbiddenError as error:
        raise CheckpointError(f"{path}: {error}; it was not executed. Use the file as released") from error
    except Exception as error:       # as above
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: not a pickle of arrays; fetch it again ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a dict of arrays, found a {type(content).__name__}")
    for name, value in content.items():
        if not isinstance(value, _Array) or value.array is None:
            raise CheckpointError(f"{path}: '{name:.80}' is not an array of numbers ({type(value).__name__})")
    return {name: value.array for name, value in content.items()}


class _ForbiddenError(Exception):
    """The pickle asks for more than arrays."""


class _Dtype:
    """Stands for numpy.dtype, of plain numbers alone: of others a pickle may say any size, and arrays read past it."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not NUMBERS.fullmatch(code):
            raise ValueError(f"it asks for arrays of '{code:.80}', which are no numbers")
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])               # the rest says what code says


class _Array:
    """Stands for an array: a view of bytes that are in the pickle."""

    array: np.ndarray | None = None

    def build(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.view(data, dtype, shape, "F" if fortran else "C")

    def view(self, data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str = "C") -> _Array:
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
        return self


class _Named(dict):
    """A dict by names alone: what else a pickle may make a key of can take for ever to hash."""

    def __setitem__(self, name: str, value: object) -> None:
        if not isinstance(name, str):
            raise ValueError(f"expected the name of an array, found a {type(name).__name__}")
        super().__setitem__(name, value)


def _from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str,
                 axes: tuple[int, ...] | None = None) -> _Array:
    found = _Array().view(data, dtype, shape, "C" if axes else order)
    if axes:
        found.array = found.array.transpose(axes)
    return found


class _ArrayUnpickler(pickle._Unpickler):
    """Rebuilds arrays of numbers by the stand-ins above, and calls nothing else; any other name is refused.

    In Python, since to the one in C a number in the file can mean memory: its memo is as long as the highest index.
    """

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))                        # which gives no more than there is
        self.left = len(content)
        core = {"multiarray": {"_reconstruct": lambda kind, shape, code: _Array(),
                               "scalar": lambda dtype, data: _Array().view(data, dtype, ())},
                "numeric": {"_frombuffer": _from_buffer}}                                   # protocol 5
        self.allowed = {("numpy", "ndarray"): None, ("numpy", "dtype"): _Dtype, ("_codecs", "encode"): self.latin1,
                        ("collections", "OrderedDict"): lambda: _Named()}
        for numpy in ("numpy.core", "numpy._core"):                  # of NumPy 1 and 2
            self.allowed |= {(f"{numpy}.{module}", name): stand_in
                             for module, names in core.items() for name, stand_in in names.items()}

    def find_class(self, module: str, name: str) -> Callable | None:
        if (module, name) not in self.allowed:
            raise _ForbiddenError(f"the pickle asks for {module:.80}.{name:.80}, which arrays do not need")
        return self.allowed[module, name]

    def latin1(self, text: str, encoding: str) -> bytes:
        # How pickle protocols 0 to 2 spell bytes. No other codec: some decompress or decode, and none is needed.
        if encoding != "latin1":
            raise _ForbiddenError(f"the pickle asks for the codec '{encoding:.80}', which arrays do not need")
        self.left -= len(text)                                       # each text once, and not again and again
        if self.left < 0:
            raise ValueError("it asks for more bytes than it has")
        return text.encode("latin1")

    def load_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].build(state)                                  # of stand-ins: pickle's sets any attribute of all

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(found := _Named())
        for name, value in zip(items[::2], items[1::2], strict=True):
            found[name] = value

    def load_empty_dictionary(self) -> None:
        self.append(_Named())

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))    # pickle's makes room before

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code not in SETS}
    dispatch |= {pickle.BUILD[0]: load_build, pickle.DICT[0]: load_dict, pickle.EMPTY_DICT[0]: load_empty_dictionary,
                 pickle.BYTEARRAY8[0]: load_bytearray8}
