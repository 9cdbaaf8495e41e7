"""The speed benchmark: an honest reference, sound arithmetic, and GPU rows that run before there is a GPU."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from benchmarks import cohort, gpu, measure, peer, speed, timed
from benchmarks.measure import REFERENCE, Row, medians, operations, side_by_side, table
from benchmarks.reference import ReferenceDiscriminator, ReferenceGenerator
from detect.search import SearchSettings
from model import Discriminator, Generator, ModelConfig
from op import memory
from op.conv import conv2d

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ModelConfig(size=32, style_dim=8, n_mlp=2, channel_base=64, channel_multiplier=1, channel_max=8)
close = partial(torch.testing.assert_close, atol=1e-5, rtol=3e-4)


def pair(ours, reference, fold):
    """Both networks with the same weights, noise strengths and biases away from zero."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, fold=fold)
    net, plain = ours(config), reference(config)
    for parameter in net.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    plain.load_state_dict(net.state_dict())
    return net, plain


@pytest.fixture(autouse=True)
def quick_rates(monkeypatch):
    """The machine's rates take a second to measure; any will do here."""
    for module in (timed, speed):
        monkeypatch.setattr(module, "rate", lambda device, dtype: 1e9)
        monkeypatch.setattr(module, "bandwidth", lambda device: 1e9)
    yield
    memory.keep_freed(False)


# ---- The reference

@pytest.mark.parametrize("fold", [1, 2])
def test_the_reference_generator_is_the_same_function(fold):
    net, plain = pair(Generator, ReferenceGenerator, fold)
    w_plus = torch.randn(3, net.config.n_latent, 8, requires_grad=True)
    images, expected = net.synthesis(w_plus, "const"), plain.synthesis(w_plus, "const")
    close(images, expected)
    close(torch.autograd.grad(images.square().sum(), w_plus), torch.autograd.grad(expected.square().sum(), w_plus))
    close(net.synthesis(w_plus[:, 0], None), plain.synthesis(w_plus[:, 0], None))


@pytest.mark.parametrize("fold", [1, 2])
def test_the_reference_discriminator_is_the_same_function(fold):
    net, plain = pair(Discriminator, ReferenceDiscriminator, fold)
    images = torch.randn(4, 3, 32, 32)
    close(net(images), plain(images))


def test_the_reference_trainer_has_the_published_networks_in_float32_and_leaves_ours_alone():
    config = dataclasses.replace(train.PRESETS["smoke32"], precision="bf16")
    reference, ours = timed.make_trainer(config, CPU, reference=True), timed.make_trainer(config, CPU)
    assert isinstance(reference.g, ReferenceGenerator) and isinstance(reference.d, ReferenceDiscriminator)
    assert reference.g.compute_dtype == torch.float32 and ours.g.compute_dtype == torch.bfloat16
    assert type(ours.g) is Generator and type(ours.d) is Discriminator
    assert reference.ada.p == ours.ada.p == timed.ADA_P


# ---- Arithmetic

def test_variants_take_turns_and_the_first_call_does_not_count():
    order = []
    samples = side_by_side({REFERENCE: lambda: order.append("r"), "ours": lambda: order.append("o")}, CPU, 2, calls=2)
    assert "".join(order) == "rroo" * 3
    assert [len(times) for times in samples.values()] == [2, 2]


def test_the_median_counts():
    assert medians({"a": [3.0, 1.0, 9.0]}, scale=10) == {"a": 30.0}


def test_the_average_step_counts_every_phase_as_often_as_it_comes():
    config = dataclasses.replace(train.PRESETS["smoke32"], path_every=4, r1_every=16)
    assert timed.average_step({"plain": 1.0, "path": 5.0, "all": 21.0}, config) == 1 + 4 / 4 + 16 / 16
    without = dataclasses.replace(config, path_every=0, r1_every=0)
    assert timed.average_step({"plain": 1.0, "path": 1.0, "all": 1.0}, without) == 1


def test_operations_of_a_convolution_count_whatever_kernel_does_it():
    """On a CPU with AVX2 or AVX512 a kernel of our own does it, of which the counter knows nothing."""
    x, weight = torch.ones(1, 16, 8, 8, requires_grad=True), torch.ones(16, 16, 3, 3, requires_grad=True)
    once = 2 * 9 * 16 * 16 * 8 * 8
    assert operations(lambda: conv2d(x, weight, padding=1)) == once
    assert operations(lambda: conv2d(x, weight, padding=1).sum().backward()) == 3 * once


