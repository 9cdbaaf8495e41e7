"""Finding scans, and folders of slices."""

import errno
import inspect
import json
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from PIL import Image

from common.results import BY_HASH
from ct import dicom_header
from ct.read import FORMATS, RESERVED, Format, find_all, find_scans, read_scan
from ct.scan import Found, Scan, ScanError
from detect.folder import PARTS
from detect.jobs import WORK
from detect.result import result_folder
from tests.writers import (
    make_uid,
    write_dicom_series,
    write_nifti_scan,
    write_rgb_folder,
    write_scan_json,
    write_slice_folder,
)

RNG = np.random.default_rng(0)
HU = RNG.integers(-20, 101, (12, 6, 8)).astype(np.float32)
CT = RNG.integers(-1000, 600, (4, 6, 8)).astype(np.float32)


def ids(folder, **kwargs):
    return [source.scan_id for source in find_scans(folder, **kwargs)]


def read_only(folder, **kwargs):
    source, = find_scans(folder, **kwargs)
    return read_scan(source)


# ---- formats

def test_a_new_format_is_a_module_and_an_entry(tmp_path, monkeypatch):
    """With what Format says and nothing else; one with claims, find and read, as was said to be enough, failed."""
    def claims(path, head):
        return head.startswith(b"TOY")

    def find(paths):
        return [Found("toy", (path,), path.with_suffix(""), options={"floor": -1000}, notes=("a toy",))
                for path in paths]

    def read(source):
        values = np.frombuffer(source.paths[0].read_bytes()[3:], np.uint8).reshape(2, 3, 4)
        hu = values.astype(np.float32) + np.float32(source.options["floor"])
        return Scan(source.scan_id, hu, np.array([0.0, 5.0]), source="toy", notes=("read",))

    toy = SimpleNamespace(KIND="toy", claims=claims, find=find, read=read)
    monkeypatch.setattr("ct.read.FORMATS", (*FORMATS, toy))
    (tmp_path / "head.toy").write_bytes(b"TOY" + bytes(range(24)))
    write_slice_folder(tmp_path / "case", HU)
    case, head = find_scans(tmp_path)
    assert (case.kind, head.kind, head.scan_id, head.options) == ("slices", "toy", "head", {"floor": -1000})
    scan = read_scan(head)
    assert scan.hu.ravel().tolist() == list(range(-1000, -976)) and scan.notes == ("a toy", "read")


def test_the_formats_of_this_program_keep_the_contract():
    offered = [name for name in [*Format.__annotations__, *vars(Format)] if not name.startswith("_")]
    assert offered == ["KIND", "claims", "find", "read"]
    for module in FORMATS:
        for name in offered[1:]:
            given = list(inspect.signature(getattr(module, name)).parameters)
            assert given == list(inspect.signature(getattr(Format, name)).parameters)[1:], (module.KIND, name)


# ---- slice folders

def test_grey_slices_in_natural_order(tmp_path):
    scan = read_only(write_slice_folder(tmp_path / "case", HU, slice_spacing_mm=4, pixel_spacing_mm=[0.4, 0.5]))
    assert scan.scan_id == "case" and scan.source == "slices" and scan.notes == ()
    np.testing.assert_allclose(scan.hu, HU, atol=120 / 255 / 2 + 1e-4)        # '10.png' comes after '9.png'
    np.testing.assert_array_equal(scan.position_mm, np.arange(12) * 4.0)
    assert scan.pixel_spacing_mm == (0.4, 0.5) and scan.saturation_hu == (-20, 100)


def test_grey_level_to_hu_by_hand(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.array([[0, 51, 255]], np.uint8)).save(tmp_path / "a" / "0.png")
    write_scan_json(tmp_path / "a", [[-20, 100]])
    np.testing.assert_allclose(read_only(tmp_path).hu, [[[-20, 4, 100]]], atol=1e-5)


