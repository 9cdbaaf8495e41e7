"""Claims on scans: one holder at a time; those of the dead are taken over, those of the living never."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from common.files import FullDiskError
from detect.claims import JUDGING, Claims


def foreign(claims: Claims, name: str, age_s: float = 0, **changes) -> None:
    """A claim as another process would have made it, last touched age_s ago."""
    path = claims.path(name)
    path.write_text(json.dumps({**claims.me, "token": "another", **changes}))
    os.utime(path, (time.time() - age_s,) * 2)


def test_one_holder_at_a_time(tmp_path):
    first, second = Claims(tmp_path), Claims(tmp_path)
    with first.hold("a") as mine, second.hold("a") as theirs, second.hold("b") as other:
        assert (mine, theirs, other) == (True, False, True)
    with second.hold("a") as theirs:
        assert theirs
    assert os.listdir(tmp_path) == [JUDGING]


@pytest.mark.parametrize("changes, age_s, taken", [
    ({}, 0, False),                                              # this very process is alive ...
    ({}, 299, False),
    ({}, 301, True),                                             # ... but has not touched its claim for 5 minutes
    ({"started": 1}, 0, True),                                   # its number has gone to another process
    ({"host": "elsewhere", "started": 1}, 0, False),             # of other machines only the time is known
    ({"host": "elsewhere", "started": 1}, 301, True),
    ({"namespace": "of another container", "started": 1}, 0, False),
    ({"namespace": None, "started": None}, 0, False),
])
def test_a_claim_is_taken_over_when_its_holder_is_dead(tmp_path, changes, age_s, taken):
    claims = Claims(tmp_path)
    foreign(claims, "a", age_s, **changes)
    with claims.hold("a") as mine:
        assert mine == taken
    assert {*os.listdir(tmp_path)} - {JUDGING} == (set() if taken else {claims.path("a").name})


def test_a_killed_process_leaves_its_claim_to_the_next_at_once(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    claims = Claims(tmp_path)
    foreign(claims, "a", pid=ended.pid, started=12345)
    with claims.hold("a") as mine:
        assert mine


def test_a_claim_that_is_not_written_yet_is_left_until_it_is_old(tmp_path):
    claims = Claims(tmp_path)
    claims.path("a").touch()
    with claims.hold("a") as mine:
        assert not mine
    os.utime(claims.path("a"), (0, 0))
    with claims.hold("a") as mine:
        assert mine


def test_a_claim_that_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    """On a full disk. Empty, it was taken for a living run's by whoever had made room and came again."""
    claims = Claims(tmp_path)

    def full(content, file):
        file.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(json, "dump", full)
        with pytest.raises(FullDiskError, match=f"the disk is full.*{claims.path('a')}"), claims.hold("a"):
            pass
    assert os.listdir(tmp_path) == []
    with claims.hold("a") as mine:
        assert mine


def test_a_holder_keeps_its_claim_fresh_and_lets_go_of_no_others(tmp_path):
    claims = Claims(tmp_path, beat_s=0.01)
    with claims.hold("a"):
        os.utime(claims.path("a"), (0, 0))
        end = time.monotonic() + 10
        while claims.path("a").stat().st_mtime < time.time() - 60:
            assert time.monotonic() < end
            time.sleep(0.01)
        foreign(claims, "a")                                     # taken over, after this one had been asleep for long
    assert claims.path("a").exists()


def test_of_many_runs_one_gets_a_scan_dead_holders_or_not(tmp_path):
    names, finished, at_work, clashes = [f"scan {i}" for i in range(60)], set(), set(), []
    for name in names[::2]:
        foreign(Claims(tmp_path), name, started=1)

    def work():
        claims = Claims(tmp_path)
        for name in names:
            with claims.hold(name) as mine:
                if mine:
                    clashes.extend({name} & at_work)
                    at_work.add(name)
                    time.sleep(0.001)
                    at_work.remove(name)
                    finished.add(name)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert finished == set(names) and clashes == []


def test_who_judges_a_dead_holder_does_so_alone(tmp_path):
    """Else one run removes the claim that another has just made in the dead one's place, and a third makes its own."""
    first, second, taken = Claims(tmp_path), Claims(tmp_path), []
    foreign(first, "a", started=1)

    def take():
        with second.hold("a") as mine:
            taken.append(mine)
    with first._alone():
        thread = threading.Thread(target=take)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and taken == []
        foreign(first, "a")                                      # the first took it over: of a living holder now
    thread.join()
    assert taken == [False]


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"host": "here"}', "7"])
def test_a_claim_that_nobody_can_read_counts_until_it_is_old(tmp_path, text):
    """It was a traceback."""
    claims = Claims(tmp_path)
    claims.path("a").write_text(text)
    with claims.hold("a") as mine:
        assert not mine
    os.utime(claims.path("a"), (1, 1))
    with claims.hold("a") as mine:
        assert mine


def test_names_of_any_length_and_kind(tmp_path):
    claims = Claims(tmp_path)
    for name in ("x" * 255, "../../etc", "\udcff", "\u202e", ""):
        with claims.hold(name) as mine:
            assert mine and claims.path(name).parent == tmp_path
