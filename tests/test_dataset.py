"""The slice database: what goes in comes out, damage is found before it hurts."""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
import time
import zlib

import lmdb
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import dataset
from common.files import ABANDONED_S, remove_abandoned
from dataset import DatasetError, ScanRecord, SliceDataset, SliceWriter, decode_slice, encode_slice, is_same
from gan import batches

N = 16


def random_scan(seed: int, slices: int = 3, size: int = N) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hu = rng.integers(-20, 101, (slices, size, size)).astype(np.float32)
    return hu, rng.random((slices, size, size)) < 0.5, np.arange(slices)[::-1] * 5.0 + 1.25


@pytest.fixture
def database(tmp_path):
    """Three scans of three slices: a and c train, b val."""
    path = tmp_path / "slices.lmdb"
    with SliceWriter(path, {"slab_mm": 5.0}) as writer:
        for number, name in enumerate("abc"):
            hu, brain, mm = random_scan(number)
            record = ScanRecord.encode(name, hu, brain, mm, np.array([4, 5, 6]), "slices", (f"note {name}",))
            writer.add(record, "val" if name == "b" else "train", f"patient {name}")
    return path


def flip_bit(path, offset, bit=0):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_slice_survives_the_round_trip_at_the_limits_of_16_bit():
    hu = np.array([[-1024, 32767, 0, -20], [100, -1, 5, 32767], [-1024, -1024, 180, 7], [1, 2, 3, 4]])
    brain = np.eye(4, dtype=bool)
    decoded, mask = decode_slice(encode_slice(hu, brain), 4)
    assert decoded.dtype == np.int16 and (decoded == hu).all()
    assert mask.dtype == bool and (mask == brain).all()


def test_hu_are_rounded_to_the_nearest_integer():
    hu = np.array([[0.4, 0.6], [-19.6, 99.51]], np.float32)
    assert decode_slice(encode_slice(hu, np.ones((2, 2), bool)), 2)[0].tolist() == [[0, 1], [-20, 100]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1025, 32768])
def test_hu_that_do_not_fit_are_refused(bad):
    with pytest.raises(DatasetError, match="--hu-clip"):
        encode_slice(np.array([[0.0, bad]] * 2), np.ones((2, 2), bool))


def test_dataset_returns_what_was_written(database):
    data = SliceDataset(database, "val")
    hu, brain, mm = random_scan(1)
    assert len(data) == 3 and data.scan_ids == ["b"] and data.size == N
    item = data[1]
    assert item["hu"].dtype == torch.int16 and item["brain"].dtype == torch.bool
    assert (item["hu"].numpy() == hu[1]).all() and (item["brain"].numpy() == brain[1]).all()
    assert item["below_vertex_mm"] == 6.25 and item["scan"] == 0
    scan = data.scan(0)
    assert (scan["hu"].numpy() == hu).all() and (scan["brain"].numpy() == brain).all()
    assert scan["below_vertex_mm"].tolist() == [11.25, 6.25, 1.25]


def test_scan_numbers_count_within_the_split(database):
    train, everything = SliceDataset(database, "train"), SliceDataset(database, "all")
    assert train.scan_ids == ["a", "c"] and [train[i]["scan"] for i in range(len(train))] == [0, 0, 0, 1, 1, 1]
    assert everything.scan_ids == ["a", "b", "c"]
    assert (train.scan(1)["hu"] == everything.scan(2)["hu"]).all()


def test_manifest_tells_how_the_database_was_made(database):
    manifest = dataset.verify(database)
    assert manifest["size"] == N and manifest["format_version"] == 1 and manifest["settings"] == {"slab_mm": 5.0}
    assert manifest["counts"] == {"train": {"scans": 2, "slices": 6, "loose": 0},
                                  "val": {"scans": 1, "slices": 3, "loose": 0}}
    assert manifest["scans"][1] == {"scan_id": "b", "patient": "patient b", "split": "val", "source": "slices",
                                    "first": 3, "slices": [4, 5, 6], "below_vertex_mm": [11.25, 6.25, 1.25],
                                    "notes": ["note b"]}


def test_pickled_and_read_by_workers(database):
    data = SliceDataset(database, "all")
    data[0]                                                  # the parent holds the file open when the workers fork
    copy = pickle.loads(pickle.dumps(data))
    assert (copy[4]["hu"] == data[4]["hu"]).all()
    loaded = torch.cat([batch["hu"] for batch in DataLoader(data, batch_size=2, num_workers=2)])
    assert (loaded == torch.stack([data[i]["hu"] for i in range(9)])).all()


