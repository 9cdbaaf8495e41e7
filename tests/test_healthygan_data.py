"""What HealthyGAN reads: images of every kind, slices, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import itertools
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import DatasetError, ScanRecord, SliceDataset, SliceWriter
from healthygan.data import (
    FULL,
    TIFF_PHOTOMETRIC,
    WHITE_IS_ZERO,
    ImageSettings,
    Pictures,
    class_folders,
    read_image,
    read_images,
    read_slices,
)
from healthygan.training_data import batches, load_sources, load_training, split_by_patient
from tests.writers import png_of_16_bits

SETTINGS = ImageSettings("images", 4, crop_top=0)
ORIENTATION = 0x112                      # EXIF's tag


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("pixels, settings, expected", [
    (np.full((4, 4), 255, np.uint8), SETTINGS, [FULL]),
    (np.full((4, 4), 51, np.uint8), SETTINGS, [FULL // 5]),
    (np.full((4, 4), 1000, np.uint16), SETTINGS, [1000]),                           # scaled, not clipped at 255
    (np.full((4, 4), 4095, np.uint16), ImageSettings("images", 4, 0, 4095), [FULL]),
    (np.full((4, 4, 3), [255, 0, 51], np.uint8), SETTINGS, [FULL, 0, FULL // 5]),
    (np.full((4, 4, 3), 51, np.uint8), SETTINGS, [FULL // 5]),                      # RGB that is grey
    (np.full((4, 4, 4), [51, 51, 51, 0], np.uint8), SETTINGS, [FULL // 5]),         # transparency is left out
    (np.ones((4, 4), bool), SETTINGS, [FULL]),
])
def test_every_kind_of_image_is_scaled_to_16_bits(tmp_path, pixels, settings, expected):
    got = read_image(save(tmp_path / "x.png", pixels), settings)
    assert got.dtype == np.uint16 and got.shape == (len(expected), 4, 4)
    assert got[:, 0, 0].tolist() == expected and (got == got[:, :1, :1]).all()


def tiff_of_16_bits(pixels: np.ndarray) -> bytes:
    """[H, W, 3] as a TIFF: an 8-bit one by Pillow with its bits changed, and pixels of twice the bytes."""
    written = io.BytesIO()
    Image.fromarray(np.zeros(pixels.shape, np.uint8)).save(written, "tiff")
    found = written.getvalue()
    assert found.count(struct.pack("<3H", 8, 8, 8)) == 1
    return found.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16)) + bytes(pixels.size)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_what_pillow_reduces_to_8_bits_is_refused(tmp_path, channels):
    """12 bits stored in 16 would come in nearly black, whatever --white-16bit says."""
    path, pixels = tmp_path / "x.png", np.full((4, 4, channels), 4095)
    path.write_bytes(png_of_16_bits(pixels))
    settings = ImageSettings("images", 4, 0, 4095)
    if channels == 1:
        assert (read_image(path, settings) == FULL).all()
        return
    with pytest.raises(ValueError, match="found 16-bit colour or grey with alpha: save it as 16-bit grey"):
        read_image(path, settings)
    if channels == 3:
        path.write_bytes(tiff_of_16_bits(pixels))
        with pytest.raises(ValueError, match="found 16-bit colour"):
            read_image(path, settings)


@pytest.mark.parametrize("pixels, white", [(np.array([[4000, 0]] * 2, np.uint16), 4095),
                                           (np.array([[255, 0]] * 2, np.uint8), FULL)])
def test_a_tiff_in_which_zero_is_white_is_not_read_inverted(tmp_path, pixels, white):
    """Pillow turns 8 bits round, when it reads as when it writes, but 16 bits neither time."""
    path, settings = tmp_path / "x.tif", ImageSettings("images", 2, 0, white)
    Image.fromarray(pixels).save(path, tiffinfo={TIFF_PHOTOMETRIC: WHITE_IS_ZERO})
    expected = [FULL - round(FULL * 4000 / 4095), FULL] if pixels.dtype == np.uint16 else [FULL, 0]
    assert read_image(path, settings)[0, 0].tolist() == expected


def test_a_stack_of_images_is_not_taken_for_its_first_one(tmp_path):
    first, *others = [Image.fromarray(np.full((2, 2), 9 * i, np.uint8)) for i in range(3)]
    first.save(tmp_path / "x.tif", save_all=True, append_images=others)
    with pytest.raises(ValueError, match="expected one image, found 3 in a row"):
        read_image(tmp_path / "x.tif", SETTINGS)


@pytest.mark.parametrize("suffix, kind", [("png", np.uint8), ("png", np.uint16), ("tif", np.uint8), ("tif", np.uint16)])
def test_an_image_is_turned_as_its_exif_says(tmp_path, suffix, kind):
    stored, exif = np.array([[255, 0], [255, 0]], kind) * (np.iinfo(kind).max // 255), Image.Exif()
    exif[ORIENTATION] = 6                                                 # to be turned clockwise by a quarter
    Image.fromarray(stored).save(tmp_path / f"x.{suffix}", exif=exif)
    turned = read_image(tmp_path / f"x.{suffix}", ImageSettings("images", 2, 0))
    assert turned[0].tolist() == [[FULL, FULL], [0, 0]]


def test_the_top_goes_and_the_centre_stays(tmp_path):
    pixels = np.zeros((25, 43), np.uint8)                         # 8 % of 25 rows: 2; the centre: columns 10 to 32
    pixels[2:, 10:33] = 255
    assert (read_image(save(tmp_path / "x.png", pixels), ImageSettings("images", 23)) == FULL).all()
    assert (read_image(save(tmp_path / "x.png", pixels), ImageSettings("images", 25, crop_top=0)) == 0).any()


def test_a_set_is_handed_out_as_three_channels(tmp_path):
    save(tmp_path / "set/a.png", np.full((8, 8), 255, np.uint8))
    save(tmp_path / "set/sub/b.png", np.full((8, 8, 3), [255, 0, 255], np.uint8))
    images = read_images(tmp_path / "set", SETTINGS)
    assert images.names == ["set/a", "set/sub/b"] == images.units
    x = images[[1, 0]]
    assert x.shape == (2, 3, 4, 4) and x[:, :, 0, 0].tolist() == [[1, -1, 1], [1, 1, 1]]


def test_folders_by_links_are_read_and_a_link_to_where_it_lies_ends(tmp_path):
    """A collection of links to folders was found empty, or in part."""
    save(tmp_path / "far/a.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "set/b.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "set/.thumbnails/b.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "set/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "set")
    (tmp_path / "set/folder.png").mkdir()
    images = read_images(tmp_path / "set", SETTINGS)
    assert images.names == ["set/b", "set/link/a"] and not images.unreadable


def test_an_unreadable_image_is_skipped_and_named(tmp_path):
    whole = save(tmp_path / "set/a.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "set/b.png").write_bytes(whole.read_bytes()[:40])
    (tmp_path / "set/c.jpg").write_text("no image")
    images = read_images(tmp_path / "set", SETTINGS)
    assert images.names == ["set/a"] and images.unreadable.keys() == {"set/b", "set/c"}
    whole.unlink()
    with pytest.raises(DatasetError, match="none of its 2 images can be read; the first: b.png"):
        read_images(tmp_path / "set", SETTINGS)


def test_twelve_bits_read_as_sixteen_are_noticed(tmp_path):
    save(tmp_path / "set/a.png", np.full((8, 8), 4000, np.uint16))
    with pytest.warns(UserWarning, match=r"6\.1 % of white; for 12 bits .* --white-16bit 4095 \(now 65535\)"):
        read_images(tmp_path / "set", SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_images(tmp_path / "set", ImageSettings("images", 4, 0, 4095))


def test_missing_and_empty_folders_are_named(tmp_path):
    (tmp_path / "train/healthy").mkdir(parents=True)
    with pytest.raises(DatasetError, match="train/mixed: no such folder; expected images in .*train/healthy"):
        class_folders(tmp_path, "train", ("healthy", "mixed"))
    with pytest.raises(DatasetError, match="healthy: no images in it; expected files ending in .bmp"):
        read_images(tmp_path / "train/healthy", SETTINGS)
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        read_images(tmp_path / "nowhere", SETTINGS)


def test_one_name_with_two_suffixes_is_refused(tmp_path):
    for suffix in ("png", "bmp"):
        save(tmp_path / f"set/a.{suffix}", np.zeros((8, 8), np.uint8))
    with pytest.raises(DatasetError, match="set/a is there with several suffixes"):
        read_images(tmp_path / "set", SETTINGS)


def test_names_of_two_folders_are_told_apart(tmp_path):
    """One name is one score: the threshold would come from means of images that have nothing in common."""
    for site in ("a", "b"):
        save(tmp_path / site / "healthy/0.png", np.zeros((8, 8), np.uint8))
        save(tmp_path / site / f"mixed-{site}/0.png", np.zeros((8, 8), np.uint8))
    same = [tmp_path / site / "healthy" for site in ("a", "b")]
    for read in (lambda: load_sources(same, SETTINGS, "train", None),
                 lambda: load_training(same[:1], same, SETTINGS, 0, 0),
                 lambda: load_training(same, same[:1], SETTINGS, 0, 0)):
        with pytest.raises(DatasetError, match="healthy/0 is both in .*a/healthy and in .*b/healthy; .* rename one"):
            read()
    (same[1] / "0.png").write_bytes(b"no image")                  # counts as well: the unreadable are named, too
    save(same[1] / "1.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(DatasetError, match="healthy/0 is both in"):
        load_sources(same, SETTINGS, "train", None)
    other = [tmp_path / site / f"mixed-{site}" for site in ("a", "b")]
    assert load_sources(other, SETTINGS, "train", None).names == ["mixed-a/0", "mixed-b/0"]
    assert len(load_sources([other[0], other[0]], SETTINGS, "train", None)) == 2          # to weigh more


def test_scans_of_two_databases_held_out_under_one_id_are_refused(slices32, tmp_path):
    copy = tmp_path / "copy.lmdb"
    copy.write_bytes(slices32.read_bytes())
    settings = ImageSettings("slices", 32)
    with pytest.raises(DatasetError, match=r"head2 is both in .* and in .*copy.lmdb; .* prepare both"):
        load_training([slices32, copy], [slices32], settings, 0, 0)
    assert set(load_training([slices32, slices32], [slices32, copy], settings, 0, 0).held_out.units) == {"head2"}


def test_a_folder_is_named_however_it_is_given(tmp_path, monkeypatch):
    """With '..' in it a name would lead out of the results."""
    save(tmp_path / "set/sub/a.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "healthy").symlink_to(tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set/sub")
    for folder, expected in (("..", "set/sub/a"), (".", "sub/a"), ("../sub", "sub/a"),
                             (tmp_path / "healthy", "healthy/sub/a")):
        assert read_images(Path(folder), SETTINGS).names == [expected]


def pictures(names: list[str], values: list[int] | None = None) -> Pictures:
    """Images that differ, or show one of these values each: those of one value are copies."""
    values = range(len(names)) if values is None else values
    pixels = np.array([[[[0, value + 1], [0, 0]]] for value in values], np.uint16).reshape(-1, 1, 2, 2)
    return Pictures(SETTINGS, pixels, names, names, {})


def test_a_patient_is_held_out_whole(tmp_path):
    names = [f"healthy/{i}" for i in range(8)]
    table = tmp_path / "patients.csv"

    def split(names, *args):
        return split_by_patient(pictures(names), pictures([]), *args)

    table.write_text("image,patient\n" + "".join(f"{name}.png,{i // 2}\n" for i, name in enumerate(names)))
    kept, held_out = split(names, 0.5, 0, table)
    assert len(kept) == len(held_out) == 4 and sorted(kept + held_out) == list(range(8))
    assert {i // 2 for i in kept}.isdisjoint({i // 2 for i in held_out})
    assert split(names, 0.5, 0, table) == (kept, held_out) != split(names, 0.5, 2, table)
    with pytest.raises(DatasetError, match="0.9 keeps all 4 healthy images .* lower it"):
        split(names, 0.9, 0, table)
    dotted = ["healthy/scan.001", "healthy/scan.002"]
    table.write_text("image,patient\nhealthy/scan.001,a\nhealthy/scan.002.png,b\n")
    assert sorted(sum(split(dotted, 0.5, 0, table), [])) == [0, 1]
    table.write_text("image,patient\nhealthy/0.png,0\n")
    with pytest.raises(DatasetError, match="no patient for 7 images, the first: healthy/1"):
        split(names, 0.5, 0, table)


def test_a_copy_of_an_image_is_held_out_with_it():
    """Under a second name it would be trained on, and the threshold be that of images learnt by rote."""
    healthy, mixed = pictures(list("abcdef"), [0, 1, 2, 0, 1, 2]), pictures([])
    for seed in range(5):
        kept, held_out = split_by_patient(healthy, mixed, 1 / 3, seed, None)
        assert len(held_out) == 2 and held_out[1] == held_out[0] + 3 and sorted(kept + held_out) == list(range(6))
    blank = dataclasses.replace(healthy, pixels=np.zeros((6, 1, 2, 2), np.uint16))         # alike, but no copies
    assert len(split_by_patient(blank, mixed, 0.5, 0, None)[1]) == 3


def test_who_is_in_the_unannotated_set_is_not_held_out(tmp_path):
    healthy, table = pictures(list("abcd")), tmp_path / "patients.csv"
    for seed in range(5):
        assert split_by_patient(healthy, pictures(["x", "y"], [0, 2]), 0.5, seed, None)[1] == [1, 3]
    grey_as_rgb = pictures(["x", "y"], [0, 2])
    grey_as_rgb = dataclasses.replace(grey_as_rgb, pixels=grey_as_rgb.pixels.repeat(3, 1))
    assert split_by_patient(healthy, grey_as_rgb, 0.5, 0, None)[1] == [1, 3]
    with pytest.raises(DatasetError, match="0.75 keeps 3 of 4 .* only 2 are not in the unannotated set"):
        split_by_patient(healthy, grey_as_rgb, 0.75, 0, None)
    table.write_text("image,patient\na,1\nb,2\nc,1\nd,3\nx,3\n")                         # another image of d's
    for seed in range(5):
        assert split_by_patient(healthy, pictures(["x", "y"], [8, 9]), 1 / 3, seed, table)[1] in ([0, 2], [1])


def test_a_folder_given_to_both_sets_lends_no_image_to_the_threshold(tmp_path):
    for i in range(4):
        save(tmp_path / f"b/{i}.png", np.arange(99 + i, 115 + i, dtype=np.uint8).reshape(4, 4))
        save(tmp_path / f"a/{i}.png", np.arange(9 * i, 9 * i + 144, 9, dtype=np.uint8).reshape(4, 4))
    both = [tmp_path / "a", tmp_path / "b"]
    assert len(load_training(both[1:], both[:1], SETTINGS, 0.5, 0).held_out) == 2
    with pytest.raises(DatasetError, match="keeps 2 of 4 .* only 0 are not"):
        load_training(both[1:], both, SETTINGS, 0.5, 0)
    assert load_training(both[1:], both, SETTINGS, 0, 0).held_out is None


@pytest.mark.parametrize("shared", ["scan id", "patient", "slice"])
def test_a_scan_held_out_is_not_trained_on_from_another_database(slices32, tmp_path, shared):
    held_out, other = SliceDataset(slices32, "val").scan(0), tmp_path / "other.lmdb"
    hu = held_out["hu"].numpy() + (shared != "slice")                     # as halves of it: its pixels are others
    record = ScanRecord.encode("head2" if shared == "scan id" else "other", hu, held_out["brain"].numpy(),
                               10.0 * np.arange(len(hu))[::-1])
    with SliceWriter(other, SliceDataset(slices32).manifest["settings"]) as writer:
        writer.add(record, "train", "patient2" if shared == "patient" else "somebody")
    for sets in (([slices32], [other]), ([slices32, other], [slices32])):
        with pytest.raises(DatasetError, match=f"scan head2 is held out .* has the same {shared}"):
            load_training(*sets, ImageSettings("slices", 32), 0, 0)


def test_a_patient_held_out_is_known_behind_an_id_that_another_database_has_too(slices32, tmp_path):
    """Of two scans of one id the last one's patient alone was looked at."""
    hu = np.random.default_rng(0).normal(30, 5, (3, 32, 32))
    for name, patient in (("a", "patient2"), ("b", "somebody")):
        with SliceWriter(tmp_path / f"{name}.lmdb", SliceDataset(slices32).manifest["settings"]) as writer:
            writer.add(ScanRecord.encode("x", hu, hu > 0, 10.0 * np.arange(3)[::-1]), "train", patient)
    for names in ("ab", "ba"):
        with pytest.raises(DatasetError, match="scan head2 is held out .* but x, .* has the same patient"):
            load_training([slices32], [tmp_path / f"{name}.lmdb" for name in names], ImageSettings("slices", 32), 0, 0)


