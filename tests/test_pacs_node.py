"""The node's loop: tries, the queue, a full disk, its state on the disk."""

from __future__ import annotations

import errno
import pkgutil
import time
from threading import Thread

import pytest
import torch

from ct.scan import ScanError
from pacs.orthanc import OrthancAway, OrthancRefused
from pacs.server import page
from pacs.state import State, StateError
from tests.pacs_archive import (
    S1,
    S2,
    S3,
    S4,
    Archive,
    FakeOrthanc,
    archive_node,
    at_once,
    dashed,
    log_of,
    more_images,
    one_answers_500,
    states,
    wait_for,
)


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


def test_a_damaged_image_is_the_reason_of_its_series(tmp_path):
    """It was told to send two scans as series of their own."""
    archive = Archive(tmp_path, S1, slices=6)
    path = archive.files[S1][2]
    path.write_bytes(path.read_bytes()[:200])
    node = archive_node(tmp_path, archive)
    node.step()
    assert states(node) == {S1: "refused"}
    assert f"{S1}.2.dcm: not a DICOM image" in node.state.rows[S1]["reason"]         # Orthanc's id of the instance


def test_an_image_that_is_named_but_not_there_is_tried_again_and_fails_in_the_end(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))

    def turned_down(verb, what):
        if verb == "fetch" and what == f"{S1}.2":
            raise OrthancRefused(f"http://fake/{what}: 404 Not Found", 404)
    archive.turned_down = turned_down
    node = archive_node(tmp_path, archive)
    for _ in range(10):
        node.step()
    assert states(node) == {S1: "failed", S2: "done"} and "given up after 5 tries" in node.state.rows[S1]["reason"]


def test_a_series_that_orthanc_does_not_serve_lets_the_others_go_first_and_fails_in_the_end(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2, S3)
    one_answers_500(archive, f"{S1}.2")
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive, queue=3)
    node.step()
    assert states(node) == dict.fromkeys((S1, S2, S3), "waiting") and node.state.waiting() == [S2, S3, S1]
    assert f"try 1 failed, another will follow: http://fake/{S1}.2: 500" in page(node, "http://fake")
    archive.files[S4] = archive.files[S3]
    archive.log = log_of(S1, S2, S3, S4)
    node.log.follow()
    assert node.state.waiting() == [S2, S3, S1, S4]          # it keeps no room from others, nor its place
    node.state.close()
    again = archive_node(tmp_path, archive)                          # tries outlast the process
    while again.step():
        pass
    assert states(again) == {S1: "failed", S2: "done", S3: "done", S4: "done"}
    assert again.state.rows[S1]["reason"] == f"given up after 5 tries: http://fake/{S1}.2: 500 Internal Server Error"
    assert archive.fetched.count(f"{S1}.2") == 5 and again.metrics.put_back == 3
    assert "cn_stylegan_put_back_total 3" in again.metrics.text(0)


def test_a_series_is_not_failed_for_a_storage_that_serves_none(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2)
    one_answers_500(archive, "")
    node = archive_node(tmp_path, archive)
    for _ in range(3):
        node.step()
    assert archive.fetched == [f"{S1}.0", f"{S2}.0"]                       # a pause before each further try
    monkeypatch.setattr("pacs.node.time.monotonic", lambda: 1e12)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    for _ in range(18):
        node.step()
    assert len(archive.fetched) == 20 and states(node) == {S1: "waiting", S2: "waiting"}
    archive.turned_down = lambda *_: None                            # mended
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"} and not node.state.rows[S1].get("reason")


MACHINE = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"),
           torch.AcceleratorError("CUDA error: unspecified launch failure"), RuntimeError("can't start new thread"),
           RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
           RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "torch.empty"]


