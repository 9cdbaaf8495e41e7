"""The node's pages: the worklist for people and programs, health, metrics. Read only."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from detect.scores import rounded_down
from pacs.node import Node
from pacs.state import DONE, WAITING

REFRESH_S = 15
DAYS = 7.0                                            # of finished series that are shown
ROW_KEYS = ("study_uid", "series_uid", "score", "percentile", "flagged", "threshold", "unreliable", "anomalous_ml",
            "notes", "reason", "announced", "finished", "seconds")


def worklist(node: Node, days: float = DAYS) -> tuple[list[dict], int]:
    """The series, and how many more were finished before the last `days`, which are left out.

    In work and waiting first; then results with the highest score first, those not to be trusted below the others;
    then the refused and failed.
    """
    rows, known = [], node.state.rows
    oldest = (datetime.now(UTC) - timedelta(days=min(days, 36500))).isoformat(timespec="seconds")
    for series_id, row in known.items():
        if row["state"] != WAITING and row.get("finished", oldest) < oldest:
            continue
        state = "in work" if series_id == node.in_work and row["state"] == WAITING else row["state"]
        rows.append({"orthanc_id": series_id, "state": state, **{key: row.get(key) for key in ROW_KEYS}})
    order = {"in work": 0, WAITING: 1, DONE: 2}
    return sorted(rows, key=lambda r: (order.get(r["state"], 3), r["unreliable"] is not None, -(r["score"] or 0),
                                       r["announced"], r["orthanc_id"])), len(known) - len(rows)


@cache
def _template() -> Template:
    here = Path(__file__).parent
    places = FileSystemLoader([here, here.parent / "detect" / "report"])
    return Environment(loader=places, autoescape=True, trim_blocks=True, lstrip_blocks=True,
                       undefined=StrictUndefined).get_template("worklist.html.jinja")


def page(node: Node, link: str, days: float = DAYS) -> str:
    """The worklist as HTML, in the look of the report; link: Orthanc's URL for whoever looks at it."""
    rows, older = worklist(node, days)
    return _template().render(
        rows=rows, older=older, days=f"{days:g}", model=node.identity.name, weights=node.identity.weights_hash[:12],
        orthanc=link, up=node.metrics.orthanc_up, changes_up=node.metrics.changes_up,
        disk_full=node.metrics.disk_full, refresh=REFRESH_S, rounded_down=rounded_down)


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "CN-StyleGAN", ""
    timeout = 60.0                                    # seconds: who asks nothing keeps no thread

    def __init__(self, node: Node, link: str, days: float, *args):
        self.node, self.link, self.days = node, link, days
        super().__init__(*args)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        node = self.node
        if path == "/":
            self._answer(200, "text/html; charset=utf-8", page(node, self.link, self.days))
        elif path == "/worklist.json":
            series, older = worklist(node, self.days)
            self._answer(200, "application/json", json.dumps({
                "research_only": True, "model": node.identity.name, "weights_sha256": node.identity.weights_hash,
                "series": series, "older": older}))
        elif path == "/metrics":
            self._answer(200, "text/plain; version=0.0.4", node.metrics.text(len(node.state.waiting())))
        elif path == "/healthz":
            self._answer(503 if node.stuck else 200, "application/json", json.dumps(
                {"stuck": node.stuck, "orthanc": node.metrics.orthanc_up, "changes": node.metrics.changes_up,
                 "waiting": len(node.state.waiting())}))
        else:
            self._answer(404, "text/plain", "not here; there are /, /worklist.json, /healthz and /metrics\n")

    do_HEAD = do_GET

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store"),
                            ("X-Content-Type-Options", "nosniff"),
                            ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")):
            self.send_header(name, value)
        try:
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except ConnectionError:                       # the reader has gone
            self.close_connection = True

    def log_message(self, *_) -> None:
        """Nothing: a page that refreshes itself would fill the log."""


def serve(node: Node, host: str, port: int, link: str | None = None, days: float = DAYS) -> ThreadingHTTPServer:
    """Start answering in threads of its own; port 0 takes a free one. link: as for page, by default the node's own."""
    server = ThreadingHTTPServer((host, port), partial(_Handler, node, link or node.orthanc.url, days))
    Thread(target=server.serve_forever, daemon=True).start()
    return server
