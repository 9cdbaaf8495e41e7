"""The client of Orthanc's REST interface: what it asks, and what it makes of each answer."""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pacs.node import Node
from pacs.orthanc import Orthanc, OrthancAway, OrthancRefused
from pacs.state import State
from tests.pacs_archive import (
    S1,
    S2,
    S3,
    S4,
    free_port,
)
from tests.pacs_process import IDENTITY, project


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


@pytest.mark.parametrize("instances", [[1, S2], [{"a": 1}], [S2, "../../x"]])
def test_an_instance_that_has_no_id_of_orthancs_is_asked_for_by_none(tmp_path, answering, instances):
    """What is no text ended the node with a traceback."""
    answering.body = json.dumps({"ID": S1, "MainDicomTags": {}, "Instances": instances, "ParentStudy": S3,
                                 "IsStable": True, "LastUpdate": ""}).encode()
    client = Orthanc(answering.url)
    for request in (client.series, client.series_of):
        with pytest.raises(OrthancAway, match=f"{S1}.*: names an instance by what is no id; is this Orthanc"):
            request(S1)


def test_json_that_nests_too_deeply_is_no_answer(answering):
    """It ended the node with a traceback."""
    answering.body = b"[" * 200_000
    with pytest.raises(OrthancAway, match="no JSON; is this Orthanc"):
        Orthanc(answering.url).last_change()


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


def test_a_url_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(ValueError, match="ORTHANC_USER") as error:
        Orthanc("http://user:secret-word@127.0.0.1:8042")
    assert "secret-word" not in str(error.value)
    with pytest.raises(ValueError, match="expected a URL"):
        Orthanc("127.0.0.1:8042")


def test_a_body_that_a_proxy_does_not_take_names_the_proxys_setting(tmp_path, answering):
    (tmp_path / "map.dcm").write_bytes(b"x")
    for answering.status, mend in ((413, True), (400, False)):
        with pytest.raises(OrthancRefused, match=f"/instances: {answering.status}") as error:
            Orthanc(answering.url).store(tmp_path / "map.dcm")
        assert not error.value.for_all and ("nginx: client_max_body_size" in str(error.value)) == mend


@pytest.mark.parametrize("status", ["FilteredOut", "Failure", "StorageFull"])
def test_what_orthanc_answers_that_it_has_not_stored_is_not_stored(tmp_path, answering, status):
    answering.body = json.dumps({"ID": S1, "ParentStudy": S2, "Status": status}).encode()
    (tmp_path / "sr.dcm").write_bytes(b"x")
    with pytest.raises(OrthancAway, match=f"/instances: sr.dcm is not stored: {status}"):
        Orthanc(answering.url).store(tmp_path / "sr.dcm")
    for status in ("Success", "AlreadyStored"):
        answering.body = json.dumps({"ID": S1, "ParentStudy": S2, "Status": status}).encode()
        assert Orthanc(answering.url).store(tmp_path / "sr.dcm") == (S1, S2)
