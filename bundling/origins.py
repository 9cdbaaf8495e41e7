"""What runs and bundles have left for others: networks and readers that a training begins with or is beside.

A run of train_encoder.py or train_reader.py and a bundle made of it are one thing here: the same weights, known by one
digest, with the same account of what has taught them, by which it is told whose scans may judge them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import distributed
from common.weights import CheckpointError, digest, holds_bundle
from ct.settings import PreprocessSettings
from dataset import SliceDataset, facts_of, is_same
from detect.bundle import load_bundle
from detect.inversion import EncoderMethod
from detect.reader import Reader
from gan.encoding import FirstNetworks, has_taught_discriminator, method_of
from gan.lineage import lineage, not_held_out
from gan.reader_loop import Beside, First
from gan.run_folder import load_run, told_of
from gan.snapshots import Snapshot, snapshot_steps
from model import NETWORKS

WITH_READER = ("inpainting", "inversion")                  # methods that a reader can read beside
OF_ENCODER_RUNS = (*WITH_READER, "search")                 # made of a run of train_encoder.py; others bring a file


def is_bundle(folder: Path, flag: str) -> bool:
    """Whether what a flag names is a model bundle. Raises CheckpointError for a folder that is a training run, too."""
    bundle = holds_bundle(folder)
    if bundle and snapshot_steps(folder):
        raise CheckpointError(f"{flag} {folder}: holds a training run and a model bundle, whose weights may be others; "
                              "move model.json and the *.safetensors beside it to a folder of their own, and give one "
                              "of the two")
    return bundle


def open_encoder_run(folder: Path, flag: str = "--encoder", halved: bool = False) -> Snapshot:
    """A run of train_encoder.py, of one with --halved or of another. Raises CheckpointError."""
    snapshot = load_run(folder, flag, "encoder", "train_encoder.py")
    if snapshot.meta["config"].get("halved", False) != halved:
        raise CheckpointError(f"{flag} {folder}: " + (
            "its networks were not taught to draw slices at half their size; give a run of train_encoder.py --halved"
            if halved else "a run of train_encoder.py --halved, whose networks draw what surroundings call for beside "
                           "those of another run; give it as --surroundings"))
    return snapshot


def has_open_noise(meta: dict[str, Any]) -> bool:
    """Whether the training of an encoder, or one that it began with, took the strengths of the generator's noise into
    the maps (gan.inpainting.open_noise)."""
    return any(one["config"].get("hide") or one["config"].get("code_channels") for one in lineage(meta))


def open_surroundings(run: Path, beside: Snapshot) -> Snapshot:
    """What --surroundings names. Raises CheckpointError unless it learnt from the slices that those of an encoder's run
    are, with the same held out."""
    snapshot = open_encoder_run(run, "--surroundings", halved=True)
    for key, told in (("data", "another database"), ("held_out", "other held-out scans")):
        if told_of(snapshot.meta, key) != told_of(beside.meta, key):
            raise CheckpointError(f"--surroundings {run}: has {told} than {beside.path.parent}: scans that one "
                                  "holds out may have taught the other; give a run on the same --data")
    return snapshot


def open_beside(folder: Path, device: torch.device, precision: str, surroundings: Path | None = None) -> Beside:
    """What --encoder, and --surroundings, of train_reader.py name. Raises CheckpointError."""
    if is_bundle(folder, "--encoder"):
        refuse_surroundings(surroundings, folder)
        bundle = load_bundle(folder, device, precision)
        if bundle.settings.method not in WITH_READER:
            raise CheckpointError(f"--encoder {folder}: a model of method {bundle.settings.method}, beside which no "
                                  f"reader reads; give one of {' or '.join(WITH_READER)}, or a run of train_encoder.py")
        known = bundle.meta["provenance"] or {}
        return Beside(folder, bundle.reconstructor, digest_of(bundle.reconstructor), bundle.preprocessing,
                      {part: known.get(part) for part in ("data", "gan", "encoder")},
                      lambda dataset: learnt_by_networks(dataset, known))
    snapshot = open_encoder_run(folder)
    halves = surroundings and open_surroundings(surroundings, snapshot)
    method = method_of(snapshot, None, device, distributed.pick_precision(precision, device), halves)
    return Beside(folder, method, digest_of(method), PreprocessSettings.from_json(snapshot.meta["data"]["settings"]),
                  snapshot.known(),
                  lambda dataset: sorted({scan for one in (snapshot, halves) if one
                                          for scan in learnt_by_run(dataset, one.meta)}))


def refuse_surroundings(run: Path | None, model: Path) -> None:
    if run:
        raise ValueError(f"--surroundings {run}: --encoder {model} is a model, which has its own networks for that, or "
                         "does without; leave it out, or give runs of train_encoder.py for both")


def open_first_networks(folder: Path, halved: bool = False) -> FirstNetworks:
    """What --init of train_encoder.py names, of a model with --halved its networks for the surroundings. Raises
    CheckpointError."""
    if is_bundle(folder, "--init"):
        bundle = load_bundle(folder)
        method, prepared = bundle.reconstructor, taught_with(bundle.meta)
        if halved:
            method = getattr(method, "halves", None)
            if not method:
                raise CheckpointError(f"--init {folder}: a model without networks of half the size, that draw what "
                                      "surroundings call for; give one that has them, or leave --halved out")
        if not prepared:
            raise CheckpointError(f"--init {folder}: a model that holds no networks of train_encoder.py; leave --init "
                                  "out, or give one that does (checkpoint.py show), or a run of train_encoder.py")
        distributed.print0(f"note: what is measured on held-out scans says too much where {folder} was trained on "
                           "scans that --data holds out: a bundle does not say on which")
        weights = {name: network.state_dict() for name in NETWORKS if (network := getattr(method, name, None))}
        return FirstNetworks(folder, weights, method.encoder.config, prepared,
                             networks_known(bundle.meta["provenance"], "surroundings" if halved else "encoder"))
    snapshot = load_run(folder, "--init", "encoder", "train_encoder.py")
    weights = {name: tensors for name, tensors in snapshot.weights.items()
               if name != "discriminator" or has_taught_discriminator(snapshot)}
    return FirstNetworks(folder, weights, snapshot.model(),
                         PreprocessSettings.from_json(snapshot.meta["data"]["settings"]),
                         snapshot.known())


def open_first_reader(folder: Path) -> First:
    """What --init of train_reader.py names. Raises CheckpointError."""
    if is_bundle(folder, "--init"):
        bundle = load_bundle(folder)
        reader, known = getattr(bundle.reconstructor, "reader", None), (bundle.meta["provenance"] or {}).get("reader")
        if not reader or not known:
            raise CheckpointError(f"--init {folder}: a model that holds no reader; leave --init out, or give one that "
                                  "does (checkpoint.py show), or a run of train_reader.py")
        return First(folder, reader.state_dict(), list(reader.widths), digest_of(bundle.reconstructor), known)
    snapshot = load_run(folder, "--init", "reader", "train_reader.py")
    return First(folder, snapshot.weights["reader_ema"], snapshot.meta["model"]["widths"], snapshot.meta["beside"],
                 snapshot.known())


def open_reader(run: Path, beside: str) -> Snapshot:
    """What --reader names. ValueError unless it was taught beside the networks of this digest_of()."""
    snapshot = load_run(run, "--reader", "reader", "train_reader.py")
    if snapshot.meta["beside"] != beside:
        raise ValueError(f"--reader {run}: was taught beside other networks than those that it is to read beside, of "
                         "another run of train_encoder.py or another model; teach one beside these (train_reader.py)")
    return snapshot


def reader_of(snapshot: Snapshot, device: torch.device) -> Reader:
    """The averaged reader of a run of train_reader.py."""
    reader = Reader(snapshot.meta["model"]["widths"])
    snapshot.restore({"reader_ema": reader})
    return reader.eval().requires_grad_(False).to(device)


def digest_of(method: EncoderMethod) -> str:
    """SHA-256 of the networks beside which a reader reads, as bundles hold them: of runs and their bundles the same."""
    return digest(method.expecting(torch.float16))


# ------------------------------------------------------------------------------------------------------------
# What has taught them

def taught(step: int, meta: dict[str, Any]) -> dict[str, Any]:
    """How a run of train_reader.py or train_encoder.py was taught, at a step: JSON-able; no paths, no ids.

    data: all scans of that database taught it, but for the `held_out` of those that it holds out; init: the same of
    what the run began with; gan: of its GAN, if it had one.
    """
    gan = meta.get("gan")
    return {"images_seen": step, "config": meta["config"], "held_out": len(meta["held_out"]),
            "data": facts_of(meta["data"]), "init": as_taught(meta.get("init")),
            **({"gan": taught(gan["step"], gan)} if gan else {})}


def taught_with(meta: dict[str, Any]) -> PreprocessSettings | None:
    """How the slices were prepared that the networks of a bundle have learnt from, by its model.json; None for one
    without networks of train_encoder.py.

    New scans, which its own preprocessing is for, may be prepared otherwise (latent_stats.py --held-out, or calibrated
    anew). Bundles from before this was kept tell by range_hu what differs.
    """
    known = meta["provenance"] or {}
    if meta["settings"].get("method") not in OF_ENCODER_RUNS or not known.get("encoder"):
        return None
    if "taught_with" in known:
        return PreprocessSettings.from_json(known["taught_with"])
    settings = PreprocessSettings.from_json(meta["preprocessing"])
    hu_clip = tuple(meta["config"].get("range_hu", settings.standardise.hu_clip))
    return replace(settings, standardise=replace(settings.standardise, hu_clip=hu_clip))


def as_taught(known: dict[str, Any] | None) -> dict[str, Any] | None:
    """taught() of a run of which this is known (Snapshot.known); a bundle tells it so already. None for none."""
    return taught(known["step"], known) if known and "step" in known else known


def provenance(step: int, meta: dict[str, Any], surroundings: Snapshot | None = None) -> dict[str, Any]:
    """Where the weights of an encoder's run come from, at a step; gan: None for one without. JSON-able; no paths.

    taught_with: how the slices were prepared that they learnt from. surroundings: of the run with --halved beside it.
    """
    halves, gan = as_taught(surroundings and surroundings.known()), meta["gan"]
    return {"data": facts_of(meta["data"]), "taught_with": meta["data"]["settings"],
            "gan": run_facts(gan["step"], gan) | taught(gan["step"], gan) if gan else None,
            "encoder": run_facts(step, meta), "init": as_taught(meta.get("init")),
            **({"surroundings": {"data_digest": halves["data"]["digest"], **halves}} if halves else {})}


def run_facts(step: int, meta: dict[str, Any]) -> dict[str, Any]:
    return {"images_seen": step, "config": meta["config"], "data_digest": meta["data"]["digest"]}


def networks_known(known: dict[str, Any], which: str = "encoder") -> dict[str, Any]:
    """How the networks of a bundle were taught, by its provenance, as taught() tells it of a run; which: of it.

    Of its GAN bundles of earlier versions do not tell enough for that.
    """
    networks, whole = known.get(which) or {}, which == "encoder"
    data, gan = known["data"], known.get("gan") if whole else None
    held_out = data["counts"]["val"]["scans"]
    if not whole and "data" in networks:                       # those for the surroundings may be of another database
        data, held_out = networks["data"], networks["held_out"]
    return {"images_seen": networks.get("images_seen"), "config": networks.get("config"), "data": data,
            "held_out": held_out, "init": (known if whole else networks).get("init"),
            "gan": gan if gan and "data" in gan else None}


def learnt_by_networks(dataset: SliceDataset, known: dict[str, Any]) -> list[str]:
    """Scans that a database holds out and the networks of a bundle may have learnt from, by its provenance."""
    parts = [part for part in ("encoder", "surroundings") if part == "encoder" or known.get(part)]
    return sorted({scan for part in parts if known.get("data")
                   for scan in seen_of(dataset, networks_known(known, part))})


def learnt_by_run(dataset: SliceDataset, meta: dict[str, Any]) -> list[str]:
    """The same of a run, by its meta: all that it does not hold out itself, and what the runs that it began with have
    not held out of the same database, or may have learnt from by what a bundle told of them."""
    scans = dataset.held_out_ids()
    before = not_held_out(scans, {"data": dataset.facts(), "held_out": scans, "init": meta}, elsewhere=False)
    return sorted(set(scans) - set(meta["held_out"]) | set(before))


def learnt_by_reader(dataset: SliceDataset, known: dict[str, Any]) -> list[str]:
    """The same of its reader, or one that this began with; none without one."""
    runs = list(lineage(known["reader"])) if "reader" in known else []
    if "held_out" in known:            # the networks' database once more, what it holds out prepared as new scans are
        runs += [one | {"data": known["held_out"]} for one in runs
                 if one["data"]["digest"] == known["data"]["digest"] and is_same(one["data"], known["data"])]
    return sorted({scan for one in runs for scan in seen_of(dataset, one)})


def seen_of(dataset: SliceDataset, known: dict[str, Any] | None) -> list[str]:
    """Scans that a database holds out and a training may have learnt from, by what a bundle tells of it."""
    scans = dataset.held_out_ids()
    return not_held_out(scans, {"data": dataset.facts(), "held_out": scans, "init": known})
