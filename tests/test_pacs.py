"""The PACS node against the real Orthanc on loopback (Debian package orthanc)."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread

import pytest

from pacs.node import Node
from pacs.orthanc import Orthanc, OrthancRefused
from pacs.server import page, worklist
from pacs.state import State
from tests.pacs_archive import (
    PATIENT_IDS,
    answers,
    at_once,
    free_port,
    orthanc_id,
    wait_for,
    write_study,
)
from tests.pacs_process import IDENTITY, project

BINARY = shutil.which("Orthanc") or shutil.which("Orthanc", path="/usr/sbin")

needs_orthanc = pytest.mark.skipif(BINARY is None, reason="Orthanc is not installed (Debian package orthanc)")

ROOT = Path(__file__).resolve().parent.parent


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


@pytest.fixture
def orthanc(tmp_path):
    server = Server(tmp_path / "orthanc")
    yield server
    server.stop()


def node_of(server, folder: Path, run=project, **more) -> Node:
    return Node(server.client, State(folder, {"model": "stub"}), run, IDENTITY, **more)


def until_idle(node: Node, done: int) -> None:
    def step():
        node.step()
        return sum(row["state"] != "waiting" for row in node.state.rows.values()) == done
    wait_for(step)


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
def test_a_series_deleted_by_itself_takes_its_results_along(tmp_path, orthanc):
    """Orthanc's log has no entry of it: the ones of the series are gone."""
    orthanc.send(write_study(tmp_path, 1))
    orthanc.send(write_study(tmp_path, 2))
    node = node_of(orthanc, tmp_path / "state", at_once, withdraw_deleted=True)
    until_idle(node, 2)
    gone, kept = node.state.rows
    orthanc.client._request(f"/series/{gone}", method="DELETE")
    node._next_round = 0.0                                           # as after an hour
    wait_for(lambda: node.step() or node.state.rows[gone]["state"] == "refused")
    assert orthanc.get("/studies") == [node.state.rows[kept]["study"]]                 # nothing was left in the other
    assert len(orthanc.get("/series")) == 1 + len(("KO", "OT", "OT", "SEG", "SR"))


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
    assert "SECRET7" not in text and "ID7" not in text


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
