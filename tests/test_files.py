"""common/files.py: files that several processes write at once, and what killed ones leave."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import pytest

from common.files import (
    ABANDONED_S,
    locked,
    no_folder,
    remove_abandoned,
    replace_text,
    replacing,
    replacing_folder,
    write_table,
)


def test_two_that_write_one_file_at_once_both_end_well(tmp_path):
    """They shared a place to write at: the second found it gone, and its run ended."""
    path = tmp_path / "run.json"
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["run.json"]


def test_what_a_killed_process_began_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    key = uuid.uuid4().hex
    begun = {f".{name}.writing": age_s for name, age_s in (
        (f"run.json.{key}", 60), (f"living.json.{key}", -60), (f"scores.csv.{key}", 60), ("draft", 60))}
    for name, age_s in begun.items():
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (time.time() - ABANDONED_S - age_s,) * 2)
    replace_text(tmp_path / "run.json", "{}")
    assert sorted(os.listdir(tmp_path)) == [".draft.writing", f".living.json.{key}.writing", "run.json"]
    remove_abandoned(tmp_path, ".*.writing", 60)
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_link_stays_one_and_its_file_is_replaced(tmp_path):
    """A file took its place, and what it led to stayed old."""
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(Path("far") / "file")
    for text in ("first", "second"):                                     # it may lead to nothing before
        replace_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_text() == text


def test_a_lock_is_one_holders_and_not_inherited(tmp_path):
    """A loader's processes are forks, and outlive a killed run by seconds: the next was to be refused for so long."""
    path = tmp_path / ".lock"
    with locked(path):
        with pytest.raises(BlockingIOError), locked(path):
            pass
        if (child := os.fork()) == 0:
            time.sleep(100)
            os._exit(0)
    try:
        with locked(path, wait_s=60):                                    # until the child has got to closing it
            pass
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_is_waited_for(tmp_path):
    held = threading.Event()

    def hold():
        with locked(tmp_path / ".lock"):
            held.set()
            time.sleep(0.3)
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    with locked(tmp_path / ".lock", wait_s=60):
        pass
    other.join()


def test_a_file_system_without_locks_is_passed_over(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("fcntl.flock", refuse)
    with locked(tmp_path / ".lock"), locked(tmp_path / ".lock"):
        pass


def test_a_folder_is_looked_through_once_an_hour(tmp_path, monkeypatch):
    """At every file that was written, it was: of very many results each took longer than the last."""
    looked, now = [], time.time()
    monkeypatch.setattr("common.files.remove_abandoned", lambda folder, pattern: looked.append(folder))
    for _ in range(2):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        for name in ("a", "b", "c"):
            replace_text(tmp_path / name, name)
        now += ABANDONED_S
    assert looked == [tmp_path, tmp_path]


def test_a_folder_whose_replacing_breaks_off_is_as_it_was(tmp_path, monkeypatch):
    """It was moved aside, and removed with what was to come in its place."""
    place, rename = tmp_path / "scan", Path.rename
    place.mkdir()
    (place / "result.json").write_text("old")

    def stopped(path, to):
        if path.suffix == ".writing":
            raise KeyboardInterrupt
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), replacing_folder(place, tmp_path / "work") as folder:
        (folder / "result.json").write_text("new")
    assert (place / "result.json").read_text() == "old" and os.listdir(tmp_path / "work") == []
    monkeypatch.undo()
    with replacing_folder(place, tmp_path / "work") as folder:
        (folder / "result.json").write_text("new")
    assert (place / "result.json").read_text() == "new" and os.listdir(tmp_path / "work") == []


def test_two_may_remove_the_same_leftovers(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "glob", lambda self, pattern: [tmp_path / "gone", tmp_path])
    remove_abandoned(tmp_path, "*", -1)
    assert tmp_path.is_dir()                                             # folders are left alone


def test_what_keeps_a_path_from_being_a_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert no_folder(tmp_path / "file") == no_folder(tmp_path / "file/below/it") == tmp_path / "file"
    assert no_folder(tmp_path) is no_folder(tmp_path / "new/folder") is None
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert no_folder(tmp_path / "new/folder") == tmp_path


def test_floats_of_exact_columns_read_back_as_they_are(tmp_path):
    rows = [{"score": value, "ml": value, "note": "-1.5e-07"} for value in (3.398482163747152, 0.1 + 0.2, 2e-07, 5.0)]
    write_table(tmp_path / "t.csv", ("score", "ml", "note"), [*rows, {"score": None}], exact=("score",))
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "score,ml,note", "3.398482163747152,3.39848,-1.5e-07", "0.30000000000000004,0.3,-1.5e-07",
        "2e-07,2e-07,-1.5e-07", "5.0,5,-1.5e-07", ",,"]
