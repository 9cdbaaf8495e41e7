"""Round trips that must hold for any input, searched by hypothesis: windows, slabs, frames, NIfTI and DICOM."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ct import dicom, nifti
from ct.read import find_scans
from ct.scan import Scan, ScanSource
from ct.slab import to_slabs
from ct.standardise import Frame, from_frame, to_frame
from ct.window import WINDOWS_HU, decode, encode
from ct.write import write_nifti
from tests.helpers import shuffled_head
from tests.writers import write_dicom_series, write_nifti_scan

few = settings(max_examples=20, deadline=None, derandomize=True)         # each of them writes files
many = settings(max_examples=50, deadline=None, derandomize=True)
# Between slices and in the plane, mm: what a head CT may have (ct/limits.py)
SPACINGS = st.tuples(st.floats(2, 8), st.floats(0.3, 2), st.floats(0.3, 2))
AXES = ["".join(axes) for pairs in itertools.permutations(("LR", "PA", "SI")) for axes in itertools.product(*pairs)]
hus = arrays(np.float32, (3, 4), elements=st.floats(-1100, 3100, width=32))


# ---- windows

@many
@given(hus)
def test_hu_come_back_from_the_windows_within_their_range(hu):
    np.testing.assert_allclose(decode(encode(hu)), np.clip(hu, -20, 180), atol=1e-3)
    assert torch.equal(encode(torch.from_numpy(hu)), torch.from_numpy(encode(hu)))


@many
@given(hus)
def test_8_bits_cost_half_a_step_of_the_finest_window_that_is_not_clipped(hu):
    levels = np.rint((encode(hu) + 1) * 127.5)
    tolerance = np.full(hu.shape, (WINDOWS_HU[-1][1] - WINDOWS_HU[-1][0]) / 255 / 2)
    for level, (low, high) in reversed(list(zip(levels, WINDOWS_HU))):
        tolerance[(level > 0) & (level < 255)] = (high - low) / 255 / 2
    assert (np.abs(decode(levels / 127.5 - 1) - np.clip(hu, -20, 180)) <= tolerance + 1e-3).all()


@many
@given(arrays(np.float32, (3, 2, 2), elements=st.floats(-3, 3, width=32)))
def test_channels_that_disagree_still_give_hu_in_range(x):
    hu = decode(x)
    assert hu.shape == (2, 2) and (hu >= -20 - 1e-4).all() and (hu <= 180 + 1e-4).all()


# ---- slabs

@st.composite
def positions(draw) -> np.ndarray:
    """Increasing positions of 4 to 40 slices, mm: 0.5 to 3 apart, jittered, some left out."""
    spacing = draw(st.floats(0.5, 3))
    steps = spacing * draw(arrays(np.float64, draw(st.integers(4, 40)), elements=st.floats(0.9, 1.1)))
    kept = draw(arrays(bool, len(steps), elements=st.sampled_from([True] * 9 + [False])))
    kept[:4] = True
    return draw(st.floats(-500, 500)) + np.cumsum(steps)[kept]


@many
@given(positions(), st.floats(4, 8), st.floats(-5, 5))
def test_a_slope_survives_slabs_and_the_way_back(position_mm, slab_mm, slope):
    """Slabs average positions as they average HU; back on the slices they are interpolated, flat beyond the ends."""
    hu = np.broadcast_to((slope * (position_mm - position_mm[0]))[:, None, None], (len(position_mm), 2, 3))
    slabs = to_slabs(Scan("ramp", hu.astype(np.float32), position_mm, (1.0, 1.0)), slab_mm)
    centres = slabs.scan.position_mm
    assert (np.diff(centres) > 0).all()
    np.testing.assert_allclose(slabs.scan.hu[:, 1, 2], slope * (centres - position_mm[0]), atol=1e-3)
    back = slabs.from_slabs(slabs.scan.hu)
    expected = slope * (np.clip(position_mm, centres[0], centres[-1]) - position_mm[0])
    np.testing.assert_allclose(back[:, 0, 0], expected, atol=1e-3)
    mask = slabs.from_slabs(np.ones((len(centres), 2, 3), bool))
    lost = np.flatnonzero(~mask[:, 0, 0])                                # less than half a slab, at the bottom
    assert lost.tolist() == list(range(len(lost))) and (position_mm[lost] - position_mm[0] < slab_mm / 2).all()
    assert mask.dtype == bool and mask[len(lost):].all() and not mask[lost].any() and mask.shape == hu.shape


# ---- the canonical frame

@st.composite
def frames(draw) -> Frame:
    """Frames of 8 to 40 pixels over slices as large, turned up to 60 degrees, coarser or finer than these."""
    shape = draw(st.tuples(st.integers(8, 40), st.integers(8, 40)))
    spacing = draw(st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)))
    centre = tuple((n - 1) / 2 * mm + draw(st.floats(-2, 2)) for n, mm in zip(shape, spacing))
    return Frame(draw(st.integers(8, 40)), shape, spacing, centre, draw(st.floats(-60, 60)), draw(st.floats(0.5, 2)))


@many
@given(frames(), st.floats(-5, 5), st.floats(-5, 5))
def test_a_plane_survives_the_frame_and_the_way_back(frame, down, right):
    """HU that rise evenly are what interpolation and averaging leave alone, wherever no filling is mixed in."""
    rows, columns = np.indices(frame.shape)
    plane = (20 + down * rows + right * columns).astype(np.float32)
    volume = np.stack([plane, np.ones_like(plane)])
    back, whole = from_frame(to_frame(volume, frame), frame)
    inside = whole > 1 - 1e-5
    np.testing.assert_allclose(back[inside], plane[inside], atol=2e-2)
    assert from_frame(to_frame(volume > 0, frame), frame).dtype == bool


@many
@given(frames())
def test_the_middle_of_the_frame_lies_at_its_centre(frame):
    """A plane's value there, by hand: native (row, column) = centre / spacing."""
    row, column = (c / mm for c, mm in zip(frame.centre, frame.spacing))
    rows, columns = np.indices(frame.shape)
    volume = np.stack([rows, columns, np.ones(frame.shape)]).astype(np.float32)
    r, c, whole = to_frame(volume, frame)
    m = frame.size // 2 - 1
    four = [(i, j) for i in (m, frame.size - 1 - m) for j in (m, frame.size - 1 - m)]       # about the middle
    if all(whole[at] > 1 - 1e-5 for at in four):
        np.testing.assert_allclose([np.mean([v[at] for at in four]) for v in (r, c)], [row, column], atol=1e-3)