@pytest.mark.parametrize("error", MACHINE, ids=str)
def test_a_gpu_that_fails_costs_no_series(tmp_path, monkeypatch, error):
    """Each that came was failed for good, until somebody looked at the page."""
    def broken(scan):
        if error == "torch.empty":
            torch.empty(10**15)                                      # bytes x 4: more than any address space
        raise error
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive, broken)
    for _ in range(14):
        node.step()
    assert states(node) == {S1: "waiting", S2: "waiting"} and node.metrics.put_back == 14
    name = "RuntimeError" if error == "torch.empty" else type(error).__name__
    assert f"another will follow: {name}: memory, GPU, open files" in page(node, "http://fake")
    node.project = at_once                                           # mended
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"}


@pytest.mark.parametrize("name, number, error", [
    ("ct.dicom_header._read_tags", 0, MemoryError()),                             # when the series is searched
    ("ct.dicom_header._read_tags", 0, OSError(errno.ENOMEM, "Cannot allocate memory")),
    ("ct.dicom_header._read_tags", 3, OSError(errno.EIO, "Input/output error")),  # of the last image
    ("os.scandir", 0, OSError(errno.EMFILE, "Too many open files")),              # of the work folder, to clear it
    ("os.scandir", 2, OSError(errno.EMFILE, "Too many open files")),              # of the series' folder
    ("ct.dicom_header._read_tags", 4, MemoryError()),                             # when it is read
    ("ct.dicom_pixels.open_dicom", 0, MemoryError()),
    ("ct.dicom_pixels.open_dicom", 0, OSError(errno.EIO, "Input/output error")),
    ("pathlib.Path.write_bytes", 0, OSError(errno.EMFILE, "Too many open files"))])
def test_a_machine_that_fails_while_a_series_is_fetched_or_read_costs_none(tmp_path, monkeypatch, name, number, error):
    """It was refused, as a file that is no DICOM. number: of calls that go well, of a series of 4 images."""
    archive = Archive(tmp_path, S1)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    archive.fetch = lambda instance, path: path.write_bytes(archive.files[S1][int(instance[-1])].read_bytes())
    node = archive_node(tmp_path, archive)
    node.log.follow()
    (node.state.work / "left").touch()
    target, _, attribute = name.rpartition(".")
    own, calls = pkgutil.resolve_name(name), []

    def short_of_it(*args, **how):
        calls.append(args)
        if len(calls) > number:
            raise error
        return own(*args, **how)
    with monkeypatch.context() as patch:
        patch.setattr(pkgutil.resolve_name(target), attribute, short_of_it)
        node.do(S1)
    row = node.state.rows[S1]
    assert len(calls) > number and (row["state"], row["tries"]) == ("waiting", 1)
    assert "a disk of" in row["reason"] and "SECRET" not in row["reason"]
    node.step()
    assert states(node) == {S1: "done"}


def test_a_series_that_breaks_the_node_is_failed_at_once(tmp_path):
    """What is no fault of the machine is tried once, whatever its kind."""
    errors = {S1: RuntimeError("broken"), S2: OSError(errno.EINVAL, "Invalid argument"), S3: ScanError("no head")}
    left = list(errors.values())

    def broken(scan):
        raise left.pop(0)
    node = archive_node(tmp_path, Archive(tmp_path, *errors), broken)
    for _ in errors:
        node.step()
    assert states(node) == {S1: "failed", S2: "failed", S3: "refused"} and node.metrics.put_back == 0


def test_a_late_image_while_memory_fails_takes_no_results_back(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, slices=6)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive)
    node.step()
    stored = archive.uids()
    more_images(archive, tmp_path, S1)
    node.project = lambda scan: torch.empty(10**15)
    for _ in range(7):
        node.step()
    assert states(node) == {S1: "waiting"} and archive.uids() == stored and len(stored) == 7
    node.project = at_once                                           # mended
    node.step()
    assert states(node) == {S1: "done"} and len(archive.uids()) == 7 and not archive.uids() & stored


