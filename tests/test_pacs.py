"""The PACS node against the real Orthanc on loopback (Debian package orthanc), and its parts without one."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from common.files import FullDiskError
from ct.scan import ScanError
from pacs.__main__ import main
from pacs.node import Node
from pacs.orthanc import Change, Orthanc, OrthancAway, OrthancRefused
from pacs.server import _Handler, page, serve, worklist
from pacs.state import State, StateError
from tests import processes
from tests.helpers import tiny_bundle
from tests.pacs_process import IDENTITY, project
from tests.test_dicom_out import MARKERS, complete
from tests.writers import make_uid, write_dicom_series

BINARY = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
needs_orthanc = pytest.mark.skipif(BINARY is None, reason="Orthanc is not installed (Debian package orthanc)")
ROOT = Path(__file__).resolve().parent.parent


PATIENT_IDS = (b"ID 1", b" ID1", b"DEPT\\1234", b"ID1\xa0", b"ID1\r\n")          # what hospitals send; Latin-1


def dashed(text: str) -> str:
    """SHA-1 as Orthanc writes it."""
    digest = hashlib.sha1(text.encode()).hexdigest()
    return "-".join(digest[i:i + 8] for i in range(0, 40, 8))


def orthanc_id(path: Path) -> str:
    """The id that Orthanc 1.10 gives an instance's file."""
    ds = pydicom.dcmread(path, stop_before_pixels=True)
    patient = ds.get_item("PatientID").value.decode("latin-1").rstrip(" \0")
    return dashed("|".join((patient, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID)))


