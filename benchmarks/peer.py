"""Time beside what else one could take: PaDiM and PatchCore of anomalib, on the same standardised slices and cores.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install -r requirements.lock anomalib==2.7.0
    /tmp/peer/bin/python -m benchmarks.peer --data healthy.lmdb --scans SCANS --out peer.json

Speed only: their backbones have random weights, since the published ones need a download, so that what they find means
nothing. Of each: CPU time of training on --slices healthy slices; CPU time per scan, the median over --scans, from
standardised slices to anomaly map and score, without reading and writing; peak memory of its process. Ours is not
trained here: that takes hours. anomalib is none of this project's dependencies: it wants an environment of its own.
Exit codes: 0 done, 2 wrong usage, or anomalib is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import new_file
from benchmarks.cohort import held_gb
from ct.read import find_scans, read_scan
from ct.window import encode
from dataset import SliceDataset
from detect import Projector, load_bundle
from detect.projection import project_frame
from op import memory

ROOT = Path(__file__).parent.parent
BATCH = 32
CORESET = 0.1                                            # of PatchCore's patches are kept: anomalib's default
INSTALL = ("anomalib is not there ({error}): python -m venv /tmp/peer && /tmp/peer/bin/pip install -r "
           "requirements.lock anomalib==2.7.0, and run this with /tmp/peer/bin/python")


def padim() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]:
    """The model, and what ends its training."""
    from anomalib.models.image.padim.torch_model import PadimModel

    return PadimModel(backbone="resnet18", layers=["layer1", "layer2", "layer3"], pre_trained=False), PadimModel.fit


def patchcore() -> tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]:
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    model = PatchcoreModel(layers=["layer2", "layer3"], backbone="wide_resnet50_2", pre_trained=False)
    return model, lambda model: model.subsample_embedding(CORESET)


PEERS = {"padim": padim, "patchcore": patchcore}
METHODS = ("ours", *PEERS)


def measure(method: str, data: Path, scans: Path, slices: int, model: Path) -> dict[str, float | None]:
    """CPU seconds of training and per scan, peak memory in GB, of this process."""
    memory.keep_freed()
    projector = Projector(load_bundle(model, torch.device("cpu")))
    bundle, trained = projector.bundle, None
    if method in PEERS:
        net, finish = PEERS[method]()
        healthy = SliceDataset(data, "train")
        if healthy.size != bundle.reconstructor.size:
            raise ValueError(f"--data {data}: slices of {healthy.size} pixels, --model {model} takes "
                             f"{bundle.reconstructor.size}; prepare it with that --size")
        pick = torch.linspace(0, len(healthy) - 1, min(slices, len(healthy))).long().tolist()
        images = encode(torch.stack([healthy[i]["hu"] for i in pick]).float())
        started = time.process_time()
        with torch.no_grad():
            net.train()
            for part in images.split(BATCH):
                net(part)
            finish(net)
        trained = time.process_time() - started
        net.eval()
    spent = []
    for source in find_scans(scans):
        hu, brain, below_vertex_mm = projector.prepare(read_scan(source)).kept_slices()
        hu, brain = torch.from_numpy(hu), torch.from_numpy(brain)
        started = time.process_time()
        with torch.no_grad():
            if method in PEERS:
                for part in encode(hu).split(BATCH):
                    net(part)
            else:
                project_frame(bundle.reconstructor, bundle.measure, hu, brain, below_vertex_mm)
        spent.append(time.process_time() - started)
    _, peak_gb = held_gb(os.getpid())
    return {"training_cpu_s": trained, "scan_cpu_s": statistics.median(spent[1:] or spent), "scans": len(spent),
            "peak_gb": peak_gb}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="database of prepare.py, of --model's kind")
    parser.add_argument("--scans", type=Path, required=True, help="folder of scans to project")
    parser.add_argument("--model", type=Path, default=ROOT / "models/head-128", help="ours (default: %(default)s)")
    parser.add_argument("--slices", type=int, default=400, help="healthy slices to train on (default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, help="this one alone, in this process")
    parser.add_argument("--out", type=new_file, help="JSON file for the figures")
    args = parser.parse_args(argv)
    if args.slices < 1:
        parser.error(f"--slices must be at least 1, got {args.slices}")
    try:
        import anomalib.models  # noqa: F401
    except ImportError as error:
        print(f"error: {INSTALL.format(error=error)}", file=sys.stderr)
        return 2
    try:
        if args.method:
            found = {args.method: measure(args.method, args.data, args.scans, args.slices, args.model)}
        else:
            found = {}
            for method in METHODS:                       # each in a process of its own, for its memory
                places = {"--data": args.data, "--scans": args.scans, "--model": args.model}
                flags = [str(word) for flag, path in places.items() for word in (flag, path.absolute())]
                run = subprocess.run([sys.executable, "-m", "benchmarks.peer", "--method", method, *flags, "--slices",
                                      str(args.slices)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                found |= json.loads(run.stdout.splitlines()[-1])
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