def test_batches_go_on_where_they_stopped_and_two_sets_are_not_paired(tmp_path):
    for i in range(6):
        save(tmp_path / f"set/{i}.png", np.full((8, 8), 10 * i, np.uint8))
    images = read_images(tmp_path / "set", SETTINGS)

    def order(seed, start, count):
        stream = itertools.islice(batches(images, 2, seed, start), count)
        return [round((v.item() + 1) * 12.75) for batch in stream for v in batch[:, 0, 0, 0]]

    assert sorted(order(0, 0, 3)) == list(range(6))
    assert order(0, 4, 4) == order(0, 0, 6)[4:]
    assert order(0, 0, 3) != order(1, 0, 3)


def test_a_device_hands_out_the_same_images(slices32, tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):                                            # 16 bits: half of them would be negative as int16
        save(tmp_path / f"set/{i}.png", rng.integers(0, 65536, (8, 8)).astype(np.uint16))
    sets = [read_images(tmp_path / "set", SETTINGS), read_slices(slices32, "train", ImageSettings("slices", 32))]
    assert sets[0].pixels.max() > 40_000 and sets[1].pixels.min() < 0
    for pictures in sets:
        assert torch.equal(pictures.on("cpu")([2, 0]), pictures[[2, 0]])


def test_slices_keep_scan_and_slice_numbers(slices32):
    settings = ImageSettings("slices", 32)
    pictures = read_slices(slices32, "train", settings, {"head1"})
    source = SliceDataset(slices32, "train")
    assert set(pictures.units) == {"head1"} and pictures.names[0] == "head1/00" and len(pictures) == len(source) // 2
    np.testing.assert_array_equal(pictures.pixels[0, 0], source.scan(1)["hu"][0])
    x = pictures[[0, 1]]
    assert x.shape == (2, 3, 32, 32) and -1 <= x.min() < x.max() <= 1