@pytest.mark.parametrize("inside", [True, np.uint8(255)])
def test_superior_to_inferior_is_reversed_with_its_mask(tmp_path, inside):
    case = tmp_path / "case"
    write_slice_folder(case / "png", HU, order="superior-to-inferior", bits=16)
    mask = np.zeros(HU.shape, type(inside))
    mask[0] = inside                                                          # the first file: the top slice
    (case / "BrainExtraction").mkdir()
    np.save(case / "BrainExtraction" / "bet.npy", mask)
    scan = read_only(tmp_path)
    np.testing.assert_allclose(scan.hu, HU, atol=0.01)                        # 16-bit: 120 HU / 65535
    np.testing.assert_array_equal(scan.brain, mask[::-1] > 0)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_grey_stored_as_rgb(tmp_path, suffix):
    write_slice_folder(tmp_path / "case", HU[:1], suffix=".png")
    grey = Image.open(tmp_path / "case" / "0.png")
    write_slice_folder(tmp_path / "case", HU[:0])
    (tmp_path / "case" / "0.png").unlink()
    grey.convert("RGB").save(tmp_path / "case" / f"0{suffix}")
    assert read_only(tmp_path).hu.shape == (1, 6, 8)


def test_colour_in_a_one_window_scan_is_refused(tmp_path):
    write_rgb_folder(tmp_path / "case", HU)
    write_scan_json(tmp_path / "case", [[-20, 100]])
    with pytest.raises(ScanError, match="0.png: a colour picture"):
        read_only(tmp_path)


def test_three_windows_are_fused(tmp_path):
    hu = np.linspace(-20, 180, 3 * 6 * 8).reshape(3, 6, 8).astype(np.float32)
    scan = read_only(write_rgb_folder(tmp_path / "case", hu))
    np.testing.assert_allclose(scan.hu, hu, atol=200 / 255 / 2 + 1e-3)
    fine = (hu > 5) & (hu < 55)
    np.testing.assert_allclose(scan.hu[fine], hu[fine], atol=50 / 255 / 2 + 1e-3)
    assert scan.saturation_hu == (-20, 180)


def head_hu(slices=3, size=64):
    """Air, a skull and a brain of 25 to 45 HU."""
    away = np.hypot(*np.mgrid[-1:1:size * 1j, -1:1:size * 1j])
    brain = 35 + 10 * np.sin(9 * away)
    return np.repeat(np.select([away < 0.7, away < 0.8], [brain, 900.0], -1000.0)[None], slices, 0)


@pytest.mark.parametrize("change", [lambda rgb: np.repeat(rgb[..., 1:2], 3, -1), lambda rgb: rgb[..., ::-1]],
                         ids=["grey 0..80 HU as RGB", "B, G, R"])
@pytest.mark.parametrize("scan_json", [True, False])
def test_channels_that_are_not_the_three_windows_are_refused(change, scan_json, tmp_path):
    """Blood of 70 HU was read as 49 and as 28, without a word."""
    folder = write_rgb_folder(tmp_path / "case" / "png", head_hu(), scan_json=scan_json)
    assert read_only(tmp_path).hu.shape == (3, 64, 64)
    for path in folder.glob("*.png"):
        Image.fromarray(np.ascontiguousarray(change(np.asarray(Image.open(path))))).save(path)
    with pytest.raises(ScanError, match=r"0.png and the other pictures: R, G and B are of no one HU in \d\d+% of"):
        read_only(tmp_path)


def test_three_windows_may_have_been_resized(tmp_path):
    folder = write_rgb_folder(tmp_path / "case", head_hu())
    for path in folder.glob("*.png"):
        Image.open(path).resize((40, 40), Image.Resampling.BILINEAR).save(path)
    assert read_only(tmp_path).hu.shape == (3, 40, 40)


def test_names_of_many_digits_are_told_apart(tmp_path):
    names = [f"1.3.12.2.1107.5.1.4.64123.3000001905060708001230000000{k}" for k in (1, 2, 4)]
    write_rgb_folder(tmp_path / "case", HU[:3])
    for name, path in zip(names, sorted((tmp_path / "case").glob("*.png"))):
        path.rename(path.with_name(f"{name}.png"))
    missing = f"{names[0].rpartition('.')[2][:-1]}3"
    assert [note for note in read_only(tmp_path).notes if "missing" in note] == [
        f"slices missing, by their numbers: 1 ({missing}); the others are taken as evenly spaced"]


