"""Results in the archive: one set for each series, and none that outlasts its images."""

from __future__ import annotations

from threading import Thread

import pydicom
import pytest

from common.files import FullDiskError
from ct.scan import ScanError
from detect.dicom_out import BURNED_IN
from pacs.orthanc import OrthancAway, OrthancRefused
from pacs.server import page
from tests.pacs_archive import (
    PATIENT_IDS,
    S1,
    S2,
    Archive,
    archive_node,
    at_once,
    dashed,
    log_of,
    more_images,
    one_answers_500,
    states,
    wait_for,
)


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
    gone = f"{S1}.6"

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


def test_burned_in_text_is_noted_in_the_row(tmp_path):
    archive = Archive(tmp_path, S1, S2)
    ds = pydicom.dcmread(archive.files[S1][2])
    ds.BurnedInAnnotation = "YES"
    ds.save_as(archive.files[S1][2])
    node = archive_node(tmp_path, archive)
    while node.step():
        pass
    assert [node.state.rows[one]["notes"] for one in (S1, S2)] == [[BURNED_IN], []]
    assert "burned-in text" in page(node, "http://fake")


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
    gone = f"{S1}.5"

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


@pytest.mark.parametrize("patient", PATIENT_IDS)
def test_results_of_a_part_go_whatever_the_patient_id(tmp_path, patient):
    archive = Archive(tmp_path, S1, patient=patient)
    node = archive_node(tmp_path, archive)
    node.step()
    first = archive.uids()
    more_images(archive, tmp_path, S1)
    node.step()
    assert len(first) == len(archive.uids()) == 7 and not first & archive.uids()


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


def test_a_series_deleted_by_itself_leaves_its_results_where_nothing_else_is_asked_for(tmp_path):
    """A site may delete images by a rule, and keep the reports."""
    archive = Archive(tmp_path, S1, S2)
    node = archive_node(tmp_path, archive)
    while node.step():
        pass
    before, stored = node.state.rows[S1], archive.uids()
    del archive.files[S1]
    node._next_round = 0.0
    node.step()
    assert node.state.rows[S1] == before and archive.uids() == stored


def test_a_series_deleted_by_itself_takes_its_results_along_where_that_is_asked_for(tmp_path, capsys):
    """They stayed beside no images, in a study that goes on."""
    archive = Archive(tmp_path, S1, S2)
    node = archive_node(tmp_path, archive, withdraw_deleted=True)
    while node.step():
        pass
    files, others = archive.files.pop(S1), set(node.state.rows[S2]["objects"])
    node.step()
    assert states(node) == {S1: "done", S2: "done"}                  # asked after once an hour
    node._next_round = 0.0                                           # as after an hour
    node.step()
    row = node.state.rows[S1]
    assert states(node) == {S1: "refused", S2: "done"} and archive.uids() == others and row["objects"] == []
    assert row["reason"].startswith("deleted from Orthanc after its results") and "score" not in row
    assert f"{S1}: deleted from Orthanc after" in capsys.readouterr().out
    node.state.close()
    archive.files[S1], archive.log = files, archive.log + log_of(S1, first=3)     # from a backup: nothing is new
    again = archive_node(tmp_path, archive)
    while again.step():
        pass
    assert states(again) == {S1: "done", S2: "done"} and len(archive.stored) == 14


def test_a_series_of_which_images_are_deleted_is_done_again_with_those_that_stay(tmp_path):
    """The results of the whole stayed beside a part."""
    archive = Archive(tmp_path, S1, S2, slices=6)
    node = archive_node(tmp_path, archive, withdraw_deleted=True)
    while node.step():
        pass
    others = set(node.state.rows[S2]["objects"])
    archive.files[S1].pop()
    node._next_round = 0.0                                           # as after an hour
    node.step()
    assert states(node) == {S1: "waiting", S2: "done"}
    while node.step():
        pass
    row = node.state.rows[S1]
    assert (row["state"], row["images"]) == ("done", 5) and archive.uids() == others | set(row["objects"])
    node._next_round = 0.0
    assert not node.step() and node.metrics.outcomes["done"] == 3    # what was projected is what is known


@pytest.mark.parametrize("gone", [("series", "study"), ("series",)])
def test_a_study_that_is_gone_or_not_told_of_is_left_as_it_is(tmp_path, gone):
    """Its results went with it; nor is there anything to do for a series of which Orthanc does not tell."""
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive, withdraw_deleted=True)
    while node.step():
        pass
    before = node.state.rows[S1]

    def turned_down(verb, what):
        if verb in gone:
            raise OrthancRefused("gone", 404)
        if verb == "study":
            raise OrthancAway("http://fake: 500 Internal Server Error")
    archive.turned_down = turned_down
    for node._next_round in (0.0, 0.0):
        node.step()
    assert node.state.rows[S1] == before and len(archive.stored) == 7


def test_what_was_done_is_asked_after_some_at_a_step(tmp_path):
    archive, asked = Archive(tmp_path, S1), []
    node = archive_node(tmp_path, archive, withdraw_deleted=True)
    while node.step():
        pass
    ids = [dashed(f"series {i}") for i in range(49)]
    for series_id in ids:
        node.state.put(series_id, node.state.rows[S1])
    archive.turned_down = lambda verb, what: asked.append(what) if verb == "series" else None
    archive.files |= dict.fromkeys(ids, archive.files[S1])
    node._next_round, counts = 0.0, []
    for _ in range(4):
        node.step()
        counts.append(len(asked))
    assert counts == [20, 40, 50, 50] and sorted(asked) == sorted([S1, *ids])
