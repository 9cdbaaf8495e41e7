"""The PACS node against the real Orthanc on loopback (Debian package orthanc), and its parts without one."""

import errno
import json
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from common.files import FullDiskError
from ct.scan import ScanError
from pacs.__main__ import main
from pacs.node import Node
from pacs.orthanc import Change, Orthanc, OrthancAway, OrthancRefused, orthanc_id
from pacs.server import page, serve, worklist
from pacs.state import State, StateError
from tests.pacs_process import IDENTITY, project
from tests.test_dicom_out import MARKERS, complete
from tests.writers import write_dicom_series

BINARY = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")
needs_orthanc = pytest.mark.skipif(BINARY is None, reason="Orthanc is not installed (Debian package orthanc)")
ROOT = Path(__file__).resolve().parent.parent


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


def write_study(folder: Path, number: int, slices: int = 4, marked: int = 300, **more) -> Path:
    hu = np.full((slices, 24, 24), -1000.0)
    hu[:, 1:23, 1:23], hu[:, 2:22, 2:22] = 1000, 30                   # air, skull, brain
    brain = hu[:, 2:22, 2:22].reshape(-1)
    brain[:marked] = 70
    hu[:, 2:22, 2:22] = brain.reshape(slices, 20, 20)

    def edit(ds, k):
        complete(ds, k)
        ds.PatientID, ds.PatientName = f"ID{number}", f"SECRET{number}"
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
    assert "SECRET1" not in out.out + out.err + json.dumps(worklist(node)) and "in broken" in out.err


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
        return row["state"] == "done" and row["finished"] and len(row["instances"]) == 6
    wait_for(again)
    row = next(iter(node.state.rows.values()))
    assert not set(first["objects"]) & set(row["objects"])
    study, = (orthanc.get(f"/studies/{s}") for s in orthanc.get("/studies"))
    assert orthanc.results(study) == ["KO 1", "OT 1", "OT 3", "SEG 1", "SR 1"]


@needs_orthanc
def test_no_patient_data_but_in_orthanc(tmp_path, orthanc, capfd):
    orthanc.send(write_study(tmp_path, 7))
    node = node_of(orthanc, tmp_path / "state")
    until_idle(node, 1)
    said = capfd.readouterr()
    text = said.out + said.err + page(node, orthanc.url) + json.dumps(worklist(node))
    text += "".join(path.read_text() for path in (tmp_path / "state").rglob("*") if path.is_file())
    assert len(MARKERS) >= 12 and "SECRET7" not in text and "ID7" not in text


@needs_orthanc
def test_the_queue_is_bounded(tmp_path, orthanc):
    for number in range(5):
        orthanc.send(write_study(tmp_path, number))
    node = node_of(orthanc, tmp_path / "state", queue=2)
    wait_for(lambda: orthanc.client.last_change() and sum(
        c.kind == "StableSeries" for c in orthanc.client.changes(0, 1000)[0]) == 5)
    assert node.follow() and len(node.state.waiting()) == 2
    assert node.follow() and len(node.state.waiting()) == 2          # no room: the log is left alone
    until_idle(node, 5)


@needs_orthanc
def test_orthanc_away_is_waited_for(tmp_path, orthanc):
    orthanc.send(write_study(tmp_path, 1))
    node = node_of(orthanc, tmp_path / "state", poll_s=0.1)
    wait_for(lambda: node.follow() or node.state.waiting())
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


def test_a_url_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="ORTHANC_USER") as error:
        Orthanc("http://user:secret-word@127.0.0.1:8042")
    assert "secret-word" not in str(error.value)
    with pytest.raises(ValueError, match="expected a URL"):
        Orthanc("127.0.0.1:8042")


class FakeOrthanc:
    """A change log, and series that are CT unless named otherwise."""

    url = "http://fake"

    def __init__(self, changes):
        self.log = changes

    def last_change(self):
        return self.log[-1].sequence if self.log else 0

    def changes(self, since, limit):
        page = [c for c in self.log if c.sequence > since][:limit]
        return page, page[-1].sequence if page else since, not page or page[-1] is self.log[-1]

    def series(self, series_id):
        if series_id == "deleted":
            raise OrthancRefused("gone", 404)
        return {"MainDicomTags": {"Modality": "SR" if series_id == "report" else "CT"}, "Instances": ["i"],
                "ParentStudy": "s"}

    def study(self, study_id):
        return {"MainDicomTags": {"StudyInstanceUID": "1.2"}}