def test_a_number_far_beyond_the_others_does_not_count_to_it(tmp_path):
    write_rgb_folder(tmp_path / "case", HU[:4])
    last = sorted((tmp_path / "case").glob("*.png"))[-1]
    last.rename(last.with_name("30000000000.png"))
    assert "slices missing, by their numbers: 29999999997 (3, 4, 5, 6, 7, ...)" in read_only(tmp_path).notes[-1]


def test_three_windows_in_jpeg_are_refused(tmp_path):
    """Its colours are no channels: HU were off by 4 on average, without a word."""
    folder = write_rgb_folder(tmp_path / "case", np.zeros((3, 16, 16)))
    for path in sorted(folder.glob("*.png")):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    with pytest.raises(ScanError, match="0.jpg: a JPEG, which mixes the three windows"):
        read_only(tmp_path)


def test_the_originals_layout_needs_no_scan_json(tmp_path):
    write_rgb_folder(tmp_path / "case7" / "png", HU, scan_json=False)
    scan = read_only(tmp_path)
    assert scan.scan_id == "case7" and scan.brain is None
    assert scan.notes == ("slice spacing unknown, 5 mm assumed (--unknown-slice-spacing-mm)",)
    assert read_only(tmp_path / "case7" / "png").scan_id == "case7"
    write_scan_json(tmp_path / "case7", [[5, 55], [0, 80], [-20, 180]], 3.0)  # in the case folder: overrides
    assert read_only(tmp_path).slice_spacing_mm == 3


def test_a_mask_that_does_not_fit_is_an_error(tmp_path):
    case = tmp_path / "case"
    write_rgb_folder(case / "png", HU, scan_json=False)
    (case / "BrainExtraction").mkdir()
    np.save(case / "BrainExtraction" / "bet.npy", np.ones((11, 6, 8)))
    with pytest.raises(ScanError, match=r"bet.npy: the mask is \[11, 6, 8\], the slices are \[12, 6, 8\]"):
        read_only(tmp_path)
    np.save(case / "BrainExtraction" / "bet.npy", np.zeros((12, 6, 8)))
    with pytest.raises(ScanError, match="empty"):
        read_only(tmp_path)


def test_unknown_slice_spacing(tmp_path):
    write_slice_folder(tmp_path / "case", HU, slice_spacing_mm=None)
    scan = read_only(tmp_path, unknown_slice_spacing_mm=2.5)
    assert scan.slice_spacing_mm == 2.5 and "2.5 mm assumed" in scan.notes[0]
    with pytest.raises(ScanError, match="--unknown-slice-spacing-mm"):
        read_only(tmp_path, unknown_slice_spacing_mm=0)


@pytest.mark.parametrize("key, value, words", [
    ("windows_hu", [[100, -20]], "low below high"),
    ("windows_hu", [[0, 80], [5, 55]], "one \\[low, high\\] pair"),
    ("windows_hu", [[0, 80], [5, 55], [-20, 180]], "for R, G and B"),
    ("windows_hu", [["a", 5]], "windows_hu"),
    ("slice_spacing_mm", -1, "positive number"),
    ("slice_spacing_mm", True, "positive number"),
    ("pixel_spacing_mm", [0.5], "pixel_spacing_mm"),
    ("pixel_spacing_mm", [0.5, None], "pixel_spacing_mm"),
    ("order", "up", "inferior-to-superior"),
    ("clipped_hu", [100, 200], "lies beyond 'windows_hu'"),
    ("clipped_hu", [-50, -20], "lies beyond 'windows_hu'"),
    ("order", None, "order"),
])
def test_scan_json_errors_name_file_and_key(tmp_path, key, value, words):
    path = write_slice_folder(tmp_path / "case", HU) / "scan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ScanError, match=words) as error:
        read_only(tmp_path)
    assert "scan.json" in str(error.value) and key in str(error.value) and str(tmp_path) not in str(error.value)