def test_databases_are_checked(slices32, tmp_path):
    with pytest.raises(DatasetError, match="slices of 32 x 32 cannot be shrunk by a whole factor to the network's 64"):
        read_slices(slices32, "train", ImageSettings("slices", 64))
    with pytest.raises(DatasetError, match="prepared with other settings"):
        read_slices(slices32, "train", ImageSettings("slices", 32, slices={"slab_mm": 7}))
    listed = tmp_path / "scans.txt"
    for ids in ("head0\nhead9\n", "head9\n"):
        listed.write_text(ids)
        with pytest.raises(DatasetError, match="1 scans are not in .*the first: head9"):
            load_sources([slices32], ImageSettings("slices", 32), "train", listed)
    with pytest.raises(DatasetError, match="folders of images only, or databases only"):
        load_training([slices32], [tmp_path], ImageSettings("slices", 32), 0.1, 0)


def test_a_databases_validation_split_is_held_out(slices32, tmp_path):
    listed = tmp_path / "scans.txt"
    listed.write_text("head1\n")
    data = load_training([slices32], [slices32], ImageSettings("slices", 32), 0.1, 0, mixed_scans=listed)
    assert set(data.healthy.units) == {"head0", "head1"} and set(data.mixed.units) == {"head1"}
    assert set(data.held_out.units) == {"head2"} and data.healthy.settings.slices["slab_mm"] == 5