@pytest.mark.parametrize("device, pinned", [("cpu", False), ("cuda:0", True)])
def test_batches_are_pinned_for_a_gpu_of_the_run_alone(database, device, pinned, monkeypatch):
    """--device cpu pinned them where there was a GPU."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(batches, "DataLoader", lambda *_, pin_memory, **__: asked.append(pin_memory) or [{"hu": None}])
    data, device = SliceDataset(database), torch.device(device)
    next(batches.image_batches(data, 2, 0, 0, device=device))
    next(batches.slice_batches(data, 2, 0, 0, device=device))
    assert asked == [pinned, pinned]


def test_a_replaced_file_is_not_read_through_the_old_map(database):
    SliceDataset(database)[0]
    hu, brain, mm = random_scan(9, slices=40)
    with SliceWriter(database, {}, overwrite=True) as writer:
        writer.add(ScanRecord.encode("new", hu, brain, mm), "train", "p")
    assert (SliceDataset(database)[39]["hu"].numpy() == hu[39]).all()


def test_the_map_grows_with_the_data(tmp_path, monkeypatch):
    opened = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **k: opened(*a, **{**k, "map_size": min(k["map_size"], 1 << 16)}))
    hu, brain, mm = random_scan(3, slices=8, size=128)       # about 100 kB into a map of 64 kB
    with SliceWriter(tmp_path / "x.lmdb", {}) as writer:
        writer.add(ScanRecord.encode("a", hu, brain, mm), "train", "a")
    monkeypatch.undo()
    assert (SliceDataset(tmp_path / "x.lmdb").scan(0)["hu"].numpy() == hu).all()


def test_a_name_that_is_no_utf8_is_written_and_read(tmp_path):
    """It ended in a traceback, after the scans were found."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xcf\xe5.lmdb")
    hu, brain, mm = random_scan(3, slices=4)
    with SliceWriter(path, {}) as writer:
        writer.add(ScanRecord.encode("a", hu, brain, mm), "train", "a")
    assert (SliceDataset(path).scan(0)["hu"].numpy() == hu).all()


# ---- damage

def test_every_flipped_bit_is_found_on_opening(database):
    """100 of them, the first and last bytes included; the last 20 are the seal's own."""
    size, rng = os.path.getsize(database), np.random.default_rng(0)
    for offset in [0, *range(size - 20, size), *rng.integers(0, size, 79)]:
        bit = int(rng.integers(8))
        flip_bit(database, offset, bit)
        with pytest.raises(DatasetError):
            SliceDataset(database)
        flip_bit(database, offset, bit)
    dataset.verify(database)


def test_every_truncated_file_says_so(database):
    """100 lengths. One too short to tell an LMDB by its first bytes is no database at all."""
    size, rng = os.path.getsize(database), np.random.default_rng(0)
    for length in sorted([*range(10), *rng.integers(0, size - 20, 70), *range(size - 20, size)], reverse=True):
        os.truncate(database, length)
        with pytest.raises(DatasetError, match="truncated" if length >= 20 else "not a slice database"):
            SliceDataset(database, check=False)


def test_an_altered_record_fails_its_own_check_even_when_the_file_was_not_checked(database):
    with open(database, "rb") as file:
        whole = file.read()
    payload = encode_slice(*[part[2] for part in random_scan(0)[:2]])
    flip_bit(database, whole.index(payload) + 10)
    data = SliceDataset(database, check=False)
    data[1]
    with pytest.raises(DatasetError, match="record 2 is altered"):
        data[2]


def test_verify_finds_records_swapped_by_a_program_that_keeps_their_checks(database, tmp_path):
    copy = tmp_path / "swapped.lmdb"
    copy.write_bytes(database.read_bytes()[:-20])
    with lmdb.open(str(copy), subdir=False, lock=False, map_size=1 << 24) as env, env.begin(write=True) as change:
        first, second = change.get(b"00000000"), change.get(b"00000001")
        change.put(b"00000000", second)
        change.put(b"00000001", first)
    dataset._seal(copy)
    with pytest.raises(DatasetError, match="not where the manifest has it"):
        dataset.verify(copy)


