"""Train HealthyGAN (Rahman Siddiquee et al. 2022): translate images to their healthy version, without labels.

    python -m healthygan.train --data cxr --out runs/healthygan --preset full256
    python -m healthygan.train --healthy b.lmdb --mixed a.lmdb b.lmdb --mixed-scans a.txt --preset cpu128
    torchrun --nproc-per-node=8 -m healthygan.train --data cxr --out runs/healthygan

Set B is known to be healthy, set A is unannotated: healthy and diseased mixed. --data holds train/healthy and
train/mixed; --healthy and --mixed name folders of images, or databases of head-CT slices made by prepare.py.
Writes to --out: config.json, stats.jsonl, sample grids (x, t, y, m, |x-y|), TensorBoard curves, snapshots, and in
best/ the generator with the highest AUCp (unannotated against known healthy: no labels) with its frozen threshold.
Run the same command again to go on from the last snapshot. SIGINT, SIGTERM, SIGHUP and SIGUSR1 end it with a snapshot
after the step in progress. Exit codes: 0 done, 2 wrong usage, 4 diverged again after going back to the last snapshot
(which is kept), 129, 130 or 143 stopped by a signal.
"""
from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # run as a script from anywhere

import distributed
from config import parse
from dataset import DatasetError
from evaluation import metrics
from gan.run import Run, run_command
from healthygan.data import ImageSettings, class_folders, is_database
from healthygan.pictures import save_grid
from healthygan.scoring import aucp, image_scores, unit_scores
from healthygan.settings import PRESETS, TrainConfig
from healthygan.training import Trainer
from healthygan.training_data import TrainingData, batches, load_training
from healthygan.weights import save_model
from op import memory

# ---------------------------------------------------------------------------------------------------------------
# The choice of a generator

