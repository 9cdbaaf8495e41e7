"""The anomaly map as a DICOM Parametric Map, float32, on the source's frames."""

from __future__ import annotations

import numpy as np
from highdicom import VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from pydicom.sr.codedict import codes

from ct.derived import LONG_WARNING
from detect.dicom_out.common import Case


def build(case: Case) -> ParametricMap:
    """All slices; stored values are the map's own, and the real-world mapping is the identity."""
    values = case.on_source(case.result.anomaly.astype(np.float32))
    low, high = float(values.min()), float(values.max())
    mapping = RealWorldValueMapping(
        "ANOMALY", "Difference from the closest normal, as the model scores it", case.identity.unit, (low, high),
        slope=1.0, intercept=0.0, quantity_definition=codes.SCT.Score)
    window = VOILUTTransformation(window_center=(low + high) / 2, window_width=max(high - low, 1.0))
    return case.finish(ParametricMap(
        case.images, values, contains_recognizable_visual_features=False, real_world_value_mappings=[mapping],
        voi_lut_transformations=[window], content_qualification="RESEARCH", content_label="RESEARCH",
        content_description=LONG_WARNING, **case.header_of("map", "anomaly map")))
