from __future__ import annotations

from types import SimpleNamespace

import nibabel as nib
import numpy as np

from detect.outputs import STEPS, write_maps
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
