"""Projection as an actor pool of Ray Data, for those who have a Ray cluster; nothing else here needs Ray.

    pip install "ray[data]"
    python examples/ray_data.py SCANS --model models/head-128 --out results --actors 16 --gpus 0.25

Each actor holds the model and takes one scan after the other. OUT is as projector.py --part makes it: a rerun skips
what is finished, and both may work on the same folder. This checkout, SCANS and OUT lie at the same path on every node.
"""

import argparse
import pickle
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parent.parent


class Project:
    def __init__(self, model: str, out: str):
        from detect import Projector, load_bundle
        from detect.dicom_out import dicom_writer
        from detect.outputs import OUTPUTS
        from distributed import pick_device

        self.projector, self.out = Projector(load_bundle(model, pick_device("auto"))), Path(out)
        self.writers = {**OUTPUTS, "dicom": dicom_writer(self.projector)}

    def __call__(self, row: dict) -> dict:
        from detect.jobs import project_all
        from detect.result import find_result_folder, read_result

        source = pickle.loads(row["source"])
        for _ in project_all(self.projector, [source], self.out, self.writers, by_hash=True):
            pass
        scan = (read_result(find_result_folder(self.out, source.scan_id)) or {"scan": {}})["scan"]
        return {"scan_id": source.scan_id, "status": scan.get("status", "another run has it")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of an actor; at 0.25 four of them share one")
    args = parser.parse_args()
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})

    from ct.read import find_scans
    from detect.folder import collect_all, make_writable, write_tables

    make_writable(args.out)
    sources = [{"source": pickle.dumps(source)} for source in find_scans(args.scans)]
    done = ray.data.from_items(sources, override_num_blocks=len(sources)).map(
        Project, fn_constructor_args=[str(args.model.resolve()), str(args.out.resolve())], num_gpus=args.gpus,
        compute=ray.data.ActorPoolStrategy(size=args.actors))
    print(*(f"{row['scan_id']}: {row['status']}" for row in done.take_all()), sep="\n")
    write_tables(args.out, collect_all(args.out))


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    main()