S1, S2, S3, S4 = map(dashed, "1234")                                  # ids of series


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """An Orthanc of a test's own: no DICOM port, series are stable after a second."""

    def __init__(self, folder: Path, **settings):
        self.port, self.folder = free_port(), folder
        self.url = f"http://127.0.0.1:{self.port}"
        folder.mkdir(parents=True, exist_ok=True)
        self.config = folder / "orthanc.json"
        self.config.write_text(json.dumps({
            "Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "HttpPort": self.port, "RemoteAccessAllowed": False, "AuthenticationEnabled": False,
            "DicomServerEnabled": False, "StableAge": 1, **settings}))
        self.start()

    def start(self) -> None:
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([BINARY, self.config], stdout=log, stderr=log)
        self.client = Orthanc(self.url)
        wait_for(lambda: answers(self.url + "/system"))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def send(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            self.client.store(path)

    def get(self, path: str):
        return json.loads(urllib.request.urlopen(self.url + path, timeout=60).read())

    def results(self, study: dict) -> list[str]:
        """Modalities of the study's series besides the CT, a word per series."""
        series = [self.get(f"/series/{s}") for s in study["Series"]]
        return sorted(f"{s['MainDicomTags']['Modality']} {len(s['Instances'])}" for s in series
                      if s["MainDicomTags"]["Modality"] != "CT")


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 401
    except OSError:
        return False
    return True


def wait_for(happens, seconds: float = 180.0):             # a loaded machine is slow, not broken
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{happens} did not happen within {seconds} s")


@pytest.fixture
def orthanc(tmp_path):
    server = Server(tmp_path / "orthanc")
    yield server
    server.stop()


def write_study(folder: Path, number: int, slices: int = 4, marked: int = 300, patient: bytes | None = None,
                **more) -> Path:
    hu = np.full((slices, 24, 24), -1000.0)
    hu[:, 1:23, 1:23], hu[:, 2:22, 2:22] = 1000, 30                   # air, skull, brain
    brain = hu[:, 2:22, 2:22].reshape(-1)
    brain[:marked] = 70
    hu[:, 2:22, 2:22] = brain.reshape(slices, 20, 20)

    def edit(ds, k):
        complete(ds, k)
        ds.PatientID, ds.PatientName = f"ID{number}", f"SECRET{number}"
        if patient is not None:
            ds.SpecificCharacterSet = "ISO_IR 100"
            value = patient + b" " * (len(patient) % 2)
            ds[0x00100020] = RawDataElement(Tag(0x00100020), "LO", len(value), value, 0, False, True)
    return write_dicom_series(folder / f"study{number}", hu, study=f"study{number}", series=f"series{number}",
                              edit=edit, **more)


def node_of(server, folder: Path, run=project, **more) -> Node:
    return Node(server.client, State(folder, {"model": "stub"}), run, IDENTITY, **more)


def until_idle(node: Node, done: int) -> None:
    def step():
        node.step()
        return sum(row["state"] != "waiting" for row in node.state.rows.values()) == done
    wait_for(step)


# ---- with Orthanc

@needs_orthanc
def test_a_study_gets_its_results_once_and_its_own_results_do_not_trigger_it(tmp_path, orthanc):
    orthanc.send(write_study(tmp_path, 1))
    node = node_of(orthanc, tmp_path / "state")
    until_idle(node, 1)
    time.sleep(2.5)                                          # our own series are stable by now
    for _ in range(3):
        node.step()
    (series_id, row), = node.state.rows.items()
    assert (row["state"], row["score"], row["flagged"]) == ("done", 3.0, True)
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert study["PatientMainDicomTags"]["PatientID"] == "ID1"
    assert orthanc.results(study) == ["KO 1", "OT 1", "OT 3", "SEG 1", "SR 1"]
    assert not list(node.state.work.iterdir())
    assert node.metrics.outcomes["done"] == 1


@needs_orthanc
def test_a_refused_series_gets_a_row_and_no_object(tmp_path, orthanc):
    orthanc.send(write_study(tmp_path, 1, slices=3))
    node = node_of(orthanc, tmp_path / "state")
    until_idle(node, 1)
    (_, row), = node.state.rows.items()
    assert row["state"] == "refused" and "too few slices for a head" in row["reason"]
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert orthanc.results(study) == []
    assert node.metrics.outcomes["refused"] == 1


@needs_orthanc
def test_a_failure_costs_one_series_and_quotes_nothing(tmp_path, orthanc, capfd):
    message = "SECRET" + str(1)

    def broken(scan):
        raise RuntimeError(message)
    orthanc.send(write_study(tmp_path, 1))
    node = node_of(orthanc, tmp_path / "state", broken)
    until_idle(node, 1)
    (_, row), = node.state.rows.items()
    assert row["state"] == "failed" and row["reason"].startswith("RuntimeError")
    out = capfd.readouterr()
    assert "SECRET1" not in out.out + out.err + json.dumps(worklist(node)[0]) and "in broken" in out.err


@needs_orthanc
def test_more_images_of_a_series_replace_its_results(tmp_path, orthanc):
    folder = write_study(tmp_path, 1, slices=6)
    late = sorted(folder.iterdir())[-1].rename(tmp_path / "late.dcm")
    orthanc.send(folder)
    node = node_of(orthanc, tmp_path / "state")
    until_idle(node, 1)
    first = next(iter(node.state.rows.values()))
    orthanc.client.store(late)

    def again():
        node.step()
        row = next(iter(node.state.rows.values()))
        return row["state"] == "done" and row["finished"] and row["images"] == 6
    wait_for(again)
    row = next(iter(node.state.rows.values()))
    assert not set(first["objects"]) & set(row["objects"])
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert orthanc.results(study) == ["KO 1", "OT 1", "OT 3", "SEG 1", "SR 1"]


@needs_orthanc
def test_outdated_results_go_whatever_the_patient_id(tmp_path, orthanc):
    late = []
    for number, patient in enumerate(PATIENT_IDS):
        folder = write_study(tmp_path, number, slices=6, patient=patient)
        late.append(sorted(folder.iterdir())[-1].rename(tmp_path / f"late{number}.dcm"))
        orthanc.send(folder)
    node = node_of(orthanc, tmp_path / "state", at_once)
    until_idle(node, len(PATIENT_IDS))
    for path in late:
        assert orthanc.client.store(path)[0] == orthanc_id(path)         # the fake one's ids are the real one's
    wait_for(lambda: node.step() or not node.state.waiting() and all(
        row["images"] == 6 for row in node.state.rows.values()))
    found = [orthanc.results(orthanc.get(f"/studies/{s}")) for s in orthanc.get("/studies")]
    assert found == [["KO 1", "OT 1", "OT 3", "SEG 1", "SR 1"]] * len(PATIENT_IDS)


@needs_orthanc
def test_series_that_orthanc_was_restarted_before_it_called_stable(tmp_path):
    server = Server(tmp_path / "orthanc", StableAge=3)
    try:
        node = node_of(server, tmp_path / "state", at_once)
        whole = write_study(tmp_path, 1)
        part = sorted(write_study(tmp_path, 2, slices=6).iterdir())
        for path in part[:4]:
            server.client.store(path)
        until_idle(node, 1)
        server.send(whole)
        for path in part[4:]:
            server.client.store(path)
        server.stop()
        server.start()
        wait_for(lambda: node.step() or sorted(row["images"] for row in node.state.rows.values()
                                               if row["state"] == "done") == [4, 6])
    finally:
        server.stop()


@needs_orthanc
def test_a_study_that_was_deleted_and_sent_again_is_done_again(tmp_path, orthanc):
    folder = write_study(tmp_path, 1)
    orthanc.send(folder)
    node = node_of(orthanc, tmp_path / "state", at_once)
    until_idle(node, 1)
    study, = orthanc.get("/studies")
    orthanc.client._request(f"/studies/{study}", method="DELETE")
    orthanc.send(folder)
    wait_for(lambda: node.step() or node.metrics.outcomes["done"] == 2)
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert orthanc.results(study) == ["KO 1", "OT 1", "OT 3", "SEG 1", "SR 1"]


@needs_orthanc
def test_results_do_not_bring_a_deleted_study_back(tmp_path, orthanc):
    orthanc.send(write_study(tmp_path, 1))

    def deleted_meanwhile(scan):
        study, = orthanc.get("/studies")
        orthanc.client._request(f"/studies/{study}", method="DELETE")
        return at_once(scan)
    node = node_of(orthanc, tmp_path / "state", deleted_meanwhile)
    until_idle(node, 1)
    row, = node.state.rows.values()
    assert (row["state"], row["reason"]) == ("refused", "deleted from Orthanc before its results were stored")
    assert orthanc.get("/studies") == []


@needs_orthanc
def test_a_series_sent_again_with_other_pixels_under_the_same_uids_is_done_again(tmp_path, orthanc):
    """Its old score stood beside images that it was not of: the results, in series of their own, were still there."""
    orthanc.send(write_study(tmp_path, 1, marked=300))
    node = node_of(orthanc, tmp_path / "state", at_once)
    until_idle(node, 1)
    (series_id, row), = node.state.rows.items()
    assert row["score"] == 3
    orthanc.client._request(f"/series/{series_id}", method="DELETE")
    orthanc.send(write_study(tmp_path / "corrected", 1, marked=0))
    wait_for(lambda: node.step() or node.metrics.outcomes["done"] == 2)
    assert node.state.rows[series_id]["score"] == 0
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert orthanc.results(study) == ["KO 1", "OT 1", "OT 3", "SR 1"]                      # nothing is marked now


@needs_orthanc
def test_results_that_a_filter_turns_away_are_not_stored(tmp_path):
    script = tmp_path / "filter.lua"
    script.write_text("function ReceivedInstanceFilter(dicom, origin)\n  return dicom.Modality == 'CT'\nend\n")
    server = Server(tmp_path / "orthanc", LuaScripts=[str(script)])
    try:
        server.send(write_study(tmp_path, 1))
        node = node_of(server, tmp_path / "state", at_once)
        wait_for(lambda: node.step() or node.metrics.put_back)
        row, = node.state.rows.values()
        assert row["state"] == "waiting" and "seg.dcm is not stored: FilteredOut; let the server's" in row["reason"]
    finally:
        server.stop()


@needs_orthanc
def test_no_patient_data_but_in_orthanc(tmp_path, orthanc, capfd):
    orthanc.send(write_study(tmp_path, 7))
    node = node_of(orthanc, tmp_path / "state")
    until_idle(node, 1)
    said = capfd.readouterr()
    text = said.out + said.err + page(node, orthanc.url) + json.dumps(worklist(node)[0])
    text += "".join(path.read_text() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert len(MARKERS) >= 12 and "SECRET7" not in text and "ID7" not in text


@needs_orthanc
def test_the_queue_is_bounded(tmp_path, orthanc):
    for number in range(5):
        orthanc.send(write_study(tmp_path, number))
    node = node_of(orthanc, tmp_path / "state", queue=2)
    wait_for(lambda: orthanc.client.last_change() and sum(
        c.kind == "StableSeries" for c in orthanc.client.changes(0, 1000)[0]) == 5)
    assert node.log.follow() and len(node.state.waiting()) == 2
    assert node.log.follow() and len(node.state.waiting()) == 2          # no room: the log is left alone
    until_idle(node, 5)


@needs_orthanc
def test_orthanc_away_is_waited_for(tmp_path, orthanc):
    orthanc.send(write_study(tmp_path, 1))
    node = node_of(orthanc, tmp_path / "state", poll_s=0.1)
    wait_for(lambda: node.log.follow() or node.state.waiting())
    orthanc.stop()
    loop = Thread(target=node.run)
    loop.start()
    wait_for(lambda: not node.metrics.orthanc_up)
    assert node.state.waiting()
    orthanc.start()
    wait_for(lambda: node.metrics.outcomes["done"] == 1 and node.metrics.orthanc_up)
    node.stopping.set()
    loop.join(60)
    assert not loop.is_alive()


@needs_orthanc
def test_credentials(tmp_path):
    server = Server(tmp_path / "orthanc", AuthenticationEnabled=True, RegisteredUsers={"node": "secret-word"})
    try:
        assert Orthanc(server.url, "node", "secret-word").system()["Name"] == "test"
        with pytest.raises(OrthancRefused, match="ORTHANC_USER and ORTHANC_PASSWORD") as error:
            Orthanc(server.url, "node", "wrong-word").system()
        assert "wrong-word" not in str(error.value)
    finally:
        server.stop()


@needs_orthanc
def test_one_set_of_results_each_after_kills_at_random_moments(tmp_path, orthanc):
    studies, kills, chance = 4, 4, random.Random(4)
    for number in range(studies):
        orthanc.send(write_study(tmp_path, number, marked=100 * number))
    port_file, state = tmp_path / "port", tmp_path / "state"
    command = [sys.executable, "-m", "tests.pacs_process", orthanc.url, str(state), str(port_file)]
    for attempt in range(kills + 1):
        port_file.unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(port_file.exists)
            if attempt < kills:
                time.sleep(chance.uniform(0, 2.0))
            else:
                wait_for(lambda: [json.loads(path.read_text())["state"] for path in state.glob("series/*.json")]
                         == ["done"] * studies)
        finally:
            process.kill()                                           # kill -9
            process.wait()
    found = [orthanc.results(orthanc.get(f"/studies/{s}")) for s in orthanc.get("/studies")]
    assert len(found) == studies
    marked = sorted("SEG 1" in series for series in found)
    assert marked == [False] + [True] * (studies - 1)                # study 0 has nothing to mark
    for series in found:
        assert [s for s in series if s != "SEG 1"] == ["KO 1", "OT 1", "OT 3", "SR 1"]


# ---- without

@pytest.fixture
def broken_server():
    """Answers 500 to the first request, nonsense to the second, 404 after that."""
    class Handler(BaseHTTPRequestHandler):
        asked = 0

        def do_GET(self):
            Handler.asked += 1
            self.send_response({1: 500, 2: 200}.get(Handler.asked, 404))
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_what_is_worth_another_try(broken_server):
    client = Orthanc(broken_server, timeout_s=2)
    with pytest.raises(OrthancAway, match="/system: 500"):
        client.system()
    with pytest.raises(OrthancAway, match="no JSON; is this Orthanc"):
        client.system()
    with pytest.raises(OrthancRefused, match="/series/x: 404"):
        client.series("x")
    with pytest.raises(OrthancAway, match="refused"):
        Orthanc(f"http://127.0.0.1:{free_port()}").system()


@pytest.fixture
def answering():
    """A server that answers everything with its .status, .headers and .body; .asked: method and headers."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            server.asked.append((self.command, dict(self.headers)))
            self.send_response(server.status)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(server.body)))
            self.end_headers()
            self.wfile.write(server.body)

        do_POST = do_DELETE = do_GET

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.status, server.headers, server.body, server.asked = 200, {}, b"", []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_proxys_404_before_a_server_that_is_away_deletes_nothing(answering):
    """Some proxies answer so while what is behind them starts: series were passed over for good."""
    client = Orthanc(answering.url)
    answering.status, answering.body = 404, b"no such backend"
    with pytest.raises(OrthancRefused, match="/changes.last: 404"):      # another address than Orthanc's
        client.last_change()
    answering.status, answering.body = 200, b"{}"
    client.system()
    answering.status = 404
    for request in (lambda: client.series(S1), lambda: client.fetch(S1, Path("x")), lambda: client.delete(S1)):
        with pytest.raises(OrthancAway, match="/system: 404"):
            request()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(tmp_path, answering, status):
    answering.status, answering.headers = status, {"Location": answering.url + "/orthanc/changes?token=secret-word"}
    client = Orthanc(answering.url, "node", "secret-word")
    node = Node(client, State(tmp_path / "state", {}), project, IDENTITY)
    with pytest.raises(OrthancRefused, match=f"redirects to {answering.url}/orthanc; give --orthanc that") as error:
        node.run()
    assert error.value.for_all and "secret-word" not in str(error.value)
    (tmp_path / "x").write_bytes(b"x")
    for request in (lambda: client.store(tmp_path / "x"), lambda: client.delete(S1)):
        with pytest.raises(OrthancRefused, match="redirects to"):
            request()
    assert [method for method, _ in answering.asked] == ["GET", "POST", "DELETE"]


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"Changes": [{}], "Last": 1, "Done": true}',
                                  b'{"Changes": 1, "Last": "x"}', b"[1]"])
def test_json_that_is_not_orthancs(tmp_path, answering, body):
    answering.body = body
    client = Orthanc(answering.url)
    (tmp_path / "x").write_bytes(b"x")
    for request in (client.last_change, lambda: client.changes(0, 1), lambda: client.series(S1),
                    lambda: client.series_of(S1), lambda: client.study(S1), lambda: client.store(tmp_path / "x")):
        with pytest.raises(OrthancAway, match="is this Orthanc"):
            request()
    if body != b"[]":                                                # nothing found, too
        with pytest.raises(OrthancAway, match="is this Orthanc"):
            client.find("1.2", S1)


def test_instances_are_found_of_this_study_alone(monkeypatch):
    client, asked = Orthanc("http://fake"), []
    answers = {"/tools/lookup": [{"ID": id, "Type": kind} for id, kind in ((S1, "Instance"), (S2, "Instance"),
                                                                       (S3, "Instance"), (S4, "Series"))],
               f"/instances/{S1}/study": {"ID": "other"}, f"/instances/{S2}/study": {"ID": "this"}}

    def request(path, body=None):
        asked.append((path, body))
        if path not in answers:
            raise OrthancRefused("gone", 404)
        return json.dumps(answers[path]).encode()
    monkeypatch.setattr(client, "_request", request)
    assert client.find("1.2.3", "this") == [S2] and asked[0] == ("/tools/lookup", b"1.2.3")


def test_results_without_patient_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--orthanc", "http://fake", "--state", "s", "--no-phi"])
    assert "under a patient of their own" in capsys.readouterr().err


def test_a_url_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="ORTHANC_USER") as error:
        Orthanc("http://user:secret-word@127.0.0.1:8042")
    assert "secret-word" not in str(error.value)
    with pytest.raises(ValueError, match="expected a URL"):
        Orthanc("127.0.0.1:8042")


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


@pytest.mark.parametrize("user, password", [("node", ""), ("", "secret-word"), ("no:de", "secret-word")])
def test_credentials_that_cannot_be_are_refused_without_repeating_them(user, password, monkeypatch, capsys):
    monkeypatch.setenv("ORTHANC_USER", user)
    monkeypatch.setenv("ORTHANC_PASSWORD", password)
    assert main(["--model", "m", "--orthanc", "http://fake", "--state", "s"]) == 2
    told = capsys.readouterr().err
    assert "error: ORTHANC_USER" in told and "secret-word" not in told


def test_pages_that_cannot_be_served_are_told_by_the_flags(tmp_path, monkeypatch, answering, default_signals, capsys):
    taken = answering.url.rsplit(":")[-1]
    asked = of_stub(monkeypatch, tmp_path, Archive(tmp_path, S1))
    assert main([*asked, "--port", taken]) == 2
    assert f"error: --host 127.0.0.1 --port {taken}: the pages cannot be served there" in capsys.readouterr().err


@pytest.mark.parametrize("name, text", [("state.json", "[]"), ("state.json", '{"model": 1}'), ("series/x.json", "null"),
                                        ("series/x.json", '{"state": "done"}'), ("series/x.json", "")])
def test_a_damaged_file_of_the_state_is_named(tmp_path, name, text):
    State(tmp_path, {"weights": "a"}).close()
    (tmp_path / name).write_text(text)
    with pytest.raises(StateError, match=f"{name}: damaged; delete it"):
        State(tmp_path, {"weights": "a"})


@pytest.mark.parametrize("place", ["", "series", "work"])
def test_a_state_that_cannot_be_written_is_told_by_its_flag(tmp_path, place):
    (tmp_path / "state").mkdir() if place else None
    (tmp_path / "state" / place).touch()
    with pytest.raises(StateError, match=f"--state .*: cannot be used .*{place or 'state'}.*; mend that, or"):
        State(tmp_path / "state", {"weights": "a"})


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_cannot_be_is_wrong_usage(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--model", "m", "--orthanc", "http://fake", "--state", "s", f"--port={port}"])
    assert f"to 65535, got {port}" in capsys.readouterr().err


class FakeOrthanc:
    """A change log, and series that are stable and CT unless named otherwise; each has one instance."""

    url, updated = "http://fake", "20260101T000000"

    def __init__(self, changes):
        self.log = changes

    def last_change(self):
        return self.log[-1] if self.log else None

    def changes(self, since, limit):
        page = [c for c in self.log if c.sequence > since][:limit]
        return page, page[-1].sequence if page else since, not page or page[-1] is self.log[-1]

    def series(self, series_id):
        if series_id == dashed("deleted"):
            raise OrthancRefused("gone", 404)
        return {"ID": series_id, "MainDicomTags": {"Modality": "SR" if series_id == dashed("report") else "CT"},
                "Instances": ["i"], "ParentStudy": "s", "IsStable": True, "LastUpdate": self.updated}

    def study(self, study_id):
        return {"MainDicomTags": {"StudyInstanceUID": "1.2"}}


def log_of(*ids, kind="StableSeries", first=1, date="20260101T000000"):
    return [Change(number, kind, series_id, date) for number, series_id in enumerate(ids, first)]


def fake_node(folder, changes, **more):
    return Node(FakeOrthanc(changes), State(folder, {"model": "stub"}), project, IDENTITY, **more)



def test_the_change_log_is_followed_once(tmp_path):
    a, report, deleted, b = map(dashed, ("a", "report", "deleted", "b"))
    node = fake_node(tmp_path, log_of(a, report, deleted, b))
    assert node.log.follow() is False
    assert node.state.waiting() == [a, b] and node.state.sequence == 4
    node.state.put(a, node.state.rows[a] | {"state": "done", "objects": ["1.2.3"]})
    node.state.close()
    again = fake_node(tmp_path, log_of(a, report, deleted, b, a))               # announced again, no new image
    again.log.follow()
    assert again.state.waiting() == [b] and again.state.sequence == 5


def test_a_change_log_that_starts_anew_is_read_from_its_beginning(tmp_path):
    a, b, c, d = map(dashed, "abcd")
    node = fake_node(tmp_path, log_of(a, b, c))
    node.log.follow()
    node.orthanc.log = log_of(d, date="20260101T000001")
    node.log.follow()
    assert node.state.waiting()[-1] == c and d in node.state.waiting() and node.state.sequence == 1


@pytest.mark.parametrize("grown", [2, 3, 4, 250])
def test_a_change_log_that_starts_anew_and_has_grown_beyond_our_place(tmp_path, grown):
    """While a series was in work, or the node stopped; its first entries were lost."""
    node = fake_node(tmp_path, log_of(*[dashed(f"before {i}") for i in range(3)]), queue=1000)
    node.log.follow()
    node.orthanc.log = log_of(*[dashed(f"anew {i}") for i in range(grown)], date="20260101T000001")
    while node.log.follow():
        pass
    assert {dashed(f"anew {i}") for i in range(grown)} <= set(node.state.waiting()) and node.state.sequence == grown


def test_a_change_log_whose_newest_entries_were_deleted_is_not_read_again(tmp_path):
    node = fake_node(tmp_path, log_of(S1, S2, S3), from_now=True)
    node.log.follow()
    assert not node.state.rows and node.state.sequence == 3           # of before the first start
    node.orthanc.log = node.orthanc.log[:2]
    node.log.follow()
    node.orthanc.log += log_of(S4, first=4, date="20260101T000001")
    node.state.close()
    again = Node(node.orthanc, State(tmp_path, {"model": "stub"}), project, IDENTITY, from_now=True)
    again.log.follow()
    assert again.state.waiting() == [S4] and again.state.sequence == 4


class Archive(FakeOrthanc):
    """Also holds a study of each series of the log; `turned_down` may raise for a request: its verb and id."""

    def __init__(self, folder, *ids, slices=4, patient=None):
        super().__init__(log_of(*ids))
        self.patient = patient
        self.files = {id: sorted(write_study(folder, number, slices, patient=patient).iterdir())
                      for number, id in enumerate(ids)}
        self.fetched, self.stored = [], {}                            # stored: SOP Instance UIDs by Orthanc's ids
        self.unstable, self.parents = set(), {}                       # parents: studies by series, where not the one
        self.studies = {}                                             # studies by their UIDs, as above

    def turned_down(self, verb, what):
        pass

    def system(self):
        self.turned_down("system", None)
        return {"Name": "fake"}

    def series(self, series_id):
        if series_id not in self.files:
            raise OrthancRefused("gone", 404)
        instances = [f"{series_id}/{number}" for number in range(len(self.files[series_id]))]
        self.turned_down("series", series_id)
        return super().series(series_id) | {"Instances": instances, "IsStable": series_id not in self.unstable,
                                            "ParentStudy": self.parents.get(series_id, "s")}

    def study(self, study_id):
        self.turned_down("study", study_id)
        return super().study(study_id)

    def series_of(self, instance_id):
        """Instances have the ids of image_ids() in the log, so that they look like Orthanc's."""
        self.turned_down("series_of", instance_id)
        series_id = next(id for id in self.files if instance_id in self.image_ids(id))
        return self.series(series_id) | {"Instances": self.image_ids(series_id)}

    def image_ids(self, series_id):
        return [dashed(f"{series_id}/{number}") for number in range(len(self.files[series_id]))]

    def find(self, uid, study_id):
        self.turned_down("find", uid)
        return [id for id, stored in self.stored.items() if stored == uid and study_id == "s"]

    def fetch(self, instance_id, path):
        self.fetched.append(instance_id)
        self.turned_down("fetch", instance_id)
        series_id, number = instance_id.split("/")
        shutil.copy(self.files[series_id][int(number)], path)

    def store(self, path):
        self.turned_down("store", path.name)
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        self.stored[orthanc_id(path)] = ds.SOPInstanceUID
        return orthanc_id(path), self.studies.get(ds.StudyInstanceUID, "s")

    def uids(self):
        return set(self.stored.values())

    def delete(self, instance_id):
        self.turned_down("delete", instance_id)
        self.stored.pop(instance_id, None)


def at_once(scan):
    """The stub's projection, without its pause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda s: None)
        return project(scan)


def archive_node(folder, archive, run=at_once, **more):
    return Node(archive, State(folder / "state", {"model": "stub"}), run, IDENTITY, **more)


def states(node):
    return {id: row["state"] for id, row in node.state.rows.items()}


def test_arriving_series_are_asked_after_where_orthanc_does_not_announce_them(tmp_path):
    archive, asked = Archive(tmp_path, S1, S2, slices=6), []
    archive.turned_down = lambda verb, what: asked.append(verb)
    archive.log = log_of(*archive.image_ids(S1), *archive.image_ids(S2), kind="NewInstance")
    archive.unstable = {S1, S2}
    node = archive_node(tmp_path, archive)
    assert not node.log.follow() and not node.state.rows and asked.count("series_of") == 2           # one a series
    node.state.close()
    again = archive_node(tmp_path, archive)                          # they outlast the process
    archive.unstable = {S1}
    archive.log = archive.log + log_of(S1, first=13)                 # announced as ever
    archive.turned_down = lambda verb, what: None

    def away(verb, what):
        if (verb, what) in (("series", S2), ("system", None)):
            raise OrthancAway("refused")
    archive.turned_down = away
    with pytest.raises(OrthancAway):
        again.log.follow()
    archive.turned_down = lambda verb, what: None
    again.log.follow()
    assert again.state.waiting() == [S1, S2] and not again.state.arriving
    while again.step():
        pass
    assert states(again) == {S1: "done", S2: "done"}
    archive.log = archive.log + log_of(S2, first=14)                 # late: no image of it is new
    assert not again.step() and again.metrics.outcomes["done"] == 2


UNSERVED = [OrthancAway("http://fake: 500 Internal Server Error"), OrthancRefused("http://fake: 400 Bad Request", 400)]


@pytest.mark.parametrize("verb, error", [*zip(("series", "series_of", "study"), UNSERVED * 2)])
def test_a_series_of_which_orthanc_does_not_tell_lets_the_others_go_first(tmp_path, verb, error, capsys):
    archive, asked = Archive(tmp_path, S1, S2, S3), []
    if verb == "study":
        archive.parents, archive.studies = {S1: "other"}, {make_uid("study0"): "other"}
    node = archive_node(tmp_path, archive)
    archive.log = log_of(*archive.image_ids(S1), *archive.image_ids(S2), kind="NewInstance", first=2)
    archive.log += log_of(*(() if verb == "series_of" else (S1,)), S2, S3, first=10)       # that: never announced
    of_one = {"series": [S1], "series_of": archive.image_ids(S1), "study": ["other"]}[verb]

    def turned_down(what, whose):
        if what == verb and whose in of_one:
            asked.append(whose)
            raise error
    archive.turned_down = turned_down
    for _ in range(20):
        node.step()
    assert states(node) == {S2: "done", S3: "done"}
    assert node.state.arriving <= {S1, *archive.image_ids(S1)} and 1 <= len(asked) <= 5             # then a pause
    assert "passed over, to be asked after again: http://fake" in capsys.readouterr().out
    node.state.close()
    archive.turned_down = lambda *_: None                            # mended; what arrives outlasts the process
    again = archive_node(tmp_path, archive)
    assert again.state.arriving
    while again.step():
        pass
    assert states(again) == dict.fromkeys((S1, S2, S3), "done") and not again.state.arriving


def test_a_series_of_which_orthanc_does_not_tell_is_asked_after_ever_more_rarely(tmp_path, monkeypatch):
    archive, asked, clock = Archive(tmp_path, S1), [], [0.0]
    monkeypatch.setattr("pacs.changes.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("pacs.changes.RETRY_S", (60, 300))

    def turned_down(verb, what):
        if verb == "series":
            asked.append(clock[0])
            raise OrthancAway("500")
    archive.turned_down = turned_down
    node = archive_node(tmp_path, archive)
    for minute in range(18):
        clock[0] = 60.0 * minute
        node.log.follow()
    assert [at / 60 for at in asked] == [0, 1, 3, 7, 12, 17]


def test_a_user_who_may_not_ask_of_a_series_ends_the_node(tmp_path):
    archive = Archive(tmp_path, S1)

    def turned_down(verb, what):
        if verb == "series":
            raise OrthancRefused("not allowed (403)", 403)
    archive.turned_down = turned_down
    node = archive_node(tmp_path, archive)
    with pytest.raises(OrthancRefused):
        node.run()
    assert node.state.sequence == 0                                  # nothing is passed over


def test_a_long_log_is_read_a_page_at_a_time_between_series(tmp_path, monkeypatch):
    """The first of 5 pages announces a series: it is done before the second is read. Then the node is stopped."""
    archive, pages = Archive(tmp_path, S1, S2), []
    other = log_of(*[dashed(f"patient {i}") for i in range(400)], kind="StablePatient", first=2)
    archive.log = log_of(S1) + other + log_of(S2, first=402)
    own = archive.changes

    def changes(since, limit):
        if since == node.state.sequence:                             # not what lies before
            pages.append(states(node).get(S1))
        return own(since, limit)
    monkeypatch.setattr(archive, "changes", changes)
    node = archive_node(tmp_path, archive, poll_s=0.0)
    assert node.step() and pages == [None] and states(node) == {S1: "done"}
    monkeypatch.setattr(node, "withdraw", lambda: len(pages) == 3 and node.stopping.set())
    node.run()
    assert len(pages) == 3 and S2 not in states(node)                # a stop is heeded before the log's end
    node.stopping.clear()
    while node.log.follow():
        pass
    assert len(pages) == 5 and S2 in states(node)


@pytest.mark.parametrize("verb", ["series_of", "series", "announce"])
def test_a_stop_is_heeded_within_a_page_of_the_log(tmp_path, verb, monkeypatch):
    """Each entry may be a request, and each request a time-out; nor is another series begun."""
    ids = [dashed(f"image {i}") for i in range(50)]
    archive, asked = Archive(tmp_path, S1, S2), []
    node = archive_node(tmp_path, archive)
    node.log.follow()
    archive.log = archive.log + log_of(*ids, kind={"announce": "StableSeries"}.get(verb, "NewInstance"), first=3)
    if verb == "series":
        archive.log, node.state.arriving = [], set(ids)

    def counted(series_id):
        asked.append(series_id)
        if len(asked) == 3:
            node.stopping.set()
        return FakeOrthanc.series(archive, series_id) | {"Instances": [f"{series_id}/i"], "IsStable": False}
    monkeypatch.setattr(archive, "series_of" if verb == "series_of" else "series", counted)
    place = node.state.sequence
    assert not node.step() and len(asked) == 3
    assert node.state.sequence == place + 3 * (verb == "announce")                 # the rest is read at the next start
    assert {states(node)[S1], states(node)[S2]} == {"waiting"}


def test_a_change_log_that_orthanc_does_not_serve_keeps_no_series_that_waits(tmp_path, monkeypatch, capsys):
    archive, asked, clock = Archive(tmp_path, S1, S2), [], [0.0]
    monkeypatch.setattr("pacs.node.time.monotonic", lambda: clock[0])
    node = archive_node(tmp_path, archive)
    assert node.step() and states(node) == {S1: "done", S2: "waiting"}

    def unserved():
        asked.append(clock[0])
        raise OrthancAway("http://fake/changes?last: 500 Internal Server Error")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "last_change", unserved)
        assert node.step() and states(node)[S2] == "done" and node.metrics.orthanc_up
        for clock[0] in range(0, 200, 10):
            assert not node.step()
        assert asked == [0, 10, 20, 30, 40, 60, 100, 160]            # after 1, 2, 4, ... 60 s
        assert "does not serve its change log" in page(node, "http://fake")
        assert "cn_stylegan_changes_up 0" in node.metrics.text(0)
        archive.turned_down = system_away                            # all of it: the loop waits
        clock[0] = 1000.0
        with pytest.raises(OrthancAway, match="refused"):
            node.step()
    archive.turned_down = lambda *_: None
    more_images(archive, tmp_path, S1)
    clock[0] = 2000.0
    assert node.step() and node.state.rows[S1]["images"] == 5 and node.metrics.changes_up
    assert "does not serve its change log" not in page(node, "http://fake")
    said = capsys.readouterr().out
    assert said.count("the change log cannot be read, trying again: http://fake/changes?last: 500") == 1
    assert said.count("the change log can be read again") == 1


def system_away(verb, what):
    if verb == "system":
        raise OrthancAway("refused")


def test_what_arrives_is_taken_up_at_the_end_of_a_long_log(tmp_path):
    archive, asked = Archive(tmp_path, S1), []
    other = [dashed(f"patient {i}") for i in range(950)]
    archive.log = log_of(archive.image_ids(S1)[0], kind="NewInstance") + log_of(*other, kind="StablePatient", first=2)
    archive.turned_down = lambda verb, what: asked.append(verb)
    node = archive_node(tmp_path, archive)
    while node.step():
        pass
    assert states(node) == {S1: "done"} and asked.count("series_of") == 1
    assert asked[:asked.index("fetch")].count("series") <= 4         # not at each page


def test_one_request_for_a_series_that_is_no_ct(tmp_path):
    """1000 images of an MR series, in 10 pages of the log."""
    images = [dashed(f"image {i}") for i in range(1000)]
    node, asked = fake_node(tmp_path, log_of(*images, kind="NewInstance")), []
    node.orthanc.series_of = lambda instance_id: asked.append(instance_id) or node.orthanc.series(dashed("report")) | {
        "Instances": images}
    while node.log.follow():
        pass
    assert len(asked) == 1 and not node.state.arriving


def test_what_is_remembered_of_series_that_are_no_ct_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("pacs.changes.REMEMBERED", 10)
    images = [dashed(f"image {i}") for i in range(90)]
    node = fake_node(tmp_path, log_of(*images, kind="NewInstance"))

    def series_of(instance_id):
        of = images.index(instance_id) // 3 * 3
        return node.orthanc.series(dashed("report")) | {"Instances": images[of:of + 3]}
    node.orthanc.series_of = series_of
    node.log.follow()
    assert 0 < len(node.log._no_ct) < 10 + 3


def test_an_image_that_was_deleted_before_it_was_read_does_not_take_its_series_along(tmp_path):
    archive = Archive(tmp_path, S1, slices=6)
    node = archive_node(tmp_path, archive)
    while node.step():
        pass
    earlier = archive.uids()
    more_images(archive, tmp_path, S1)
    node.log.follow()
    assert node.state.rows[S1]["images"] == 7
    archive.files[S1].pop()                                          # one is deleted while its series waits
    gone = f"{S1}/6"

    def turned_down(verb, what):
        if verb == "fetch" and what == gone:
            raise OrthancRefused(f"http://fake/{what}: 404 Not Found", 404)
    archive.turned_down = turned_down
    node.step()
    row = node.state.rows[S1]
    assert (row["state"], row["images"], row.get("reason")) == ("done", 6, None)
    assert archive.uids() == set(row["objects"]) and len(earlier) == 7
    archive.log = archive.log + log_of(S1, first=len(archive.log) + 1)
    assert not node.step() and node.metrics.outcomes["done"] == 2    # what was projected is what is known


def test_a_series_that_was_deleted_before_it_was_read_is_refused(tmp_path):
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive)
    node.log.follow()

    def turned_down(verb, what):
        if verb in ("fetch", "series"):
            raise OrthancRefused("http://fake: 404 Not Found", 404)
    archive.turned_down = turned_down
    node.step()
    row = node.state.rows[S1]
    assert (row["state"], row["reason"]) == ("refused", "deleted from Orthanc before it was read")


def test_a_damaged_image_is_the_reason_of_its_series(tmp_path):
    """It was told to send two scans as series of their own."""
    archive = Archive(tmp_path, S1, slices=6)
    path = archive.files[S1][2]
    path.write_bytes(path.read_bytes()[:200])
    node = archive_node(tmp_path, archive)
    node.step()
    assert states(node) == {S1: "refused"} and "00002.dcm: not a DICOM image" in node.state.rows[S1]["reason"]


def test_an_image_that_is_named_but_not_there_is_tried_again_and_fails_in_the_end(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))

    def turned_down(verb, what):
        if verb == "fetch" and what == f"{S1}/2":
            raise OrthancRefused(f"http://fake/{what}: 404 Not Found", 404)
    archive.turned_down = turned_down
    node = archive_node(tmp_path, archive)
    for _ in range(10):
        node.step()
    assert states(node) == {S1: "failed", S2: "done"} and "given up after 5 tries" in node.state.rows[S1]["reason"]


def test_the_queue_bounds_series_that_orthanc_does_not_announce(tmp_path):
    archive = Archive(tmp_path, S1, S2, S3)
    archive.log = log_of(*(archive.image_ids(id)[0] for id in (S1, S2, S3)), kind="NewInstance")
    node = archive_node(tmp_path, archive, queue=2)
    node.log.follow()
    assert node.log.follow() and len(node.state.waiting()) == 2 and len(node.state.arriving) == 1
    while node.step():
        pass
    assert states(node) == dict.fromkeys((S1, S2, S3), "done")


@pytest.mark.parametrize("error", [None, ScanError("no head"), RuntimeError("broken")])
def test_a_series_is_done_again_when_it_was_deleted_and_sent_again(tmp_path, error):
    archive, runs = Archive(tmp_path, S1), []

    def run(scan):
        runs.append(scan)
        if error:
            raise error
        return at_once(scan)
    node = archive_node(tmp_path, archive, run)
    while node.step():
        pass
    node.state.sequence = 0                                          # the log read again: nothing is new
    while node.step():
        pass
    assert len(runs) == 1
    archive.stored.clear()
    archive.log, archive.updated = log_of(S1, first=2), "20260102T000000"
    while node.step():
        pass
    assert len(runs) == 2 and len(archive.stored) == (0 if error else 7)


@pytest.mark.parametrize("when", ["project", "find", "store"])
def test_results_of_a_series_that_is_deleted_meanwhile_are_withdrawn(tmp_path, when):
    """find: the first request after the source was found to be there."""
    archive, asked = Archive(tmp_path, S1), []
    node = archive_node(tmp_path, archive)
    node.step()
    more_images(archive, tmp_path, S1)                               # results of fewer images are there already

    def delete_meanwhile(verb, what=None):
        asked.append(verb)
        if verb == when:
            archive.files.pop(S1, None)
    node.project, archive.turned_down = lambda scan: delete_meanwhile("project") or at_once(scan), delete_meanwhile
    node.step()
    assert "store" not in asked or when != "project"
    row = node.state.rows[S1]
    assert (row["state"], row["reason"]) == ("refused", "deleted from Orthanc before its results were stored")
    assert not archive.stored and row["objects"] == []


def test_images_deleted_while_their_series_is_in_work_take_its_results_along(tmp_path, monkeypatch):
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    archive = Archive(tmp_path, S1, slices=6)
    node = archive_node(tmp_path, archive, lambda scan: archive.files[S1].pop() and at_once(scan))
    node.step()
    row = node.state.rows[S1]
    assert row["state"] == "waiting" and "1 of its images were deleted while it was in work" in row["reason"]
    assert not archive.stored
    gone = f"{S1}/5"

    def turned_down(verb, what):
        if verb == "fetch" and what == gone:
            raise OrthancRefused(f"http://fake/{what}: 404 Not Found", 404)
    archive.turned_down, node.project = turned_down, at_once
    node.step()
    row = node.state.rows[S1]
    assert (row["state"], row["images"]) == ("done", 5) and archive.uids() == set(row["objects"])


def test_results_filed_under_another_patient_are_taken_away(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1)
    node, own = archive_node(tmp_path, archive), archive.store
    monkeypatch.setattr(archive, "store", lambda path: (own(path)[0], "another" if path.stem == "map" else "s"))
    node.step()
    row = node.state.rows[S1]
    assert row["state"] == "refused" and "under another patient or study" in row["reason"] and not archive.stored


@pytest.mark.parametrize("status", ["FilteredOut", "Failure", "StorageFull"])
def test_what_orthanc_answers_that_it_has_not_stored_is_not_stored(tmp_path, answering, status):
    answering.body = json.dumps({"ID": S1, "ParentStudy": S2, "Status": status}).encode()
    (tmp_path / "sr.dcm").write_bytes(b"x")
    with pytest.raises(OrthancAway, match=f"/instances: sr.dcm is not stored: {status}"):
        Orthanc(answering.url).store(tmp_path / "sr.dcm")
    for status in ("Success", "AlreadyStored"):
        answering.body = json.dumps({"ID": S1, "ParentStudy": S2, "Status": status}).encode()
        assert Orthanc(answering.url).store(tmp_path / "sr.dcm") == (S1, S2)


@pytest.mark.parametrize("patient", PATIENT_IDS)
def test_results_of_a_part_go_whatever_the_patient_id(tmp_path, patient):
    archive = Archive(tmp_path, S1, patient=patient)
    node = archive_node(tmp_path, archive)
    node.step()
    first = archive.uids()
    more_images(archive, tmp_path, S1)
    node.step()
    assert len(first) == len(archive.uids()) == 7 and not first & archive.uids()


def test_an_id_that_is_none_becomes_no_file(tmp_path, capsys):
    log = log_of("../../evil", S1, S1 + "/..") + log_of("../x", S2, kind="NewInstance", first=4)
    node = fake_node(tmp_path / "state", log)
    node.orthanc.series_of = lambda instance_id: node.orthanc.series(instance_id) | {"ID": "../../evil"}
    node.log.follow()
    assert node.state.waiting() == [S1] and not node.state.arriving and not list(tmp_path.glob("evil*"))
    assert capsys.readouterr().out.count("is no id of Orthanc's") == 4


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
def test_a_signal_ends_the_node_after_the_series_in_work(tmp_path, monkeypatch, default_signals, number, code):
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


def one_answers_500(archive, which, verb="fetch"):
    def turned_down(asked, what):
        if asked == verb and what.startswith(which):
            raise OrthancAway(f"http://fake/{what}: 500 Internal Server Error")
    archive.turned_down = turned_down


def test_a_series_that_orthanc_does_not_serve_lets_the_others_go_first_and_fails_in_the_end(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2, S3)
    one_answers_500(archive, f"{S1}/2")
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive, queue=3)
    node.step()
    assert states(node) == dict.fromkeys((S1, S2, S3), "waiting") and node.state.waiting() == [S2, S3, S1]
    assert f"try 1 failed, another will follow: http://fake/{S1}/2: 500" in page(node, "http://fake")
    archive.files[S4] = archive.files[S3]
    archive.log = log_of(S1, S2, S3, S4)
    node.log.follow()
    assert node.state.waiting() == [S2, S3, S1, S4]          # it keeps no room from others, nor its place
    node.state.close()
    again = archive_node(tmp_path, archive)                          # tries outlast the process
    while again.step():
        pass
    assert states(again) == {S1: "failed", S2: "done", S3: "done", S4: "done"}
    assert again.state.rows[S1]["reason"] == f"given up after 5 tries: http://fake/{S1}/2: 500 Internal Server Error"
    assert archive.fetched.count(f"{S1}/2") == 5 and again.metrics.put_back == 3
    assert "cn_stylegan_put_back_total 3" in again.metrics.text(0)


def test_a_series_is_not_failed_for_a_storage_that_serves_none(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2)
    one_answers_500(archive, "")
    node = archive_node(tmp_path, archive)
    for _ in range(3):
        node.step()
    assert archive.fetched == [f"{S1}/0", f"{S2}/0"]                       # a pause before each further try
    monkeypatch.setattr("pacs.node.time.monotonic", lambda: 1e12)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    for _ in range(18):
        node.step()
    assert len(archive.fetched) == 20 and states(node) == {S1: "waiting", S2: "waiting"}
    archive.turned_down = lambda *_: None                            # mended
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"} and not node.state.rows[S1].get("reason")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   torch.AcceleratorError("CUDA error: unspecified launch failure")])
def test_a_gpu_that_fails_costs_no_series(tmp_path, monkeypatch, error):
    """Each that came was failed for good, until somebody looked at the page."""
    def broken(scan):
        raise error
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive, broken)
    for _ in range(14):
        node.step()
    assert states(node) == {S1: "waiting", S2: "waiting"} and node.metrics.put_back == 14
    assert f"another will follow: {type(error).__name__}: memory or GPU" in page(node, "http://fake")
    node.project = at_once                                           # mended
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"}


def test_orthanc_away_as_a_whole_is_no_try_of_a_series(tmp_path):
    archive = Archive(tmp_path, S1)

    def away(asked, what):
        if asked in ("fetch", "system"):
            raise OrthancAway("refused")
    archive.turned_down = away
    node = archive_node(tmp_path, archive)
    for _ in range(6):
        with pytest.raises(OrthancAway):
            node.step()
    assert "tries" not in node.state.rows[S1] and node.metrics.put_back == 0


def more_images(archive, folder, series_id):
    """Another image of the series, and Orthanc's word of it."""
    whole = sorted(write_study(folder / "more", 0, len(archive.files[series_id]) + 1,
                               patient=archive.patient).iterdir())
    archive.files[series_id] = whole
    archive.log = archive.log + log_of(series_id, first=len(archive.log) + 1)


@pytest.mark.parametrize("outcome, error", [("refused", ScanError("no head")), ("failed", RuntimeError("broken"))])
def test_results_of_a_part_go_when_the_whole_is_refused_or_fails(tmp_path, outcome, error):
    def only_four(scan):
        if len(scan.hu) > 4:
            raise error
        return at_once(scan)
    archive = Archive(tmp_path, S1, S2)
    node = archive_node(tmp_path, archive, only_four)
    while node.step():
        pass
    kept, others = (set(node.state.rows[series_id]["objects"]) for series_id in (S1, S2))
    assert len(kept) == 7 and archive.uids() == kept | others
    more_images(archive, tmp_path, S1)

    deleted = []

    def away_after_three(asked, what):                               # Orthanc goes in the middle
        deleted.append(what) if asked == "delete" else None
        if asked in ("delete", "system") and len(deleted) > 3:
            raise OrthancAway("refused")
    archive.turned_down = away_after_three
    with pytest.raises(OrthancAway):
        node.step()
    assert states(node) == {S1: outcome, S2: "done"} and len(archive.uids() - others) == 4
    node.state.close()
    archive.turned_down = lambda *_: None
    again = archive_node(tmp_path, archive, only_four)               # as after a kill
    again.step()
    assert archive.uids() == others and again.state.rows[S1]["objects"] == []
    assert states(again) == {S1: outcome, S2: "done"}


def test_results_that_cannot_be_deleted_are_told_of_and_keep_nobody(tmp_path, capsys):
    def only_four(scan):
        if len(scan.hu) > 4:
            raise ScanError("no head")
        return at_once(scan)
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive, only_four)
    node.step()
    more_images(archive, tmp_path, S1)
    one_answers_500(archive, "", "delete")
    for _ in range(3):
        node.step()
    assert "still in the archive" in page(node, "http://fake") and len(archive.stored) == 7
    assert capsys.readouterr().out.count("still in the archive") == 1
    archive.turned_down = lambda *_: None
    node.step()
    assert "still in the archive" not in page(node, "http://fake") and not archive.stored


def test_a_full_queue_that_cannot_go_on_is_no_work(tmp_path):
    """Its loop would ask Orthanc without a pause."""
    archive = Archive(tmp_path, S1, S2)
    node = archive_node(tmp_path, archive, queue=1)
    node.log.follow()
    node._not_before[S1] = time.monotonic() + 60                     # as after a full disk
    assert node.state.waiting() == [S1] and not node.step()
    del node._not_before[S1]
    assert node.step() and node.step() and states(node) == {S1: "done", S2: "done"}


def test_a_full_disk_is_waited_for_and_said(tmp_path, monkeypatch, capsys):
    archive = Archive(tmp_path, S1, S2)

    def full(asked, what):
        if asked == "fetch" and what.startswith(S1):
            raise OSError(errno.ENOSPC, "No space left on device")
    archive.turned_down = full
    node = archive_node(tmp_path, archive, poll_s=0.01)
    monkeypatch.setattr("pacs.node.BACKOFF_S", (0.01, 0.01))
    monkeypatch.setattr("pacs.node.RETRY_S", (3600, 3600))
    loop = Thread(target=node.run)
    loop.start()
    try:
        wait_for(lambda: node.metrics.outcomes["done"] == 1)         # what needs less room goes on
        ticked = node._ticked
        wait_for(lambda: node._ticked > ticked)                      # the loop has come round since
        assert states(node) == {S1: "waiting", S2: "done"} and node.metrics.disk_full
        assert "folder is full: make room" in page(node, "http://fake") and node.metrics.orthanc_up
        assert "cn_stylegan_disk_full 1" in node.metrics.text(1)
        archive.turned_down = lambda *_: None
        node._not_before.clear()                                     # as if its pause were over
        wait_for(lambda: node.metrics.outcomes["done"] == 2 and not node.metrics.disk_full)
    finally:
        node.stopping.set()
        loop.join(60)
    assert "folder is full" not in page(node, "http://fake")
    said = capsys.readouterr().out
    assert "trying again: [Errno 28] the disk is full" in said and "there is room on the disk again" in said


def test_a_result_that_cannot_be_written_down_is_made_again(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive, poll_s=0.01)
    monkeypatch.setattr("pacs.node.BACKOFF_S", (0.01, 0.01))
    put, asked = node.state.put, []

    def full_once(series_id, row):
        asked.append(row["state"])
        if row["state"] == "done" and asked.count("done") == 1:
            raise FullDiskError(node.state.work)
        put(series_id, row)
    monkeypatch.setattr(node.state, "put", full_once)
    loop = Thread(target=node.run)
    loop.start()
    try:
        wait_for(lambda: states(node).get(S1) == "done" or not loop.is_alive())
    finally:
        node.stopping.set()
        loop.join(60)
    assert node.metrics.outcomes["done"] == 1 and asked.count("done") == 2
    assert archive.uids() == set(node.state.rows[S1]["objects"])


def test_state_of_another_model_or_node_is_refused(tmp_path):
    state = State(tmp_path, {"weights": "a"})
    with pytest.raises(StateError, match="in use by another node"):
        State(tmp_path, {"weights": "a"})
    state.close()
    with pytest.raises(StateError, match="belongs to another model"):
        State(tmp_path, {"weights": "b"})


def test_pages(tmp_path):
    names = {name: dashed(name) for name in ("low", "wild", "high", "odd", "next")}
    node = fake_node(tmp_path, log_of(*names.values()))
    node.log.follow()
    for name, values in (("low", dict(state="done", score=0.5)), ("high", dict(state="done", score=9.0, flagged=True)),
                         ("wild", dict(state="done", score=99.0, unreliable="too much", notes=["too much", "a gap"])),
                         ("odd", dict(state="refused", reason="<b>no head</b>"))):
        node.state.put(names[name], node.state.rows[names[name]] | values)
    server = serve(node, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.server_address[1]}"

    def get(path):
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            return answer.read().decode()
    series = json.loads(get("/worklist.json"))["series"]
    assert [r["orthanc_id"] for r in series] == [names[name] for name in ("next", "high", "low", "wild", "odd")]
    html = get("/")
    assert "unreliable: too much" in html and html.count("too much") == 1 and "a gap" in html
    assert "&lt;b&gt;no head" in html and "<b>no head" not in html and "Research only" in html
    places = [html.index(f">{names[name][:17]}</a>") for name in ("next", "high", "low", "odd")]
    assert places == sorted(places)
    assert json.loads(get("/healthz")) == {"stuck": False, "orthanc": True, "changes": True, "waiting": 1}
    metrics = get("/metrics").splitlines()
    assert "cn_stylegan_queue_length 1" in metrics and 'cn_stylegan_scans_total{outcome="done"} 0' in metrics
    assert 'cn_stylegan_stage_seconds_count{stage="project"} 0' in metrics
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/other")
    with urllib.request.urlopen(urllib.request.Request(url + "/", method="HEAD"), timeout=60) as answer:
        assert answer.status == 200 and int(answer.headers["Content-Length"]) > 1000 and not answer.read()
    server.shutdown()


def test_a_reader_who_asks_nothing_keeps_no_thread(tmp_path, monkeypatch):
    assert 1 <= _Handler.timeout <= 300
    monkeypatch.setattr(_Handler, "timeout", 0.1)
    server = serve(fake_node(tmp_path, []), "127.0.0.1", 0)
    with socket.create_connection(server.server_address[:2], timeout=60) as reader:
        assert reader.recv(1) == b""                                 # hung up
    server.shutdown()


def test_the_pages_show_the_last_days(tmp_path):
    names = [dashed(name) for name in ("today", "lately", "long ago", "waiting")]
    node = fake_node(tmp_path, log_of(*names))
    node.log.follow()
    for name, days in zip(names, (0, 6.9, 7.1)):
        finished = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        node.state.put(name, node.state.rows[name] | {"state": "done", "score": 1.0, "finished": finished})
    node.state.put(names[3], node.state.rows[names[3]] | {"announced": "2020-01-01T00:00:00+00:00"})
    rows, older = worklist(node)
    assert {r["orthanc_id"] for r in rows} == {names[0], names[1], names[3]} and older == 1
    assert "Not shown: 1 series finished more than 7 days ago" in page(node, "http://fake")
    assert worklist(node, 8)[1] == 0 and "Not shown" not in page(node, "http://fake", 1e9)
    server = serve(node, "127.0.0.1", 0, days=1)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_address[1]}/worklist.json", timeout=60) as answer:
        found = json.loads(answer.read())
    assert len(found["series"]) == 2 and found["older"] == 2
    server.shutdown()
