from __future__ import annotations

from types import SimpleNamespace

import nibabel as nib
import numpy as np
from PIL import Image

from ct.picture import save_png
from ct.scan import Scan
from ct.slab import to_slabs
from detect import outputs
from detect.outputs import STEPS, write_maps, write_overlays
from tests.helpers import synthetic_scan


def test_maps_are_stored_in_steps_and_read_back_to_half_of_one(tmp_path):
    scan, brain = synthetic_scan(slices=3, size=24, spacing_mm=(8.0, 7.0, 7.0))
    rng = np.random.default_rng(0)
    maps = {name: rng.normal(0, size, scan.hu.shape).astype(np.float32)
            for name, size in (("reconstruction", 40), ("residual", 10), ("anomaly", 2))}
    maps |= {"mask": maps["residual"] > 10, "brain": brain}
    projection = SimpleNamespace(scan=scan, reconstruction_hu=maps["reconstruction"], residual_hu=maps["residual"],
                                 **{name: maps[name] for name in ("anomaly", "mask", "brain")})
    assert write_maps(tmp_path, projection) == []
    for name, volume in maps.items():
        image = nib.load(tmp_path / f"{name}.nii.gz")
        found = image.get_fdata().transpose(2, 1, 0)
        if volume.dtype == bool:
            assert image.get_data_dtype() == np.uint8
            np.testing.assert_array_equal(found, volume)
        else:
            error = np.abs(found - volume).max()
            assert image.get_data_dtype() == np.int16
            assert 0.3 * STEPS[name] < error < 0.5001 * STEPS[name]              # in steps, and no coarser ones


def test_two_slabs_that_are_nearest_to_one_slice_give_one_picture(tmp_path, monkeypatch):
    """Two threads wrote one file at once. The pictures show where slabs lie: those of the upper one are 30 HU here."""
    position = np.array([0, 0.84, 4.76, 8.49, 9.97, 14.06, 14.8, 16.68, 17.79, 20.14, 23.91, 25.35, 26.07])
    scan = Scan("uneven", np.zeros((13, 16, 16), np.float32), position, (1.0, 1.0))
    slabs = to_slabs(scan, slab_mm=3.0)
    nearest = [int(np.abs(position - mm).argmin()) for mm in slabs.scan.position_mm]
    assert len(set(nearest)) == len(nearest) - 1
    upper = max(slab for slab, i in enumerate(nearest) if nearest.count(i) > 1)
    slabs.scan.hu[upper] = 30
    maps = {name: np.zeros((13, 16, 16), np.float32) for name in ("reconstruction_hu", "residual_hu")}
    projection = SimpleNamespace(scan=scan, mask=np.zeros((13, 16, 16), bool), **maps, working=SimpleNamespace(
        slabs=slabs, kept=np.ones(len(nearest), bool)))
    written = []
    monkeypatch.setattr(outputs, "save_png", lambda path, picture: written.append(path) or save_png(path, picture))
    assert write_overlays(tmp_path, projection) == [] and len(written) == len(set(written))
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "overlay").iterdir()}
    assert sorted(pictures) == [f"{i:02d}" for i in sorted(set(nearest))]
    assert [name for name in pictures if pictures[name] != pictures[f"{nearest[0]:02d}"]] == [f"{nearest[upper]:02d}"]


def test_an_overlay_of_oblong_pixels_is_as_the_head_is(tmp_path):
    """A head in rows 2 mm apart was squeezed to half of its height."""
    scan = Scan("oblong", np.zeros((2, 16, 16), np.float32), np.array([0.0, 5.0]), (2.0, 1.0))
    slabs, maps = to_slabs(scan, slab_mm=5.0), np.zeros((2, 16, 16), np.float32)
    projection = SimpleNamespace(scan=scan, mask=maps > 0, reconstruction_hu=maps, residual_hu=maps,
                                 working=SimpleNamespace(slabs=slabs, kept=np.ones(2, bool)))
    write_overlays(tmp_path, projection)
    with Image.open(tmp_path / "overlay" / "00.png") as picture:
        assert picture.size == (4 * 16, 32)
