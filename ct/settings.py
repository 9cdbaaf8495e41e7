"""The settings of the preprocessing. On their own, so that a command line is read before torch is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

UNKNOWN_SLICE_SPACING_MM = 5.0      # taken, and noted, where a folder of slices does not tell its own
LATER = {"bone_apart"}              # settings that files of before do not have


@dataclass(frozen=True)
class StandardiseSettings:
    """What fixes the canonical frame; kept in a bundle's model.json, so that training and inference agree.

    size            pixels of the frame, N
    head_fraction   diameter of a circle of the mean intracranial area in the head's middle slices, as a fraction of
                    the frame's side; the brain then is about 0.72 of it long and 0.59 wide
    hu_clip         HU are clipped to this before anything is interpolated, so that a scan with the full range and
                    one saturated by its source come out alike
    remove_outside  set what lies more than margin_mm outside the head (holders, casts, tubes) to hu_clip[0]
    margin_mm       in the millimetres of an adult's head, whatever the head's size
    bone_apart      a pixel of the frame that lies across the edge of a bone shows its soft tissue alone: a mean over
                    both hides thin blood under the skull. Where little is left of it, the pixel is bone, hu_clip[1]
    """

    size: int = 256
    head_fraction: float = 0.68
    hu_clip: tuple[float, float] = (-20.0, 180.0)
    remove_outside: bool = True
    margin_mm: float = 12.0
    bone_apart: bool = False


@dataclass(frozen=True)
class PreprocessSettings:
    """Everything that decides which pixels a network sees.

    slab_mm             thickness that thin slices are averaged to
    thin_mm             slices closer together than this are thin
    min_brain_fraction  slices with less brain than this part of the frame are left out
    max_below_vertex_mm slices lower than this are left out (the neck)
    """

    standardise: StandardiseSettings = field(default_factory=StandardiseSettings)
    slab_mm: float = 5.0
    thin_mm: float = 4.0
    min_brain_fraction: float = 0.02
    max_below_vertex_mm: float = 160.0

    def to_json(self) -> dict:
        """What was added later is left out where it is off, as in the files from before."""
        stored = dataclasses.asdict(self)
        for name in LATER:
            if not stored["standardise"][name]:
                del stored["standardise"][name]
        return stored

    def other_than(self, other: PreprocessSettings) -> str:
        """What of these differs from other ones, for people to read; '' where nothing does."""
        one, other = (dataclasses.asdict(each) for each in (self, other))
        one, other = (each.pop("standardise") | each for each in (one, other))
        return "; ".join(f"{key} {one[key]}, there {other[key]}" for key in one if one[key] != other[key])

    def flags(self) -> str:
        """Of prepare.py, which prepares slices like this with them."""
        low, high = self.standardise.hu_clip
        words = [f"--size {self.standardise.size} --hu-clip {low:g} {high:g}"]
        words += ["--bone-apart"] * self.standardise.bone_apart
        words += [f"--{name.replace('_', '-')} {getattr(self, name):g}"
                  for name in ("slab_mm", "min_brain_fraction", "max_below_vertex_mm")
                  if getattr(self, name) != getattr(PreprocessSettings, name)]
        return " ".join(words)

    @classmethod
    def from_json(cls, stored: dict) -> PreprocessSettings:
        """The inverse of to_json, after a trip through JSON or not; ValueError on missing or unknown keys."""
        outer = _checked(cls, stored, "preprocessing settings")
        inner = _checked(StandardiseSettings, outer.pop("standardise"), "standardisation settings")
        return cls(standardise=StandardiseSettings(**inner), **outer)


def _checked(cls: type, stored: dict, what: str) -> dict:
    if not isinstance(stored, dict):
        raise ValueError(f"{what}: expected an object of keys and values, found a {type(stored).__name__}")
    names = {f.name for f in dataclasses.fields(cls)}
    unknown, missing = sorted(set(stored) - names), sorted(names - LATER - set(stored))
    if unknown or missing:
        raise ValueError(f"{what}: unknown keys {unknown}, missing keys {missing}; made by another version: prepare "
                         "anew")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}
