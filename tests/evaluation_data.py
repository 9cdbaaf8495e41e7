"""What the tests of evaluate.py need: a folder of results with labels, and the command run on it."""

from __future__ import annotations

import csv
import json

import numpy as np

import evaluate

SCORES = np.array([0.9, 0.8, 0.4, 0.7, 0.3, 0.2])
LABELS = np.array([1, 1, 1, 0, 0, 0])                                        # 8 of 9 pairs ranked right


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])
    return path


def write_results(folder):
    """Six scans of three slices, scored, with labels and categories beside the folder."""
    folder.mkdir()
    names = list("abcdef")
    write_csv(folder / "scores.csv", "scan_id,score,status,reason", [[n, s, "ok", ""] for n, s in zip(names, SCORES)])
    types = ["Epidural", "Epidural|Subdural", "Subdural", "", "", ""]
    write_csv(folder.parent / "labels.csv", "scan_id,label,types", list(zip(names, LABELS, types)))
    write_csv(folder / "slices.csv", "scan_id,slice,score", [[n, k, s * (k + 1)] for n, s in zip(names, SCORES)
                                                            for k in range(3)])
    write_csv(folder.parent / "slice_labels.csv", "scan_id,slice,label",
              [[n, k, int(y and k == 2)] for n, y in zip(names, LABELS) for k in range(3)])
    return folder


def run(results, *extra, out="metrics"):
    """The exit code of evaluate.py, and its metrics.json where there is one."""
    base = results.parent
    code = evaluate.main([str(results / "scores.csv"), str(base / "labels.csv"), "--out", str(base / out),
                          "--bootstrap", "100", *map(str, extra)])
    path = base / out / "metrics.json"
    return code, json.loads(path.read_text()) if path.is_file() else None
