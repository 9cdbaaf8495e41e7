"""Files made to harm: pickles that would run code, headers that lie about lengths. All refused, and nothing runs."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import struct
import subprocess
import sys
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


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def beyond_its_own(size: int) -> bytes:
    """An array of `size` bytes at the place of an item of 8: a dtype is told another size after the array is made."""
    dtype, array = b"h\x00", b"h\x01"
    return (b"\x80\x04" + name("numpy", "dtype") + text("V8") + b"\x89\x88\x87Rq\x000"
            + name("numpy", "ndarray") + number(1) + b"\x85" + dtype + b"\x86Rq\x010"
            + dtype + b"(" + number(3) + text("|") + b"NNN" + number(size) + number(1) + number(0) + b"tb0"
            + b"}" + text("mean") + name("numpy.core.numeric", "_frombuffer") + b"(" + array
            + name("numpy", "dtype") + text("f8") + b"\x85R" + number(size // 8) + b"\x85" + text("C") + b"tRs.")


def nested(count: int) -> bytes:
    """A tuple of twice the one before, count times."""
    return b")" + b"2\x86" * count


CLAIMS = {
    "memory that is not its own": (beyond_its_own(1 << 30), "arrays of 'V8', which are no numbers"),
    "an array of 10 TB": (b"}" + text("mean") + name("numpy", "ndarray") + number(10**13) + b"\x85\x85Rs.",
                          "'NoneType' object is not callable"),
    "an array without content": (b"}" + text("mean") + name("numpy.core.multiarray", "_reconstruct")
                                 + name("numpy", "ndarray") + number(0) + b"\x85" + text("b") + b"\x87Rs.",
                                 "'mean' is not an array of numbers"),
    "bytes by the terabyte": (b"\x96" + struct.pack("<Q", 1 << 40) + b".", "EOFError"),
    "a frame by the terabyte": (b"\x95" + struct.pack("<Q", 1 << 40) + b".", "IndexError"),
    "a place in the memo": (b"Nr" + struct.pack("<I", 1 << 31) + b".", "found a NoneType"),
    "a name that takes for ever to hash": (b"}" + nested(200) + b"Ns.", "the name of an array, found a tuple"),
    "a set that takes for ever to hash": (b"\x8f(" + nested(200) + b"\x90.", "KeyError"),
    "a list that is long when written out": (b"}" + text("mean") + b"]((Nlq\x00" + b"h\x00" * 9 + b"es.",
                                             r"'mean' is not an array of numbers \(list\)"),
    "a text over and over": (text("x" * 200) + b"q\x000(" + (name("_codecs", "encode") + b"h\x00" + text("latin1")
                                                            + b"\x86R") * 100 + b"l.", "more bytes than it has"),
    "attributes of what it calls": (name("_codecs", "encode") + b"N}" + text("__defaults__") + b")s\x86b.",
                                    "object has no attribute 'build'"),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_pickle_that_claims_more_than_it_holds_is_refused(what, tmp_path):
    """The first, of 190 bytes, ended the process: it read memory that was not the array's."""
    content, message = CLAIMS[what]
    (tmp_path / "s.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"s.pkl: .*{message}"):
        read_statistics(tmp_path / "s.pkl")


FLIPS = """
import pickle, resource
from pathlib import Path
import numpy as np
from common.weights import CheckpointError
from detect.released import read_statistics

arrays = {name: np.full((2, 3), 0.5, np.float32) for name in ("mean", "std", "pca_components")}
Path.is_file, Path.read_bytes = lambda path: True, lambda path: bytes(altered)        # to write 15,000 files takes long
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)
for protocol in (0, 2, 5):
    whole, read = pickle.dumps(arrays, protocol=protocol), 0
    for bit in range(8 * min(len(whole), 400)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        try:
            found = read_statistics("s.pkl")
        except CheckpointError:
            continue
        read += 1
        for name, array in found.items():
            assert isinstance(name, str) and array.dtype.kind in "fiu" and array.nbytes <= len(altered)
    print(protocol, read)
"""


def test_a_flipped_bit_of_a_pickles_head_is_harmless():
    """MemoryError, OverflowError and SystemError came through, and 1.4 GB for an index in the memo."""
    done = subprocess.run([sys.executable, "-c", FLIPS], capture_output=True, text=True, timeout=300,
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == list("025")


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
