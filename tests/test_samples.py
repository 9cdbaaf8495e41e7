"""The benchmark of samples: nearest slices and copies counted by hand, and the command on a tiny run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import samples
from dataset import ScanRecord, SliceDataset, SliceWriter
from model import Generator, ModelConfig


def test_nearest_slice_is_found_as_it_is_and_mirrored():
    references = torch.zeros(300, 2, 2)                    # more than one block of references
    references[280] = torch.tensor([[10.0, 20.0], [30.0, 40.0]])
    queries = torch.stack([references[280] + torch.tensor([[2.0, -2.0], [2.0, -2.0]]), references[280].flip(-1)])
    distance, index = samples.nearest(queries, references)
    assert distance.tolist() == pytest.approx([2.0, 0.0], abs=1e-3) and index.tolist() == [280, 280]


def test_copies_are_counted_against_the_nearest_held_out_slices():
    held_out = torch.linspace(10, 20, 101)                 # the hundredth part lies below 10.1
    found = samples.copies(torch.tensor([5.0, 9.0, 12.0, 15.0]), held_out)
    assert found["near_hu"] == pytest.approx(10.1) and found["share_near"] == 0.5
    assert found["held_out"]["p50"] == pytest.approx(15) and found["samples"]["p50"] == pytest.approx(10.5)


def test_copied_samples_show_in_the_figures():
    generator = torch.Generator().manual_seed(0)
    train, held_out, other = (30 + 10 * torch.randn(40, 16, 16, generator=generator) for _ in range(3))
    copied, fresh = (samples.figures(one, held_out, train) for one in (train + 1, other))
    assert copied["slices"] == 40 and copied["copies"]["share_near"] == 1 and fresh["copies"]["share_near"] < 0.2
    assert copied["copies"]["samples"]["p50"] == pytest.approx(1, abs=1e-3)
    assert fresh["floor"] == copied["floor"]               # of training to held-out slices, whatever the samples are
    shifted = samples.figures(other + 20, held_out, train)
    assert shifted["swd"] > 3 * shifted["floor"]


def test_truncation_draws_samples_towards_one():
    torch.manual_seed(0)
    generator = Generator(ModelConfig(size=32, style_dim=8, channel_base=64, channel_max=8)).eval()
    spread = [samples.draw(generator, 40, psi, 0, (-20, 180)).std(0).mean() for psi in (0.0, 0.5, 1.0)]
    assert spread[0] < 1e-3 and spread[0] < spread[1] < spread[2]
    assert torch.equal(samples.draw(generator, 3, 0.7, 1, (0, 70)), samples.draw(generator, 3, 0.7, 1, (0, 70)))
    assert not torch.equal(samples.draw(generator, 3, 0.7, 1, (0, 70)), samples.draw(generator, 3, 0.7, 2, (0, 70)))


def test_command_on_a_run(gan_run, slices32, tmp_path, capsys):
    assert samples.main(["--run", str(gan_run), "--data", str(slices32), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["slices"] == len(SliceDataset(slices32, "val")) == 8
    assert f"{found['swd']:.2f} HU; of training slices to them: {found['floor']:.2f} HU" in capsys.readouterr().out
    for name in ("samples-psi-0.7.png", "samples-psi-1.png"):
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (8 * 32, 8 * 32)          # 64 samples
    with Image.open(tmp_path / "nearest.png") as sheet:
        assert sheet.size == (8 * 32, 4 * 32)              # 16 pairs


def test_other_data_than_the_runs_are_refused(gan_run, slices32, tmp_path, capsys):
    data, path = SliceDataset(slices32, "train"), tmp_path / "other.lmdb"
    with SliceWriter(path, data.manifest["settings"]) as writer:
        for split in ("train", "val"):
            parts = (part.numpy() for part in data.scan(0).values())
            writer.add(ScanRecord.encode(split, *parts), split, split)
    assert samples.main(["--run", str(gan_run), "--data", str(path), "--out", str(tmp_path)]) == 2
    assert "is not that of the database which --run" in capsys.readouterr().err


def test_a_models_copies_are_not_looked_for_among_what_calibrated_it(slices32, tmp_path, monkeypatch, capsys):
    """Its samples were said to repeat nothing, of slices that it had never seen."""
    facts = SliceDataset(slices32).facts()
    known = {"data": facts | {"digest": "1" * 64, "counts": {}}, "calibration_data": facts}
    monkeypatch.setattr(samples, "load_bundle", lambda *_: SimpleNamespace(meta={"provenance": known}))
    assert samples.main(["--model", "mine", "--data", str(slices32), "--out", str(tmp_path)]) == 2
    assert "--model mine was trained on 111111111111; give that database" in capsys.readouterr().err
