"""The baselines: what each calls abnormal, that they come back from disk as they were, and their command."""

from __future__ import annotations

import csv

import nibabel as nib
import numpy as np
import pytest
import torch

import distributed
from benchmarks import baselines
from benchmarks.baselines import HuFit, HuThresholds, anomaly_map
from common.results import BY_HASH
from common.weights import save_tensors
from ct.frame import PreprocessSettings, preprocess_scan
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect import pca as position_pca
from detect.autoencoder import Autoencoder, AutoencoderFit, coarse_noise
from detect.fitted import Fitted
from detect.pca import PcaFit, PositionPca
from evaluation.cohort import read_scores
from tests.helpers import synthetic_head, synthetic_scan
from tests.writers import write_slice_folder

SETTINGS = {"hu": HuFit(), "pca": PcaFit(components=2, step_mm=20.0),
            "dae": AutoencoderFit(width=8, depth=2, noise_size=4, steps=3, batch=4)}


@pytest.fixture(scope="module")
def data(slices32) -> SliceDataset:
    return SliceDataset(slices32, "train")


@pytest.fixture(scope="module")
def fits(data) -> dict[str, Fitted]:
    found = {kind: baselines.KINDS[kind](settings) for kind, settings in SETTINGS.items()}
    for baseline in found.values():
        baseline.fit(data)
    return found


def database(path, slices: dict[str, tuple[np.ndarray, list[float]]]) -> SliceDataset:
    """One scan an entry: hu [S, N, N] and mm below the vertex; all of the frame is brain."""
    with SliceWriter(path, PreprocessSettings().to_json()) as writer:
        for name, (hu, below) in slices.items():
            writer.add(ScanRecord.encode(name, hu, np.ones(hu.shape, bool), below), "train", name)
    return SliceDataset(path)


@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16])
def test_the_autoencoder_computes_in_what_the_device_does_natively(native, monkeypatch):
    """Emulated, as bfloat16 is on most CPUs without AMX, a step takes six times as long."""
    monkeypatch.setattr(distributed, "pick_precision", lambda flag, device: native)
    one, seen = Autoencoder(AutoencoderFit(width=8, depth=1)), []
    one.net.register_forward_hook(lambda net, inputs, output: seen.append(output.dtype))
    one._denoised(torch.zeros(1, 32, 32))
    assert seen == [native]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_saved_baseline_comes_back_as_it_was(kind, fits, data, tmp_path):
    fits[kind].save(tmp_path / "saved.safetensors")
    loaded = baselines.load(tmp_path / "saved.safetensors")
    scan = data.scan(0)
    before, after = (anomaly_map(b, scan["hu"], scan["brain"], scan["below_vertex_mm"]) for b in (fits[kind], loaded))
    assert type(loaded) is type(fits[kind]) and loaded.fitting == SETTINGS[kind]
    assert loaded.trained_on["data"]["settings"] == data.manifest["settings"]
    assert loaded.trained_on["data"]["digest"] == data.manifest["digest"]
    assert torch.allclose(before, after, atol=0.5)                   # the components are kept as float16


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_map_is_not_negative_and_lies_in_the_brain(kind, fits, data):
    scan = data.scan(1)
    found = anomaly_map(fits[kind], scan["hu"] + 30, scan["brain"], scan["below_vertex_mm"])
    assert found.shape == scan["hu"].shape and found.dtype == torch.float32
    assert (found >= 0).all() and (found[~scan["brain"]] == 0).all() and found.max() > 1


def test_an_unfitted_baseline_says_so():
    with pytest.raises(ValueError, match="pca: not fitted"):
        anomaly_map(PositionPca(), torch.zeros(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), [0.0])