# ---- files

@few
@given(st.sampled_from(AXES), SPACINGS, st.integers(0, 99))
def test_a_nifti_scan_and_its_maps_agree_in_any_orientation(axes, spacing, seed):
    hu = shuffled_head((4, 3, 5), seed)
    with tempfile.TemporaryDirectory() as folder:
        path = write_nifti_scan(Path(folder) / "scan.nii", hu, spacing, axes)
        scan = nifti.read(ScanSource("scan", "nifti", (path,)))
        np.testing.assert_array_equal(scan.hu, hu)
        np.testing.assert_allclose(np.diff(scan.position_mm), spacing[0], rtol=1e-5)
        np.testing.assert_allclose(scan.pixel_spacing_mm, spacing[1:], rtol=1e-5)
        assert write_nifti(Path(folder) / "map.nii", scan.hu, scan) is None
        given_, written = nib.load(path), nib.load(Path(folder) / "map.nii")
        np.testing.assert_allclose(written.affine, given_.affine, atol=1e-5)
        np.testing.assert_array_equal(written.get_fdata(), given_.get_fdata())


@few
@given(st.permutations(range(5)), st.booleans(), st.booleans(), st.booleans(), st.floats(-25, 25),
       SPACINGS, st.integers(0, 99))
def test_a_dicom_series_is_read_in_order_whatever_its_files_are_called(order, rows, columns, transposed, tilt, spacing,
                                                                      seed):
    hu = shuffled_head((5, 3, 4), seed)
    with tempfile.TemporaryDirectory() as folder:
        write_dicom_series(folder, hu, spacing, tilt_deg=tilt, flip_rows=rows, flip_columns=columns,
                           transpose=transposed, name=lambda k: f"{order[k]}.dcm")
        scan = dicom.read(ScanSource("scan", "dicom", tuple(sorted(Path(folder).iterdir()))))
        np.testing.assert_array_equal(scan.hu, hu)
        np.testing.assert_allclose(np.diff(scan.position_mm), spacing[0], rtol=1e-4)
        write_nifti(Path(folder) / "map.nii", scan.hu, scan)
        image = nib.load(Path(folder) / "map.nii")
        k, i, j = 3, 2, 1                                                # the place of a pixel, by both files
        place = scan.geometry.origins[k] + i * scan.geometry.row_step + j * scan.geometry.column_step
        np.testing.assert_allclose(image.affine @ [j, i, k, 1], [-place[0], -place[1], place[2], 1], atol=1e-3)
        np.testing.assert_array_equal(image.get_fdata()[j, i, k], hu[k, i, j])


