"""python -m pacs: flags, environment and signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import available_timezones

import pytest

from ct.scan import ScanError
from pacs.__main__ import main, parse, start
from pacs.orthanc import OrthancRefused
from tests import processes
from tests.helpers import tiny_bundle
from tests.pacs_archive import (
    S1,
    S2,
    Archive,
    archive_node,
    at_once,
    free_port,
    states,
    wait_for,
)
from tests.pacs_process import IDENTITY


def test_results_without_patient_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--orthanc", "http://fake", "--state", "s", "--no-phi"])
    assert "under a patient of their own" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:8042x", "http://127.0.0.1:80421", "http://127.0.0.1:0", "http://[::1",
                                 "http://user:secret-word@127.0.0.1:8042x"])
def test_a_url_whose_port_cannot_be_is_refused_at_the_start(url, capsys):
    assert main(["--model", "m", "--orthanc", url, "--state", "s"]) == 2
    told = capsys.readouterr().err
    assert "error: --orthanc" in told and "such as http://127.0.0.1:8042" in told and "secret-word" not in told


@pytest.mark.parametrize("url", ["http://127.0.0.1:8042/a b", "http://127.0.0.1:8042/\u00e4", "http://127.0.0.1:8042/?x=1",
                                 "http://127.0.0.1:8042/app/explorer.html#", "http://.example:8042", "ftp://127.0.0.1",
                                 "http://u:secret-word@127.0.0.1", ""])
@pytest.mark.parametrize("flag", ["--orthanc", "--link"])
def test_a_url_that_is_no_base_is_refused_by_its_flag(tmp_path, flag, url, monkeypatch, capsys):
    """The first ones were waited for, or broke off with a traceback."""
    asked = ["--model", "m", "--state", str(tmp_path / "s"), "--orthanc", "http://fake", f"{flag}={url}"]
    assert main(asked) == 2
    told = capsys.readouterr().err
    assert f"error: {flag}" in told and "secret-word" not in told
    assert "such as http://127.0.0.1:8042" in told or "leave user and password out" in told


@pytest.mark.parametrize("flag, value", [("poll-s", "inf"), ("poll-s", "nan"), ("timeout-s", "1e300"), ("queue", "0"),
                                         ("days", "-1"), ("host", ""), ("queue", "x"), ("since", "then")])
def test_a_setting_out_of_range_is_wrong_usage(flag, value, capsys):
    """An endless pause or time-out was a traceback at the first look."""
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--orthanc", "http://fake", "--state", "s", f"--{flag}={value}"])
    assert f"--{flag}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--withdraw-deleted"]])
def test_results_of_deleted_series_are_deleted_only_where_that_is_asked_for(tmp_path, more):
    model, state = str(tiny_bundle(tmp_path / "model")), str(tmp_path / "state")
    node, server = start(parse(["--model", model, "--orthanc", "http://fake", "--state", state, "--port", "0",
                                "--device", "cpu", *more]))
    server.shutdown()
    server.server_close()
    node.state.close()
    assert node.withdraw_deleted == bool(more)


@pytest.mark.parametrize("user, password", [("node", ""), ("", "secret-word"), ("no:de", "secret-word")])
def test_credentials_that_cannot_be_are_refused_without_repeating_them(user, password, monkeypatch, capsys):
    monkeypatch.setenv("ORTHANC_USER", user)
    monkeypatch.setenv("ORTHANC_PASSWORD", password)
    assert main(["--model", "m", "--orthanc", "http://fake", "--state", "s"]) == 2
    told = capsys.readouterr().err
    assert "error: ORTHANC_USER" in told and "secret-word" not in told


def test_pages_that_cannot_be_served_are_told_by_the_flags(tmp_path, monkeypatch, default_signals, capsys):
    asked = of_stub(monkeypatch, tmp_path, Archive(tmp_path, S1))
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        assert main([*asked, "--port", str(taken)]) == 2
    assert f"error: --host 127.0.0.1 --port {taken}: the pages cannot be served there" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_cannot_be_is_wrong_usage(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--orthanc", "http://fake", "--state", "s", f"--port={port}"])
    assert f"to 65535, got {port}" in capsys.readouterr().err


def test_the_help_s_example_can_be_pasted(capsys):
    """Its lines were joined: Python took the backslash for its own."""
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    assert "--orthanc http://127.0.0.1:8042 \\\n        --state state\n" in capsys.readouterr().out


def test_the_containers_have_a_time_zone_and_can_be_given_a_gpu():
    """Without tzdata TZ is UTC, whatever it says."""
    compose, dockerfile = (Path(__file__).parents[1].joinpath(name).read_text() for name in ("compose.yaml",
                                                                                            "Dockerfile"))
    node = compose[compose.index("\n  node:\n"):compose.index("\nconfigs:\n")]
    assert "{TZ: \"${TZ:-UTC}\"}" in node and "# deploy: {resources: {reservations: {devices:" in node
    assert " tzdata " in dockerfile and "2.23.1" in compose[:compose.index("\nservices:\n")]


def test_the_example_of_an_environment_holds_values_alone():
    """A comment behind TZ's value was part of it, and results were dated in UTC."""
    example = Path(__file__).parents[1].joinpath(".env.example").read_text()
    values = dict(re.findall(r"^(?:# ?)?([A-Z_]+)=(.*)$", example, re.M))
    assert set(values) == {"ORTHANC_USER", "ORTHANC_PASSWORD", "TZ"}
    assert not any(re.search(r"\s", value) for value in values.values()) and values["TZ"] in available_timezones()


