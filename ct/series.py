"""Which DICOM images make up one scan.

A series UID does not make a scan: anonymisers give one to two patients, or a study UID to each file, scanners put two
phases or two kernels under it, archives add screenshots and compressed copies. So images are grouped by study, series,
frame of reference and patient, and what runs through the same stretch of the body twice is taken apart by the attribute
that tells the two apart (TRAITS). Patient data is compared as a hash and never shown. ct.dicom_header reads the
headers, ct.dicom the scans.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ct.dicom_header import Frame, Header, number_of
from ct.scan import Found, joined_uid

KIND = "dicom"
SAME_PLACE_MM = 0.05                                  # closer slices are duplicates
MIN_SLICES = 3
# What tells apart two stacks that run through the same stretch of the body: frame trait -> its name in messages.
TRAITS = {"kernel": "reconstruction kernel", "type": "image type", "voltage": "tube voltage",
          "thickness": "slice thickness", "spacing": "pixel spacing", "phase": "temporal position",
          "contrast": "contrast agent", "acquisition": "acquisition number"}
# Of these, what may be told otherwise of slices of one pass, if only by rounding: the others change the pictures.
BOOKKEEPING = {"type", "thickness", "spacing", "acquisition"}
UNTOLD = {"", "False"}                                # a trait that a slice says nothing of; of contrast, no agent


def scans_of(headers: Sequence[Header]) -> list[Found]:
    """The scans that the images of these headers make up, in any folders; what is none is one with an error.

    Where a folder holds several, each has a hash of its UID as its suffix: no id of one ever comes to mean another.
    """
    found = _find_series(headers)
    several = Counter(one.anchor for one in found)
    return [replace(one, suffix=hashlib.sha256(one.uid.encode()).hexdigest()[:8]) if several[one.anchor] > 1 else one
            for one in found]


@dataclass
class _Group:
    """Headers that may be one scan, what to say about them, and why they cannot be one."""

    headers: list[Header]
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def slices(self) -> list[Frame]:
        return [frame for header in self.headers for frame in header.frames if not frame.left_out]


def _find_series(headers: Sequence[Header]) -> list[Found]:
    """Scans by study; what of a study is no axial CT is a note on its scans, or a row of its own if there are none."""
    found, single = [], {}
    for members, notes in _studies(headers):
        groups = _join_small([group for series in _by_series(members) for group in _by_identity(series)])
        reasons = [group.headers[0].left_out or f"of fewer than {MIN_SLICES} slices" for group in groups
                   if len(group.slices) < MIN_SLICES and not group.error]
        scans = [group for group in groups if len(group.slices) >= MIN_SLICES or group.error]
        if not scans:
            one = sum(len(group.slices) for group in groups) == 1
            for group in groups:
                if one and group.slices:
                    single.setdefault(group.slices[0].path.parent, []).append(group)
                else:
                    found.append(_found(group))
            continue
        notes += (f"other series of the study left out: {describe_left_out(reasons)}",) if reasons else ()
        for group in scans:
            group.notes += notes
            found += [_found(group)] if group.error else _take_apart(group)
    return found + [_found(group) for groups in single.values() for group in _as_one_row(groups)]


def _studies(headers: Sequence[Header]) -> list[tuple[list[Header], tuple[str, ...]]]:
    """The headers of each study, by folder where its UID is missing, and what to say of it.

    Where all studies that a series lies in have one or two images, the UIDs were replaced file by file, and the series
    counts in place of the study: but only with its frame of reference and patient, since careless anonymisers give one
    series UID to several patients.
    """
    def series_of(header: Header) -> tuple[str, str, str]:
        return header.series_uid, header.frame_of_reference, header.patient

    studies: dict[str, list[Header]] = {}
    within: dict[tuple[str, str, str], set[str]] = {}
    for header in headers:
        study = header.study_uid or str(header.path.parent)
        studies.setdefault(study, []).append(header)
        within.setdefault(series_of(header), set()).add(study)
    small = {study for study, members in studies.items() if len(_Group(members).slices) < MIN_SLICES}
    spread = {series for series, own in within.items() if all(series[:2]) and len(own) > 1 and own <= small}
    joined: dict[str | tuple[str, str, str], list[Header]] = {}
    for study, members in studies.items():
        for header in members:
            series = series_of(header)
            joined.setdefault(series if series in spread else study, []).append(header)
    return [(members, (f"{len(within[key])} studies of one or two images that share series, frame of reference and "
                       "patient, taken as one",) if key in spread else ()) for key, members in joined.items()]


def _as_one_row(groups: list[_Group]) -> list[_Group]:
    """Studies of one image in one folder as one that cannot be a scan, where they could be slices of one."""
    if len(groups) < MIN_SLICES:
        return groups
    headers = [header for group in groups for header in group.headers]
    return [_Group(headers, error=f"{headers[0].path.name} and {len(headers) - 1} more: {len(groups)} studies of one "
                   "image in this folder, as where UIDs were replaced file by file; export the series again with one "
                   "StudyInstanceUID and one SeriesInstanceUID")]


def _by_series(headers: list[Header]) -> list[list[Header]]:
    """The headers of a study by series UID, over folders but for copies; by folder where it is missing."""
    series: dict[str, dict[Path, list[Header]]] = {}
    for header in headers:
        series.setdefault(header.series_uid, {}).setdefault(header.path.parent, []).append(header)
    return [group for uid, folders in series.items()
            for group in (_without_copied(list(folders.values())) if uid else folders.values())]


def _without_copied(folders: list[list[Header]]) -> list[list[Header]]:
    """The folders of a series joined, but for those of which most is in another: they are copies.

    A few images in two folders make none: taken apart, each would be a part of the head that passes for a scan.
    """
    joined: list[list[Header]] = []
    for folder in sorted(folders, key=len, reverse=True):
        images = {header.instance_uid for header in folder}
        for group in joined:
            if len(images & {header.instance_uid for header in group}) <= len(images) / 2:
                group += folder
                break
        else:
            joined.append(list(folder))
    return joined


def _by_identity(headers: list[Header]) -> list[_Group]:
    """A series by frame of reference and patient, the largest group first and with the images of no use.

    Where an image says only one of the two, or neither, it goes with the group that it fits if there is one.
    """
    groups: dict[tuple[str, str], list[Header]] = {}
    for header in headers:
        if header.left_out is None:
            groups.setdefault((header.frame_of_reference, header.patient), []).append(header)
    for key in [key for key in groups if "" in key]:
        fits = [other for other in groups if other != key and all(a in ("", b) for a, b in zip(key, other))]
        if len(fits) == 1:
            groups[fits[0]] += groups.pop(key)
    useless = [header for header in headers if header.left_out is not None]
    ordered = sorted(groups.values(), key=lambda group: (-len(group), min(header.instance_uid for header in group)))
    if not ordered:
        return [_Group(useless)]
    if len(ordered) > 1 and len(ordered) > len(headers) / MIN_SLICES:
        return [_Group(headers, error=f"{headers[0].path.name} and {len(headers) - 1} more: one series whose images "
                       f"belong to {len(ordered)} frames of reference (FrameOfReferenceUID) or patients, so that "
                       "their places cannot be compared; export the series again")]
    note = (f"one of {len(ordered)} scans under one series UID, told apart by frame of reference and patient",)
    ordered[0] += useless
    return [_Group(group, note if len(ordered) > 1 else ()) for group in ordered]


def _join_small(groups: list[_Group]) -> list[_Group]:
    """Series of one or two images, which some archives make of a scan, joined where all else is the same."""
    joined, small = [], {}
    for group in groups:
        if group.error or not 0 < len(group.slices) < MIN_SLICES:
            joined.append(group)
            continue
        header, frame = group.headers[0], group.slices[0]
        key = (header.frame_of_reference, header.patient, frame.size, frame.spacing,
               tuple(frame.orientation.round(2).ravel().tolist()), frame.traits["kernel"])
        small.setdefault(key, []).append(group)
    for alike in small.values():
        headers = [header for group in alike for header in group.headers]
        count = len({header.series_uid for header in headers})
        joined.append(_Group(headers, (f"{count} series of one or two images taken as one scan",) if count > 1 else ()))
    rest = [group for group in joined if not group.error and 0 < len(group.slices) < MIN_SLICES]
    if len(rest) < MIN_SLICES or len(rest) < len(groups) / 2:
        return joined
    headers = [header for group in rest for header in group.headers]
    error = (f"{headers[0].path.name} and {len(headers) - 1} more: series of one or two images, which differ in frame "
             "of reference, size, pixel spacing, orientation or kernel, so that they make up no scan; export the "
             "series as one")
    return [group for group in joined if group not in rest] + [_Group(headers, error=error)]


def _take_apart(group: _Group) -> list[Found]:
    """The scans of a group: more than one where it runs through the same stretch of the body several times."""
    parts, left = _separate(group.slices)
    notes = group.notes + ((f"left out: {describe_left_out(left)}",) if left else ())
    if len(parts) == 1 and not left:
        return [_found(group)]
    found, known = [], set()
    for k, (frames, trait) in enumerate(parts):
        kept = {(frame.path, frame.index) for frame in frames}
        headers = [header for header in group.headers if any((f.path, f.index) in kept for f in header.frames)
                   or (k == 0 and header.left_out is not None)]                         # to be noted when it is read
        why = (f"one of {len(parts)} stacks in this series, told apart by {trait}",) if len(parts) > 1 else ()
        found.append(_found(_Group(headers, (*notes, *why)), frames, alike=_signature(frames) in known))
        known.add(_signature(frames))
    return found


def _signature(frames: Sequence[Frame]) -> tuple[str, ...]:
    """What tells a stack from others of its series, whichever there are: the same when more of its slices arrive."""
    return tuple(min((frame.traits[trait] for frame in frames), default="") for trait in TRAITS)


def _found(group: _Group, frames: Sequence[Frame] | None = None, alike: bool = False) -> Found:
    """frames: those that belong to the scan, where not all of the files' do. alike: another stack of its series has the
    same traits, so that its images' own UIDs must tell it from that.
    """
    paths = tuple(header.path for header in group.headers)
    options: dict = {}
    if frames is not None and any(len(header.frames) > 1 for header in group.headers):
        options["frames"] = tuple(sorted((paths.index(frame.path), frame.index) for frame in frames))
    headers = group.headers
    used = group.slices if frames is None else frames
    uid = joined_uid(min(header.series_uid for header in headers), max(header.frame_of_reference for header in headers),
                     *_signature(used), *([min(header.instance_uid for header in headers)] if alike else []))
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    whose = tuple(sorted({key for header in headers for key in header.whose}))
    return Found(KIND, paths, folder, "", uid, options, whose=whose, error=group.error, notes=group.notes)


# ---- stacks that overlap

def _separate(frames: list[Frame]) -> tuple[list[tuple[list[Frame], str]], list[str]]:
    """Stacks of slices, each with what tells it from the others, and the reasons of those that are left out."""
    frames, copies = _without_copies(frames)
    left = ["copy of another slice (derived or lossy compressed)"] * len(copies)
    once = _shown_once(frames)
    for trait, name in TRAITS.items():
        whole = once and (trait in BOOKKEEPING or _told_alike(frames, trait))
        stacks = [frames] if whole else _stacks(frames, trait)
        large = [stack for stack in stacks if len(stack) >= MIN_SLICES]
        if len(stacks) == 1 or not large or (trait == "spacing" and len(large) < len(stacks)):
            continue
        left += [f"of another {name}" for stack in stacks if len(stack) < MIN_SLICES for _ in stack]
        parts = []
        for stack in large:
            inner, more = _separate(stack)
            parts += [(part, f"{name}, {also}" if also else name) for part, also in inner]
            left += more
        return parts, left
    runs = [frames] if once else _runs(frames)
    return [(run, "image number" if len(runs) > 1 else "") for run in runs], left


def _shown_once(frames: list[Frame]) -> bool:
    """Whether the slices lie one above the other, without overlap and gaps: one pass, whatever is told of them."""
    thickness, steps = told_thickness_mm(frames), np.diff(_heights(frames))
    return bool(len(steps) and thickness > 0 and steps.min() > 0.9 * thickness and np.median(steps) < 1.1 * thickness)


def told_thickness_mm(frames: list[Frame]) -> float:
    """The median of what the slices tell; 0 where none tells a number."""
    told = [number_of(frame.traits["thickness"]) for frame in frames]
    return float(np.median([mm for mm in told if np.isfinite(mm)] or [0]))


def _heights(frames: list[Frame]) -> np.ndarray:
    return np.sort([frame.height for frame in frames])


def _without_copies(frames: list[Frame]) -> tuple[list[Frame], list[Frame]]:
    """Slices, and those marked as derived or compressed that lie where one lies that is not."""
    places = _heights([frame for frame in frames if not frame.copy])
    copies = [frame for frame in frames if frame.copy and len(places)
              and np.abs(places - frame.height).min() <= SAME_PLACE_MM]
    return [frame for frame in frames if not any(frame is copy for copy in copies)], copies


def _stacks(frames: list[Frame], trait: str) -> list[list[Frame]]:
    """Frames by the trait's value; values that lie above each other, as of one block after another, are one stack."""
    values: dict[str, list[Frame]] = {}
    for frame in frames:
        values.setdefault(frame.traits[trait], []).append(frame)
    stacks: list[list[list[Frame]]] = []
    for value in sorted(values, key=lambda text: (number_of(text), text)):
        block = values[value]
        for stack in stacks:
            if not any(_overlap(block, other) for other in stack):
                stack.append(block)
                break
        else:
            stacks.append([block])
    return [[frame for block in stack for frame in block] for stack in stacks]