def test_another_file_is_no_baseline(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no tensors in here")
    with pytest.raises(ValueError, match=r"x\.safetensors: cannot be read as a baseline"):
        baselines.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("meta", ({}, {"config": '{"size": 32', "trained_on": "{}"},
                                  {"config": '{"size": 32, "colour": 1}', "trained_on": "{}"}))
def test_a_file_of_another_version_is_refused(tmp_path, meta):
    """With a traceback, where it held another setting, or none."""
    path = tmp_path / "pca.safetensors"
    save_tensors({"mean": torch.zeros(1)}, path, metadata={"method": "pca", **meta})
    with pytest.raises(ValueError, match=r"pca\.safetensors: not as this version writes it .*; fit it anew"):
        baselines.load(path)


# ---- no reconstruction

def test_flat_draws_one_grey_in_the_brain_and_leaves_the_rest():
    hu, brain = torch.tensor([[[30.0, 70.0], [0.0, 900.0]]]), torch.tensor([[[True, True], [True, False]]])
    flat = baselines.Flat()
    found = flat.closest_normal(hu, brain, np.zeros(1))
    assert found.normal_hu.tolist() == [[[30.0, 30.0], [30.0, 900.0]]]
    assert (found.query_hu - found.normal_hu).tolist() == [[[0.0, 40.0], [-30.0, 0.0]]]


# ---- HU thresholds

def test_hu_thresholds_take_blood_but_no_bone_no_fluid_and_no_single_pixel(data):
    baseline = HuThresholds()
    baseline.fit(data)
    hu = torch.full((1, 24, 24), 35.0)
    hu[0, 2:7, 2:7] = 70                                             # 15 above the threshold
    hu[0, 12:17, 2:7] = 300
    hu[0, 2:7, 12:17] = 5
    hu[0, 20, 20] = 80
    brain = torch.ones_like(hu, dtype=torch.bool)
    found = anomaly_map(baseline, hu, brain, [0.0])[0]
    assert (found[3:6, 3:6] == 15).all()
    found[2:7, 2:7] = 0
    assert (found == 0).all()


# ---- PCA

def test_components_draw_what_varies_and_are_orthonormal():
    rng = np.random.default_rng(0)
    mean, first, second = (torch.from_numpy(rng.normal(size=(8, 8))).float() for _ in range(3))
    weights = torch.from_numpy(rng.normal(size=(12, 2))).float()
    slices = mean + weights[:, :1, None] * first + weights[:, 1:, None] * second
    middle, basis = position_pca._components(slices, 2)
    flat = basis.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(2), atol=1e-4)
    drawn = (slices - middle).flatten(1) @ flat.T @ flat
    assert torch.allclose(drawn, (slices - middle).flatten(1), atol=1e-3)


def test_pca_compares_with_slices_of_the_same_height(tmp_path):
    rng = np.random.default_rng(0)
    texture = rng.normal(0, 0.5, (6, 16, 16))
    data = database(tmp_path / "two.lmdb", {"top": (20 + texture, [0.0] * 6), "base": (60 + texture, [100.0] * 6)})
    pca = PositionPca(PcaFit(components=2, step_mm=10.0))
    pca.fit(data)
    hu, brain = torch.full((2, 16, 16), 60.0), torch.ones(2, 16, 16, dtype=torch.bool)
    top, base = anomaly_map(pca, hu, brain, np.array([3.0, 97.0]))
    assert top[4:12, 4:12].mean() == pytest.approx(40, abs=2)
    assert base[4:12, 4:12].mean() < 2


def test_pca_does_not_see_bone(tmp_path):
    rng = np.random.default_rng(0)
    hu = 30 + rng.normal(0, 1, (6, 16, 16))
    data = database(tmp_path / "six.lmdb", {"six": (hu, [0.0] * 6)})
    pca = PositionPca(PcaFit(components=2, step_mm=10.0))
    pca.fit(data)
    brain = torch.ones(1, 16, 16, dtype=torch.bool)
    brain[:, :4] = False
    plain = torch.full((1, 16, 16), 30.0)
    with_bone = torch.where(brain, plain, torch.tensor(1000.0))
    assert torch.equal(*(anomaly_map(pca, query, brain, [0.0]) for query in (plain, with_bone)))


def test_pca_needs_more_slices_than_components(data):
    with pytest.raises(ValueError, match="too few for 500 components.*--components"):
        PositionPca(PcaFit(components=500)).fit(data)


# ---- denoising autoencoder

def test_coarse_noise_is_smooth_seeded_and_another_one_a_slice():
    def drawn(seed):
        return coarse_noise((4, 64, 64), 8, torch.Generator().manual_seed(seed))

    noise = drawn(3)
    assert torch.equal(noise, drawn(3)) and not torch.equal(noise, drawn(4))
    assert not torch.equal(noise[0], noise[1])
    assert abs(noise.mean()) < 0.3 and 0.4 < noise.std() < 1.1       # bilinear enlargement takes some of it away
    inner = noise.diff(dim=-1).abs().median()
    assert inner < 0.25 * noise.std()


def test_noise_is_added_to_the_brain_alone(monkeypatch):
    dae, seen = Autoencoder(AutoencoderFit(width=8, depth=1, noise_size=4)), []
    own = dae._denoised
    monkeypatch.setattr(dae, "_denoised", lambda hu: (seen.append(hu), own(hu))[1])
    brain = torch.zeros(2, 16, 16, dtype=torch.bool)
    brain[:, 4:12, 4:12] = True
    batch = {"hu": torch.full((2, 16, 16), 30, dtype=torch.int16), "brain": brain}
    dae._step(batch, torch.optim.Adam(dae.net.parameters()), torch.Generator().manual_seed(0))
    assert (seen[0][~brain] == 30).all() and seen[0][brain].std() > 5