def log_of(*ids, kind="StableSeries"):
    return [Change(number, kind, series_id) for number, series_id in enumerate(ids, 1)]


def fake_node(folder, changes, **more):
    return Node(FakeOrthanc(changes), State(folder, {"model": "stub"}), project, IDENTITY, **more)


def test_the_change_log_is_followed_once(tmp_path):
    node = fake_node(tmp_path, log_of("a", "report", "deleted", "b"))
    assert node.follow() is False
    assert node.state.waiting() == ["a", "b"] and node.state.sequence == 4
    node.state.put("a", node.state.rows["a"] | {"state": "done"})
    node.state.close()
    again = fake_node(tmp_path, log_of("a", "report", "deleted", "b", "a"))     # announced again, no new image
    again.follow()
    assert again.state.waiting() == ["b"] and again.state.sequence == 5


def test_a_change_log_that_starts_anew_is_read_from_its_beginning(tmp_path):
    node = fake_node(tmp_path, log_of("a", "b", "c"))
    node.follow()
    node.orthanc.log = log_of("d")
    node.follow()
    assert node.state.waiting()[-1] == "c" and "d" in node.state.waiting() and node.state.sequence == 1


class Archive(FakeOrthanc):
    """Also holds a study of each series of the log; `turned_down` may raise for a request: its verb and id."""

    def __init__(self, folder, *ids, slices=4):
        super().__init__(log_of(*ids))
        self.files = {id: sorted(write_study(folder, number, slices).iterdir()) for number, id in enumerate(ids)}
        self.fetched, self.stored = [], set()

    def turned_down(self, verb, what):
        pass

    def system(self):
        self.turned_down("system", None)
        return {"Name": "fake"}

    def series(self, series_id):
        instances = [f"{series_id}/{number}" for number in range(len(self.files[series_id]))]
        return super().series(series_id) | {"Instances": instances}

    def fetch(self, instance_id, path):
        self.fetched.append(instance_id)
        self.turned_down("fetch", instance_id)
        series_id, number = instance_id.split("/")
        shutil.copy(self.files[series_id][int(number)], path)

    def store(self, path):
        self.turned_down("store", path.name)
        self.stored.add(orthanc_id(path))

    def delete(self, instance_id):
        self.turned_down("delete", instance_id)
        self.stored.discard(instance_id)