def test_files_of_another_kind_are_named_as_such(tmp_path, database):
    with pytest.raises(DatasetError, match="no such file"):
        SliceDataset(tmp_path / "none.lmdb")
    with pytest.raises(DatasetError, match=f"{tmp_path}: a folder; .* python prepare.py {tmp_path} --out"):
        SliceDataset(tmp_path)
    for content in (b"", b"hello", b"x" * 5000):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(DatasetError, match="not a slice database"):
            SliceDataset(tmp_path / "text")
    with lmdb.open(str(tmp_path / "foreign"), subdir=False, lock=False) as env, env.begin(write=True) as change:
        change.put(b"key", b"value")
    with pytest.raises(DatasetError, match="another program"):
        SliceDataset(tmp_path / "foreign")
    with pytest.raises(DatasetError, match="split must be"):
        SliceDataset(database, "test")


def test_another_format_version_is_refused(database, monkeypatch):
    monkeypatch.setattr(dataset, "FORMAT_VERSION", 2)
    with pytest.raises(DatasetError, match="format version 1, this program reads 2"):
        SliceDataset(database)


def test_an_empty_split_is_refused(tmp_path):
    hu, brain, mm = random_scan(0)
    with SliceWriter(tmp_path / "x.lmdb", {}) as writer:
        writer.add(ScanRecord.encode("a", hu, brain, mm), "train", "a")
    with pytest.raises(DatasetError, match="no slices in split 'val'"):
        SliceDataset(tmp_path / "x.lmdb", "val")


# ---- writing

def test_nothing_is_left_behind_when_writing_fails(tmp_path):
    with pytest.raises(KeyError):
        with SliceWriter(tmp_path / "x.lmdb", {}) as writer:
            writer.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_have_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    """Slices of patients stayed beside --out for ever. A living writer may add nothing for hours."""
    out = tmp_path / "x.lmdb"
    with SliceWriter(out, {}) as living:
        living.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
        begun, = tmp_path.iterdir()
        names = {".x.lmdb.1234.partial": 60, ".x.lmdb.0a.partial": -60, ".other.lmdb.0b.partial": 60, begun.name: 60}
        for name, more_s in names.items():
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() - ABANDONED_S - more_s,) * 2)
        SliceWriter(out, {})
        left = {path.name for path in tmp_path.iterdir()}
        assert left == {begun.name, ".x.lmdb.0a.partial", ".other.lmdb.0b.partial"}
        assert SliceWriter(out, {})._partial != begun            # nor is it taken for one's own
    os.utime(out, (0, 0))
    remove_abandoned(tmp_path, "x.lmdb")                         # the lock is let go of
    assert not out.exists()


def test_the_writer_refuses_what_cannot_be_right(database, tmp_path):
    with pytest.raises(DatasetError, match="--overwrite"):
        SliceWriter(database, {})
    with pytest.raises(DatasetError, match="does not exist"):
        SliceWriter(tmp_path / "no" / "x.lmdb", {})
    with SliceWriter(tmp_path / "y.lmdb", {}) as writer:
        writer.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
        with pytest.raises(DatasetError, match="unique"):
            writer.add(ScanRecord.encode("a", *random_scan(1)), "train", "a")
        with pytest.raises(DatasetError, match="size 8"):
            writer.add(ScanRecord.encode("b", *random_scan(1, size=8)), "train", "b")
        with pytest.raises(DatasetError, match="split must be"):
            writer.add(ScanRecord.encode("b", *random_scan(1)), "test", "b")


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("taken", ["file", "folder", "link"])
def test_of_two_runs_to_one_place_the_second_replaces_nothing(tmp_path, monkeypatch, links, taken):
    """The first one's database was replaced, without --overwrite and without a word. Some disks know no hard links."""
    def no_links(*args):
        raise PermissionError(1, "Operation not permitted")
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    out = tmp_path / "x.lmdb"
    with pytest.raises(DatasetError, match=r"x\.lmdb has been taken .* kept as .*x\.[0-9a-f]{8}\.lmdb: .* --mixed"):
        with SliceWriter(out, {}, flag="--mixed") as second:
            second.add(ScanRecord.encode("b", *random_scan(1)), "train", "b")
            if taken == "file":
                with SliceWriter(out, {}) as first:
                    first.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
            elif taken == "folder":
                out.mkdir()
            else:
                out.symlink_to("nowhere")
    kept, = set(tmp_path.iterdir()) - {out}
    assert [scan["scan_id"] for scan in dataset.verify(kept)["scans"]] == ["b"]
    if taken == "file":
        assert [scan["scan_id"] for scan in dataset.verify(out)["scans"]] == ["a"]
    with pytest.raises(DatasetError, match="--overwrite" if taken != "folder" else "is a folder"):
        SliceWriter(out, {})


