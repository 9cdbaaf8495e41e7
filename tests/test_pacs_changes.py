"""Orthanc's change log, followed: what is written down as waiting, once, whatever Orthanc does not serve."""

from __future__ import annotations

import pytest

from pacs.node import Node
from pacs.orthanc import OrthancAway, OrthancRefused
from pacs.server import page
from pacs.state import State
from tests.pacs_archive import (
    S1,
    S2,
    S3,
    S4,
    Archive,
    FakeOrthanc,
    archive_node,
    dashed,
    fake_node,
    log_of,
    more_images,
    states,
)
from tests.pacs_process import IDENTITY, project
from tests.writers import make_uid


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


@pytest.mark.parametrize("status", [500, 404, 400])
def test_a_change_log_that_orthanc_does_not_serve_keeps_no_series_that_waits(tmp_path, monkeypatch, capsys, status):
    """A refusal, 404 or 400, ended the node."""
    archive, asked, clock = Archive(tmp_path, S1, S2), [], [0.0]
    monkeypatch.setattr("pacs.node.time.monotonic", lambda: clock[0])
    node = archive_node(tmp_path, archive)
    assert node.step() and states(node) == {S1: "done", S2: "waiting"}

    def unserved():
        asked.append(clock[0])
        said = f"http://fake/changes?last: {status} told"
        raise OrthancAway(said) if status == 500 else OrthancRefused(said, status)
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
    assert said.count(f"the change log cannot be read, trying again: http://fake/changes?last: {status} told") == 1
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


def test_the_queue_bounds_series_that_orthanc_does_not_announce(tmp_path):
    archive = Archive(tmp_path, S1, S2, S3)
    archive.log = log_of(*(archive.image_ids(id)[0] for id in (S1, S2, S3)), kind="NewInstance")
    node = archive_node(tmp_path, archive, queue=2)
    node.log.follow()
    assert node.log.follow() and len(node.state.waiting()) == 2 and len(node.state.arriving) == 1
    while node.step():
        pass
    assert states(node) == dict.fromkeys((S1, S2, S3), "done")


def test_an_id_that_is_none_becomes_no_file(tmp_path, capsys):
    log = log_of("../../evil", S1, S1 + "/..") + log_of("../x", S2, kind="NewInstance", first=4)
    node = fake_node(tmp_path / "state", log)
    node.orthanc.series_of = lambda instance_id: node.orthanc.series(instance_id) | {"ID": "../../evil"}
    node.log.follow()
    assert node.state.waiting() == [S1] and not node.state.arriving and not list(tmp_path.glob("evil*"))
    assert capsys.readouterr().out.count("is no id of Orthanc's") == 4
