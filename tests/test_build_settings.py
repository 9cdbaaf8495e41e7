"""What latent_stats.py is asked for is what build() does: precision of the calibration, seed of the statistics."""

import pytest
import torch

from bundling import build
from common.weights import load_tensors
from tests.calibration_data import command, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_scans_are_reconstructed_in_the_precision_asked_for(inputs, tmp_path, monkeypatch, precision, dtype):
    """As read back from the weights that are stored, whatever the device is good at."""
    seen = []

    def end(folds, *_):
        seen.extend(fold.reconstructor.precision for fold in folds)
        raise ValueError("enough")

    monkeypatch.setattr(build, "calibrate", end)
    assert command(*inputs, tmp_path / "mine", "--set", "method=inversion", "--precision", precision) == 2
    assert seen == [dtype]


def test_statistics_of_codes_hang_on_the_seed(inputs, tmp_path):
    def mean(seed, name):
        assert command(*inputs, tmp_path / name, "--calibrate", "none", "--passes", "3", "--seed", str(seed)) == 0
        return load_tensors(tmp_path / name / "latent.safetensors")["mean"]

    first, again, other = (mean(seed, name) for seed, name in ((1, "a"), (1, "b"), (2, "c")))
    assert torch.equal(first, again) and not torch.equal(first, other)