def test_the_first_line_tells_the_offset_of_the_dates(tmp_path, monkeypatch, default_signals, capsys):
    monkeypatch.setenv("TZ", "<+0545>-5:45")
    time.tzset()
    try:
        main(of_stub(monkeypatch, tmp_path, Archive(tmp_path, S1), lambda scan: os.kill(os.getpid(), signal.SIGTERM)))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "/ (projects on cpu, dates results +05:45)\n" in capsys.readouterr().out


def of_stub(monkeypatch, folder, archive, run=at_once):
    """A command line, whose program has the stub for a model and the archive for a server."""
    stub = type("Stub", (), {"__call__": lambda self, scan: run(scan), "key": lambda self: {"model": "stub"}})()
    for name, made in (("Orthanc", lambda *_: archive), ("Projector", lambda bundle: stub), ("load_bundle", print),
                       ("identity_of", lambda projector: IDENTITY), ("set_impl", print),
                       ("memory.keep_freed", print)):
        monkeypatch.setattr(f"pacs.__main__.{name}", made)
    return ["--model", "m", "--orthanc", "http://fake", "--state", str(folder / "state"), "--port", "0",
            "--device", "cpu"]


@pytest.fixture
def default_signals():
    """As a program is started from a terminal, whatever the tests were: in the background SIGINT is ignored. What it
    sets is set back.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_node_after_the_series_in_work(tmp_path, monkeypatch, default_signals, number, code, capsys):
    archive = Archive(tmp_path, S1, S2)

    def run(scan):
        os.kill(os.getpid(), number)
        return at_once(scan)

    class Event(threading.Event):
        def set(self):
            assert threading.current_thread() is not threading.main_thread()        # that may hold its lock: a deadlock
            super().set()
    monkeypatch.setattr("pacs.node.threading", SimpleNamespace(Event=Event))
    assert main(of_stub(monkeypatch, tmp_path, archive, run)) == code
    assert re.search(r"^worklist: http://127\.0\.0\.1:\d+/ \(projects on cpu, dates results [+-]\d\d:\d\d\)$",
                     capsys.readouterr().out, re.M)
    node = archive_node(tmp_path, archive)
    assert states(node) == {S1: "done", S2: "waiting"} and archive.uids() == set(node.state.rows[S1]["objects"])


def test_a_signal_that_nohup_ignores_stays_ignored(tmp_path, monkeypatch, default_signals):
    archive, numbers = Archive(tmp_path, S1, S2), [signal.SIGHUP, signal.SIGTERM]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def run(scan):
        os.kill(os.getpid(), numbers.pop(0))
        return at_once(scan)
    assert main(of_stub(monkeypatch, tmp_path, archive, run)) == 143
    assert states(archive_node(tmp_path, archive)) == {S1: "done", S2: "done"}


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_the_model_is_loaded_ends_the_program(tmp_path, monkeypatch, default_signals, number, code):
    asked = of_stub(monkeypatch, tmp_path, Archive(tmp_path, S1))
    monkeypatch.setattr("pacs.__main__.load_bundle", lambda *_: os.kill(os.getpid(), number))
    try:
        assert main(asked) == code
    except SystemExit as stop:                                       # of a command, that is the same
        assert stop.code == code and number != signal.SIGINT
    assert not (tmp_path / "state").exists()


def test_a_second_ctrl_c_ends_the_node_at_once_and_leaves_no_patient_data(tmp_path, monkeypatch, default_signals):
    archive = Archive(tmp_path, S1)

    def run(scan):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")
    assert main(of_stub(monkeypatch, tmp_path, archive, run)) == 130
    assert not list((tmp_path / "state" / "work").iterdir())
    assert states(archive_node(tmp_path, archive)) == {S1: "waiting"} and not archive.stored


@pytest.mark.parametrize("error", [ScanError("the decoder crashed, SIGTERM"), RuntimeError("killed")])
def test_what_fails_while_the_node_is_stopped_is_done_at_the_next_start(tmp_path, error):
    """systemd sends SIGTERM to all processes, a closed terminal SIGHUP: a decoder's end was the series' refusal."""
    def run(scan):
        node.stopping.set()
        raise error
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive, run)
    node.run()
    assert states(node) == {S1: "waiting"}
    node.state.close()
    again = archive_node(tmp_path, archive)
    again.step()
    assert states(again) == {S1: "done"}


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_program_while_orthanc_is_away(tmp_path, number, code):
    log = tmp_path / "log"
    run = processes.start("pacs.__main__", ["--model", tiny_bundle(tmp_path / "model"), "--orthanc",
                                            f"http://127.0.0.1:{free_port()}", "--state", tmp_path / "state",
                                            "--port", "0", "--device", "cpu"], log)
    wait_for(lambda: log.exists() and "Orthanc is away" in log.read_text())
    os.kill(run.pid, number)
    assert processes.codes([run]) == [code], log.read_text()
    assert os.listdir(tmp_path / "state" / "work") == []


@pytest.mark.parametrize("verb", ["fetch", "store"])
def test_a_user_who_may_not_do_it_ends_the_program_and_keeps_the_queue(tmp_path, verb, monkeypatch, capsys):
    archive, tries = Archive(tmp_path, S1, S2), []

    def denied(asked, what):
        if asked == verb:
            tries.append(what)
            if len(tries) > 1:
                raise SystemExit("tried again")
            raise OrthancRefused("POST http://fake/instances: not allowed (403); set ORTHANC_USER", 403)
    archive.turned_down = denied
    assert main(of_stub(monkeypatch, tmp_path, archive)) == 2
    assert "error: POST http://fake/instances: not allowed (403)" in capsys.readouterr().err
    archive.turned_down = lambda *_: None
    node = archive_node(tmp_path, archive)
    assert states(node) == {S1: "waiting", S2: "waiting"} and not list(node.state.work.iterdir())
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"}