def at_once(scan):
    """The stub's projection, without its pause."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.sleep", lambda s: None)
        return project(scan)


def archive_node(folder, archive, run=at_once, **more):
    return Node(archive, State(folder / "state", {"model": "stub", "phi": True}), run, IDENTITY, **more)


def states(node):
    return {id: row["state"] for id, row in node.state.rows.items()}


@pytest.mark.parametrize("verb", ["fetch", "store"])
def test_a_user_who_may_not_do_it_ends_the_program_and_keeps_the_queue(tmp_path, verb, monkeypatch, capsys):
    archive, tries = Archive(tmp_path, "S1", "S2"), []

    def denied(asked, what):
        if asked == verb:
            tries.append(what)
            if len(tries) > 1:
                raise SystemExit("tried again")
            raise OrthancRefused("POST http://fake/instances: not allowed (403); set ORTHANC_USER", 403)
    archive.turned_down = denied
    stub = type("Stub", (), {"__call__": lambda self, scan: at_once(scan), "key": lambda self: {"model": "stub"}})()
    for name, made in (("Orthanc", lambda *_: archive), ("Projector", lambda bundle: stub), ("load_bundle", print),
                       ("identity_of", lambda projector: IDENTITY), ("set_impl", print),
                       ("memory.keep_freed", print), ("signal.signal", print)):
        monkeypatch.setattr(f"pacs.__main__.{name}", made)
    asked = ["--model", "m", "--orthanc", "http://fake", "--state", str(tmp_path / "state"), "--port", "0"]
    assert main([*asked, "--device", "cpu"]) == 2
    assert "error: POST http://fake/instances: not allowed (403)" in capsys.readouterr().err
    archive.turned_down = lambda *_: None
    node = archive_node(tmp_path, archive)
    assert states(node) == {"S1": "waiting", "S2": "waiting"} and not list(node.state.work.iterdir())
    while node.step():
        pass
    assert states(node) == {"S1": "done", "S2": "done"}


def one_answers_500(archive, which, verb="fetch"):
    def turned_down(asked, what):
        if asked == verb and what.startswith(which):
            raise OrthancAway(f"http://fake/{what}: 500 Internal Server Error")
    archive.turned_down = turned_down


def test_a_series_that_orthanc_does_not_serve_lets_the_others_go_first_and_fails_in_the_end(tmp_path, monkeypatch):
    archive = Archive(tmp_path, "S1", "S2", "S3")
    one_answers_500(archive, "S1/2")
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive, queue=3)
    node.step()
    assert states(node) == dict.fromkeys(("S1", "S2", "S3"), "waiting") and node.state.waiting() == ["S2", "S3", "S1"]
    assert "try 1 failed, another will follow: http://fake/S1/2: 500" in page(node, "http://fake")
    archive.files["S4"] = archive.files["S3"]
    archive.log = log_of("S1", "S2", "S3", "S4")
    node.follow()
    assert node.state.waiting() == ["S2", "S3", "S1", "S4"]          # it keeps no room from others, nor its place
    node.state.close()
    again = archive_node(tmp_path, archive)                          # tries outlast the process
    while again.step():
        pass
    assert states(again) == {"S1": "failed", "S2": "done", "S3": "done", "S4": "done"}
    assert again.state.rows["S1"]["reason"] == "given up after 5 tries: http://fake/S1/2: 500 Internal Server Error"
    assert archive.fetched.count("S1/2") == 5 and again.metrics.put_back == 3
    assert "cn_stylegan_put_back_total 3" in again.metrics.text(0)


def test_a_series_is_not_failed_for_a_storage_that_serves_none(tmp_path, monkeypatch):
    archive = Archive(tmp_path, "S1", "S2")
    one_answers_500(archive, "S")
    node = archive_node(tmp_path, archive)
    for _ in range(3):
        node.step()
    assert archive.fetched == ["S1/0", "S2/0"]                       # a pause before each further try
    monkeypatch.setattr("pacs.node.time.monotonic", lambda: 1e12)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    for _ in range(18):
        node.step()
    assert len(archive.fetched) == 20 and states(node) == {"S1": "waiting", "S2": "waiting"}
    archive.turned_down = lambda *_: None                            # mended
    while node.step():
        pass
    assert states(node) == {"S1": "done", "S2": "done"} and not node.state.rows["S1"].get("reason")


def test_orthanc_away_as_a_whole_is_no_try_of_a_series(tmp_path):
    archive = Archive(tmp_path, "S1")

    def away(asked, what):
        if asked in ("fetch", "system"):
            raise OrthancAway("refused")
    archive.turned_down = away
    node = archive_node(tmp_path, archive)
    for _ in range(6):
        with pytest.raises(OrthancAway):
            node.step()
    assert "tries" not in node.state.rows["S1"] and node.metrics.put_back == 0


def more_images(archive, folder, series_id):
    """Another image of the series, and Orthanc's word of it."""
    whole = sorted(write_study(folder / "more", 0, len(archive.files[series_id]) + 1).iterdir())
    archive.files[series_id] = whole
    archive.log = archive.log + [Change(len(archive.log) + 1, "StableSeries", series_id)]