def _told_alike(frames: list[Frame], trait: str) -> bool:
    """Whether the slices that tell the trait are one stack: what was lost of the others' headers sets none apart."""
    return len(_stacks([frame for frame in frames if frame.traits[trait] not in UNTOLD], trait)) <= 1


def _overlap(first: list[Frame], second: list[Frame]) -> bool:
    """Whether two blocks share more than half of the shorter one's stretch of the body."""
    (low1, high1), (low2, high2) = ((min(h), max(h)) for h in ([f.height for f in block] for block in (first, second)))
    shorter = min(high1 - low1, high2 - low2)
    return min(high1, high2) - max(low1, low2) > 0.5 * shorter - SAME_PLACE_MM


def _runs(frames: list[Frame]) -> list[list[Frame]]:
    """Frames apart where their numbers run through the same stretch again: two to four times, of 5 slices or more.

    They may go on where the first run ends, upwards again or back downwards, or begin anew. Anything else is one run:
    numbers in no order above all, and those of slices that are no closer together than within a run, as where files
    were numbered by their names (1, 10, 11, 2).
    """
    numbers = [frame.number for frame in frames]
    if None in numbers:
        return [frames]
    if len(set(numbers)) < len(numbers):
        return _if_passes(_of_equal_numbers(frames), frames)
    ordered = sorted(frames, key=lambda frame: frame.number)
    steps = np.diff([frame.height for frame in ordered])
    breaks = np.flatnonzero(np.sign(steps) != np.sign(np.median(steps))) + 1 if len(steps) else []
    edges = [0, *breaks, len(ordered)]
    runs = _if_passes([ordered[low:high] for low, high in zip(edges, edges[1:])], frames)
    return runs if len(runs) > 1 else _if_passes(_up_and_down(ordered), frames)