def test_operations_of_a_product():
    assert operations(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


def test_the_table_says_what_was_not_measured():
    text = table([Row("fast", "s", "4x", reference=8.0, ours=1.0, floor=0.5, met=True),
                  Row("absent", "", "-", note="no GPU on this machine")])
    lines = text.splitlines()
    assert lines[2].split() == ["fast", "8", "1", "8.0x", "0.5", "s", "4x", "yes"]
    assert "not measured" in lines[3] and lines[4] == "absent: no GPU on this machine"


# ---- The rows, with tiny sizes

def test_the_generator_rows():
    fp32, bf16 = speed.generator_rows(1, TINY, batch=2, precisions=("fp32", "bf16"))
    assert fp32.ours > 0 and bf16.reference == fp32.reference and set(bf16.samples) == {REFERENCE, "bf16"}
    assert fp32.floor > 0 and fp32.met == (fp32.ratio >= 4)


def test_what_a_cpu_only_emulates_is_not_measured():
    fp32, bf16 = speed.generator_rows(1, TINY, batch=2, precisions=("fp32",))
    assert fp32.ours > 0 and bf16.ours is None and bf16.note == speed.SLOWER and bf16.goal == "12x"


def test_the_median_row_counts_all_planes():
    row = speed.median_row(1, shape=(4, 8, 8), size=3, planes=2)
    assert row.reference == 2 * row.samples[REFERENCE][0] and row.floor == 2 * 4 * 64 * 4 / 1e9


def test_the_training_row_runs_every_phase_and_judges_by_both_goals():
    config = dataclasses.replace(train.PRESETS["smoke32"], style_dim=8, channel_base=64, channel_max=8, batch=4)
    (row,) = timed.training_row("training", config, CPU, 1, "goal", most_s_per_kimg=1e9, least_ratio=0)
    assert row.met and row.floor > 0 and row.unit == "s/kimg"
    assert len(row.samples) == 6
    (row,) = timed.training_row("training", config, CPU, 1, "goal", most_s_per_kimg=1e-9)
    assert not row.met
    (row,) = timed.training_row("training", config, CPU, 1, "goal", least_ratio=1, reference=False)
    assert row.reference is row.ratio is row.met is None and set(row.samples) == {"auto plain", "auto path", "auto all"}


def test_the_encoders_row():
    tiny = dataclasses.replace(TINY, fold=2)
    row = speed.encoder_row(1, model=tiny, precisions=("fp32", "bf16"))
    assert row.ours > 0 and row.reference > 0 and len(row.samples["bf16"]) == 1
    row = speed.encoder_row(1, model=tiny, precisions=("fp32",))
    assert row.ours > 0 and row.reference is None and list(row.samples) == ["fp32"]


def test_the_projection_row():
    settings = SearchSettings(steps_latent=2, steps_noise=2)
    row = timed.projection_row("projection", TINY, 3, settings, CPU, 1, "goal", 1e9)
    assert row.met and row.reference == 10 * row.samples[REFERENCE][0] and row.floor > 0
    assert row.ours == row.samples["ours"][0]
    row = timed.projection_row("projection", TINY, 3, settings, CPU, 1, "goal", 1e9, (10, 2), reference=False)
    assert row.reference is None and row.ours == 2 * row.samples["ours"][0]


def test_the_log_says_how_long_each_turn_took(caplog):
    with caplog.at_level("INFO", "benchmarks"):
        side_by_side({"ours": lambda: None}, CPU, 1, label="plain step")
        side_by_side({"ours": lambda: None}, CPU, 1)
    assert caplog.messages == ["plain step, ours, first call ...", "plain step, ours, first call: 0.0 s",
                               "plain step, ours, 1 ...", "plain step, ours, 1: 0.0 s"]


def test_a_reference_of_fewer_images_counts_for_as_many():
    config = dataclasses.replace(train.PRESETS["smoke32"], style_dim=8, channel_base=64, channel_max=8, batch=4,
                                 path_every=0, r1_every=0)
    (row,) = timed.training_row("training", dataclasses.replace(config, ada_target=0), CPU, 1, "goal",
                                reference_batch=2)
    assert row.reference == 1000 / 2 * row.samples[f"{REFERENCE} plain"][0] and "reference's batch 2" in row.note
    assert row.ours == 1000 / 4 * row.samples["auto plain"][0]


def test_the_rows_of_the_ops():
    rows = list(timed.op_rows(2, ((3, 8),), CPU, 1, calls=1))
    assert len(rows) == 5 and all(row.ours > 0 for row in rows)
    assert rows[-1].floor == 1e3 * 2 * (2 * 3 * 8 * 8 * 2) / 1e9                   # bias_act: read and written once
    assert timed.median_row((2, 8, 8), 3, CPU, 1).reference > 0
    alone = timed.median_row((2, 8, 8), 3, CPU, 1, reference=False)
    assert alone.reference is None and alone.ours > 0 and alone.floor == 1e3 * 2 * (2 * 8 * 8 * 4) / 1e9


def test_the_rows_of_a_styled_layer():
    rows = list(timed.styled_rows(2, ((32, 4),), CPU, 1, calls=1))
    tensor = 1e3 * 2 * 32 * 4 * 4 * 2 / 1e9                                        # ms, of 1 GB/s
    assert [row.floor for row in rows] == [2 * tensor, 6 * tensor, 6 * tensor] and all(row.ours > 0 for row in rows)


FINE = Row("fine", "s", "-", 2.0, 1.0)


def out_of_memory(device, repeats, reference):
    yield FINE
    raise torch.OutOfMemoryError("CUDA out of memory. Tried much\nand more")


def lacking(device, repeats, reference):
    raise NotImplementedError


@pytest.mark.parametrize("job, told", [
    (out_of_memory, [FINE, Row("gpu row", "", "-", note="failed: CUDA out of memory. Tried much")]),
    (lacking, [Row("gpu row", "", "-", note="failed: NotImplementedError()")]),
    (lambda *_: torch.of_tomorrow(),
     [Row("gpu row", "", "-", note="failed: module 'torch' has no attribute 'of_tomorrow'")]),
])
def test_a_row_that_fails_says_why_after_those_that_it_has(job, told):
    class Pipe(list):
        send = list.append

    pipe = Pipe()
    gpu.tell_rows(pipe, "gpu row", job, CPU, 1, True)
    assert pipe == told


def hangs(device, repeats, reference):
    with measure.phase("first call"):
        yield FINE
        time.sleep(600)


def dies(device, repeats, reference):
    measure.LOG.info("build ...")
    os._exit(3)


def test_a_row_that_hangs_is_stopped_and_what_it_has_is_kept(monkeypatch, capsys):
    rows = gpu.in_a_process("gpu slow", hangs, CPU, 1, True, limit_s=60)
    assert next(rows) == FINE
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 60))
    assert list(rows) == [Row("gpu slow", "", "-", note="stopped after 60 s, last: first call ...")]
    assert capsys.readouterr().err.endswith(" s  first call ...\n") and multiprocessing.active_children() == []