def test_the_autoencoder_learns_and_the_seed_decides(tmp_path):
    rng = np.random.default_rng(0)
    hu = np.clip(30 + 10 * np.sin(np.arange(16) / 2)[:, None] + rng.normal(0, 1, (8, 16, 16)), -20, 100)
    data = database(tmp_path / "eight.lmdb", {"eight": (hu, [5.0 * i for i in range(8)])})
    settings = AutoencoderFit(width=8, depth=1, noise_size=4, steps=60, batch=8, lr=5e-3)
    trained, again = Autoencoder(settings), Autoencoder(settings)
    for dae in (trained, again):
        dae.fit(data)
    query, brain = torch.from_numpy(hu).float(), torch.ones(8, 16, 16, dtype=torch.bool)
    query[:, 4:10, 4:10] += 40
    maps = anomaly_map(trained, query, brain, np.arange(8.0))
    healthy = torch.ones(16, 16, dtype=torch.bool)
    healthy[2:12, 2:12] = False
    assert maps[:, 5:9, 5:9].mean() > 2 * maps[:, healthy].mean()
    assert all(torch.equal(a, b) for a, b in zip(trained.state().values(), again.state().values()))


def test_the_autoencoder_refuses_slices_it_cannot_halve(data):
    with pytest.raises(ValueError, match="slices of 32 pixels cannot be halved 6 times.*--depth"):
        Autoencoder(AutoencoderFit(width=8, depth=5)).fit(data)


@pytest.mark.parametrize("width, groups", [(12, 1), (20, 2), (28, 1), (32, 4), (44, 1)])
def test_any_width_has_groups_of_channels_alike(width, groups):
    """28 ended in 'num_channels (28) must be divisible by num_groups (3)'."""
    net = Autoencoder(AutoencoderFit(width=width, depth=1)).net
    assert net.down[0][1].num_groups == groups and net(torch.zeros(1, 1, 8, 8)).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"noise_hu": -1.0}, {"seed": -1}])
def test_settings_that_cannot_be_meant_name_their_flag(wrong):
    with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
        AutoencoderFit(**wrong)


# ---- scores

def test_a_slice_scores_the_mean_of_its_map_over_the_brain():
    maps, brain = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    brain[0, :2] = True                                              # 8 pixels; the second slice has none
    maps[0, 0, 0], maps[0, 3, 3] = 4.0, 100.0
    assert baselines.slice_scores(maps, brain).tolist() == [0.5, 0.0]


def test_a_scans_map_lies_in_its_own_geometry(data):
    scan, truth = synthetic_scan(lesion=(0, 10, 30, 14, 75), angle_deg=8)
    empty = synthetic_scan(angle_deg=8)[0]
    baseline = HuThresholds()
    baseline.fit(data)
    settings = PreprocessSettings(StandardiseSettings(size=64))
    scored = baselines.score_scan(baseline, preprocess_scan(scan, settings))
    lesion = np.abs(scan.hu - empty.hu) > 30
    assert scored.anomaly.shape == scan.hu.shape and scored.shown.dtype == bool
    assert lesion[scored.anomaly > 8].mean() > 0.8 and (scored.slice_scores[~scored.shown] == 0).all()
    assert scored.scan_score("max") == scored.slice_scores.max() > 0


