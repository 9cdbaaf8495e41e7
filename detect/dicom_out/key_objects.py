"""The key slices and the other objects as a Key Object Selection: one thing to open, all results with it."""

from __future__ import annotations

from collections.abc import Sequence

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from highdicom.sr import ObserverContext
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ct.derived import LONG_WARNING
from detect.dicom_out.common import Case
from detect.dicom_out.sr import observer


def build(case: Case, objects: Sequence[Dataset]) -> KeyObjectSelectionDocument:
    """Key slices of the source, highest score first (of a multi-frame source its frames), then the objects."""
    images = list({image.SOPInstanceUID: image for image, _ in map(case.reference, case.key_slices)}.values())
    selected = [*images, *objects]
    frames = [frame for _, of_slice in map(case.reference, case.key_slices) for frame in of_slice or ()]
    content = KeyObjectSelection(
        codes.DCM.OfInterest, selected,
        observer_device_context=ObserverContext(codes.DCM.Device, observer(case)), description=LONG_WARNING)
    if frames:                                        # the library has no argument for them
        source, = (item for item in content[0].ContentSequence if "ReferencedSOPSequence" in item
                   and item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == images[0].SOPInstanceUID)
        source.ReferencedSOPSequence[0].ReferencedFrameNumber = frames
    return case.finish(KeyObjectSelectionDocument(selected, content, **case.header_of("key-objects", "key objects")))
