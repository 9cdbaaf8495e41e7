"""The node's pages: the worklist, its state and its metrics."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest

from pacs.server import _Handler, page, serve, worklist
from tests.pacs_archive import (
    dashed,
    fake_node,
    log_of,
)


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


def test_a_percentile_is_rounded_down_as_in_the_report(tmp_path):
    """Of the top scan among 200 healthy ones, 99.5025, the page said 100."""
    node = fake_node(tmp_path, log_of(dashed("top")))
    node.log.follow()
    node.state.put(dashed("top"), node.state.rows[dashed("top")] | dict(
        state="done", score=1.0, percentile=100 * 200 / 201))
    html = page(node, "http://fake")
    assert ">99.5<" in html and ">100<" not in html


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
