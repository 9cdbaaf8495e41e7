"""common/stopping.py, and the commands that unpack zips: SIGTERM leaves no patient's file behind."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from common.stopping import Terminated, orderly_end
from tests import processes
from tests.helpers import synthetic_head, tiny_bundle
from tests.writers import write_dicom_series

TERM, HUP = signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def default_signals():
    """As a program is started from a terminal; under nohup SIGHUP is ignored, and stays so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (TERM, HUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(TERM, 143), (HUP, 129)])
def test_a_signal_raises_once_and_is_as_before_in_the_end(number, code):
    cleaned = False
    with pytest.raises(Terminated) as stop, orderly_end(), orderly_end():
        assert signal.getsignal(number) != signal.SIG_DFL                # or the tests would end here
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), TERM)                                   # as SLURM and srun both send it
            cleaned = True
    assert cleaned and stop.value.code == code
    assert signal.getsignal(TERM) == signal.getsignal(HUP) == signal.SIG_DFL


def test_the_signals_of_others_stay_theirs():
    got = []
    before = signal.signal(TERM, lambda number, frame: got.append(number))
    try:
        with orderly_end():
            os.kill(os.getpid(), TERM)
        assert got == [TERM] and signal.getsignal(TERM) is not signal.SIG_DFL
    finally:
        signal.signal(TERM, before)


def test_other_threads_ask_for_no_signal():
    found = []

    def look():
        with orderly_end():
            found.append(signal.getsignal(TERM))
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("command", ["projector", "prepare"])
def test_sigterm_leaves_no_patient_data_in_the_temporary_folder(command, tmp_path):
    """It ended the run on the spot, and the unpacked files stayed for good."""
    hu, _ = synthetic_head(slices=6, size=48, spacing_mm=(20.0, 4.8, 4.8))
    for k in range(40):                            # of as many patients, and none a copy: prepare.py refuses those
        name = f"head-{k:02d}"

        def of_its_own(ds, _, name=name):
            ds.PatientID = name
        write_dicom_series(tmp_path / "series" / name, hu + k - 20, (20.0, 4.8, 4.8), series=name, study=name,
                           edit=of_its_own)
        shutil.make_archive(str(tmp_path / "scans" / name), "zip", tmp_path / "series" / name)
    unpacked, log = tmp_path / "unpacked", tmp_path / "log"
    unpacked.mkdir()
    more = {"projector": ["--model", tiny_bundle(tmp_path / "model"), "--out", tmp_path / "out", "--device", "cpu",
                          "--jobs", "1"],
            "prepare": ["--out", tmp_path / "out.lmdb", "--size", "32", "--workers", "1"]}[command]
    run = processes.start(command, [tmp_path / "scans", *more], log, TMPDIR=unpacked)

    def wait_for(condition) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < end and run.is_alive(), log.read_text()
            time.sleep(0.002)
    wait_for(lambda: log.exists() and "2/40 " in log.read_text())        # between reading, networks and writing
    wait_for(lambda: any(Path(unpacked).glob("*/*.dcm")))
    os.kill(run.pid, TERM)
    assert processes.codes([run]) == [143]
    assert os.listdir(unpacked) == [] and "stopped" in log.read_text()
    assert (tmp_path / "out" / "scores.csv").exists() == (command == "projector")         # of what is done
