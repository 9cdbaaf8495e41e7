"""What is marked, as a binary DICOM Segmentation on the source's frames."""

from __future__ import annotations

from highdicom import AlgorithmIdentificationSequence
from highdicom.seg import Segmentation, SegmentDescription
from pydicom.sr.codedict import codes

from ct.derived import MANUFACTURER
from detect.dicom_out.common import TRACKING_ID, Case


def build(case: Case) -> Segmentation:
    """The mask, one segment; only frames with a marked pixel."""
    identity = case.identity
    algorithm = AlgorithmIdentificationSequence(
        identity.name, codes.DCM.ArtificialIntelligence, identity.version, source=MANUFACTURER,
        parameters={"weights_sha256": identity.weights_hash})
    segment = SegmentDescription(
        1, TRACKING_ID, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "AUTOMATIC", algorithm,
        tracking_uid=case.tracking_uid, tracking_id=TRACKING_ID, anatomic_regions=[codes.SCT.Brain])
    return case.segmentation(case.result.mask, segment, **case.header_of("seg", "marked regions"))