@pytest.mark.parametrize("clipped, known", [([0, 70], (0, 70)), ([-1024, 3000], (-20, 100)), ([-1000, 50], (-20, 50))])
def test_what_the_window_ends_is_clipped_whatever_was_before(tmp_path, clipped, known):
    """A clipped_hu wider than the window said that its ends were measured: bone of 100 HU, which is no bone."""
    path = write_slice_folder(tmp_path / "case", HU) / "scan.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clipped_hu": clipped}))
    assert read_only(tmp_path).saturation_hu == known


def test_scan_json_that_is_missing_a_key_or_no_json(tmp_path):
    path = write_slice_folder(tmp_path / "case", HU) / "scan.json"
    path.write_text('{"windows_hu": [[0, 80]]}')
    with pytest.raises(ScanError, match="'slice_spacing_mm' is missing"):
        read_only(tmp_path)
    path.write_text("{")
    with pytest.raises(ScanError, match="cannot be read as JSON"):
        read_only(tmp_path)


def test_pictures_that_cannot_be_a_scan(tmp_path):
    folder = write_slice_folder(tmp_path / "case", HU)
    Image.fromarray(np.zeros((6, 9), np.uint8)).save(folder / "3.png")
    with pytest.raises(ScanError, match="3.png: 9x6 pixels, but 0.png has 8x6"):
        read_only(tmp_path)
    (folder / "3.png").write_bytes((folder / "4.png").read_bytes()[:40])
    with pytest.raises(ScanError, match="3.png: cannot be read"):
        read_only(tmp_path)


def test_numbers_that_are_skipped_or_come_twice(tmp_path):
    folder = write_slice_folder(tmp_path / "case", HU)
    (folder / "7.png").unlink()
    assert read_only(tmp_path).notes == (
        "slices missing, by their numbers: 1 (7); the others are taken as evenly spaced",)
    shutil.copy(folder / "6.png", folder / "06.png")
    with pytest.raises(ScanError, match="the same slice as 06.png"):
        read_only(tmp_path)


def test_pictures_without_scan_json_are_a_row_with_a_reason(tmp_path):
    write_slice_folder(tmp_path / "good", HU)
    write_slice_folder(tmp_path / "bad", HU, scan_json=False)
    bad, good = find_scans(tmp_path)
    assert (bad.scan_id, good.scan_id) == ("bad", "good")
    with pytest.raises(ScanError, match="12 pictures without a scan.json.*windows_hu.*slice_spacing_mm.*order"):
        read_scan(bad)
    shutil.rmtree(tmp_path / "good")
    (tmp_path / "good").mkdir()
    write_scan_json(tmp_path / "good", [[0, 80]])
    with pytest.raises(ScanError, match="no PNG or JPEG"):
        read_scan(find_scans(tmp_path / "good")[0])


# ---- finding

def test_all_kinds_at_any_nesting(tmp_path):
    write_dicom_series(tmp_path / "a" / "b" / "dicom", CT)
    write_nifti_scan(tmp_path / "a" / "vol.nii.gz", CT)
    write_slice_folder(tmp_path / "c" / "pictures", HU)
    write_rgb_folder(tmp_path / "d" / "png", HU, scan_json=False)
    write_slice_folder(tmp_path / ".hidden", HU)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "LICENSE").write_text("nothing")
    found = find_scans(tmp_path)
    assert [(s.scan_id, s.kind) for s in found] == [
        ("a--b--dicom", "dicom"), ("a--vol", "nifti"), ("c--pictures", "slices"), ("d", "slices")]
    assert all(read_scan(s).scan_id == s.scan_id for s in found)


def test_nothing_found(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ScanError, match="no scans found; looked for DICOM"):
        find_scans(tmp_path)
    with pytest.raises(ScanError, match="no such file"):
        find_scans(tmp_path / "gone")


def test_one_file(tmp_path):
    path = write_nifti_scan(tmp_path / "vol.nii", CT)
    write_nifti_scan(tmp_path / "other.nii", CT)
    assert ids(path) == ["vol"]
    write_slice_folder(tmp_path / "case", HU)
    with pytest.raises(ScanError, match="one picture is not a scan"):
        find_scans(tmp_path / "case" / "0.png")


