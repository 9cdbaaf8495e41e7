"""A node with a projection that needs no model, as a process of its own that tests may kill.

    python -m tests.pacs_process URL STATE PORT_FILE
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ct.scan import Scan, ScanError
from detect.dicom_out import Identity
from pacs.node import Node
from pacs.orthanc import Orthanc
from pacs.server import serve
from pacs.state import State

IDENTITY = Identity("stub", "1", "ab" * 32)


@dataclass(frozen=True)
class Stub:
    """What is denser than 60 HU in the brain's window is marked; the score is its volume."""

    scan: Scan
    anomaly: np.ndarray
    mask: np.ndarray
    slice_scores: np.ndarray
    projected: np.ndarray
    score: float
    percentile: float | None = 50.0
    threshold: float | None = 1.0
    flagged: bool | None = False
    anomalous_ml: float | None = 2.0
    unreliable: str | None = None
    notes: tuple[str, ...] = ()


def project(scan: Scan) -> Stub:
    if len(scan.hu) < 4:
        raise ScanError(f"{scan.scan_id}: too few slices for a head")
    time.sleep(0.3)
    mask = (scan.hu > 60) & (scan.hu < 90)
    scores, score = mask.sum((1, 2)).astype(np.float32), float(mask.sum() / 100)
    return Stub(scan, scan.hu, mask, scores, np.ones(len(mask), bool), score, flagged=score > 1)


def main(url: str, state: str, port_file: str) -> None:
    on_disk = State(Path(state), {"model": "stub"})
    node = Node(Orthanc(url, timeout_s=5), on_disk, project, IDENTITY, queue=3, poll_s=0.1)
    signal.signal(signal.SIGTERM, lambda *_: node.stopping.set())
    server = serve(node, "127.0.0.1", 0)
    Path(port_file).write_text(str(server.server_address[1]))
    node.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
