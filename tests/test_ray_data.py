"""examples/ray_data.py, with a stand-in for Ray: actors that take the scans in turn, in this process."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import projector
from tests.helpers import tiny_bundle
from tests.queue_data import flags, made, make_scans, run_whole, tables


class Rows(list):
    """The part of ray.data.Dataset that is used."""

    def map(self, kind, fn_constructor_args, num_gpus, compute):
        actors = [kind(*fn_constructor_args) for _ in range(compute)]
        return Rows(actors[number % compute](row) for number, row in enumerate(self))

    def take_all(self):
        return self


def test_its_folder_of_results_is_that_of_a_whole_run(tmp_path, monkeypatch, capsys):
    """It had no run.json: a merge refused it, and evaluate.py found no threshold."""
    ray = SimpleNamespace(init=lambda runtime_env: None, data=SimpleNamespace(
        from_items=lambda rows, override_num_blocks: Rows(rows), ActorPoolStrategy=lambda size: size))
    monkeypatch.setitem(sys.modules, "ray", ray)
    example = importlib.import_module("examples.ray_data")
    scans, model, out = make_scans(tmp_path / "four", 4), tiny_bundle(tmp_path / "tiny"), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["ray_data.py", str(scans), "--model", str(model), "--out", str(out)])
    assert example.main() == 3                                            # one scan is broken
    said = capsys.readouterr()
    assert "scan-000: ok" in said.out and "scan-003: failed" in said.out and said.err == ""
    found = tables(out)
    assert found == tables(run_whole(scans, model, tmp_path / "whole", "--precision", "auto"))
    assert (out / "report.html").is_file() and made(capsys) == 3
    assert projector.main(["merge", str(out)]) == 3 and tables(out) == found
    assert projector.main(flags(scans, model, out, "--precision", "auto")) == 3 and made(capsys) == 0
    before = (out / "run.json").read_bytes()                  # it was the other model's, whose results there are none
    for other, told in ((tiny_bundle(tmp_path / "other", seed=1), "another model"), (tmp_path / "none", "none")):
        monkeypatch.setattr(sys, "argv", ["ray_data.py", str(scans), "--model", str(other), "--out", str(out)])
        assert example.main() == 2 and told in capsys.readouterr().err and (out / "run.json").read_bytes() == before