def test_an_id_does_not_depend_on_what_else_is_there(tmp_path):
    write_slice_folder(tmp_path / "p1" / "ct" / "brain", HU)
    write_dicom_series(tmp_path / "p1" / "dicom", CT)
    write_nifti_scan(tmp_path / "v.nii", CT)
    before = ids(tmp_path), ids(tmp_path, ids="uid")
    assert before[0][0] == "p1--ct--brain" and before[0][1:] == ["p1--dicom", "v"]
    write_slice_folder(tmp_path / "p2" / "ct" / "brain", HU + 1)
    write_nifti_scan(tmp_path / "v.nii.gz", CT)                # of the same name: by path both have another
    after = ids(tmp_path), ids(tmp_path, ids="uid")
    for earlier, later in zip(before, after):
        assert set(earlier) - {"v"} < set(later) and len(set(later)) == len(later) == 5
    assert "v" not in after[0]
    write_slice_folder(tmp_path / "moved" / "here", HU)
    assert set(ids(tmp_path / "moved", ids="uid")) <= set(before[1])                  # a copy has the same uid


def test_an_id_never_comes_to_mean_another_series(tmp_path):
    def add(number):
        def change(ds, k):
            ds.SeriesNumber = number
        write_dicom_series(tmp_path / "head", CT + number, series=number, name=lambda k: f"{number}-{k}", edit=change)

    def found(**how):
        return {source.scan_id: read_scan(source).hu[0, 0, 0] - CT[0, 0, 0] for source in find_scans(tmp_path, **how)}

    add(5)
    alone, alone_by_uid = found(), found(ids="uid")
    add(2)                                            # a lower number: it would have been 'head'
    two = found()
    add(1)
    add(9)
    four = found()
    assert alone == {"head": 5} and sorted(two.values()) == [2, 5] and sorted(four.values()) == [1, 2, 5, 9]
    assert "head" not in two and two.items() < four.items() and alone_by_uid.items() < found(ids="uid").items()


def test_of_scans_that_share_a_name_none_has_it(tmp_path):
    """A file that comes beside a folder, as dcm2niix writes it, took over the folder's id."""
    write_dicom_series(tmp_path / "top" / "head", CT)
    assert ids(tmp_path / "top") == ["head"]
    write_nifti_scan(tmp_path / "top" / "head.nii.gz", CT)
    with zipfile.ZipFile(tmp_path / "top" / "head.zip", "w") as file:
        for path in write_dicom_series(tmp_path / "other", CT + 1, series="other").iterdir():
            file.write(path, path.name)
    both = {source.kind: source.scan_id for source in find_scans(tmp_path / "top") if source.archive is None}
    found = ids(tmp_path / "top")
    assert len(set(found)) == 3 and all(re.fullmatch("head-[0-9a-f]{8}", one) for one in found)
    (tmp_path / "top" / "head.zip").unlink()
    assert both == {source.kind: source.scan_id for source in find_scans(tmp_path / "top")}
    (tmp_path / "top").rename(tmp_path / "moved")
    assert sorted(both.values()) == ids(tmp_path / "moved")                           # by the place under SCANS


def test_by_uid_a_copy_leaves_the_id_to_its_scan(tmp_path):
    write_dicom_series(tmp_path / "b", CT)
    alone, = ids(tmp_path, ids="uid")
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    assert alone in ids(tmp_path, ids="uid") and len(ids(tmp_path, ids="uid")) == 2


def test_series_mixed_in_one_folder_without_extensions(tmp_path):
    for k, series in enumerate(("one", "two")):
        write_dicom_series(tmp_path / "mixed", CT + k, series=series, name=lambda i, s=series: f"IM{i}{s}")
    found = find_scans(tmp_path)
    assert all(source.scan_id.startswith("mixed-") and len(source.scan_id) == 14 for source in found)
    assert {read_scan(s).hu[0, 0, 0] for s in found} == {CT[0, 0, 0], CT[0, 0, 0] + 1}
    text = str(found) + str([read_scan(s).notes for s in found])
    assert "Secret" not in text and "SECRET" not in text and make_uid("one") not in text


