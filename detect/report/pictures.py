"""The pictures of a page, within its limit: key slices of every scan, all slices of as many as fit."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ct.picture import pack_overlay
from detect.report.tables import Entry, HealthyScores
from detect.scores import choose_key_slices

FULL, REDUCED = (360, 60), (256, 50)         # a panel's longer side in pixels, JPEG quality


def set_key(entry: Entry, calibration: HealthyScores) -> None:
    """Set key: the slices with a picture that rise highest above healthy ones at their level, or score highest.

    Not marked ones first, as DICOM's key slices are: slices.csv does not tell which are, and the page shows this band.
    Of scans that are not compared, where it does not, by the same rule: healthy slices score more at the skull's base,
    however scores are scaled.
    """
    pictured = sorted((s for s in entry.slices if s.number in entry.overlays),
                      key=lambda s: calibration.above(s.below_vertex_mm) - s.score)
    entry.key = [pictured[place] for place in choose_key_slices([s.below_vertex_mm for s in pictured])]


def _pack_scan(entry: Entry, numbers: list[int], size: tuple[int, int], pool: ThreadPoolExecutor) -> list:
    """Pictures of these slices, inferior to superior; one that cannot be read is noted and left out."""
    def attempt(number: int):
        try:
            return pack_overlay(entry.overlays[number], *size)
        except OSError as error:
            return error

    pictures = []
    for number, result in zip(sorted(numbers), pool.map(attempt, sorted(numbers))):
        if isinstance(result, OSError):
            entry.notes.append(f"overlay/{entry.overlays.pop(number).name} cannot be read as a picture")
        else:
            pictures.append((number, result[0]))
            entry.aspect = result[1]
    return pictures


def add_pictures(entries: list[Entry], calibration: HealthyScores, room: int) -> None:
    """Give scans their pictures, highest score first, within `room` bytes.

    Half the room goes to all slices of the first scans, the rest to key slices of every further one; what is then left
    makes more scans complete.
    """
    def size(pictures) -> int:
        return sum(len(data) + 16 for _, data in pictures)

    def fill(entries: list[Entry], of: Callable, packing: tuple[int, int], room: int) -> int:
        """Stops at the first scan that does not fit; returns the room that is left."""
        for entry in entries:
            pictures = _pack_scan(entry, of(entry), packing, pool)
            left = room + size(entry.pictures) - size(pictures)
            if left < 0:
                break
            entry.pictures, room = pictures, left
        return room

    for entry in entries:
        set_key(entry, calibration)
    with ThreadPoolExecutor() as pool:
        room = room - room // 2 + fill(entries, lambda e: [*e.overlays], FULL, room // 2)
        lacking = [e for e in entries if not e.complete]
        room = fill(lacking, lambda e: [s.number for s in e.key if s.number in e.overlays], REDUCED, room)
        fill(lacking, lambda e: [*e.overlays], FULL, room)
    for entry in entries:
        entry.key = [s for s in entry.key if s.number in entry.overlays]