def test_a_row_whose_process_dies_says_with_what():
    (row,) = gpu.in_a_process("gpu row", dies, CPU, 1, True, limit_s=60)
    assert row == Row("gpu row", "", "-", note="failed: its process ended with 3, last: build ...")


def test_slow_rows_come_last_and_first_without_their_reference(monkeypatch):
    """The last one may take all the time that is left, any other its own limit."""
    asked = []

    def found(title, job, device, repeats, reference, limit_s):
        asked.append((job, reference, round(limit_s)))
        yield Row(job, "s", "-", 2.0 if reference else None, 1.0)

    monkeypatch.setattr(gpu, "in_a_process", found)
    monkeypatch.setattr(gpu, "GPU_ROWS", {name: name for name in gpu.GPU_ROWS})
    saved = []
    names = ["median512", "ct256", "paper512"]
    rows = gpu.measure(names, CPU, 1, 500, lambda rows: saved.append([(row.name, row.reference) for row in rows]))
    assert asked == [("median512", True, 60), ("ct256", False, 120), ("paper512", False, 120), ("ct256", True, 120),
                     ("paper512", True, 500)]
    assert saved[2] == [("median512", 2), ("ct256", None), ("paper512", None)]
    assert [(row.name, row.reference) for row in rows] == saved[-1] == [(name, 2) for name in names]
    (late,) = gpu.measure(["ct256"], CPU, 1, gpu.LEAST_S - 1, saved.append, ours=True)
    assert late == Row("gpu ct256, without the reference", "", "-", note="not begun: 14 s of the time limit left")