def test_a_proxy_that_takes_no_result_fails_no_series(tmp_path, monkeypatch):
    """nginx takes 1 MB: every series was failed at its first try, and earlier results were taken back."""
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive)

    def turned_down(verb, what):
        if verb == "store" and what == "map.dcm":
            raise OrthancRefused("http://fake/instances: 413 Request Entity Too Large", 413)
    archive.turned_down = turned_down
    for _ in range(14):
        node.step()
    assert states(node) == {S1: "waiting", S2: "waiting"} and node.metrics.put_back == 14
    archive.turned_down = lambda *_: None                            # mended
    while node.step():
        pass
    assert states(node) == {S1: "done", S2: "done"}


def test_one_series_whose_result_is_not_taken_fails_after_five_tries(tmp_path, monkeypatch):
    archive = Archive(tmp_path, S1, S2)
    monkeypatch.setattr("pacs.node.RETRY_S", (0, 0))
    node = archive_node(tmp_path, archive)

    def turned_down(verb, what):
        if verb == "store" and node.in_work == S1:
            raise OrthancRefused("http://fake/instances: 413 Request Entity Too Large", 413)
    archive.turned_down = turned_down
    while node.step():
        pass
    assert states(node) == {S1: "failed", S2: "done"} and node.metrics.put_back == 4
    assert node.state.rows[S1]["reason"] == ("given up after 5 tries: http://fake/instances: 413 Request Entity Too "
                                             "Large")
    assert archive.uids() == set(node.state.rows[S2]["objects"])


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


def test_state_of_another_model_or_node_is_refused(tmp_path):
    state = State(tmp_path, {"weights": "a"})
    with pytest.raises(StateError, match="in use by another node"):
        State(tmp_path, {"weights": "a"})
    state.close()
    with pytest.raises(StateError, match="of a node that differs in weights .a there, b here.; give a new folder"):
        State(tmp_path, {"weights": "b"})


def test_what_differs_from_the_state_s_model_is_named(tmp_path):
    """After an upgrade of the program it was 'another model or other settings'."""
    made = {"weights": "a" * 64, "precision": "fp32", "versions": {"program": "0.1.0", "measure": 3},
            "settings": {"method": "inversion", "mask": {"least": 2.0}}, "calibration": None}
    State(tmp_path, made).close()
    for other, told in (
            (made | {"versions": {"program": "0.1.1", "measure": 3}}, "versions program (0.1.0 there, 0.1.1 here)"),
            (made | {"weights": "b" * 64, "calibration": "c" * 64}, "calibration, weights"),
            (made | {"settings": {"method": "inversion", "mask": {"least": 3.0}}, "threshold": 1.5},
             "settings mask least (2.0 there, 3.0 here), threshold (None there, 1.5 here)")):
        with pytest.raises(StateError) as error:
            State(tmp_path, other)
        assert str(error.value) == (
            f"--state {tmp_path}: its results are of a node that differs in {told}; give a new folder, with --since "
            "now where what is in the archive is not to be done again, or go back")


def test_a_state_of_another_orthanc_is_refused(tmp_path):
    """Of its log entries were passed over, and its series were refused as deleted."""
    archive = Archive(tmp_path, S1)
    node = archive_node(tmp_path, archive)
    while node.step():
        pass
    node.state.close()
    archive.url = "http://renamed"                                   # the same: it has the series
    node = archive_node(tmp_path, archive)
    node.step()
    node.state.close()
    other = Archive(tmp_path / "other", S2)
    other.url = "http://other"
    node = archive_node(tmp_path, other)
    with pytest.raises(StateError, match="--state .*: is of the Orthanc at http://renamed, and none of the 1 series "
                                         "that came last is at http://other; choose another folder"):
        node.step()
    assert states(node) == {S1: "done"} and not other.fetched


def test_a_state_without_series_is_as_new_at_another_orthanc(tmp_path):
    node = archive_node(tmp_path, FakeOrthanc(log_of(*map(dashed, "abc"), kind="StablePatient")))
    node.step()
    assert node.state.sequence == 3
    node.state.close()
    other = Archive(tmp_path, S1, S2)
    other.url = "http://other"
    again = archive_node(tmp_path, other)
    while again.step():
        pass
    assert states(again) == {S1: "done", S2: "done"}