class Chooser:
    """Keeps the generator with the highest AUCp in out/best, on rank 0. No label of a diseased image is used."""

    def __init__(self, data: TrainingData, out: Path, meta: dict, device: torch.device):
        self.data, self.out, self.meta, self.device = data, out, meta, device
        count = min(6, len(data.mixed), len(data.healthy))       # spread: neighbours are slices of one scan
        self.shown = torch.cat([part[[i * len(part) // count for i in range(count)]]
                                for part in (data.mixed, data.healthy)])

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """`aucp` of the training images, and their mean scores; writes a sample grid, and out/best if it is better."""
        with torch.no_grad():
            x = self.shown.to(self.device)
            save_grid(self.out / f"samples-{trainer.iteration:06d}.png", x, trainer.best(x))
        sets = (self.data.mixed, self.data.healthy)
        mixed, healthy = (image_scores(trainer.best, part, self.device) for part in sets)
        row = {"aucp": aucp(mixed, healthy), "score_mixed": float(mixed.mean()), "score_healthy": float(healthy.mean())}
        mature = trainer.iteration >= trainer.config.choose_after * trainer.config.iterations
        if mature and row["aucp"] > trainer.highest_aucp:
            trainer.highest_aucp = row["aucp"]
            chosen = {"iteration": trainer.iteration, **row}
            save_model(self.out / "best", trainer.best, {**self.meta, "chosen": chosen, **self._calibrate(trainer)})
        return row

    def _calibrate(self, trainer: Trainer) -> dict:
        """Scores of the healthy units kept aside, and the threshold they give; both None where none were."""
        if self.data.held_out is None:
            return {"validation_scores": None, "threshold": None}
        scores = image_scores(trainer.best, self.data.held_out, self.device)
        by_unit = sorted(unit_scores(scores, self.data.held_out.units).values())
        return {"validation_scores": by_unit, "threshold": metrics.empirical_threshold(by_unit, trainer.config.fpr)}


# ---------------------------------------------------------------------------------------------------------------
# The loop

def train(config: TrainConfig, data: TrainingData, out: Path, device: torch.device, rollback: bool = False) -> None:
    """Train until config.iterations. Raises CheckpointError; FloatingPointError when a loss is not finite.

    rollback: the run diverged; go on from its last snapshot with other random numbers.
    """
    # ---- Set up
    trainer = Trainer(config, device)
    facts = data.facts()
    meta = {"kind": "healthygan", "config": dataclasses.asdict(config),
            "model": dataclasses.asdict(config.model()), "data": facts, "digest": data.digest()}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        chooser = None
        if distributed.is_main():
            chooser = Chooser(data, out, {"model": meta["model"], "image_settings": facts["image_settings"],
                                          "training": {"config": meta["config"], "counts": facts["counts"]}}, device)
        if run.resumed:
            distributed.print0(f"Resuming at iteration {trainer.iteration}")
        distributed.check_same_state(trainer.g)
        batch = config.batch * trainer.world
        streams = [batches(part, config.batch, 2 * run.seed + i, trainer.images_seen, device)
                   for i, part in enumerate((data.mixed, data.healthy))]
        distributed.print0(f"{len(data.healthy)} healthy images, {len(data.mixed)} unannotated, "
                           f"{len(data.held_out) if data.held_out else 0} healthy kept aside; 2 x {trainer.world} x "
                           f"{config.batch} images a step in {trainer.g.compute_dtype} on {device}")

        # ---- Train
        while trainer.iteration < config.iterations:
            run.log.add(batch, **trainer.step(*(next(stream) for stream in streams)))

            def due(every):
                return trainer.iteration % every == 0 or trainer.iteration == config.iterations

            if due(config.tick) or due(config.choose):
                extra = {}
                if due(config.choose):
                    extra = distributed.gather(chooser.measure(trainer) if chooser else None)[0]
                run.tick(trainer.iteration, device, **extra)
                if (problem := trainer.collapse()) and distributed.is_main():
                    warnings.warn(problem, stacklevel=1)
            run.end_step(trainer.iteration, snapshot=due(config.snapshot))


# ---------------------------------------------------------------------------------------------------------------
# Command

def read_data(config: TrainConfig, args) -> TrainingData:
    """What --data or --healthy and --mixed name. Raises DatasetError."""
    healthy, mixed = args.healthy, args.mixed
    if args.data is not None:
        healthy, mixed = ([folder] for folder in class_folders(args.data, "train", ("healthy", "mixed")))
    for path in (*healthy, *mixed):
        if not path.exists():
            raise DatasetError(f"{path}: no such file or folder")
    kind = "slices" if is_database(healthy[0]) else "images"
    if kind == "images" and (args.healthy_scans or args.mixed_scans):
        raise DatasetError("--healthy-scans and --mixed-scans choose scans of databases, found folders of images")
    if kind == "slices" and args.patients:
        raise DatasetError("--patients is for images; a database is split by patient already (prepare.py --patients)")
    settings = ImageSettings(kind, config.size, config.crop_top, config.white_16bit)
    data = load_training(healthy, mixed, settings, config.val_fraction, config.seed, args.patients,
                         args.healthy_scans, args.mixed_scans)
    for part in (data.healthy, data.mixed):
        for name, reason in part.unreadable.items():
            distributed.print0(f"skipped: {name}: {reason}")
    skipped = len(data.healthy.unreadable) + len(data.mixed.unreadable)
    if skipped:
        distributed.print0(f"{skipped} images could not be read and were skipped")
    return data


def main(argv: list[str] | None = None) -> int:
    def arguments(parser):
        parser.add_argument("--data", type=Path, help="folder with train/healthy and train/mixed (or healthy, mixed)")
        parser.add_argument("--healthy", type=Path, nargs="+", help="set B: folders of images, or databases")
        parser.add_argument("--mixed", type=Path, nargs="+", help="set A: folders of images, or databases")
        parser.add_argument("--healthy-scans", type=Path, help="of --healthy's databases take these scans: ids by line")
        parser.add_argument("--mixed-scans", type=Path, help="of --mixed's databases take these scans: ids by line")
        parser.add_argument("--patients", type=Path, help="CSV with image (healthy/NAME) and patient: one patient's "
                                                          "images are kept aside together")
        parser.add_argument("--out", type=Path, default=Path("runs/healthygan"),
                            help="run folder; an unfinished run goes on")
        parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and stop")

    config, args = parse(__doc__, PRESETS, arguments, argv)
    if args.dry_run:
        print(json.dumps(dataclasses.asdict(config), indent=2))
        return 0
    if (args.data is None) == (args.healthy is None) or (args.healthy is None) != (args.mixed is None):
        print("error: give --data FOLDER, or --healthy and --mixed", file=sys.stderr)
        return 2

    def work(device, rollback):
        memory.keep_freed()
        train(config, read_data(config, args), args.out, device, rollback)

    return run_command(work, args.device, args.out)


if __name__ == "__main__":
    sys.exit(main())