def test_a_folder_that_has_taken_the_place_of_a_database_costs_no_work(tmp_path):
    with pytest.raises(DatasetError, match="x.lmdb has been taken"):
        with SliceWriter(tmp_path / "x.lmdb", {}, overwrite=True) as writer:
            writer.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
            (tmp_path / "x.lmdb").mkdir()
    kept, = tmp_path.glob("x.*.lmdb")
    assert len(dataset.verify(kept)["scans"]) == 1


def test_the_same_input_gives_the_same_bytes(tmp_path):
    for name in ("x", "y"):
        with SliceWriter(tmp_path / name, {"a": 1}) as writer:
            writer.add(ScanRecord.encode("a", *random_scan(0)), "train", "a")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_databases_of_as_many_scans_and_slices_are_the_same():
    """Also where one tells of no loose slices: an earlier version's, such as that of models/phantom-128."""
    train, val = {"scans": 5, "slices": 120}, {"scans": 2, "slices": 49}
    now = {"digest": "1", "counts": {"train": train | {"loose": 0}, "val": val | {"loose": 0}}}
    before = {"digest": "2", "counts": {"train": train, "val": val}}
    assert is_same(now, before) and is_same(before, now) and is_same(before, now, "val")
    more = {"digest": "1", "counts": now["counts"] | {"train": train | {"loose": 3}}}
    assert not is_same(now, more) and is_same(now, more, "val") and not is_same(before, more, "train")


def test_the_same_scans_split_otherwise_are_told_apart_where_they_are_as_many(database, tmp_path):
    """By the digest of the held-out records, which databases of earlier versions do not have: there by the counts."""
    with dataset._environment(database).begin() as transaction:
        bodies = [transaction.get(b"%08d" % i)[4:] for i in (3, 4, 5)]                     # of b, after a's three
    facts = SliceDataset(database).facts()
    assert facts["val_digest"] == hashlib.sha256(struct.pack("<3I", *map(zlib.crc32, bodies))).hexdigest()
    with SliceWriter(tmp_path / "other", {"slab_mm": 5.0}) as writer:
        for number, name in enumerate("xyz"):                                              # ids are no part of it
            writer.add(ScanRecord.encode(name, *random_scan(number)), "val" if name == "z" else "train", name)
    other = SliceDataset(tmp_path / "other").facts()
    assert (other["digest"], other["counts"]) == (facts["digest"], facts["counts"])
    assert not is_same(facts, other) and not is_same(facts, other, "val") and is_same(facts, dict(facts))
    assert is_same(facts | {"digest": "of a later version"}, other)
    before = {key: facts[key] for key in ("digest", "counts")}
    assert is_same(before, other) and is_same(other, before)


def test_a_database_of_an_earlier_version_is_that_of_runs_of_both(database):
    """It has no digest of what it holds out; a run on one prepared anew has."""
    data = SliceDataset(database)
    run = {"data": data.known(), "held_out": data.held_out_ids()}
    del data.manifest["val_digest"]
    earlier = {"data": data.known(), "held_out": data.held_out_ids()}
    assert set(earlier["data"]) == {"digest", "counts", "settings"} and set(run["data"]) - set(earlier["data"]) == {
        "val_digest"}
    assert data.unlike(run) is data.unlike(earlier) is SliceDataset(database).unlike(earlier) is None
    assert data.unlike(run | {"held_out": ["a"]}) == "held_out"


def grey_jpeg_like(count: int, size: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Slices as grey JPEGs give them: a head with 8 HU of correlated noise, saturated bone, flat air."""
    from scipy import ndimage
    rng = np.random.default_rng(0)
    y, x = (np.indices((size, size)) - size / 2) / size
    radius = np.hypot(y / 0.45, x / 0.37)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, (count, size, size)), (0, 0.7, 0.7))
    hu = np.where(radius < 0.88, 30 + 8 * noise / noise.std(), np.where(radius < 1, 100, -20))
    return np.clip(hu, -20, 100).astype(np.float32), np.broadcast_to(radius < 0.88, hu.shape)


def test_a_thousand_slices_at_256_take_less_than_40_mb_and_are_read_fast():
    hu, brain = grey_jpeg_like(20)
    payloads = [encode_slice(h, b) for h, b in zip(hu, brain)]
    assert sum(map(len, payloads)) / len(payloads) < 40_000
    start = time.process_time()
    for payload in payloads:
        decode_slice(payload, 256)
    assert len(payloads) / (time.process_time() - start) > 150     # goal 500 a second; slack for a busy machine
