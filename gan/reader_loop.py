"""The loop of the reader's training: what it learns from, beside networks of a run or a model bundle."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import ConcatDataset

import distributed
from common.weights import CheckpointError, digest
from common.wording import some
from ct.settings import PreprocessSettings
from dataset import DatasetError, SliceDataset, facts_of, is_same
from detect.inversion import EncoderMethod
from gan.batches import slice_batches
from gan.encoder_loop import go_through
from gan.lineage import tell_of_seen
from gan.reading import ReadingTrainer
from gan.run import Run
from gan.settings import EveryNth, ReaderConfig


@dataclass(frozen=True)
class Beside:
    """What a reader is taught beside: the networks of a run of train_encoder.py, or of a model bundle.

    folder    that --encoder names
    method    as which they are used
    digest    of their weights (bundling.origins.digest_of)
    prepared  how the slices that they are for are prepared
    known     where they come from: what a reader's run keeps of that, JSON
    seen      of a database, the scans that it holds out and they may have been trained on
    """

    folder: Path
    method: EncoderMethod
    digest: str
    prepared: PreprocessSettings
    known: dict[str, Any]
    seen: Callable[[SliceDataset], list[str]]

    def range_hu(self, hu_clip: tuple[float, float]) -> tuple[float, float]:
        """The HU that a reader is shown of slices cut to hu_clip: below, what the networks are; above, all."""
        return getattr(self.method, "range_hu", hu_clip)[0], hu_clip[1]


@dataclass(frozen=True)
class First:
    """A reader whose weights are the first ones, of a run of train_reader.py or of a model bundle.

    folder    that --init names
    weights   of the averaged reader; widths: its channels
    beside    digest of the networks that it was taught beside
    known     how it was taught: what a run that begins with it keeps of that, JSON (gan.lineage)
    """

    folder: Path
    weights: dict[str, torch.Tensor]
    widths: list[int]
    beside: str
    known: dict[str, Any]


def train(config: ReaderConfig, data: Path, beside: Beside, out: Path, device: torch.device,
          first: First | None = None, fold: EveryNth | None = None, rollback: bool = False) -> None:
    """Train a reader on what networks make of a database. Raises as encoder_loop.train() does.

    fold: of the scans that the database holds out only those of the fold are held out; the reader learns from the
    others, too, in half of what it sees.
    """
    # ---- Set up
    dataset = SliceDataset(data, "all")
    check_database(dataset, beside, config)
    slices, held_out, told = parts_of(dataset, fold)
    known = dataset.known()
    if first:
        check_first(first, beside, config)
        tell_of_seen(held_out.scan_ids, "--init", first.folder,
                     {"data": known, "held_out": held_out.scan_ids, "init": first.known})
    trainer = ReadingTrainer(config, beside.method, beside.range_hu(dataset.prepared.standardise.hu_clip), device)
    if first:
        trainer.start_from(first.weights)
    meta = {"kind": "reader", "config": dataclasses.asdict(config), "model": {"widths": list(config.widths())},
            "data": known, "held_out": held_out.scan_ids, "beside": beside.digest, "encoder": beside.known,
            "init": first.known if first else None,
            "began_with": digest({"reader": first.weights}) if first else None}
    with Run(out, meta, trainer, config.seed, rollback) as run:
        distributed.check_same_state(trainer.reader)
        batches = slice_batches(slices, config.batch, run.seed, config.workers, trainer.images_seen,
                                prepare=trainer.prepare, device=device)
        distributed.print0(f"{told}, {len(held_out)} held out; {trainer.reader.compute_dtype} on {device}")
        go_through(config, run, trainer, trainer.learn, batches, held_out, len(slices), out, device)


def check_database(dataset: SliceDataset, beside: Beside, config: ReaderConfig) -> None:
    """DatasetError or ValueError unless a reader can be taught by it, beside these networks."""
    found, expected = dataset.prepared, beside.prepared
    if found.standardise.hu_clip == getattr(beside.method, "range_hu", None):         # as what taught the networks was
        expected = replace(expected, standardise=replace(expected.standardise, hu_clip=found.standardise.hu_clip))
    if other := found.other_than(expected):
        raise DatasetError(f"--data {dataset.path}: its slices were prepared in another way than those of --encoder "
                           f"{beside.folder} ({other}); prepare them with the same flags, for a model with prepare.py "
                           "--like MODEL")
    if dataset.size % 2**config.depth:
        raise ValueError(f"--depth {config.depth}: slices of {dataset.size} x {dataset.size} pixels cannot be halved "
                         "so often; give a smaller one")
    if seen := beside.seen(dataset):
        mend = "hold out scans that it has not seen (prepare.py --split)"
        its, own = facts_of(beside.known.get("data") or {}), dataset.facts()
        if "step" in beside.known and not (its["digest"] == own["digest"] and is_same(its, own)):
            mend += ("; a run does not tell of another database's scans that they are new to it: if these are, make a "
                     "model of it (latent_stats.py), and give that")
        raise DatasetError(f"--data {dataset.path}: holds out {some(seen, 3)}, "
                           f"which --encoder {beside.folder} may have been trained on: {mend}")


def check_first(first: First, beside: Beside, config: ReaderConfig) -> None:
    """CheckpointError unless the first weights fit. Beside other networks than theirs they do, and are told of."""
    if first.widths != list(config.widths()):
        raise CheckpointError(f"--init {first.folder}: a reader of channels {first.widths}, this one is to have "
                              f"{list(config.widths())}; give --width {first.widths[0]} --depth {len(first.widths)} as "
                              "there, or leave --init out")
    if first.beside != beside.digest:
        distributed.print0(f"note: the reader of --init {first.folder} was taught beside other networks than those of "
                           f"--encoder {beside.folder}: what these expect of a slice is new to it")


def parts_of(dataset: SliceDataset, fold: EveryNth | None) -> tuple[ConcatDataset, SliceDataset, str]:
    """What a reader learns from, what is held out, and the first in words. DatasetError where nothing is left to learn
    from.

    dataset: all that a database holds.
    """
    held_out, others = in_folds(dataset, fold)
    if not dataset.manifest["counts"]["train"]["slices"]:
        if not others:
            raise DatasetError(f"--data {dataset.path}: holds all of its scans out, which leaves none to learn from: "
                               "give --fold 1:3, 2:3 and 3:3, three readers that each learn from two thirds of them "
                               "and hold the others out, or prepare it with a smaller --val-fraction")
        return ConcatDataset([others]), held_out, others.told()
    train = SliceDataset(dataset.path, "train", check=False)
    told = train.told()
    if not others:
        return ConcatDataset([train]), held_out, told
    told += f" and again and again the {len(others)} of {len(others.scan_ids)} others"
    return ConcatDataset([train, *[others] * max(1, round(len(train) / len(others)))]), held_out, told


def in_folds(dataset: SliceDataset, fold: EveryNth | None) -> tuple[SliceDataset, SliceDataset | None]:
    """What a database holds out, with a fold that fold's part of it alone, and the other scans that it holds out."""
    held_out = SliceDataset(dataset.path, "val", check=False)
    if not fold:
        return held_out, None
    here = fold.of(held_out.scan_ids, held_out.patients)
    if not 0 < len(here) < len(held_out.scan_ids):
        raise DatasetError(f"--fold {fold}: {dataset.path} holds scans of {len(set(held_out.patients))} patients out, "
                           "too few")
    return tuple(SliceDataset(dataset.path, "val", check=False, scans=part)
                 for part in (here, set(held_out.scan_ids) - set(here)))