def test_a_series_spread_over_folders_is_one_scan_and_a_copy_is_another(tmp_path):
    write_dicom_series(tmp_path / "study", CT, name=lambda k: f"{k}")
    for k in range(4):
        (tmp_path / "study" / f"S{k}").mkdir()
        (tmp_path / "study" / f"{k}").rename(tmp_path / "study" / f"S{k}" / "im")
    assert read_only(tmp_path).scan_id == "study"
    write_dicom_series(tmp_path / "c1", CT, series="again")
    shutil.copytree(tmp_path / "c1", tmp_path / "c2")
    assert ids(tmp_path) == ["c1", "c2", "study"]


def test_series_without_axial_ct_are_notes_of_the_study(tmp_path):
    write_dicom_series(tmp_path / "x" / "axial", CT)
    write_dicom_series(tmp_path / "x" / "scout", CT[:1], series="scout",
                       edit=lambda ds, k: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]))
    write_dicom_series(tmp_path / "y" / "mr", CT, series="mr", study="other",
                       edit=lambda ds, k: setattr(ds, "Modality", "MR"))
    axial, mr = find_scans(tmp_path)
    assert read_scan(axial).notes == ("other series of the study left out: 1 localiser",)
    with pytest.raises(ScanError, match=r"0 axial CT slices.*4 not CT \(modality MR\)"):
        read_scan(mr)


def test_broken_dicom_files_are_a_row(tmp_path):
    folder = write_dicom_series(tmp_path / "case", CT)
    (folder / "junk.dcm").write_bytes(b"junk" * 100)
    (folder / "empty.dcm").write_bytes(b"")
    good, bad = find_scans(tmp_path)
    assert read_scan(good).hu.shape == CT.shape
    assert bad.scan_id == "case-unreadable"
    with pytest.raises(ScanError, match="empty.dcm.*and 1 more in this folder"):
        read_scan(bad)


def test_a_folder_that_cannot_be_read_is_a_row(tmp_path, monkeypatch):
    """It was passed over without a word. One that is listed, and no more, ended the run."""
    for name in ("good", "Ivanov/closed", "Ivanov/listed", "lost+found"):
        write_slice_folder(tmp_path / name, HU)
    listed, allowed = os.scandir, os.access

    def scandir(path):
        if Path(path).name in ("closed", "lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "listed" and allowed(path, mode))
    sources = find_scans(tmp_path)
    assert [source.scan_id for source in sources] == ["Ivanov--closed", "Ivanov--listed", "good"]
    for source in sources[:2]:
        name = source.paths[0].name
        with pytest.raises(ScanError, match=rf"^{name}: this folder cannot be read \(Permission denied\); mend that"):
            read_scan(source)
    assert read_scan(sources[2]).hu.shape == HU.shape
    assert len({*ids(tmp_path, ids="uid")} & {*ids(tmp_path / "Ivanov", ids="uid")}) == 2
    assert ids(tmp_path / "Ivanov" / "closed") == ["closed"]


def test_names_that_are_no_utf8_are_printable_in_a_reason(tmp_path):
    """A run that wrote the reason, or said it, ended there."""
    (tmp_path / "c").mkdir()
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "c"), b"\xcf\xe5.dcm"))).write_bytes(b"junk")
    source, = find_scans(tmp_path)
    with pytest.raises(ScanError, match="^%CF%E5.dcm: ") as error:
        read_scan(source)
    assert str(error.value).encode() and str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_a_file_that_is_gone_is_named_without_its_folder(tmp_path):
    top = tmp_path / "Ivanov"
    write_dicom_series(top / "dicom", CT)
    write_nifti_scan(top / "nifti.nii", CT)
    write_slice_folder(top / "slices", CT)
    sources = find_scans(tmp_path, log=lambda line: None)
    assert [source.kind for source in sources] == ["dicom", "nifti", "slices"]
    for source in sources:
        source.paths[0].unlink()
        with pytest.raises(ScanError, match=source.paths[0].name) as error:
            read_scan(source)
        assert "Ivanov" not in str(error.value)


def test_a_dicomdir_is_passed_over(tmp_path):
    def directory(ds, k):
        ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
        del ds.SOPClassUID
    write_dicom_series(tmp_path / "case", CT)
    write_dicom_series(tmp_path, CT[:1], name=lambda k: "DICOMDIR", edit=directory)
    assert ids(tmp_path) == ["case"]


