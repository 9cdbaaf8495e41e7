"""checkpoint.py show: what a bundle is."""

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import checkpoint
from tests.bundle_data import latent_stats, networks, save

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def bundle_parts():
    return networks(), latent_stats()


def test_where_a_bundle_comes_from_is_shown_in_short(tmp_path, bundle_parts):
    """It was one line of kilobytes of JSON. Whatever the provenance holds, the whole is in model.json."""
    shown = checkpoint.describe(ROOT / "models" / "head-128").partition("\n  versions")[2]
    lines = shown.splitlines()
    assert "{" not in shown and len(lines) < 30 and max(map(len, lines[:-1])) <= 120
    for expected in ("28 healthy scans; thresholds, exceeded by 5% of such scans at most: max 0.76, top3 0.651, mean",
                     "gan                  1008 images of database b1b25a593347e72a\n",
                     "data                 database b1b25a593347e72a: 80 scans to train on, 28 held out\n",
                     "surroundings         186368 images of database b1b25a593347e72a\n",
                     "reader taught by     98 of the 108 scans of database b1b25a593347e72a, 3744 images\n",
                     "notes                non-commercial research, as the licences of CT-ICH",
                     "in full              " + str(ROOT / "models" / "head-128" / "model.json")):
        assert expected in shown
    known = {"notes": "two\nlines", "folds": [{"held_out": 3}] * 2, "whatever": [1, 2], "none": [], "encoder": None}
    save(tmp_path / "bundle", *bundle_parts, {"preprocessing": None, "calibration": None, "provenance": known})
    shown = checkpoint.describe(tmp_path / "bundle")
    for expected in ("notes                two lines\n", "folds                2 entries\n",
                     "whatever             [1, 2]\n", "none                 []\n",
                     "calibration          none: scores without percentiles\n"):
        assert f"\n  {expected}" in shown


def test_notes_are_shown_in_full():
    """Of how head-256 was trained, for which models/README.md sends its reader here, `4 entries` were shown."""
    assert checkpoint.comes_from({"notes": {"how": ["a", "b"]}}) == ["  note: how            a; b"]
    shown = " ".join(checkpoint.describe(ROOT / "models" / "head-256").split())
    assert "note: how slices: the 3,106 of SIZE=256 recipes/head-128.sh (2,086" in shown
    assert "steps of 2 HU; no GAN: generator, encoder and discriminator start" in shown
    shown = " ".join(checkpoint.describe(ROOT / "models" / "phantom-128").split())      # 1,525 steps of 8 images
    assert " encoder 12200 images " in shown and "of its second run alone, with predicted noise: 12,200 images" in shown


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_model_of_healthygan_is_told_by_its_name(more, capsys):
    """It was said to be no model bundle, which latent_stats.py were to write."""
    assert checkpoint.main(["show", str(ROOT / "models" / "healthygan-cxr-128"), *more]) == 2
    told = capsys.readouterr().err
    assert "healthygan-cxr-128/model.json: a model of HealthyGAN, for python -m healthygan.test (healthygan/" in told


def test_a_folder_that_may_not_be_read_is_told_so(tmp_path, capsys, monkeypatch):
    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr("common.weights.sha256", closed)
    for more in ((), ("--json",)):
        assert checkpoint.main(["show", str(ROOT / "models" / "heads-128"), *more]) == 2
        assert "heads-128: cannot be read (Permission denied); give" in capsys.readouterr().err


def test_a_reader_that_leaves_early_gets_no_traceback():
    """`checkpoint.py show MODEL | head -1`: the pipe is closed before anything is written."""
    command = [sys.executable, str(ROOT / "checkpoint.py"), "show", str(ROOT / "models" / "heads-128")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE
