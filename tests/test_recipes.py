"""recipes/*.sh: every command they run is understood by its parser, and a finished step is not done again."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import pytest

import latent_stats
from detect.bundle import load_bundle
from detect.settings import Settings
from recipes import ct_ich_tables
from tests.command_lines import parse

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.sh"))

# In Python's place: writes its arguments down, and an empty file where a command would write a database or a bundle.
# $CODES: exit codes of programs, such as 'benchmarks/ct_ich.py=3 healthygan.test=2'
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" --END-- >> "$WORDS"
[ "$1" != -c ] || { echo 2; exit; }
for one in ${CODES-}; do
    case $one in "$1="*) exit "${one#*=}" ;; esac
    [ "$1" != -m ] || case $one in "$2="*) exit "${one#*=}" ;; esac
done
[ "$1" != latent_stats.py ] && [ "$1" != prepare.py ] && exit
while [ "$1" != --out ]; do shift; done
case $2 in *.lmdb) : > "$2" ;; *) mkdir -p "$2" && : > "$2/model.json" ;; esac
"""


@pytest.fixture
def run(tmp_path):
    """run(recipe, *arguments, code=0, **environment) -> the commands, a list of words each, that it gives to Python."""
    stand_in, words = tmp_path / "python", tmp_path / "words"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(recipe: str, *arguments: str, code: int = 0, **environment: str) -> list[list[str]]:
        words.write_text("")
        done = subprocess.run(["sh", f"recipes/{recipe}", *arguments], cwd=ROOT, capture_output=True, text=True,
                              timeout=60, env=os.environ | {"PYTHON": str(stand_in), "WORDS": str(words)} | environment)
        assert done.returncode == code, done.stderr
        return [command.strip("\n").split("\n") for command in words.read_text().split("--END--\n") if command]

    return run