def test_dicom_without_a_preamble(tmp_path):
    folder = write_dicom_series(tmp_path / "case", CT)
    for path in folder.iterdir():
        ds = pydicom.dcmread(path)
        del ds.file_meta, ds.preamble
        ds.save_as(path, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(read_only(tmp_path).hu, CT)


def test_several_inputs_name_their_scans_after_the_input(tmp_path):
    hu = np.zeros((4, 8, 8), np.float32)
    for folder in ("a", "b", "c/a"):
        write_slice_folder(tmp_path / folder / "case", hu)
    ids = [source.scan_id for source in find_all([tmp_path / "b", tmp_path / "a"])]
    assert ids == ["a--case", "b--case"]
    assert [source.scan_id for source in find_all([tmp_path / "a"])] == ["case"]
    with pytest.raises(ScanError, match="^a--case: found more than once; .*give the folder above"):
        find_all([tmp_path / "a", tmp_path / "c/a"])


def test_inputs_whose_names_are_no_utf8_or_long_give_ids_that_can_be_written(tmp_path):
    """Of several inputs one such name ended the run; a long one and a scan's made a name that no folder can have."""
    odd, long = os.fsdecode(os.fsencode(tmp_path) + b"/\xcf\xe5"), tmp_path / ("n" * 200)
    for folder, number in ((tmp_path / "case", 0), (Path(odd), 1), (long / ("a" * 100), 2), (long / ("b" * 100), 3)):
        write_slice_folder(folder, HU + number)
    found = [source.scan_id for source in find_all([tmp_path / "case", odd, long])]
    assert found[0] == "%CF%E5" and "case" in found and len(set(found)) == 4 and max(map(len, found)) < 130
    assert [one for one in found if one.startswith("nnn")] and all(one.encode() for one in found)


def test_a_link_is_named_by_its_own_name(tmp_path, monkeypatch):
    """A folder of links, given one by one, had ids of what they lead to."""
    write_slice_folder(tmp_path / "store" / "real", HU)
    write_dicom_series(tmp_path / "store" / "series", CT)
    volume = write_nifti_scan(tmp_path / "store" / "volume.nii", CT)
    (tmp_path / "links").mkdir()
    for name, target in (("one", "real"), ("two", "series"), ("three.nii", volume.name)):
        (tmp_path / "links" / name).symlink_to(tmp_path / "store" / target)
    links = [str(tmp_path / "links" / name) for name in ("one", "two", "three.nii")]
    assert [ids(link)[0] for link in links] == ["one", "two", "three"] == [ids(link + "/")[0] for link in links]
    assert [source.scan_id for source in find_all(links)] == ["one", "three", "two"] == sorted(ids(tmp_path / "links"))
    monkeypatch.chdir(tmp_path / "links" / "one")
    assert ids(".") == ids("../real") == ["real"] and set(ids("..")) == {"real", "series", "volume"}


def test_two_links_to_one_scan_are_one_scan_given_twice(tmp_path):
    write_nifti_scan(tmp_path / "v.nii", CT)
    write_slice_folder(tmp_path / "case", HU)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "case")
        (tmp_path / f"{name}.nii").symlink_to(tmp_path / "v.nii")
    for first, second in (("a", "b"), ("a.nii", "b.nii"), ("case", "b"), ("v.nii", "b.nii")):
        names = [name.removesuffix(".nii") for name in (first, second)]
        with pytest.raises(ScanError, match=f"^{names[0]} and {names[1]}: one scan, given twice"):
            find_all([tmp_path / first, tmp_path / second])
    assert len(find_all([tmp_path / "a", tmp_path / "b.nii"])) == 2


def test_inputs_that_are_scans_are_named_once(tmp_path):
    """They were 'case--case' and 'vol.nii.gz--vol'."""
    hu = np.zeros((4, 8, 8), np.float32)
    for folder in ("case", "other/case", "many/one"):
        write_slice_folder(tmp_path / folder, hu)
    write_nifti_scan(tmp_path / "vol.nii.gz", hu)
    ids = [source.scan_id for source in find_all([tmp_path / name for name in ("vol.nii.gz", "case", "many")])]
    assert ids == ["case", "many--one", "vol"]
    with pytest.raises(ScanError, match="^case: found more than once"):
        find_all([tmp_path / "case", tmp_path / "other/case"])


