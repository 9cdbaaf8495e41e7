"""Where a benchmark is to write is tried before its work: after hours it ended with nothing written."""

from __future__ import annotations

import pytest

from benchmarks import (
    baselines,
    cohort,
    cross_validation,
    ct_ich,
    gpu,
    inversion,
    lesion_mask,
    peer,
    phe_sich,
    samples,
    speed,
    xray_map,
)

MODEL = ["--model", "no-model"]
FOLDERS = {
    "ct_ich": (ct_ich, ["--data", "none", "--database", "none", *MODEL]),
    "phe_sich": (phe_sich, ["--data", "none", "--database", "none", *MODEL]),
    "inversion": (inversion, ["--data", "none", *MODEL]),
    "lesion_mask": (lesion_mask, ["--data", "none", *MODEL]),
    "samples": (samples, ["--data", "none", *MODEL]),
    "xray_map": (xray_map, ["--data", "none", *MODEL]),
    "cross_validation": (cross_validation, ["--model", "none", "no-model"]),
    "baselines": (baselines, ["score", "none", "none"]),
}
FILES = {
    "cohort": (cohort, ["scans"]), "peer": (peer, ["--data", "none", "--scans", "none"]), "speed": (speed, []),
    "gpu": (gpu, []), "baselines": (baselines, ["fit", "pca", "--data", "none"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_file_in_the_place_of_the_folder_is_named_first(name, tmp_path, capsys):
    command, flags = FOLDERS[name]
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        (tmp_path / "out").write_text("a file")
        assert command.main([*flags, "--out", str(out)]) == 2
        assert f"--out {out}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_the_file_is_named_first(name, tmp_path, capsys):
    command, flags = FILES[name]
    (tmp_path / "file").write_text("a file")
    for out, why in ((tmp_path, "a folder is there"), (tmp_path / "file" / "figures", "File exists")):
        with pytest.raises(SystemExit) as stopped:
            command.main([*flags, "--out", str(out)])
        assert stopped.value.code == 2 and f"{out}: cannot be written ({why}" in capsys.readouterr().err
