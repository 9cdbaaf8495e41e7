"""Key slices as pictures, for viewers that show nothing else: the slice, the outline, 'research only' burned in."""

from __future__ import annotations

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr.coding import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ct.derived import LONG_WARNING, LOSSY
from ct.picture import mark
from detect.dicom_out.common import Case

SIDE = 512                                # the shorter pictures are enlarged to it: the text must be readable


def build(case: Case, number: int) -> SCImage:
    """The picture of key slice `number` (from 0) in radiological display, RGB."""
    k = case.key_slices[number]
    picture = draw(case.scan.hu[k], case.result.mask[k], [
        "RESEARCH ONLY", "unverified, not for diagnosis",
        f"slice {k + 1} of {len(case.scan.hu)} from below, score {case.result.slice_scores[k]:.3g}"])
    ds = SCImage(
        picture, "RGB", 8, "PATIENT", case.images[0].StudyInstanceUID, patient_orientation=("L", "P"),
        **dict.fromkeys(("patient_id", "patient_name", "patient_birth_date", "patient_sex", "accession_number",
                         "study_id", "referring_physician_name"), ""),
        **case.header_of("pictures", "key slices", number + 1))
    ds.StudyDate = ds.StudyTime = ""
    ds.DateOfSecondaryCapture, ds.TimeOfSecondaryCapture = ds.ContentDate, ds.ContentTime
    ds.DerivationDescription, ds.ImageComments = LONG_WARNING, LONG_WARNING
    # What is burned in here names nobody; what the source's pixels hold is shown, and may
    ds.BurnedInAnnotation = "YES" if case.burned_in else "NO"
    image, frames = case.reference(k)
    for keyword in LOSSY:
        if keyword in image:
            ds[keyword] = image[keyword]
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = image.SOPClassUID, image.SOPInstanceUID
    if frames is not None:
        source.ReferencedFrameNumber = frames[0]
    source.PurposeOfReferenceCodeSequence = [CodedConcept.from_code(
        codes.DCM.SourceImageForImageProcessingOperation)]
    ds.SourceImageSequence = [source]
    return case.finish(ds)


def draw(hu: np.ndarray, mask: np.ndarray, lines: list[str]) -> np.ndarray:
    """uint8 [H, W, 3]: a slice [H, W] with the mask's outline, text in the upper left corner, sides marked."""
    picture = Image.fromarray(mark(hu, mask))
    scale = max(1, -(-SIDE // max(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    pen, size = ImageDraw.Draw(picture), picture.height // 32
    font = ImageFont.load_default(size)
    for row, line in enumerate(lines):
        pen.text((size // 2, size // 2 + row * 1.3 * size), line, (255, 220, 0), font)
    for side, anchor, x in (("R", "lm", size // 2), ("L", "rm", picture.width - size // 2)):
        pen.text((x, picture.height / 2), side, (255, 220, 0), font, anchor=anchor)
    return np.asarray(picture)