def test_what_else_lies_in_a_folder_of_results_is_no_id(tmp_path):
    """A scan right in a folder called scans, as in the README, ended the run."""
    inside = {WORK, BY_HASH, PARTS, "run.json", "scores.csv", "slices.csv", "seconds.csv", "report.html"}
    assert inside == RESERVED
    write_dicom_series(tmp_path / "scans", CT)
    found = {ids(tmp_path / "scans")[0], ids(tmp_path)[0]}
    assert all(re.fullmatch("scans-[0-9a-f]{8}", one) for one in found) and len(found) == 2
    write_slice_folder(tmp_path / "case", HU)
    several = find_all([tmp_path / "case", tmp_path / "scans"])
    assert [one.scan_id for one in several] == ["case", *ids(tmp_path / "scans")]
    write_slice_folder(tmp_path / "many" / "run.json", HU)
    write_nifti_scan(tmp_path / "many" / "report.html.nii", CT)
    write_dicom_series(tmp_path / "many" / "scans" / "scans", CT)
    several = ids(tmp_path / "many")
    assert [re.sub("-[0-9a-f]{8}$", "-HASH", one) for one in several] == [
        "report.html-HASH", "run.json-HASH", "scans--scans"]
    assert all(result_folder(tmp_path, one).parent == tmp_path for one in {*found, *several})


def test_ids_by_uid_are_the_same_whatever_the_inputs(tmp_path):
    for k, folder in enumerate("ab"):
        write_dicom_series(tmp_path / folder, CT + k, series=folder)
    ids = [source.scan_id for source in find_all([tmp_path / "b", tmp_path / "a"], ids="uid")]
    assert len(set(ids)) == 2 and all(name.startswith("dicom-") for name in ids)
    assert sorted(source.scan_id for source in find_all([tmp_path], ids="uid")) == ids
    with pytest.raises(ScanError, match=f"^{', '.join(ids)}: found more than once; leave one out"):
        find_all([tmp_path, tmp_path / "a", tmp_path / "b"], ids="uid")


@pytest.mark.parametrize("error, why", [(MemoryError(), "MemoryError"),
                                        (OSError(errno.EIO, "Input/output error", "/Doe"), "Input/output error")])
def test_a_machine_that_fails_for_a_header_costs_its_scan_alone(tmp_path, monkeypatch, error, why):
    """And the reason says so: it was that of a damaged file, 'cannot be read as DICOM'."""
    write_dicom_series(tmp_path / "head", CT)
    write_dicom_series(tmp_path / "other", CT, study="other", series="other")
    own = dicom_header._read_tags

    def short_of_it(path):
        if path.parent.name == "other":
            raise error
        return own(path)
    monkeypatch.setattr(dicom_header, "_read_tags", short_of_it)
    head, other = find_all([tmp_path])
    assert head.scan_id == "head" and read_scan(head).hu.shape == CT.shape
    assert other.error == (f"000.dcm: cannot be read ({why}): memory, open files or a disk of this machine failed; try "
                           "again; and 3 more in this folder")


def test_ids_by_uid_hang_on_all_that_is_in_a_file(tmp_path):
    """Volumes of one size that began with the same 64 KiB of air had one id, and the second's results replaced the
    first's."""
    hu = np.full((12, 80, 80), -1000, np.float32)
    for k, folder in enumerate("ab"):
        hu[8:, 20:60, 20:60] = 30 + k
        (tmp_path / folder).mkdir()
        write_nifti_scan(tmp_path / folder / "scan.nii", hu)
    first, second = ((tmp_path / folder / "scan.nii").read_bytes() for folder in "ab")
    assert len(first) == len(second) and first[:65536] == second[:65536]
    found = find_all([tmp_path / "a", tmp_path / "b"], ids="uid")
    assert len({source.scan_id for source in found}) == 2
    assert [source.scan_id for source in find_scans(tmp_path, ids="uid")] == [source.scan_id for source in found]