# ---- ids

def ids_of(folder, ids):
    """Ids by the files of their scans."""
    return {tuple(sorted(path.name for path in source.paths)): source.scan_id
            for source in find_scans(folder, ids=ids, log=lambda line: None)}


@few
@given(st.lists(st.tuples(st.integers(1, 3), st.sampled_from("ab"), st.integers(0, 1)), min_size=2, max_size=4,
                unique=True), st.integers(1, 3), st.booleans())
def test_ids_stay_when_other_scans_arrive(series, early, one_uid):
    """Series of any number in any folder, or two phases under one series UID; those that come first are found first."""
    with tempfile.TemporaryDirectory() as folder:
        folder, before = Path(folder), None
        for k, (number, name, phase) in enumerate(series):
            def edit(ds, _, number=number, phase=phase):
                ds.SeriesNumber, ds.AcquisitionNumber = number, phase
                ds.SOPInstanceUID += f".{phase}"
            write_dicom_series(folder / name, np.zeros((3, 4, 4)), series=(number, name, 0 if one_uid else phase),
                               name=lambda i, k=k: f"{k}-{i}", edit=edit)
            if k + 1 == early:
                before = ids_of(folder, "uid")
        after = ids_of(folder, "uid")
        assert len(after) == len(set(after.values())) == len(series)
        assert before is None or before.items() <= after.items()


@few
@given(st.permutations(range(4)), st.integers(1, 3))
def test_no_id_by_path_comes_to_mean_another_scan_whatever_arrives(order, early):
    """Series 0 and 1 in one folder, 2 elsewhere, beside a NIfTI file: only a second series in a folder changes ids."""
    with tempfile.TemporaryDirectory() as folder:
        folder, before = Path(folder), None
        for count, k in enumerate(order, 1):
            if k == 3:
                write_nifti_scan(folder / "v.nii", np.zeros((3, 4, 4), np.float32))
            else:
                write_dicom_series(folder / ("b" if k == 2 else "a"), np.zeros((3, 4, 4)), series=k,
                                   name=lambda i, k=k: f"{k}-{i}",
                                   edit=lambda ds, _, k=k: setattr(ds, "SeriesNumber", k))
            if count == early:
                before = ids_of(folder, "path")
        after = ids_of(folder, "path")
        assert len(set(after.values())) == 4
        named_before = {name: files for files, name in before.items()}
        assert all(named_before.get(name, files) == files for files, name in after.items())
        together = {after[files] for files in after if files[0][0] in "01"}
        assert all(after[files] == name or after[files] in together for files, name in before.items())
