"""Key slices as pictures, for viewers that show nothing else: the slice, the outline, 'research only' burned in."""

from __future__ import annotations

import math

import numpy as np
from highdicom.sc import SCImage
from highdicom.sr.coding import CodedConcept
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from ct.derived import LONG_WARNING, LOSSY
from ct.picture import mark, square_shape
from detect.dicom_out.common import Case

LONGER, SHORTER = 512, 256                # smaller sides are enlarged to at least these: the text must be readable
LINE = 1.3                                # from one line of text to the next, in font sizes
TEXT_RGB = (255, 220, 0)


def build(case: Case, number: int) -> SCImage:
    """The picture of key slice `number` (from 0) in radiological display, RGB."""
    k = case.key_slices[number]
    picture = draw(case.scan.hu[k], case.result.mask[k], [
        "RESEARCH ONLY", "unverified, not for diagnosis",
        f"slice {k} of 0 to {len(case.scan.hu) - 1} from below, score {case.result.slice_scores[k]:.3g}"],
        case.scan.pixel_spacing_mm)
    ds = SCImage(
        picture, "RGB", 8, "PATIENT", case.images[0].StudyInstanceUID, patient_orientation=("L", "P"),
        **dict.fromkeys(("patient_id", "patient_name", "patient_birth_date", "patient_sex", "accession_number",
                         "study_id", "referring_physician_name"), ""),
        **case.header_of("pictures", "key slices", number + 1))
    ds.ConversionType = "WSD"                         # made by software; the library says digitised film or interface
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


def draw(hu: np.ndarray, mask: np.ndarray, lines: list[str],
         pixel_spacing_mm: tuple[float, float] | None = None) -> np.ndarray:
    """uint8 [h, w, 3]: a slice [H, W] with the mask's outline, text in the upper left corner, sides marked.

    Its pixels are square, so that nothing need say otherwise; its sides are LONGER and SHORTER or more.
    """
    shape = square_shape(hu.shape, pixel_spacing_mm)
    scale = max(1, math.ceil(LONGER / max(shape)), math.ceil(SHORTER / min(shape)))
    height, width = (round(length * scale) for length in shape)
    picture = Image.fromarray(mark(hu, mask)).resize((width, height), Image.Resampling.NEAREST)
    pen, size = ImageDraw.Draw(picture), _font_size(width, height, lines)
    font = ImageFont.load_default(size)
    for row, line in enumerate(lines):
        pen.text((size // 2, size // 2 + row * LINE * size), line, TEXT_RGB, font)
    for side, anchor, x in (("R", "lm", size // 2), ("L", "rm", width - size // 2)):
        pen.text((x, height / 2), side, TEXT_RGB, font, anchor=anchor)
    return np.asarray(picture)


def _font_size(width: int, height: int, lines: list[str]) -> int:
    """A 32nd of the height, or what the longest line fits the width with, margins of half a size on both sides."""
    size = height // 32
    while max(map(ImageFont.load_default(size).getlength, lines)) + size > width:
        size -= 1
    return size