def programs(commands: list[list[str]]) -> list[str]:
    return [next(word for word in command if word.endswith(".py")) for command in commands if command[0] != "-c"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_syntax_and_usage(recipe, run):
    subprocess.run(["sh", "-n", f"recipes/{recipe}"], cwd=ROOT, check=True)
    head = (ROOT / "recipes" / recipe).read_text().split("\n\n")[0]
    assert f"# usage: sh recipes/{recipe}" in head
    assert run(recipe, "--help", code=2) == []


def test_heads_of_another_size(run, tmp_path):
    commands = run("head-128.sh", "ct-ich", "phe-sich", "loose", str(tmp_path), SIZE="256")
    flags = dict(zip(programs(commands), commands))
    assert [c[c.index("--size") + 1] for c in commands if c[0] == "prepare.py"] == ["256", "256"]
    assert all("ct256" in flags[name] for name in ("train.py", "train_reader.py", "latent_stats.py"))
    assert [parse(c).preset for c in commands if "train_encoder.py" in c] == ["ct256", "half256"]
    assert "head-256" in flags["latent_stats.py"]
    assert parse(flags["train_encoder.py"]).batch == parse(flags["train_reader.py"]).batch == 64
    assert "--nproc-per-node=1" in flags["train_encoder.py"]


def test_phantoms(run, tmp_path):
    commands = run("phantom-128.sh", str(tmp_path / "work"))
    assert programs(commands) == ["demos/phantom.py", "prepare.py", "train.py", "train_encoder.py", "train_encoder.py",
                                  "latent_stats.py", "demos/benchmark.py"]
    for command in commands:
        parse(command)
    again = programs(run("phantom-128.sh", str(tmp_path / "work")))          # what is resumed by its own command stays
    assert again == ["demos/phantom.py", "train.py", "train_encoder.py", "train_encoder.py", "demos/benchmark.py"]


def test_head(run, tmp_path):
    """One database in the range of loose slices trains, another with all HU and the same scans held out calibrates."""
    work = tmp_path / "work"
    work.mkdir()
    commands = run("head-128.sh", "a", "b", "c", str(work))
    assert programs(commands) == ["recipes/ct_ich_tables.py", "prepare.py", "prepare.py", "train.py",
                                  *["train_encoder.py"] * 2, *["train_reader.py"] * 4, "latent_stats.py",
                                  *(f"benchmarks/{name}.py" for name in (
                                      "inversion", "cross_validation", "ct_ich", "phe_sich"))]
    args = [parse(command) for command in commands]
    assert [one.scans for one in args[1:3]] == [["a/train", "b/scans", "c"], ["a/train", "b/scans"]]
    assert all(one.bone_apart and one.split == f"{work}/all.csv" for one in args[1:3])
    assert {str(one.data) for one in args[3:11]} == {f"{work}/slices.lmdb"}
    assert [one.preset for one in args[4:6]] == ["ct128", "half128"]
    assert {one.surroundings for one in args[6:11]} == {args[5].out}
    assert args[3].kimg == 1                                      # encoder and generator learn together, from a start
    readers = [work / f"reader-{number}" for number in (1, 2, 3)]
    assert [(str(one.fold), one.out) for one in args[7:10]] == list(zip(("1:3", "2:3", "3:3"), readers))
    (tmp_path / "alone").mkdir()
    alone = run("head-128.sh", "a", "b", "c", str(tmp_path / "alone"), RANKS="1")
    for ranks, launched in ((2, commands), (1, alone)):
        of_several = [command for command in launched if f"--nproc-per-node={ranks}" in command]
        assert programs(of_several) == [*["train_encoder.py"] * 2, *["train_reader.py"] * 4]
        assert {parse(command).batch * ranks for command in of_several} == {16}           # the same batch in all
    for ranks in ("3", "8"):                              # does not divide the batch; leaves fewer than 4 images each
        assert run("head-128.sh", "a", "b", "c", str(work), RANKS=ranks, code=2) == []
    assert args[6].fold is None and all(one.init == args[6].out for one in args[7:10])
    assert args[10].reader == args[12].reader == readers
    assert str(args[10].held_out) == f"{work}/scans.lmdb"
    assert programs(run("head-128.sh", "a", "b", "c", str(work))) == [
        name for name in programs(commands) if name not in ("prepare.py", "latent_stats.py")]


@pytest.mark.parametrize("recipe, arguments, partly", [
    ("head-128.sh", ["a", "b", "c"], "benchmarks/ct_ich.py"), ("healthygan.sh", ["cxr", "data"], "healthygan.test")])
def test_what_failed_in_part_keeps_no_later_program_from_being_run(recipe, arguments, partly, run, tmp_path):
    """3: some scans or pictures could not be read, all others are done. The recipe ended there, each time."""
    def started(place: str, **more) -> list[str]:
        (tmp_path / place).mkdir()
        commands = run(recipe, *arguments, str(tmp_path / place), **more)
        return [next(word for word in command if word != "-m") if command[1] != "torch.distributed.run"
                else next(word for word in command if word.endswith(".py")) for command in commands]

    all_programs = started("well")
    behind = all_programs[all_programs.index(partly) + 1:]
    assert behind == {"head-128.sh": ["benchmarks/phe_sich.py"],
                      "healthygan.sh": ["benchmarks.xray_map", "healthygan.trivial"]}[recipe]
    assert started("partly", code=3, CODES=f"{partly}=3") == all_programs
    assert started("wrong", code=2, CODES=f"{partly}=2") == all_programs[:-len(behind)]
    assert started("then", code=2, CODES=f"{partly}=3 {behind[-1]}=2") == all_programs


def test_heads(run, tmp_path):
    work = str(tmp_path / "work")
    commands = run("heads-128.sh", "slices.lmdb", work)
    assert programs(commands) == ["train.py", "train_encoder.py", "benchmarks/samples.py"]
    args = [parse(command) for command in commands]
    assert [str(one.data) for one in args] == ["slices.lmdb"] * 3 and args[1].gan == args[0].out
    assert args[1].preset == "heads128" and args[2].run == args[1].out


def test_healthygan(run, tmp_path):
    """A run's schedule fits its length: copying, the whole t, the mask, and the falling rate after all of them."""
    work = str(tmp_path / "work")
    bleeds, loose, slices, scans = (f"{name}.lmdb" for name in ("bleeds", "loose", "slices", "scans"))
    of_xrays = run("healthygan.sh", "cxr", "data", work)
    assert [command[1] for command in of_xrays] == ["healthygan.train", "healthygan.test", "benchmarks.xray_map",
                                                    "healthygan.trivial"]
    of_ct = run("healthygan.sh", "ct", bleeds, loose, slices, scans, "ct-ich", work)
    assert [command[1] for command in of_ct[:2]] == ["healthygan.sets", "healthygan.train"]
    assert programs(of_ct[2:]) == ["latent_stats.py", *(f"benchmarks/{name}.py" for name in (
        "inversion", "cross_validation", "ct_ich"))]
    xrays, ct = ([parse(command) for command in commands] for commands in (of_xrays, of_ct))
    for train in (xrays[0], ct[1]):
        assert train.copy_first + train.translate_first < train.iterations * (1 - train.decay)
    halves = ct[0]
    assert halves.overwrite                                       # killed between the two, it began anew for ever
    assert ct[1].mixed == [halves.mixed] * 2 + [Path(loose)] and ct[1].healthy == [halves.healthy] * 2 + [Path(loose)]
    assert str(ct[2].held_out) == scans == str(ct[5].database) and ct[5].beside == [ct[2].out]
    assert str(ct[2].data) == slices                              # holds out what scans.lmdb does; loose.lmdb nothing
    wrong = ((), ("cxr",), ("ct", bleeds, loose, slices, scans))
    assert all(run("healthygan.sh", *one, code=2) == [] for one in wrong)


def test_paper(run, tmp_path):
    work = str(tmp_path / "work")
    first = run("paper512.sh", "scans", work, PATIENTS="patients.csv", NODES="2", HEAD="node1")
    assert programs(first) == ["prepare.py", "train.py", "train_encoder.py", "latent_stats.py",
                               "benchmarks/inversion.py"]
    for command in first:
        if command[0] != "-c":                                                 # the number of GPUs
            assert getattr(parse(command), "preset", "paper512") == "paper512"
    launched = next(command for command in first if "train.py" in command)
    assert {"--nnodes=2", "--nproc-per-node=2"} < set(launched)
    second = run("paper512.sh", "scans", work, NODES="2", NODE="1", HEAD="node1", GPUS="4")
    assert programs(second) == ["train.py", "train_encoder.py"] and "--nproc-per-node=4" in second[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "healthy.lmdb").touch()
    other = run("paper512.sh", "scans", str(tmp_path / "other"), HEAD="node1", GPUS="1")
    meetings = [{part for part in command if "--rdzv" in part} for command in (launched, second[0], other[0])]
    assert meetings[0] == meetings[1] and len(meetings[0] & meetings[2]) == 1       # the backend: nodes may be shared


@pytest.mark.parametrize("name, changes", [
    ("phantom-128", {}), ("head-128", {}),
    ("head-256", {"bright_rim": 1, "judged": "normal", "spared": 0.0, "grow_hu": 8.0, "level": False,
                  "surprise_mask": 3.0, "extent_hu": 0.0, "hypodense": 0.6})])
def test_settings_are_those_of_the_shipped_bundle(name, changes, run, tmp_path):
    """head-256 is of before --gated, and has no reader."""
    (tmp_path / "work").mkdir()
    recipe, size = name.rsplit("-", 1)
    places = {"phantom": [], "head": ["a", "b", "c"]}[recipe]
    commands = run(f"{recipe}-128.sh", *places, str(tmp_path / "work"), SIZE=size)
    args = parse(next(command for command in commands if command[0] == "latent_stats.py"))
    settings = Settings().changed(latent_stats.SETTINGS[args.preset]).changed(args.changes).replace(**changes)
    assert settings.to_json() == load_bundle(ROOT / "models" / name).settings.to_json()


def test_tables_of_ct_ich(tmp_path, capsys):
    """The healthy scans, whole, and of the others what is more than 3 slices from any bleed."""
    ct_ich, phe_sich, out = tmp_path / "ct-ich", tmp_path / "phe-sich", tmp_path / "out"
    for folder in (ct_ich, phe_sich):
        folder.mkdir()
    rows = [f"h{n},train,2,0" for n in range(4)] + ["ill,test,9,1"]
    (ct_ich / "scans.csv").write_text("\n".join(["scan_id,split,slices,label", *rows]))
    bleeds = [f"p,{n},{int(n in (4, 6))}" for n in range(12)] + ["q,0,1", "q,3,0"]
    (phe_sich / "slices.csv").write_text("\n".join(["scan_id,slice,label", *bleeds]))
    assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(out)]) == 0

    def table(name):
        with (out / name).open(newline="") as file:
            return list(csv.reader(file))[1:]

    assert table("keep.csv") == [[f"h{n}", k] for n in range(4) for k in "01"] + [["p", "0"], ["p", "10"], ["p", "11"]]
    assert dict(table("all.csv")) == {"h0": "val", "h1": "val", "h2": "val", "h3": "val", "p": "train"}

    for label in ("1.0", "0.0", "", "yes", " 1"):                 # 1.0 by pandas: taken for 0, a bleed would train
        (phe_sich / "slices.csv").write_text("\n".join(["scan_id,slice,label", "p,0,0", f"p,1,{label}"]))
        assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(out)]) == 2
        assert f"slices.csv, line 3: label '{label}' of p, slice 1; expected 1 where a bleed" in capsys.readouterr().err

    (phe_sich / "slices.csv").write_text("scan_id,slice,label\np,0,0\np,,0\n")
    assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(out)]) == 2
    assert "slices.csv, line 3: slice '' of p; expected a whole number" in capsys.readouterr().err
    (phe_sich / "slices.csv").write_text("scan_id,slice,label\np,0,0\n")
    for row, told in (("h9,train,2,1", "label '1' of h9, which is of split 'train'; expected 0"),
                      ("h9,train,2,", "label '' of h9"), ("h9,train,,0", "slices '' of h9; expected a whole number")):
        (ct_ich / "scans.csv").write_text("\n".join(["scan_id,split,slices,label", *rows, row]))
        assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(tmp_path / "none")]) == 2
        assert f"scans.csv, line 7: {told}" in capsys.readouterr().err and not (tmp_path / "none").exists()

    (ct_ich / "scans.csv").write_text("scan_id,split,slices,label\nill,test,9,1")
    assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(out)]) == 2
    assert "no scan of split 'train'" in capsys.readouterr().err
    (phe_sich / "slices.csv").write_text("scan_id,slice\n")
    (ct_ich / "scans.csv").write_text("\n".join(["scan_id,split,slices,label", *rows]))
    assert ct_ich_tables.main([str(ct_ich), str(phe_sich), str(out)]) == 2
    assert "label missing" in capsys.readouterr().err