@pytest.mark.parametrize("slices, spacing_mm", [(28, 5.0), (112, 1.25)])
def test_thin_slices_count_as_the_slab_that_they_make(slices, spacing_mm):
    """One of 5 mm at 3, two at 0: 15 mm of them have a mean of 1, whatever the scan's own slices."""
    scan = synthetic_scan(slices=slices, size=48, spacing_mm=(spacing_mm, 4.8, 4.8))[0]
    pre = preprocess_scan(scan, PreprocessSettings(StandardiseSettings(size=32)))
    hu = baselines.kept_slices(pre)[0]
    scores = torch.zeros(len(hu))
    scores[len(hu) // 2] = 3.0
    scored = baselines.to_scan(pre, torch.zeros_like(hu), scores)
    assert len(scored.slice_scores) == slices and scored.scan_score("top3") == pytest.approx(1)


# ---- the command

def test_fit_and_score_write_what_evaluate_reads(slices32, tmp_path):
    for name, lesion in (("normal", None), ("bleed", (0, 10, 25, 20, 75))):
        head = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6), lesion=lesion)[0]
        write_slice_folder(tmp_path / "scans" / name, head, slice_spacing_mm=10.0)
    saved, out = str(tmp_path / "hu.safetensors"), tmp_path / "results"
    assert baselines.main(["fit", "hu", "--data", str(slices32), "--out", saved, "--low-hu", "50",
                           "--device", "cpu"]) == 0
    assert baselines.load(saved).fitting.low_hu == 50
    assert baselines.main(["score", saved, str(tmp_path / "scans"), "--out", str(out), "--mask-hu", "5",
                           "--device", "cpu"]) == 0
    scores = read_scores(out / "scores.csv")
    assert scores["bleed",] > scores["normal",]
    slices = read_scores(out / "slices.csv", by_slice=True)
    assert {key[0] for key in slices} == {"bleed", "normal"}
    assert any(slices.values()) and all(score == float(np.float32(score)) for score in slices.values())
    mask, values = (nib.load(out / "bleed" / f"{name}.nii.gz").get_fdata() for name in ("mask", "anomaly"))
    assert np.array_equal(mask > 0, values > 5) and mask.any()


def test_a_broken_scan_is_a_row_with_a_reason(fits, tmp_path):
    fits["hu"].save(tmp_path / "hu.safetensors")
    write_slice_folder(tmp_path / "scans" / "empty", np.full((4, 64, 64), -1000.0), slice_spacing_mm=10.0)
    assert baselines.main(["score", str(tmp_path / "hu.safetensors"), str(tmp_path / "scans"), "--out",
                           str(tmp_path / "results"), "--device", "cpu"]) == 3
    with open(tmp_path / "results" / "scores.csv", newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert row["status"] == "failed" and row["reason"]


def test_an_error_that_is_no_scans_keeps_the_scores_before_it(fits, tmp_path, monkeypatch, capsys):
    """A full disk at the second scan: the first one's scores were lost."""
    fits["hu"].save(tmp_path / "hu.safetensors")
    head = synthetic_head(slices=14, size=64, spacing_mm=(10.0, 3.6, 3.6))[0]
    for name in ("a", "b"):
        write_slice_folder(tmp_path / "scans" / name, head, slice_spacing_mm=10.0)
    real = baselines.write_nifti

    def full(path, *rest):
        if path.parent.name != "a":
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(baselines, "write_nifti", full)
    flags = ["--out", str(tmp_path / "results"), "--device", "cpu"]
    assert baselines.main(["score", str(tmp_path / "hu.safetensors"), str(tmp_path / "scans"), *flags]) == 2
    assert "No space left" in capsys.readouterr().err
    assert set(read_scores(tmp_path / "results/scores.csv")) == {("a",)}
    assert {key[0] for key in read_scores(tmp_path / "results/slices.csv", by_slice=True)} == {"a"}


@pytest.mark.parametrize("there, text, whose", [
    ("run.json", '{"settings": {}}', "projector.py"), ("one/result.json", "{}", "projector.py"),
    (f"{BY_HASH}/ab/one/result.json", "{}", "projector.py"),
    ("run.json", '{"image_settings": {}}', "another command"), ("run.json", "{", "another command")])
def test_results_of_other_commands_are_not_written_over(there, text, whose, fits, tmp_path, capsys):
    """Their scores.csv was lost, and evaluate.py then judged scores in HU by the threshold in run.json."""
    fits["hu"].save(tmp_path / "hu.safetensors")
    write_slice_folder(tmp_path / "scans" / "two", np.full((4, 64, 64), -1000.0), slice_spacing_mm=10.0)
    out = tmp_path / "results"
    (out / there).parent.mkdir(parents=True)
    (out / there).write_text(text)
    (out / "scores.csv").write_bytes(b"scan_id,score\r\none,7.5\r\n")
    assert baselines.main(["score", str(tmp_path / "hu.safetensors"), str(tmp_path / "scans"), "--out", str(out),
                           "--device", "cpu"]) == 2
    assert f"results: holds results of {whose} ({there}); choose another --out" in capsys.readouterr().err
    assert (out / "scores.csv").read_bytes() == b"scan_id,score\r\none,7.5\r\n"
    assert not (out / "slices.csv").exists()


def test_a_missing_database_is_wrong_usage(tmp_path, capsys):
    assert baselines.main(["fit", "hu", "--data", str(tmp_path / "no.lmdb"), "--out", str(tmp_path / "x")]) == 2
    assert "no.lmdb" in capsys.readouterr().err
