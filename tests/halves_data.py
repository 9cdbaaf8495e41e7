"""What the tests of networks of half the size need: their shape, and the commands for their runs and bundles."""

from __future__ import annotations

from pathlib import Path

import latent_stats
import train_encoder
import train_reader

SHAPE = dict(style_dim=16, n_mlp=2, channel_max=16, encoder_noise=True, noise_channels=True, encoder_masks=True,
             encoder_width=0.5, encoder_code=8)
FLAGS = ["--preset", "smoke32", "--hide", "0.9", "--halved", "--batch", "4", "--encoder-code", "8", "--epochs", "0.5",
         "--lr-generator", "1e-3", "--precision", "fp32", "--device", "cpu"]


def halves(slices: Path, out: Path, *flags) -> int:
    """Exit code of train_encoder.py --halved: networks that draw what surroundings call for."""
    return train_encoder.main(["--data", str(slices), "--out", str(out), *FLAGS, *map(str, flags)])


def closest(slices: Path, out: Path, *flags) -> int:
    """The same of those beside them that draw closest normals."""
    return halves(slices, out, "--hide", 0.2, "--closest", "--adversarial", 0, *flags)


def reader(slices: Path, encoder: Path, out: Path, *flags) -> int:
    return train_reader.main([*map(str, ("--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32",
                                         "--epochs", 0.25, "--batch", 4, "--device", "cpu", *flags))])


def stats(slices: Path, encoder: Path, out: Path, *flags) -> int:
    return latent_stats.main([*map(str, ("--data", slices, "--encoder", encoder, "--out", out, "--preset", "smoke32",
                                         "--precision", "fp32", "--device", "cpu", *flags))])
