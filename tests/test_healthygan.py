"""healthygan.test and what else there is beside the training: scores, shipped weights, baselines, sets, scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluate
from common.results import BY_HASH
from common.weights import CheckpointError
from ct.window import encode
from dataset import DatasetError
from healthygan import sets, train, trivial, weights
from healthygan import test as healthygan_test
from healthygan.data import ImageSettings, read_slices
from healthygan.model import Generator, ModelConfig, Translation
from healthygan.reconstruct import Translator, TranslatorSettings
from healthygan.scoring import aucp, difference, unit_scores
from tests.healthygan_runs import rows, train_on, write_xrays

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def xrays(tmp_path_factory) -> Path:
    return write_xrays(tmp_path_factory.mktemp("xrays"))


@pytest.fixture(scope="module")
def finished(xrays, tmp_path_factory) -> Path:
    """A run of 20 steps, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert train_on(xrays, out) == 0
    return out


@pytest.fixture(scope="module")
def scored(finished, xrays, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("results")
    assert healthygan_test.main(["--data", str(xrays), "--model", str(finished), "--out", str(out), "--device", "cpu",
                                 "--precision", "fp32"]) == 0
    return out


def test_scores_are_the_mean_difference_and_evaluate_reads_them(scored, finished, xrays):
    table = rows(scored / "scores.csv")
    assert len(table) == 11 and [float(r["score"]) for r in table] == sorted(float(r["score"]) for r in table)[::-1]
    assert {r["scan_id"]: r["label"] for r in rows(scored / "labels.csv")}["diseased/00"] == "1"
    model = weights.load_model(finished / "best")
    for row in table:
        stored = np.asarray(Image.open(scored / f"maps/{row['scan_id']}.png")) / 65535
        assert stored.mean() == pytest.approx(float(row["score"]), abs=1e-5)
        assert row["flagged"] == str(int(float(row["score"]) > model.meta["threshold"]))
        assert 0 <= float(row["percentile"]) <= 75                # of 3 healthy: at most 3 / 4
        assert Image.open(scored / f"overlays/{row['scan_id']}.png").size == (192, 32)
    out = scored / "metrics"
    assert evaluate.main([str(scored / "scores.csv"), str(scored / "labels.csv"), "--out", str(out)]) == 0
    figures = json.loads((out / "metrics.json").read_text())["scan"]
    assert (figures["abnormal"], figures["normal"]) == (5, 6)


def test_a_second_run_leaves_nothing_of_the_first_ones_data(finished, xrays, tmp_path):
    out, own = tmp_path / "out", ["maps/mine.png", "overlays/healthy/notes.txt", "metrics.json", "x/maps/y.png"]
    flags = ["--model", str(finished), "--out", str(out), "--device", "cpu", "--precision", "fp32"]
    assert healthygan_test.main(["--data", str(xrays), *flags]) == 0
    for name in own:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    (out / "slices.csv").write_text("scan_id,slice,score\nhead,0,0.5\n")
    assert healthygan_test.main(["--data", str(xrays / "train/mixed"), *flags]) == 0
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {f"{kind}/mixed/{i:02d}.png" for kind in ("maps", "overlays") for i in range(10)}
    assert found == {"scores.csv", "run.json", *own, *pictures} and not (out / "maps/healthy").exists()


@pytest.mark.parametrize("there, text", [("run.json", '{"settings": {}}'), ("one/result.json", "{}"),
                                         (f"{BY_HASH}/ab/one/result.json", "{}")])
def test_results_of_the_projector_are_not_written_over(there, text, finished, xrays, tmp_path, capsys):
    """Its scores.csv and run.json were removed, or replaced."""
    out = tmp_path / "results"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text(text)
    (out / "scores.csv").write_text("scan_id,score\none,7.5\n")
    assert healthygan_test.main(["--data", str(xrays), "--model", str(finished), "--out", str(out)]) == 2
    assert f"results: holds results of projector.py ({there}); choose another --out" in capsys.readouterr().err
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {there, "scores.csv"}
    assert (out / there).read_text() == text and "one,7.5" in (out / "scores.csv").read_text()


def test_half_a_run_json_that_a_killed_run_left_is_replaced(finished, xrays, tmp_path):
    (tmp_path / "run.json").write_text('{"settings"')
    flags = ["--model", str(finished), "--out", str(tmp_path), "--device", "cpu", "--precision", "fp32"]
    assert healthygan_test.main(["--data", str(xrays / "train/mixed"), *flags]) == 0
    assert json.loads((tmp_path / "run.json").read_text())["images"] == 10


def test_a_run_that_is_killed_leaves_no_scores_beside_other_maps(finished, xrays, tmp_path, monkeypatch):
    """The scores of the data before stood beside the maps of these."""
    flags = ["--model", str(finished), "--out", str(tmp_path), "--device", "cpu", "--precision", "fp32"]
    assert healthygan_test.main(["--data", str(xrays), *flags]) == 0
    monkeypatch.setattr(healthygan_test, "score_rows", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert healthygan_test.main(["--data", str(xrays / "train/mixed"), *flags]) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"maps", "overlays"}


@pytest.mark.parametrize("name, text", [
    ("labels.csv", "scan_id,label,types\nhealthy/0,0,\n"), ("labels.csv", "scan_id,label\nfolder/0,0\n"),
    ("labels.csv", "scan_id,label\nhealthy/0,1\n"), ("labels.csv", "scan_id,label\nhealthy/0,2\n"),
    ("labels.csv", "no table"), ("slices.csv", "scan_id,slice,score,position_mm\nhead,0,0.5,0\n")])
def test_tables_that_are_not_its_own_stay(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    healthygan_test.clear(tmp_path)
    assert (tmp_path / name).read_text() == text


def test_unreadable_images_are_rows_and_exit_3(finished, xrays, tmp_path, capsys):
    shutil.copytree(xrays / "test/healthy", tmp_path / "folder")
    (tmp_path / "folder/bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert healthygan_test.main(["--data", str(tmp_path / "folder"), "--model", str(finished), "--out", str(out)]) == 3
    last = rows(out / "scores.csv")[-1]
    assert (last["scan_id"], last["status"]) == ("folder/bad", "failed") and last["reason"]
    assert not (out / "labels.csv").exists() and "skipped: folder/bad" in capsys.readouterr().err


def test_white_of_16_bit_images_can_be_named(finished, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32))
    stored = {"eight": pixels.astype(np.uint8), "twelve": (pixels * 16).astype(np.uint16)}
    for name, scaled in stored.items():
        (tmp_path / name).mkdir()
        Image.fromarray(scaled).save(tmp_path / name / "x.png")
        more = ["--white-16bit", "4080"] if name == "twelve" else []
        assert healthygan_test.main(["--data", str(tmp_path / name), "--model", str(finished), "--device", "cpu",
                                     "--precision", "fp32", "--out", str(tmp_path / f"{name}-out"), *more]) == 0
    eight, twelve = (float(rows(tmp_path / f"{name}-out/scores.csv")[0]["score"]) for name in ("eight", "twelve"))
    assert twelve == pytest.approx(eight, rel=1e-5)


def test_slices_are_scored_by_scan(slices32, tmp_path):
    listed = tmp_path / "mixed.txt"
    listed.write_text("head1\n")
    run, out = tmp_path / "run", tmp_path / "out"
    assert train.main(["--healthy", str(slices32), "--mixed", str(slices32), "--mixed-scans", str(listed), "--out",
                       str(run), "--preset", "smoke32", "--device", "cpu", "--iterations", "2"]) == 0
    assert healthygan_test.main(["--data", str(slices32), "--model", str(run), "--out", str(out)]) == 0
    slices = rows(out / "slices.csv")
    for row in rows(out / "scores.csv"):
        own = [float(s["score"]) for s in slices if s["scan_id"] == row["scan_id"]]
        assert len(own) == int(row["slices"]) == 8 and float(row["score"]) == pytest.approx(np.mean(own), rel=1e-12)


def test_slices_are_shrunk_by_a_whole_factor(slices32):
    whole, half = (read_slices(slices32, "all", ImageSettings("slices", size)) for size in (32, 16))
    first = whole.pixels[3, 0, :2, 16:18].astype(float).mean()
    assert half.pixels.shape[1:] == (1, 16, 16) and abs(half.pixels[3, 0, 0, 8] - first) <= 0.5
    with pytest.raises(DatasetError, match="cannot be shrunk by a whole factor to the network's 24"):
        read_slices(slices32, "all", ImageSettings("slices", 24))


def test_what_a_shrunk_slice_changes_by_is_added_to_the_whole_one():
    """A generator that draws 30 HU everywhere: 50 HU become 30; 90 HU, of which it sees 70, 90 + 30 - 70."""
    class Flat(Generator):
        def forward(self, x):
            y = encode(torch.full_like(x[:, 0], 30.0))
            return Translation(y, torch.ones_like(x[:, :1]), y)

    translator = Translator(TranslatorSettings(), Flat(4, 1), ModelConfig(size=64), 128, (0.0, 70.0), "cpu")
    hu = torch.full((2, 128, 128), 50.0)
    hu[1] = 90
    found = translator.closest_normal(hu, torch.ones_like(hu, dtype=torch.bool), np.array([20.0, 25.0]))
    torch.testing.assert_close(found.query_hu, hu, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.normal_hu[0], torch.full((128, 128), 30.0), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.normal_hu[1], torch.full((128, 128), 50.0), rtol=0, atol=1e-3)


def test_a_generator_that_changes_nothing_changes_nothing_beyond_its_windows_either():
    class Same(Generator):
        def forward(self, x):
            return Translation(x, torch.zeros_like(x[:, :1]), x)

    translator = Translator(TranslatorSettings(), Same(4, 1), ModelConfig(size=64), 64, (-100.0, 300.0), "cpu")
    hu = torch.full((1, 64, 64), 30.0)
    hu[0, 5:9], hu[0, 20:24] = 250, -80
    found = translator.closest_normal(hu, torch.ones_like(hu, dtype=torch.bool), np.array([50.0]))
    torch.testing.assert_close(found.normal_hu, found.query_hu, rtol=0, atol=1e-3)


def test_released_weights_can_be_tested(xrays, tmp_path):
    state = Generator().state_dict()
    state |= {"main.1.running_mean": torch.zeros(64), "main.1.num_batches_tracked": torch.tensor(3)}
    torch.save(state, tmp_path / "360000-G.ckpt")
    model = weights.find_model(tmp_path / "360000-G.ckpt")
    assert model.settings.size == 256 and not model.generator.training
    torch.save({**state, "main.0.weight": torch.zeros(3)}, tmp_path / "bad-G.ckpt")
    with pytest.raises(CheckpointError, match=r"main.0.weight is \[3\], expected \[64, 3, 7, 7\]"):
        weights.find_model(tmp_path / "bad-G.ckpt")
    torch.save({**state, "main.0.weight": 3}, tmp_path / "odd-G.ckpt")
    with pytest.raises(CheckpointError, match="found a int at 'main.0.weight', no tensor"):
        weights.find_model(tmp_path / "odd-G.ckpt")
    (tmp_path / "text-G.ckpt").write_text("hello")
    with pytest.raises(CheckpointError, match="text-G.ckpt: cannot be read as a state dict"):
        weights.find_model(tmp_path / "text-G.ckpt")


def test_released_weights_can_be_shipped(tmp_path):
    """Their model.json did not say what network it is, and so could not be read."""
    torch.manual_seed(0)
    released = Generator()
    torch.save(released.state_dict(), tmp_path / "360000-G.ckpt")
    assert weights.main([str(tmp_path / "360000-G.ckpt"), "--out", str(tmp_path / "model")]) == 0
    shipped = weights.find_model(tmp_path / "model")
    assert shipped.settings == weights.find_model(tmp_path / "360000-G.ckpt").settings
    torch.testing.assert_close(shipped.generator.main[0].weight, released.main[0].weight, atol=1e-3, rtol=0)


def test_a_shipped_model_is_half_precision_and_scores_alike(finished, tmp_path):
    assert weights.main([str(finished), "--out", str(tmp_path / "model"), "--note", "source=synthetic"]) == 0
    whole, shipped = weights.load_model(finished / "best"), weights.load_model(tmp_path / "model")
    assert shipped.meta["provenance"]["source"] == "synthetic" and shipped.meta["threshold"] == whole.meta["threshold"]
    assert all(t.dtype == torch.float16 for t in load_file(tmp_path / "model/generator.safetensors").values())
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(shipped.generator(x).y, whole.generator(x).y, atol=0.01, rtol=0)
    with open(tmp_path / "model/generator.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match="not the file that .*model.json was written for"):
        weights.load_model(tmp_path / "model")


def test_scores_by_hand():
    x = torch.zeros(1, 3, 1, 2)
    y = torch.tensor([[[[1.0, 0.0]], [[-1.0, 0.0]], [[0.0, 0.6]]]])
    torch.testing.assert_close(difference(x, y), torch.tensor([[[1 / 3, 0.1]]]))
    assert unit_scores([1, 2, 6], ["b", "a", "b"]) == {"b": 3.5, "a": 2}
    assert aucp(np.array([0.3, 0.1]), np.array([0.2, 0.1])) == 0.625


def test_trivial_baselines_find_a_bright_square(xrays, capsys):
    (first, logistic, _), (_, ridge, _), (third, pca, _), *larger = trivial.baselines(xrays, 2)
    assert first.endswith("8x8, C = 1") and third.startswith("PCA") and len(larger) == 2
    assert logistic == 1 and ridge == 1 and pca > 0.5
    assert trivial.main(["--data", str(xrays / "train")]) == 2
    assert "diseased" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--above", "nan"], "--above must be a number, got nan"), (["--bright", "-1"], "--bright must be a number of"),
    (["--bright", "inf"], "--bright must be a number of"), (["--seed", "-1"], "--seed must be a number of at least 0")])
def test_sets_by_what_is_no_number_are_refused(flags, message, capsys):
    """No pixel is above NaN: every half passed for the better one."""
    with pytest.raises(SystemExit) as stop:
        sets.main(["halves", "--data", "a", "--mixed", "b", "--healthy", "c", *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_a_pca_of_no_components_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        trivial.main(["--data", "x", "--components", "0"])
    assert stop.value.code == 2 and "--components must be at least 1" in capsys.readouterr().err


def test_test_names_what_is_wrong(finished, xrays, slices32, tmp_path, capsys):
    def error(data, model):
        assert healthygan_test.main(["--data", str(data), "--model", str(model), "--out", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "no such file or folder" in error(xrays, tmp_path / "nothing")
    assert "give a folder that healthygan.train has written" in error(xrays, tmp_path)
    assert "holds slices, but the model was trained on images" in error(slices32, finished)
    for name in ("healthy", "diseased"):
        (tmp_path / "half/test" / name).mkdir(parents=True)
    assert "no images in it" in error(tmp_path / "half", finished)
    (tmp_path / "half/test/diseased").rmdir()
    shutil.copytree(xrays / "test/healthy", tmp_path / "half/test/healthy", dirs_exist_ok=True)
    assert "diseased: no such folder" in error(tmp_path / "half", finished)


def test_the_script_leaves_no_metrics_of_other_data(tmp_path):
    script, results = tmp_path / "healthygan/test_covid.sh", tmp_path / "healthygan/results/covid"
    python = tmp_path / ".venv/bin/python"                        # writes scores alone, or finds no data
    for folder in (results / "metrics", python.parent):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "healthygan/test_covid.sh", script)
    python.write_text(f'#!/bin/sh\n[ "$3" != TYPO ] || exit 2\necho run $1\ntouch {results}/scores.csv\n')
    python.chmod(0o755)
    own = ["labels.csv", "metrics", "notes.txt"]                  # labels: somebody's, of other data
    for name in ("labels.csv", "metrics/metrics.json", "notes.txt"):
        (results / name).touch()
        os.utime(results / name, (0, 0))

    def run(data: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", str(script), data], timeout=60, capture_output=True, text=True)

    assert run("TYPO").returncode == 2                            # all was gone before the folder was looked for
    assert sorted(path.name for path in results.iterdir()) == own and (results / "metrics/metrics.json").exists()
    found = run("a folder without classes")
    assert found.returncode == 0 and found.stdout == f"run {script.parent / 'test.py'}\n"
    assert sorted(path.name for path in results.iterdir()) == ["labels.csv", "notes.txt", "scores.csv"]


@pytest.mark.parametrize("labelled", [True, False])
def test_figures_of_x_rays_come_with_what_they_may_mean(labelled, tmp_path):
    """An AUC was printed without a word of the two collections that the usual classes come from."""
    script, python = tmp_path / "healthygan/test_covid.sh", tmp_path / ".venv/bin/python"
    labels = tmp_path / "healthygan/results/covid/labels.csv"
    for folder in (labels.parent, python.parent):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / "healthygan/test_covid.sh", script)
    tests = f"touch {labels}" if labelled else ":"
    python.write_text(f'#!/bin/sh\ncase $1 in *test.py) {tests} ;; -c) echo None ;; *) echo auc 0.95 ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", str(script), "data"], check=True, timeout=60, capture_output=True, text=True)
    assert ("auc 0.95\n" in done.stdout) == ("may detect the source" in done.stdout) == labelled


def test_scripts_run_from_their_folder():
    folder = ROOT / "healthygan"
    usage = subprocess.run(["bash", "test_covid_pretrained.sh"], cwd=folder, capture_output=True, text=True)
    assert usage.returncode == 2 and "name a folder of chest X-rays" in usage.stderr
    dry = subprocess.run(["bash", "train_covid.sh", "datasets/covid", "--dry-run", "--preset", "cpu128"], cwd=folder,
                         capture_output=True, text=True)
    assert dry.returncode == 0 and json.loads(dry.stdout)["size"] == 128
