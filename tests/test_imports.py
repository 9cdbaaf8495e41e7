"""Who may import whom. A new module at the top level needs a row in MAY_IMPORT, so that somebody thinks about it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMMANDS = {"prepare", "train", "train_encoder", "train_reader", "latent_stats", "projector", "evaluate", "checkpoint"}
APART = {"healthygan", "demos", "benchmarks", "recipes", "examples"}         # folders that nothing else imports
MAY_IMPORT = {                                                   # besides itself
    "op": set(),
    "common": set(),
    "ct": {"common.files", "common.machine", "common.pictures", "common.stopping", "common.time_zone",
           "common.version", "common.wording", "op.threads"},
    "evaluation": {"common.files", "common.pictures", "common.wording"},
    "distributed": set(),
    "config": set(),
    "model": {"op"},
    "dataset": {"common.files", "ct.settings"},
    "gan": {"op", "model", "common", "ct", "dataset", "distributed", "config", "detect.options",
            "detect.perceptual", "detect.inpainting", "detect.painter", "detect.inversion", "detect.reader"},
    "detect": {"op", "model", "common", "ct", "dataset", "distributed", "config"},
    "bundling": {"common", "ct.settings", "dataset", "detect", "distributed", "gan", "model"},
    "pacs": {"op", "common.files", "common.stopping", "common.time_zone", "ct", "detect", "distributed"},
    "healthygan": {"op", "common", "ct", "gan", "dataset", "distributed", "config", "evaluation",
                   "detect.reconstruct"},
}
# Beyond the library: the phantom benchmark stands beside its baselines; the speed benchmark times
# the trainings' own steps
ALSO = {"demos": {"benchmarks"}, "benchmarks": {"train", "train_encoder", "healthygan"}}
PACKAGES = ("common", "op", "ct", "evaluation", "gan", "detect", "bundling", "pacs")
# Commands of their own; and a class that the released checkpoint holds
MAY_USE_ARGPARSE = {"detect/report/__main__.py", "detect/released.py", "ct/mask.py", "pacs/__main__.py"}


def ignored(root: Path) -> set[str]:
    """The folders that git ignores: a user's runs/ may hold scripts."""
    path = root / ".gitignore"
    lines = path.read_text(encoding="utf-8").split() if path.is_file() else []
    return {line.rstrip("/") for line in lines if line.endswith("/")}


def rooms(root: Path) -> dict[str, list[Path]]:
    """Our modules and packages by name, with their source files; tests and what git ignores left out."""
    found, left_out = {path.stem: [path] for path in root.glob("*.py")}, ignored(root)
    for folder in root.iterdir():
        if not folder.is_dir() or not folder.name.isidentifier() or folder.name == "tests":
            continue
        sources = [path for path in sorted(folder.rglob("*.py"))
                   if not left_out & {str(parent.relative_to(root)) for parent in path.parents if parent != root
                                      and root in parent.parents}]
        if sources:
            found[folder.name] = sources
    return found


def imported(path: Path) -> set[str]:
    """Modules that a file imports, inside functions too; relative imports stay in the room."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return names


def wrong_arrows(root: Path) -> list[str]:
    ours = rooms(root)
    closed = COMMANDS | APART | {"tests"}
    wrong = []
    for room, files in sorted(ours.items()):
        if room not in MAY_IMPORT.keys() | COMMANDS | APART:
            wrong.append(f"{room} has no row in MAY_IMPORT")
            continue
        allowed = MAY_IMPORT.get(room, ours.keys() - closed) | {room}
        allowed |= ALSO.get(room, set())
        for path in files:
            arrows = [name for name in sorted(imported(path)) if name.partition(".")[0] in ours.keys() | {"tests"}]
            wrong += [f"{path.relative_to(root)} imports {name}" for name in arrows
                      if not any(f"{name}.".startswith(f"{one}.") for one in allowed)]
    return wrong


def test_every_import_of_the_repository_is_allowed():
    assert {"op", "ct", "model", "train"} <= rooms(ROOT).keys()
    assert wrong_arrows(ROOT) == []


def test_no_package_knows_the_command_line():
    users = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
             if "argparse" in imported(path)}
    assert users == MAY_USE_ARGPARSE


@pytest.mark.parametrize("name, source, complaint", [
    ("op/conv.py", "from model import Generator", "op/conv.py imports model"),
    ("ct/frame.py", "from dataset import SliceDataset", "ct/frame.py imports dataset"),
    ("gan/losses.py", "def f():\n    import detect.bundle", "gan/losses.py imports detect.bundle"),
    ("detect/search.py", "from gan.losses import in_domain", "detect/search.py imports gan.losses"),
    ("detect/bundle.py", "from bundling.origins import taught", "detect/bundle.py imports bundling.origins"),
    ("ct/mask.py", "from common.weights import verify", "ct/mask.py imports common.weights"),
    ("evaluation/metrics.py", "import ct.scan", "evaluation/metrics.py imports ct.scan"),
    ("model.py", "from op.bias_act import bias_act\nimport common.weights as w", "model.py imports common.weights"),
    ("train_encoder.py", "from train import Trainer", "train_encoder.py imports train"),
    ("dataset.py", "from tests.helpers import synthetic_head", "dataset.py imports tests.helpers"),
    ("gan/database.py", "import demos.phantom", "gan/database.py imports demos.phantom"),
    ("healthygan/model.py", "from detect.search import Search", "healthygan/model.py imports detect.search"),
    ("utils.py", "", "utils has no row in MAY_IMPORT"),
])
def test_a_wrong_arrow_is_found(tmp_path, name, source, complaint):
    for other in ("op/__init__.py", "ct/scan.py", "gan/losses.py", "detect/bundle.py", "bundling/origins.py",
                  "demos/phantom.py", "model.py", "common/weights.py", "dataset.py", "train.py", "checkpoint.py", name):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        (tmp_path / other).touch()
    (tmp_path / "train.py").write_text("import json\nimport common.weights\nfrom ct.scan import Scan\n")
    (tmp_path / name).write_text(source)
    assert wrong_arrows(tmp_path) == [complaint]


def test_scripts_that_git_ignores_are_left_alone(tmp_path):
    (tmp_path / ".gitignore").write_text("# What the commands write\nruns/\ndemos/out/\n*.lmdb\n")
    for name in ("runs/mine/plot.py", "demos/out/try.py", "demos/phantom.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import train\n")
    (tmp_path / "train.py").touch()
    assert wrong_arrows(tmp_path) == ["demos/phantom.py imports train"]
