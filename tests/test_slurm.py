"""The SLURM scripts, with stand-ins for SLURM's commands: what they start, and what a warning before the limit does."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "3"}
COMMANDS = {                                          # each writes how it was called
    "srun": 'echo "srun $* OMP_NUM_THREADS=$OMP_NUM_THREADS SRUN_CPUS_PER_TASK=$SRUN_CPUS_PER_TASK" >> "$CALLS"; '
            'eval "$STEP"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"; [ "$1" = show ] && printf "n1\\nn2\\n"; true',
}
# Of a training: goes on until it is warned, then writes its snapshot, and exits as train.py does
TRAINING = "trap 'sleep 0.3; echo snapshot >> \"$CALLS\"; exit 143' USR1; touch started; while :; do sleep 0.05; done"


@pytest.fixture
def job(tmp_path):
    """job(script, *arguments, **environment) starts it as a node's shell would; job.calls() is what it has called."""
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)

    def start(script: str, *arguments: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", ROOT / "slurm" / script, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"),
                            "SLURM_SUBMIT_DIR": str(tmp_path), **JOB, **environment})
    start.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    start.folder = tmp_path
    return start


def test_training_starts_a_torchrun_on_each_node(job):
    run = job("train.sbatch", "--data", "a b.lmdb", "--out", "runs/gan", STEP="exit 0", GPUS="4",
              SLURM_RESTART_COUNT="2")
    assert run.wait(30) == 0, run.stderr.read()
    hosts, step = job.calls()
    assert hosts == "scontrol show hostnames n[1-2]"
    assert step.startswith("srun --kill-on-bad-exit=1 .venv/bin/python -m torch.distributed.run --nnodes=2 "
                           "--nproc-per-node=4 --max-restarts=3 --rdzv-id=7-2 --rdzv-backend=c10d --rdzv-endpoint=n1:")
    assert step.endswith("train.py --data a b.lmdb --out runs/gan OMP_NUM_THREADS=1 SRUN_CPUS_PER_TASK=3")
    assert "SIGUSR1" in step
    assert job("train.sbatch", STEP="exit 0", SLURM_JOB_ID="8").wait(30) == 0
    one, other = (call.partition("--rdzv-endpoint=")[2].split()[0] for call in job.calls()[1::2])
    assert one != other                                       # on a node of both, the first to end took the other's


@pytest.mark.parametrize("told, processes", [({}, 8), ({"SLURM_GPUS_ON_NODE": "2"}, 2),
                                             ({"SLURM_GPUS_ON_NODE": "2", "GPUS": "1"}, 1)])
def test_a_process_for_each_gpu_of_the_node(job, told, processes):
    """Eight, where a job had four GPUs: each rank from the fifth on ended with 2."""
    run = job("train.sbatch", STEP="exit 0", **told)
    assert run.wait(30) == 0, run.stderr.read()
    assert f" --nproc-per-node={processes} " in job.calls()[-1]


def test_a_warning_makes_a_snapshot_and_a_new_start(job):
    run = job("train.sbatch", "--out", "runs/gan", STEP=TRAINING)
    end = time.monotonic() + 30
    while not (job.folder / "started").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    run.send_signal(signal.SIGUSR1)
    assert run.wait(30) == 143
    assert job.calls()[-2:] == ["snapshot", "scontrol requeue 7"]        # in this order: not before the snapshot
    assert "requeued" in run.stdout.read()


def test_a_training_that_fails_is_not_requeued(job):
    run = job("train.sbatch", STEP="exit 4")
    assert run.wait(30) == 4 and not any("requeue" in call for call in job.calls())


def test_projection_is_one_task_of_an_array(job):
    run = job("project.sbatch", "scans", "--model", "m", SLURM_ARRAY_TASK_ID="3", STEP="exit 3")
    assert run.wait(30) == 3
    assert job.calls() == ["srun .venv/bin/python projector.py scans --model m OMP_NUM_THREADS=3 SRUN_CPUS_PER_TASK=3"]
    alone = job("project.sbatch", "scans", STEP="exit 0")
    assert alone.wait(30) != 0 and "--array=0-N" in alone.stderr.read()


@pytest.mark.parametrize("script", ["train.sbatch", "project.sbatch"])
def test_directives_come_before_the_first_command(script):
    """sbatch reads no directive behind one."""
    lines = (ROOT / "slurm" / script).read_text().splitlines()
    first = next(k for k, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0] == "#!/bin/bash" and sum(line.startswith("#SBATCH ") for line in lines[:first]) >= 6
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append"} <= set(lines)
