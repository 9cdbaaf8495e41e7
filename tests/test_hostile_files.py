"""Files made to harm: pickles that would run code, headers that lie about lengths. All refused, and nothing runs."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from common.weights import CheckpointError, load_tensors
from detect.released import read_networks, read_statistics


class Call:
    """Pickled, this calls a function when it is read."""

    def __init__(self, function: Callable, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def pickles(proof: Path) -> dict[str, bytes]:
    """Each would make the file `proof`, if it ran."""
    touch = f"touch {proof}"
    python = f"open({str(proof)!r}, 'w')"
    word = f"\x8c{chr(len(touch))}{touch}".encode("latin1")
    hidden = np.empty(1, object)
    hidden[0] = Call(os.system, touch)
    return {
        "os.system": pickle.dumps({"mean": Call(os.system, touch)}),
        "in protocol 0": pickle.dumps({"mean": Call(os.system, touch)}, protocol=0),
        "eval": pickle.dumps({"mean": Call(eval, python)}),
        "exec": pickle.dumps({"mean": Call(exec, python)}),
        "subprocess": pickle.dumps({"mean": Call(subprocess.check_call, ["touch", str(proof)])}),
        "open": pickle.dumps({"mean": Call(open, str(proof), "w")}),
        "by name": b"\x80\x04\x8c\x02os\x8c\x06system"
                   b"\x93" + word + b"\x85R.",
        "through an allowed module": b"\x80\x04\x8c\x05numpy\x8c\x0ef2py.os.system\x93" + word + b"\x85R.",
        "an array of objects": pickle.dumps({"mean": hidden}),
        "instead of a dict": pickle.dumps(Call(os.system, touch)),
        "by the old opcode": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "a partial function": pickle.dumps({"mean": Call(functools.partial(os.system, touch))}),
    }


NAMES = list(pickles(Path("proof")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_runs_as_no_kind_of_file(name, tmp_path):
    proof = tmp_path / "proof"
    content = pickles(proof)[name]
    assert len(NAMES) >= 10

    (tmp_path / "latent_statistics.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match="latent_statistics.pkl"):
        read_statistics(tmp_path / "latent_statistics.pkl")

    # In the zip that torch.save writes, and bare
    torch.save({"g_ema": {}, "d": {}, "e": {}}, whole := io.BytesIO())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(tmp_path / "checkpoint.pth", "w") as target:
        for member in source.namelist():
            target.writestr(member, content if member.endswith("data.pkl") else source.read(member))
    for path in (tmp_path / "checkpoint.pth", tmp_path / "latent_statistics.pkl"):
        with pytest.raises(CheckpointError, match=path.name):
            read_networks(path)

    # As a mask beside slices: a bare pickle, and one in an .npy that says it holds objects
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": (2, 8, 8)})
    for mask in (content, header.getvalue() + content):
        (tmp_path / "bet.npy").write_bytes(mask)
        with pytest.raises(ValueError, match="pickle"):
            np.load(tmp_path / "bet.npy", allow_pickle=False)              # as ct.slices reads it
    assert not proof.exists()


def test_those_pickles_would_run(tmp_path):
    """Or the test above would prove nothing."""
    for name, content in pickles(tmp_path / "proof").items():
        try:
            pickle.loads(content)
        except Exception:                                                  # some fail, having run
            pass
        assert (tmp_path / "proof").exists(), name
        (tmp_path / "proof").unlink()


GOOD = save({"a": torch.zeros(4)})
HEADER = json.loads(GOOD[8:8 + struct.unpack("<Q", GOOD[:8])[0]])


def with_header(text: str, length: int | None = None, data: bytes = bytes(16)) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + data


@pytest.mark.parametrize("content", [
    with_header(json.dumps(HEADER), length=2**63),                         # a header longer than the file, by far ...
    with_header(json.dumps(HEADER), length=len(json.dumps(HEADER)) + 17),  # ... and by a byte
    with_header(json.dumps({"a": {**HEADER["a"], "data_offsets": [0, 2**40]}})),
    with_header(json.dumps({"a": {**HEADER["a"], "shape": [2**40]}})),
    with_header(json.dumps({"a": {**HEADER["a"], "shape": [2**32, 2**32]}})),
    with_header(json.dumps({"a": {**HEADER["a"], "data_offsets": [16, 0]}})),
    with_header(json.dumps({"a": HEADER["a"], "b": HEADER["a"]})),          # two tensors in one place
    with_header(json.dumps({"a": {**HEADER["a"], "dtype": "F128"}})),
    with_header("[" * 100_000),
    with_header(json.dumps(HEADER), data=bytes(15)),
    GOOD[:7], b"",
])
def test_a_safetensors_header_that_lies_is_refused(content, tmp_path):
    path = tmp_path / "generator.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="generator.safetensors: not a safetensors file"):
        load_tensors(path)
