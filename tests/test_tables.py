"""README's table is docs/results.json's; and how a benchmark's figures get there, by hand."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables


def test_readme_holds_the_figures_of_results_json():
    text = tables.README.read_text(encoding="utf-8")
    results = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    assert tables.MARK + "\n" + tables.table(results) + "\n" in text
    assert tables.placed(text, tables.table(results)) == text


def figures(auc):
    level = {"abnormal": 3, "normal": 2, "auc": auc, "auc_delong": [auc - 0.1, auc + 0.05]}
    return {"model": {"name": "mine"}, "methods": {"ours": {"scan": level, "slice": level},
                                                   "pca": {"scan": level | {"auc": 0.5}, "slice": level}}}


def test_figures_take_the_place_of_earlier_ones_and_leave_other_benchmarks():
    results = {"columns": {"ct_ich": ["of other scans"], "phe_sich": ["PHE"]},
               "rows": {"gone": {"ct_ich": [[0.1, 0.0, 0.2]]},
                        "mine": {"ct_ich": [[0.2, 0.1, 0.3]], "phe_sich": [[0.7, 0.6, 0.8]]}}}
    tables.take(results, "ct_ich", figures(0.9))
    results["rows"]["another"] = {"ct_ich": [[0.3, 0.2, 0.4], [0.2, 0.1, 0.3]]}
    tables.take(results, "ct_ich", figures(0.9))                         # the same scans: it stays
    assert tables.table(results).splitlines() == [
        "| method | CT-ICH, 3 + 2: scan AUC | slice AUC | PHE |",
        "| --- | --- | --- | --- |",
        "| mine | 0.90 (0.80-0.95) | 0.90 (0.80-0.95) | 0.70 (0.60-0.80) |",
        "| PCA by position | 0.50 (0.80-0.95) | 0.90 (0.80-0.95) |  |",
        "| another | 0.30 (0.20-0.40) | 0.20 (0.10-0.30) |  |"]


def test_a_baseline_beside_another_model_does_not_take_a_rows_place():
    """At another resolution it did, and the rows beside the first model were no longer of its run."""
    results = {"columns": {}, "rows": {}}
    tables.take(results, "ct_ich", figures(0.9))
    assert results["models"] == {"mine": {"ct_ich": "mine"}, "PCA by position": {"ct_ich": "mine"}}
    larger = figures(0.7) | {"model": {"name": "larger"}}
    before = json.dumps(results["rows"]["PCA by position"])
    told = ("--ct-ich: pca is of a run of larger, the row 'PCA by position' of one of mine; give it a row of its own, "
            "--name pca=ROW, or replace that one, --name 'pca=PCA by position'")
    with pytest.raises(ValueError, match=told):
        tables.take(results, "ct_ich", larger)
    assert json.dumps(results["rows"]["PCA by position"]) == before
    tables.take(results, "ct_ich", larger, {"pca": "PCA at 256"})
    assert [*results["rows"]] == ["mine", "PCA by position", "larger", "PCA at 256"]
    tables.take(results, "ct_ich", larger, {"pca": "PCA by position"})                   # as was asked for
    assert results["models"]["PCA by position"] == {"ct_ich": "larger"}
    more = figures(0.9)                                                      # of other scans: all cells are new
    more["methods"]["ours"]["scan"] = more["methods"]["ours"]["scan"] | {"normal": 3}
    tables.take(results, "ct_ich", more)
    assert [*results["rows"]] == [*results["models"]] == ["mine", "PCA by position"]


def test_every_cell_of_results_json_has_its_model():
    results = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    assert {name: set(row) for name, row in results["rows"].items()} == {
        name: set(row) for name, row in results["models"].items()}


def test_the_other_benchmarks_columns():
    near = {"scans": {"a": {}, "b": {}}, "methods": {"ours": {"near": [0.5, 0.1, 0.9]}}}
    assert tables.phe_sich(near) == {"PHE-SICH, 2: peak within 15 mm": {"ours": (0.5, 0.1, 0.9)}}
    every = {"emergencies": 4, "healthy": 3, "scan_auc": 0.8, "scan_auc_delong": [0.7, 0.9]}
    assert tables.phantoms({"methods": {"ours": {"all": every}}}) == {
        "phantoms, 4 + 3, calibrated by others: scan AUC": {"ours": (0.8, 0.7, 0.9)}}


def test_what_the_data_do_not_define_is_an_empty_cell():
    """An undefined interval got into docs/results.json letter by letter, and no later run could read it."""
    found, results = figures(0.9), {"columns": {}, "rows": {}}
    why = "undefined: needs two independent units of each class"
    found["methods"]["ours"]["scan"] = found["methods"]["ours"]["scan"] | {"auc_delong": why}
    found["methods"]["pca"]["slice"] = found["methods"]["pca"]["slice"] | {"auc": why, "auc_delong": why}
    tables.take(results, "ct_ich", found)
    results = json.loads(json.dumps(results))
    assert results["rows"]["mine"]["ct_ich"][0] is None
    assert tables.table(results).splitlines()[2:] == ["| mine |  | 0.90 (0.80-0.95) |",
                                                      "| PCA by position | 0.50 (0.80-0.95) |  |"]
    every = {"emergencies": 4, "healthy": 1, "scan_auc": 0.8, "scan_auc_delong": why}
    assert [*tables.phantoms({"methods": {"ours": {"all": every}}}).values()] == [{"ours": None}]


def test_without_a_table_both_files_stay(tmp_path, monkeypatch):
    """docs/results.json was written first, and kept what README could not show."""
    for name, text in (("README", f"{tables.MARK}\n| old |\n\nafter\n"), ("RESULTS", '{"columns": {}, "rows": {}}')):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(tables, name, tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "metrics.json").write_text(json.dumps(figures(0.9)))

    def broken(results):
        raise ValueError("no table")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "table", broken)
        assert tables.main(["--ct-ich", str(tmp_path)]) == 2
    assert {path: path.read_bytes() for path in before} == before
    assert tables.main(["--ct-ich", str(tmp_path)]) == 0
    assert all(path.read_bytes() != text for path, text in before.items())


def test_only_the_table_after_the_mark_is_replaced(tmp_path, monkeypatch, capsys):
    text = f"before\n\n| a |\n\n{tables.MARK}\n| old |\n| --- |\n\nafter\n\n| b |\n"
    assert tables.placed(text, "| new |\n") == f"before\n\n| a |\n\n{tables.MARK}\n| new |\n\nafter\n\n| b |\n"
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    results.write_text(json.dumps({"columns": {}, "rows": {}}))
    readme.write_text(text)
    (tmp_path / "metrics.json").write_text(json.dumps(figures(0.9)))
    monkeypatch.setattr(tables, "README", readme)
    monkeypatch.setattr(tables, "RESULTS", results)
    assert tables.main(["--ct-ich", str(tmp_path)]) == 0
    assert "| mine | 0.90 (0.80-0.95) |" in readme.read_text() and "old" not in readme.read_text()
    assert json.loads(results.read_text())["rows"]["mine"]["ct_ich"][0] == pytest.approx([0.9, 0.8, 0.95])
    assert tables.main(["--ct-ich", str(tmp_path), "--name", "pca=[Counts](counts.md)"]) == 0
    assert "[Counts](counts.md)" in json.loads(results.read_text())["rows"]
    with pytest.raises(SystemExit):
        tables.main(["--name", "hu"])
    kept = results.read_bytes()
    given = ["--ct-ich", str(tmp_path)]
    for name, flags, told in (("pac", given, "pca; ours"), ("ours", given, "pca; ours"), ("pca", [], "a folder")):
        assert tables.main([*flags, "--name", f"{name}=Row"]) == 2           # it was passed over
        assert f"--name {name}: no such method" in (said := capsys.readouterr().err) and f"one of {told}" in said
    assert results.read_bytes() == kept
    readme.write_text("no mark")
    assert tables.main([]) == 2 and "expected the line <!-- by" in capsys.readouterr().err
