"""What is marked, as a binary DICOM Segmentation on the source's frames."""

from __future__ import annotations

from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes

from detect.dicom_out.common import LONG_WARNING, MANUFACTURER, Case

TRACKING_ID = "Differs from the closest normal"         # one for the scan: SEG and SR name the same
TRACKING_WORD = "tracking"


def build(case: Case) -> Segmentation:
    """The mask, one segment; only frames with a marked pixel."""
    identity = case.identity
    algorithm = AlgorithmIdentificationSequence(
        identity.name, codes.DCM.ArtificialIntelligence, identity.version, source=MANUFACTURER,
        parameters={"weights_sha256": identity.weights_hash})
    segment = SegmentDescription(
        1, TRACKING_ID, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "AUTOMATIC", algorithm,
        tracking_uid=case.uid(TRACKING_WORD), tracking_id=TRACKING_ID, anatomic_regions=[codes.SCT.Brain])
    segment.SegmentDescription = LONG_WARNING
    return case.finish(Segmentation(
        case.images, case.on_source(case.result.mask), "BINARY", [segment], content_label="RESEARCH",
        content_description=LONG_WARNING, **case.header("seg", "marked regions")))
