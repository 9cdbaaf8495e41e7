"""Sets of slices that differ in disease alone: halves with their mirror images, and random shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from healthygan import sets

SIDE = 32
NUMBERS = np.array([3, 4, 7])


@pytest.fixture
def slices(tmp_path) -> Path:
    """Three slices of 30 HU in a square brain: blood on the right, on the left, and on both sides."""
    path = tmp_path / "bleeds.lmdb"
    brain = np.zeros((3, SIDE, SIDE), bool)
    brain[:, 4:28, 4:28] = True
    hu = np.where(brain, 30, 0)
    hu[0, 10:16, 20:25] = 65
    hu[1, 10:16, 8:12] = 65
    hu[2, 10:16, 8:12] = hu[2, 10:16, 20:25] = 65
    settings = PreprocessSettings(StandardiseSettings(size=SIDE, hu_clip=(0, 70))).to_json()
    with SliceWriter(path, settings) as writer:
        writer.add(ScanRecord.encode("head", hu, brain, np.array([50.0, 45, 40]), NUMBERS), "train", "someone")
    return path


def test_halves_by_hand():
    np.testing.assert_array_equal(sets.halves(np.array([[1, 2, 3, 4], [5, 6, 7, 8]])),
                                  [[[1, 2, 2, 1], [5, 6, 6, 5]], [[4, 3, 3, 4], [8, 7, 7, 8]]])


def test_bright_pixels_count_inside_the_brain_only():
    brain = np.ones((8, 8), bool)                                 # 6 x 6 are inside
    hu = np.full((8, 8), 30)
    hu[0] = 300                                                   # reaches row 1 through the 3 x 3 mean: 6 of 36
    assert sets.bright_share(hu, brain, 100) == pytest.approx(1 / 6)
    assert sets.bright_share(hu, brain, 250) == 0
    assert sets.bright_share(hu, np.zeros((8, 8), bool), 100) == np.inf


def test_the_half_with_blood_goes_to_set_a_and_the_other_to_set_b(slices, tmp_path, capsys):
    paths = [tmp_path / "a.lmdb", tmp_path / "b.lmdb"]
    assert sets.main(["halves", "--data", str(slices), "--mixed", str(paths[0]), "--healthy", str(paths[1])]) == 0
    assert capsys.readouterr().out == "2 slices halved, 1 left out\n"
    for path, bloody in zip(paths, (True, False)):
        written = SliceDataset(path)
        scan, entry = written.scan(0), written.manifest["scans"][0]
        assert written.manifest["settings"] == SliceDataset(slices).manifest["settings"]
        assert (entry["scan_id"], entry["patient"], entry["slices"]) == ("head", "someone", [3, 4])
        assert scan["below_vertex_mm"].tolist() == [50, 45]
        hu = scan["hu"].numpy()
        np.testing.assert_array_equal(hu, hu[..., ::-1])
        assert ((hu == 65).sum((1, 2)) == ([60, 48] if bloody else [0, 0])).all()
    assert sets.main(["halves", "--data", str(slices), "--mixed", str(tmp_path / "c.lmdb"), "--healthy",
                      str(tmp_path / "d.lmdb"), "--above", "20"]) == 2
    assert "none of its 3 slices has a half with at most 0.002 of its brain above 20 HU" in capsys.readouterr().err
    assert not (tmp_path / "c.lmdb").exists()


def test_what_is_there_is_replaced_only_when_told(slices, tmp_path, capsys):
    """As after a run that was killed between its two databases: the one put in place first is there."""
    better, command = tmp_path / "b.lmdb", ["halves", "--data", str(slices), "--mixed", str(tmp_path / "a.lmdb")]
    better.write_bytes(slices.read_bytes())
    assert sets.main([*command, "--healthy", str(better)]) == 2
    assert "b.lmdb exists already: choose another --healthy, or pass --overwrite" in capsys.readouterr().err
    assert sets.main([*command, "--healthy", str(better), "--overwrite"]) == 0
    assert not (SliceDataset(better).scan(0)["hu"] == 65).any()
    assert sets.main([*command, "--healthy", str(tmp_path / "c.lmdb")]) == 2
    assert "a.lmdb exists already: choose another --mixed, or pass --overwrite" in capsys.readouterr().err
    shapes = ["shapes", "--data", str(slices), "--mixed"]
    assert sets.main([*shapes, str(tmp_path / "a.lmdb")]) == 2 and sets.main([*shapes, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "a.lmdb exists already: choose another --mixed" in said and "is a folder: --mixed names a file" in said
    assert sets.main([*shapes, str(tmp_path / "a.lmdb"), "--overwrite"]) == 0


def test_no_file_is_read_and_written_or_written_twice(slices, tmp_path, capsys):
    before, other = slices.read_bytes(), str(tmp_path / "b.lmdb")
    for mixed, healthy in ((str(slices), other), (other, str(slices)), (other, other)):
        with pytest.raises(SystemExit):
            sets.main(["halves", "--data", str(slices), "--mixed", mixed, "--healthy", healthy, "--overwrite"])
        assert "one file is named twice" in capsys.readouterr().err
    assert slices.read_bytes() == before and not Path(other).exists()


def test_shapes_change_the_brain_alone_and_come_again(slices, tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = tmp_path / f"{name}.lmdb"
        assert sets.main(["shapes", "--data", str(slices), "--mixed", str(path), "--seed", str(seed)]) == 0
        found.append(SliceDataset(path).scan(0))
    before = SliceDataset(slices).scan(0)
    changed = found[0]["hu"] != before["hu"]
    assert changed.any((1, 2)).sum() >= 2 and not (changed & ~before["brain"]).any()
    assert 0 <= found[0]["hu"].min() and found[0]["hu"].max() <= 70
    assert (found[0]["hu"] == found[1]["hu"]).all() and not (found[0]["hu"] == found[2]["hu"]).all()
    assert SliceDataset(tmp_path / "a.lmdb").manifest["scans"][0]["slices"] == NUMBERS.tolist()


def test_the_second_database_is_of_halves_alone(slices, tmp_path, capsys):
    for what, more in (("halves", []), ("shapes", ["--healthy", str(tmp_path / "b.lmdb")])):
        with pytest.raises(SystemExit):
            sets.main([what, "--data", str(slices), "--mixed", str(tmp_path / "a.lmdb"), *more])
        assert "--healthy names the second database" in capsys.readouterr().err
