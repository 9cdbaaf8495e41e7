"""README.md and docs/: short, and every file, command and flag they name exists."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.command_lines import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "SECURITY.md", "demos/README.md", "healthygan/README.md", "models/README.md",
         *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
MOST_BYTES = 12_000                  # of README.md
PACKAGES = ("benchmarks", "bundling", "ct", "demos", "detect", "examples", "gan", "healthygan", "op", "pacs", "recipes")
NOT_OURS = {"--network", "--read-only", "--tmpfs", "--build", "--memory", "--cpus",                 # of docker
            "--max-restarts", "--rdzv-backend", "--shutdown-timeout"}                               # of torchrun
SUFFIXES = (".py", ".sh", ".sbatch", ".yaml", ".toml", ".lock")          # of files that are named, not of results


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def shell_lines(page: str) -> list[str]:
    """The lines of the page's code blocks that name no language, continuation lines joined."""
    lines, language = [], None                                   # language None: outside a block
    for line in text(page).splitlines():
        if fence := re.fullmatch(r"\s*```(\w*)", line):
            language = fence[1] if language is None else None
        elif language == "":
            lines.append(line)
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", text(page), flags=re.S | re.M)


def python_words(line: str) -> list[str] | None:
    """The words after `python` in a line of shell, after torchrun's own flags in one of torchrun; else None."""
    line = re.sub(r"^(?:[A-Z_]+=\S* )*", "", line)
    if not re.match(r"(\.venv/bin/)?python |torchrun ", line):
        return None
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":
        return words[next(i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"):]
    return words[1:]


def anchor(heading: str) -> str:
    """As the sites that show Markdown make it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_readme_is_short():
    assert 5_000 < (ROOT / "README.md").stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, part = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if part:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert part in map(anchor, headings), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    for name in re.findall(r"`([\w./-]+)`", prose(page)):
        if name.endswith(SUFFIXES):
            assert any((folder / name).exists() for folder in (ROOT, (ROOT / page).parent)), f"{page}: {name}"


def texts_in(value: object) -> list[str]:
    """All texts in a value of JSON."""
    if isinstance(value, dict | list):
        return [text for one in (value.values() if isinstance(value, dict) else value) for text in texts_in(one)]
    return [value] if isinstance(value, str) else []


@pytest.mark.parametrize("model", sorted(path.parent.name for path in (ROOT / "models").glob("*/model.json")))
def test_files_that_a_provenance_names_exist(model):
    """head-256 named a recipe that there is not."""
    endings = "|".join(map(re.escape, SUFFIXES))
    named = [name for one in texts_in(json.loads(text(f"models/{model}/model.json"))["provenance"])
             for name in re.findall(rf"[\w./-]+(?:{endings})\b", one)]
    assert named and all((ROOT / name).exists() for name in named), f"models/{model}/model.json: {named}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    for line in shell_lines(page):
        if words := python_words(line):
            parse(words)
    shell = "\n".join(shell_lines(page))
    for target in re.findall(r"`make ([a-z-]+)`", prose(page)) + re.findall(r"^make ([a-z-]+)", shell, re.M):
        assert re.search(rf"^{target}:", text("Makefile"), re.M), f"{page}: make {target}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_order_write_nothing_twice_that_is_there(page):
    """prepare.py and latent_stats.py refuse that: who followed the page was stopped at the second block."""
    made = set()
    for line in shell_lines(page):
        words = python_words(line) or [""]
        if words[0] in ("prepare.py", "latent_stats.py"):
            out = words[words.index("--out") + 1]
            assert out not in made or "--overwrite" in words, f"{page}: {line}"
            made.add(out)


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@functools.cache
def known_flags() -> dict[str, set[str]]:
    """By command, as its help has them; under '' those of all programs here, options of presets included."""
    helps = {path.stem: flags_in(path.read_text(encoding="utf-8")) for path in (ROOT / "docs/help").glob("*.txt")}
    every = set().union(NOT_OURS, *helps.values())
    for path in ROOT.glob("*/**/*.py"):
        if path.relative_to(ROOT).parts[0] in PACKAGES:
            code = path.read_text(encoding="utf-8")
            every |= set(re.findall(r'"(--[a-z][\w-]*)"', code))
            every |= {"--" + name.replace("_", "-") for name in re.findall(r"^    (\w+): .* = option\(", code, re.M)}
    return helps | {"": every}


@pytest.mark.parametrize("page", PAGES)
def test_flags_that_are_named_exist(page):
    """In prose: a flag right behind a command's name is that command's, any other one of some program here."""
    for span in re.findall(r"`([^`]+)`", prose(page)):
        command = re.match(r"(\w+)\.py ", span)
        known = known_flags().get(command[1] if command else "", known_flags()[""])
        assert flags_in(span) <= known, f"{page}: {span}"


def test_commands_of_the_readme_s_table_are_understood():
    commands = re.findall(r"^\| `([a-z_]+\.py [^`]+)` \|", text("README.md"), re.M)
    assert len(commands) == 8
    for command in commands:
        parse(shlex.split(command))


def test_every_page_is_linked_from_the_readme_or_a_page_that_is():
    linked = {"README.md"}
    while True:
        found = {str(((ROOT / page).parent / target.partition("#")[0]).resolve().relative_to(ROOT))
                 for page in linked for target in re.findall(r"\]\(([^)\s:]+)\)", text(page))
                 if target.partition("#")[0].endswith(".md")} | linked
        if found == linked:
            break
        linked = found
    assert set(PAGES) <= linked
