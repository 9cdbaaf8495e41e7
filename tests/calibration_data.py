"""What the tests of calibrations need: a small database, a run on it, the command."""

import dataclasses

import numpy as np
import torch

import latent_stats
from ct.frame import PreprocessSettings
from ct.standardise import StandardiseSettings
from dataset import ScanRecord, SliceDataset, SliceWriter
from detect.autoencoder import Autoencoder, AutoencoderFit
from gan.snapshots import save_snapshot
from model import Discriminator, Encoder, Generator, ModelConfig

TINY = ModelConfig(size=32, style_dim=16, n_mlp=2, channel_max=16)
PREPROCESSING = PreprocessSettings(StandardiseSettings(size=32))
SETTINGS = PREPROCESSING.to_json()
PLAIN = ("filter=median", "scale=both", "pool=area", "surprise_above=0.5")      # few pixels: no peaks, no bands


def write_slices(path, held_out=(5,), patients=range(6), seed=0):
    """Six scans of five slices, 0 to 20 mm below the vertex; those numbered in held_out are the val split."""
    rng = np.random.default_rng(seed)
    brain = np.zeros((5, 32, 32), bool)
    brain[:, 8:24, 8:24] = True
    with SliceWriter(path, SETTINGS) as writer:
        for s in range(6):
            hu = np.where(brain, 30 + 5 * rng.standard_normal(brain.shape), -20).astype(np.float32)
            record = ScanRecord.encode(f"head{s}", hu, brain, np.arange(20.0, -1, -5))
            writer.add(record, "val" if s in held_out else "train", f"patient{patients[s]}")
    return path


def write_run(folder, manifest, kind="encoder"):
    torch.manual_seed(0)
    networks = {"generator": Generator(TINY), "discriminator": Discriminator(TINY), "encoder": Encoder(TINY)}
    data = {key: manifest[key] for key in ("digest", "counts", "settings")}
    shared = {"model": dataclasses.asdict(TINY), "data": data,
              "held_out": [scan["scan_id"] for scan in manifest["scans"] if scan["split"] == "val"]}
    gan = {"kind": "gan", "step": 7, "config": {"kimg": 0.007}, **shared}
    meta = {"kind": kind, "config": {"epochs": 2}, "gan": gan, **shared}
    save_snapshot(folder, 50, networks, {}, meta)
    return folder


def write_inputs(folder):
    """A database and a run of train_encoder.py on it."""
    data = write_slices(folder / "healthy.lmdb")
    return data, write_run(folder / "encoder", SliceDataset(data).manifest)


def command(data, run, out, *flags):
    return latent_stats.main(["--data", str(data), "--encoder", str(run), "--out", str(out), "--preset", "smoke32",
                              "--device", "cpu", "--precision", "fp32", *flags])


def autoencoder_file(data, folder):
    autoencoder = Autoencoder(AutoencoderFit(width=8, depth=1, noise_size=4, steps=2, batch=4))
    autoencoder.fit(SliceDataset(data, "train"))
    autoencoder.save(folder / "autoencoder.safetensors")
    return folder / "autoencoder.safetensors"
