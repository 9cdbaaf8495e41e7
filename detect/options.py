"""Options that command lines show. On their own, so that a command line is read before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass

from config import check_range, option

PERCEPTUAL = ("discriminator", "lpips", "pixels")     # the kinds of detect/perceptual.py
KNEE = 0.01
OF_FILE = "_sha256"                                    # ends the name of what settings say of a file's content


@dataclass(frozen=True)
class CodesConfig:
    """How the statistics of codes are made."""

    components: int = option(16, "principal components kept per position and layer; the rest share one variance")
    passes: int = option(5, "codes of every slice: one as it is, the others augmented")
    positions: int = option(32, "positions, from the vertex down; those that no healthy slice reaches are left out")
    spacing_mm: float = option(5.0, "from position to position, mm")
    neighbour_mm: float = option(7.5, "a position uses the slices within this, mm")

    def __post_init__(self):
        check_range(self, ("components", "passes", "positions"), 1)
        check_range(self, ("spacing_mm", "neighbour_mm"), 0, above=True)


@dataclass(frozen=True)
class StatsConfig(CodesConfig):
    """How the statistics of codes are made, and how the held-out scans are projected."""

    calibrate: str = option("val", "project the held-out scans, or leave the bundle without healthy scores",
                            ("val", "none"))
    seed: int = option(0, "seed of the augmentation")
    batch: int = option(32, "slices in the networks at a time: memory, not results; --set batch=N goes before it")
    precision: str = option("auto", "bf16 where the device is good at it", ("auto", "bf16", "fp32"))

    def __post_init__(self):
        super().__post_init__()
        check_range(self, ("batch",), 1)