def _if_passes(runs: list[list[Frame]], frames: list[Frame]) -> list[list[Frame]]:
    """The runs where each, by its numbers, is a pass through the same stretch; otherwise all frames as one."""
    if not (2 <= len(runs) <= 4 and min(map(len, runs)) >= 5 and all(map(_direction, runs))):
        return [frames]
    mean_mm = np.ptp(_heights(frames)) / (len(frames) - 1)
    apart = mean_mm < 0.75 * min(np.median(np.diff(_heights(run))) for run in runs)
    return runs if apart and all(_overlap(runs[0], run) for run in runs[1:]) else [frames]


def _direction(run: list[Frame]) -> int:
    """1 where the frames lie one above the other in their order, -1 downwards, 0 otherwise."""
    signs = {int(sign) for sign in np.sign(np.diff([frame.height for frame in run]))}
    return signs.pop() if len(signs) == 1 else 0


def _of_equal_numbers(frames: list[Frame]) -> list[list[Frame]]:
    """The lowest frame of each number, the next of each, and so on; none where a number has fewer frames, or two at one
    place, which are duplicates.
    """
    levels: dict[int, list[Frame]] = {}
    for frame in sorted(frames, key=lambda frame: (frame.number, frame.height)):
        levels.setdefault(frame.number, []).append(frame)
    even = len(set(map(len, levels.values()))) == 1
    if not even or min(np.diff(_heights(level)).min() for level in levels.values()) <= SAME_PLACE_MM:
        return []
    return [list(run) for run in zip(*levels.values())]


def _up_and_down(ordered: list[Frame]) -> list[list[Frame]]:
    """Frames, by number, cut where they turn round. The one at the turn goes where the steps stay even with it, or to
    the fewer where they do on both sides.
    """
    heights = np.array([frame.height for frame in ordered])
    turn = int(np.argmax(heights * np.sign(heights[1] - heights[0]))) if len(heights) > 1 else 0
    cuts = [[ordered[:cut], ordered[cut:]] for cut in (turn + 1, turn)]
    cuts = [runs for runs in cuts if min(map(len, runs)) > 2 and _direction(runs[0]) == -_direction(runs[1])]
    uneven = [sum(np.ptp(np.diff(_heights(run))) for run in runs) for runs in cuts]
    cuts = [runs for runs, mm in zip(cuts, uneven) if mm - min(uneven) <= SAME_PLACE_MM]
    return min(cuts, key=lambda runs: max(map(len, runs)), default=[])


def describe_left_out(reasons: Sequence[str]) -> str:
    """Counts by reason: '2 localiser, 1 derived'."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())
