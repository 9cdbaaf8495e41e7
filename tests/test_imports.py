"""Who may import whom. A new module at the top level needs a row in MAY_IMPORT, so that somebody thinks about it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {"prepare", "train", "train_encoder", "latent_stats", "projector", "evaluate"}
APART = {"healthygan", "demos", "benchmarks"}                    # folders that nothing else imports
MAY_IMPORT = {                                                   # besides itself
    "op": set(),
    "ct": set(),
    "model": {"op"},
    "losses": {"op"},
    "augment": {"op"},
    "quality": {"op"},
    "anomaly": {"op"},
    "distributed": set(),
    "config": set(),
    "metrics": set(),
    "latent": set(),
    "cohort": {"metrics"},
    "triage": {"metrics"},
    "released": {"model"},
    "normative": {"op"},
    "memory": set(),
    "checkpoint": {"model", "latent", "normative", "released"},
    "dataset": {"ct", "distributed"},
    "preprocess": {"ct", "dataset", "distributed"},
    "runlog": {"checkpoint", "distributed"},
    "projection": {"anomaly", "normative", "ct", "latent", "losses", "model", "checkpoint", "op", "config"},
    "healthygan": {"ct", "dataset", "distributed", "checkpoint", "config", "memory", "metrics", "runlog"},
}
# Beyond the library: the phantom benchmark stands beside its baselines; the speed benchmark times train.py's own step
ALSO = {"demos": {"benchmarks"}, "benchmarks": {"train", "healthygan"}}


def rooms(root: Path) -> dict[str, list[Path]]:
    """Our modules and packages by name, with their source files; tests left out."""
    found = {path.stem: [path] for path in root.glob("*.py")}
    for folder in root.iterdir():
        sources = sorted(folder.rglob("*.py")) if folder.is_dir() and folder.name.isidentifier() else []
        if sources and folder.name != "tests":
            found[folder.name] = sources
    return found


def imported(path: Path) -> set[str]:
    """First names of everything a file imports, inside functions too; relative imports stay in the room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def wrong_arrows(root: Path) -> list[str]:
    ours = rooms(root)
    closed = SCRIPTS | APART | {"tests"}
    wrong = []
    for room, files in sorted(ours.items()):
        if room not in MAY_IMPORT.keys() | SCRIPTS | APART:
            wrong.append(f"{room} has no row in MAY_IMPORT")
            continue
        allowed = MAY_IMPORT.get(room, ours.keys() - closed) | {room}
        allowed |= ALSO.get(room, set())
        for path in files:
            arrows = imported(path) & (ours.keys() | {"tests"}) - allowed
            wrong += [f"{path.relative_to(root)} imports {name}" for name in sorted(arrows)]
    return wrong


def test_every_import_of_the_repository_is_allowed():
    assert {"op", "ct", "model", "train"} <= rooms(ROOT).keys()
    assert wrong_arrows(ROOT) == []


@pytest.mark.parametrize("name, source, complaint", [
    ("op/conv.py", "from model import Generator", "op/conv.py imports model"),
    ("losses.py", "def f():\n    import model", "losses.py imports model"),
    ("model.py", "from op.bias_act import bias_act\nimport checkpoint as c", "model.py imports checkpoint"),
    ("train_encoder.py", "from train import Trainer", "train_encoder.py imports train"),
    ("dataset.py", "from tests.helpers import synthetic_head", "dataset.py imports tests"),
    ("preprocess.py", "import demos.phantom", "preprocess.py imports demos"),
    ("utils.py", "", "utils has no row in MAY_IMPORT"),
])
def test_a_wrong_arrow_is_found(tmp_path, name, source, complaint):
    for other in ("op/__init__.py", "ct/scan.py", "demos/phantom.py", "model.py", "train.py", "checkpoint.py", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    (tmp_path / "train.py").write_text("import json\nimport checkpoint\nfrom ct.scan import Scan\n")
    (tmp_path / name).write_text(source)
    assert wrong_arrows(tmp_path) == [complaint]
