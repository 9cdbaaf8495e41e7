"""Projection as an actor pool of Ray Data, for those who have a Ray cluster; nothing else here needs Ray.

    pip install "ray[data]"
    python examples/ray_data.py SCANS --model models/head-128 --out results --actors 16 --gpus 0.25

Each actor holds the model and takes one scan after the other. OUT is as projector.py --part and merge make it: a rerun
skips what is finished, and both may work on the same folder. This checkout, SCANS and OUT lie at the same path on every
node. Exit codes: 0 done, 2 wrong usage, 3 some scans failed or have no result.
"""

import argparse
import pickle
import sys
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent


class Project:
    def __init__(self, model: str, out: str, sources: list):
        from detect import Projector, load_bundle
        from detect.dicom_out import dicom_writer
        from detect.folder import refuse_other_results
        from detect.outputs import OUTPUTS
        from detect.run import begin_report, run_report
        from distributed import pick_device

        self.projector, self.out = Projector(load_bundle(model, pick_device("auto"))), Path(out)
        self.writers = {**OUTPUTS, "dicom": dicom_writer(self.projector)}
        refuse_other_results(self.out, sources, self.projector.key())         # run.json stays theirs
        begin_report(self.out, run_report(self.projector, 1))

    def __call__(self, row: dict) -> dict:
        from detect.jobs import project_all
        from detect.result import find_result_folder, read_result

        source = pickle.loads(row["source"])
        for _ in project_all(self.projector, [source], self.out, self.writers, by_hash=True):
            pass
        scan = (read_result(find_result_folder(self.out, source.scan_id)) or {"scan": {}})["scan"]
        return {"scan_id": source.scan_id, "status": scan.get("status", "another run has it")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of an actor; at 0.25 four of them share one")
    args = parser.parse_args()
    try:
        return run(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from ct.read import find_scans
    from detect import load_bundle
    from detect.folder import make_writable, note_part, refuse_other_files
    from detect.run import merge

    load_bundle(args.model)                                   # what is wrong with it is told before anything is written
    found = find_scans(args.scans)
    make_writable(args.out)
    refuse_other_files(args.out, found, by_hash=True)
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    note_part(args.out, [args.scans], found, 0, 1)
    sources = [{"source": pickle.dumps(source)} for source in found]
    done = ray.data.from_items(sources, override_num_blocks=len(sources)).map(
        Project, fn_constructor_args=[str(args.model.resolve()), str(args.out.resolve()), found], num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors))
    print(*(f"{row['scan_id']}: {row['status']}" for row in done.take_all()), sep="\n")
    results, missed, others = merge(args.out)
    for words in (*missed, *([others] if others else ())):
        print(words, file=sys.stderr)
    return 3 if missed or not all(result.ok for result in results) else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
