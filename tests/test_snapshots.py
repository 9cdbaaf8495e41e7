"""Snapshots of a training run: whole or not there, the last two and the best, never a pickle of code."""

import argparse
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.weights import CheckpointError
from gan.run import Run
from gan.snapshots import load_snapshot, save_snapshot, snapshot_steps


def save_one(run, step, value=0.0, **kwargs):
    module = nn.Linear(2, 2)
    nn.init.constant_(module.weight, value)
    state = {"optimiser": torch.optim.Adam(module.parameters()).state_dict(), "rng": torch.get_rng_state()}
    return save_snapshot(run, step, {"net": module}, state, {"images": step * 16}, **kwargs)


def test_snapshot_round_trip(tmp_path):
    run = tmp_path / "runs" / "gan"
    module = nn.Linear(3, 2).to(memory_format=torch.contiguous_format)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.1)
    module(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    state = {"optimiser": optimiser.state_dict(), "rng": np.random.default_rng(3).bit_generator.state, "ada_p": 0.25,
             "order": (1, [2, None, "x", b"y"])}
    save_snapshot(run, 7, {"net": module}, state, {"preset": "smoke32"})
    snapshot = load_snapshot(run)
    assert snapshot.step == 7 and snapshot.meta == {"preset": "smoke32"}
    assert {k: snapshot.state[k] for k in ("rng", "ada_p", "order")} == {k: state[k] for k in ("rng", "ada_p", "order")}
    other = nn.Linear(3, 2)
    snapshot.restore({"net": other})
    torch.testing.assert_close(other.weight, module.weight, atol=0, rtol=0)
    resumed = torch.optim.Adam(other.parameters())
    resumed.load_state_dict(snapshot.state["optimiser"])
    torch.testing.assert_close(resumed.state[other.weight]["exp_avg"], optimiser.state[module.weight]["exp_avg"])
    with pytest.raises(CheckpointError, match="no network 'ema', only"):
        snapshot.restore({"ema": other})
    with pytest.raises(CheckpointError, match=r"weight is \[2, 3\], expected \[2, 4\]"):
        snapshot.restore({"net": nn.Linear(4, 2)})


def test_the_last_two_and_the_best_are_kept(tmp_path):
    for step, distance in ((1, 9.0), (2, 3.0), (3, None), (4, 3.5), (5, None)):
        save_one(tmp_path, step, value=step, distance=distance)
    assert snapshot_steps(tmp_path) == [2, 4, 5]
    assert load_file(tmp_path / "snapshot-00000002/net.safetensors")["weight"][0, 0] == 2
    (tmp_path / "snapshot-00000002/meta.json").write_text("{")
    save_one(tmp_path, 6)
    assert snapshot_steps(tmp_path) == [4, 5, 6]                          # of what can be read


def test_without_a_measure_the_last_two_are_kept(tmp_path):
    for step in range(1, 5):
        save_one(tmp_path, step)
    assert snapshot_steps(tmp_path) == [3, 4]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_one(tmp_path, 1, value=1)
    save_one(tmp_path, 1, value=2)
    assert load_snapshot(tmp_path).weights["net"]["weight"][0, 0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot-00000001"]


def test_a_step_whose_saving_again_breaks_off_stays(tmp_path, monkeypatch):
    """Between the two moves."""
    save_one(tmp_path, 1, value=1)
    rename = Path.rename

    def stopped(path, to):
        if path.suffix == ".writing":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stopped)
        save_one(tmp_path, 1, value=2)
    with pytest.warns(UserWarning, match="half-written"):
        assert load_snapshot(tmp_path).weights["net"]["weight"][0, 0] == 1


def test_a_run_killed_while_saving_keeps_the_snapshot_before(tmp_path, monkeypatch):
    save_one(tmp_path, 1, value=1)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", killed)
        save_one(tmp_path, 2, value=2)
    with pytest.warns(UserWarning, match="half-written"):
        assert load_snapshot(tmp_path).step == 1
    save_one(tmp_path, 2, value=2)                                       # clears what was left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_snapshot(tmp_path).step == 2


@pytest.mark.parametrize("name", ["net.safetensors", "state.pt", "meta.json"])
def test_a_damaged_snapshot_is_passed_over(tmp_path, name):
    save_one(tmp_path, 1)
    path = save_one(tmp_path, 2) / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=f"{name}.*falling back"):
        assert load_snapshot(tmp_path).step == 1
    path.unlink()
    with pytest.warns(UserWarning, match=f"{name}: no such file.*falling back"):
        assert load_snapshot(tmp_path).step == 1


def test_what_was_passed_over_as_damaged_is_not_what_is_kept(tmp_path):
    """Two damaged snapshots were the newest two, so the one gone on from and the next one written were dropped."""
    trainer = SimpleNamespace(modules=lambda: {"net": nn.Linear(2, 2)}, state=dict, load_state=lambda state: None,
                              reseed=lambda seed: None)
    meta = {"kind": "gan", "config": {}}

    def go_on_to(*steps: tuple[int, float]) -> None:
        with Run(tmp_path, meta, trainer, 0) as run:
            for step, distance in steps:
                run.end_step(step, True, distance)

    go_on_to((100, 1.0), (200, 3.0), (300, 4.0))
    for step in (200, 300):
        weights = tmp_path / f"snapshot-{step:08d}" / "net.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="damaged, now damaged-snapshot-00000300, which may be deleted"):
        go_on_to((150, 2.0))
    assert snapshot_steps(tmp_path) == [100, 150] and load_snapshot(tmp_path).step == 150
    assert (tmp_path / "damaged-snapshot-00000200").is_dir()


def test_state_that_would_need_unpickling_is_refused(tmp_path):
    for bad in (np.float64(1), argparse.Namespace(), {"deep": [nn.Linear(1, 1)]}):
        with pytest.raises(CheckpointError, match=r"state\['x'\].*cannot be saved"):
            save_snapshot(tmp_path, 1, {}, {"x": bad}, {})
    assert list(tmp_path.iterdir()) == []