@pytest.mark.parametrize("outcome, error", [("refused", ScanError("no head")), ("failed", RuntimeError("broken"))])
def test_results_of_a_part_go_when_the_whole_is_refused_or_fails(tmp_path, outcome, error):
    def only_four(scan):
        if len(scan.hu) > 4:
            raise error
        return at_once(scan)
    archive = Archive(tmp_path, "S1", "S2")
    node = archive_node(tmp_path, archive, only_four)
    while node.step():
        pass
    kept, others = (set(node.state.rows[series_id]["objects"]) for series_id in ("S1", "S2"))
    assert len(kept) == 7 and archive.stored == kept | others
    more_images(archive, tmp_path, "S1")

    deleted = []

    def away_after_three(asked, what):                               # Orthanc goes in the middle
        deleted.append(what) if asked == "delete" else None
        if asked in ("delete", "system") and len(deleted) > 3:
            raise OrthancAway("refused")
    archive.turned_down = away_after_three
    with pytest.raises(OrthancAway):
        node.step()
    assert states(node) == {"S1": outcome, "S2": "done"} and len(archive.stored - others) == 4
    node.state.close()
    archive.turned_down = lambda *_: None
    again = archive_node(tmp_path, archive, only_four)               # as after a kill
    again.step()
    assert archive.stored == others and again.state.rows["S1"]["objects"] == []
    assert states(again) == {"S1": outcome, "S2": "done"}


def test_results_that_cannot_be_deleted_are_told_of_and_keep_nobody(tmp_path, capsys):
    def only_four(scan):
        if len(scan.hu) > 4:
            raise ScanError("no head")
        return at_once(scan)
    archive = Archive(tmp_path, "S1")
    node = archive_node(tmp_path, archive, only_four)
    node.step()
    more_images(archive, tmp_path, "S1")
    one_answers_500(archive, "", "delete")
    for _ in range(3):
        node.step()
    assert "still in the archive" in page(node, "http://fake") and len(archive.stored) == 7
    assert capsys.readouterr().out.count("still in the archive") == 1
    archive.turned_down = lambda *_: None
    node.step()
    assert "still in the archive" not in page(node, "http://fake") and not archive.stored


def test_a_full_disk_is_waited_for_and_said(tmp_path, monkeypatch, capsys):
    archive = Archive(tmp_path, "large", "small")

    def full(asked, what):
        if asked == "fetch" and what.startswith("large"):
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
        assert states(node) == {"large": "waiting", "small": "done"} and node.metrics.disk_full
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
    archive = Archive(tmp_path, "S1")
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
        wait_for(lambda: states(node).get("S1") == "done" or not loop.is_alive())
    finally:
        node.stopping.set()
        loop.join(60)
    assert node.metrics.outcomes["done"] == 1 and asked.count("done") == 2
    assert archive.stored == set(node.state.rows["S1"]["objects"])


def test_state_of_another_model_or_node_is_refused(tmp_path):
    state = State(tmp_path, {"weights": "a"})
    with pytest.raises(StateError, match="in use by another node"):
        State(tmp_path, {"weights": "a"})
    state.close()
    with pytest.raises(StateError, match="belongs to another model"):
        State(tmp_path, {"weights": "b"})


def test_pages(tmp_path):
    node = fake_node(tmp_path, log_of("low", "wild", "high", "odd", "next"))
    node.follow()
    for name, values in (("low", dict(state="done", score=0.5)), ("high", dict(state="done", score=9.0, flagged=True)),
                         ("wild", dict(state="done", score=99.0, unreliable="too much", notes=["too much", "a gap"])),
                         ("odd", dict(state="refused", reason="<b>no head</b>"))):
        node.state.put(name, node.state.rows[name] | values)
    server = serve(node, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.server_address[1]}"

    def get(path):
        with urllib.request.urlopen(url + path, timeout=60) as answer:
            return answer.read().decode()
    series = json.loads(get("/worklist.json"))["series"]
    assert [r["orthanc_id"] for r in series] == ["next", "high", "low", "wild", "odd"]
    html = get("/")
    assert "unreliable: too much" in html and html.count("too much") == 1 and "a gap" in html
    assert "&lt;b&gt;no head" in html and "<b>no head" not in html and "Research only" in html
    assert html.index(">next</a>") < html.index(">high</a>") < html.index(">low</a>") < html.index(">odd</a>")
    assert json.loads(get("/healthz")) == {"stuck": False, "orthanc": True, "waiting": 1}
    metrics = get("/metrics").splitlines()
    assert "cn_stylegan_queue_length 1" in metrics and 'cn_stylegan_scans_total{outcome="done"} 0' in metrics
    assert 'cn_stylegan_stage_seconds_count{stage="project"} 0' in metrics
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get("/other")
    server.shutdown()