def test_without_a_gpu_its_rows_are_not_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "speed.json"
    assert speed.main(["--only", "paper512,ops512", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("not measured") == 2
    found = json.loads(out.read_text())
    assert [row["ours"] for row in found["rows"]] == [None, None] and found["machine"]["gpu"] == "none"


@pytest.mark.parametrize("flags, message", [
    (["--only", "median,speed"], "--only: no row speed"), (["--repeats", "0"], "--repeats must be at least 1, got 0"),
])
def test_wrong_flags_exit_2(flags, message, capsys):
    with pytest.raises(SystemExit) as end:
        speed.main(flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


# ---- projector.py as a process

def test_the_head_has_what_it_says(tmp_path):
    speed.write_head(tmp_path / "head.nii.gz", slices=24, size=48)
    hu = np.asarray(speed.nib.load(tmp_path / "head.nii.gz").dataobj)
    assert hu.shape == (48, 48, 24) and hu[0, 0].max() < -900 and (hu > 900).mean() > 0.05
    assert 55 < np.median(hu[30:33, 25:28, 13]) < 75


PROJECTOR = """
import sys, pathlib, time
scan, out, precision = sys.argv[1], sys.argv[5], sys.argv[9] if len(sys.argv) > 9 else ""
if not pathlib.Path(scan).exists():
    sys.exit(f"{scan}: no such file")
scans = [path for path in pathlib.Path(scan).rglob("*") if path.is_file()] or [scan]
kept = []
for number, path in enumerate(scans):
    kept.append(bytearray(200_000_000))
    kept[-1][::4096] = bytes(len(kept[-1][::4096]))
    time.sleep(0.2)                   # memory is read every 0.05 s
    print(f"{number + 1}/{len(scans)} head: score 1", flush=True)
time.sleep(0.2)
pathlib.Path(out).mkdir(exist_ok=True)
pathlib.Path(out, "scores.csv").write_text(f"scan_id,score,error_hu\\nhead,{len(precision)},2.5\\n")
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """In the place of projector.py: holds 0.2 GB more with every scan."""
    (tmp_path / "projector.py").write_text(PROJECTOR)
    monkeypatch.setattr(cohort, "ROOT", tmp_path)
    return tmp_path


def test_a_projection_is_measured_from_outside(stand_in):
    scan = stand_in / "head.nii"
    with pytest.raises(RuntimeError, match="ended with 1:\n.*head.nii: no such file"):
        speed.project_scan(scan, stand_in, stand_in / "out", "fp32")
    scan.touch()
    measured = speed.project_scan(scan, stand_in, stand_in / "out", "fp32")
    assert measured["score"] == 4 and measured["error_hu"] == 2.5
    assert 0 < measured["cpu_seconds"] < measured["seconds"]
    assert 0.18 < measured["peak_gb"] < 0.5


def test_a_cohorts_memory_is_told_by_tenths_of_its_scans(stand_in, capsys):
    for name in ("a/1.png", "b/1.png"):
        (stand_in / "scans" / name).parent.mkdir(parents=True)
        (stand_in / "scans" / name).touch()
    out = stand_in / "cohort.json"
    assert cohort.main([str(stand_in / "scans"), "--times", "2", "--out", str(out), "--", "--no-dicom-out"]) == 0
    found = json.loads(out.read_text())
    assert found["scans"] == 4 and found["flags"] == ["--no-dicom-out"]
    first, *_, last = found["gb_by_tenth"]
    assert 0.4 < last - first < 0.7 and found["peak_gb"] > 0.73          # of 4 scans, in the first tenth none is done
    assert found["seconds_per_scan"] > 0.2 and 0 < found["cpu_seconds_per_scan"] < found["seconds_per_scan"]
    assert "4 scans on" in capsys.readouterr().out


def test_a_scan_that_fails_costs_no_measured_run(stand_in, capsys):
    """projector.py ends with 3: the figures of all others were thrown away."""
    (stand_in / "projector.py").write_text(
        PROJECTOR + "print('3/3 head: FAILED, no head: the brain mask is empty', flush=True)\nsys.exit(3)\n")
    for name in "ab":
        (stand_in / "scans" / name).mkdir(parents=True)
        (stand_in / "scans" / name / "1.png").touch()
    out = stand_in / "cohort.json"
    assert cohort.main([str(stand_in / "scans"), "--out", str(out)]) == 3
    found = json.loads(out.read_text())
    assert (found["scans"], found["failed"]) == (3, 1)
    assert "3 scans on" in (printed := capsys.readouterr().out) and printed.endswith("GB at most; 1 failed\n")
    with pytest.raises(RuntimeError, match="ended with 3"):               # of a scan alone nothing is measured then
        speed.project_scan(stand_in / "scans", stand_in, stand_in / "out", "fp32")


def test_memory_counts_what_a_thread_has_started():
    """The decoder of ct/decoder_process.py may be started by the thread that reads."""
    child = "import time; held = bytearray(200_000_000); held[::4096] = bytes(len(held[::4096])); time.sleep(0.5)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    thread = f"import threading; t = threading.Thread(target=exec, args=({start!r},)); t.start(); t.join()"
    assert cohort.watched([sys.executable, "-c", thread]).peak_gb > 0.18


def test_a_run_that_fails_and_wrong_flags_exit_2(stand_in, tmp_path, capsys):
    (stand_in / "projector.py").write_text("raise SystemExit('nothing to do')")
    assert cohort.main([str(tmp_path)]) == 2 and "nothing to do" in capsys.readouterr().err
    for flags in ([str(tmp_path / "absent")], [str(tmp_path), "--times", "0"]):
        with pytest.raises(SystemExit):
            cohort.main(flags)


def test_the_rows_of_a_scan(monkeypatch, tmp_path):
    figures = {"fp32": {"seconds": 5.0, "peak_gb": 2.0, "error_hu": 1.0, "score": 4.0},
               "bf16": {"seconds": 4.0, "peak_gb": 3.5, "error_hu": 1.5, "score": 3.0}}
    maps = {"fp32": 10.0, "bf16": 12.0}
    monkeypatch.setattr(speed, "project_scan", lambda scan, model, out, precision, flags: figures[precision])
    monkeypatch.setattr(speed, "load_maps", lambda out: {
        "brain": np.array([1, 1, 0]), "reconstruction": np.array([0, 0, 50]) + maps[out.name.split("-")[0]]})
    time_row, memory, error, score = speed.scan_rows(2, tmp_path / "mine", slices=2, precisions=("fp32", "bf16"))
    assert (time_row.reference, time_row.ours, time_row.met) == (5, 4, True)
    assert time_row.samples == {"fp32": [5, 5], "bf16": [4, 4]}
    assert (memory.reference, memory.ours, memory.met) == (2, 3.5, False)
    assert (error.reference, error.ours) == (1, 1.5) and "differ by 2 HU" in error.note
    assert (score.reference, score.ours) == (4, 3)
    time_row, memory, error, score = speed.scan_rows(1, tmp_path / "mine", slices=2, precisions=("fp32",))
    assert (time_row.reference, time_row.ours, memory.reference, memory.ours) == (None, 5, None, 2)
    assert "reference" not in time_row.note and error.ours is score.ours is None and error.note == speed.SLOWER


def test_the_cohorts_rows(monkeypatch, tmp_path):
    def watched(command):
        """A scan alone takes 5 s in 1.1 GB, of three each 2 s, in 2 GB at first and 4 at last."""
        scans = len(list(Path(command[2]).glob("*.nii.gz")))
        return cohort.Run(*((5.0, 6.0, 1.1, 1, []) if scans == 1 else (6.0, 9.0, 4.0, 3, [(0, 2.0), (2, 4.0)])))

    monkeypatch.setattr(cohort, "watched", watched)
    time_row, cpu, memory, alone = speed.cohort_rows(2, tmp_path, scans=3, size=24, slices=4)
    assert (time_row.reference, time_row.ours, time_row.met) == (5, 2, False) and "1800 scans an hour" in time_row.note
    assert (cpu.reference, cpu.ours, cpu.met) == (6, 3, False)
    assert (memory.reference, memory.ours, memory.met) == (1.1, 4, False)
    assert memory.note == "2.00 GB in the first tenth of the scans, 4.00 GB in the last"
    assert (alone.ours, alone.met) == (5, False)


# ---- Beside anomalib

def test_without_anomalib_it_is_said_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "anomalib", None)
    assert peer.main(["--data", str(tmp_path), "--scans", str(tmp_path)]) == 2
    assert "pip install -r requirements.lock anomalib==2.7.0" in capsys.readouterr().err


def test_make_writes_no_figures_over_those_that_the_docs_cite():
    """`make bench` wrote over the record of another machine, in a file that git keeps."""
    written = re.findall(r"--out[= ](\S+)", (ROOT / "Makefile").read_text())
    assert written and all(f"{path.split('/')[0]}/" in (ROOT / ".gitignore").read_text().split() for path in written)
    cited = re.findall(r"benchmarks/(speed[^)]*\.json)\)", (ROOT / "docs" / "SPEED.md").read_text())
    assert sorted(cited) == sorted(path.name for path in (ROOT / "benchmarks").glob("speed*.json")) and len(cited) == 4


def test_the_command_of_the_gpu_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--only", "median512"])
    told = capsys.readouterr().err
    assert "error: needs a GPU" in told and "python -m benchmarks.speed measures the rows of the CPU" in told
    assert "--device" not in told                                           # a flag that it does not have
