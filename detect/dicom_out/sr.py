"""The finding and its measurements as a Comprehensive 3D SR, TID 1500.

One measurement group: of the segment (TID 1411) where something is marked, of the scan (TID 1501) where nothing is.
A negative is a result: the finding is then absent.
"""

from __future__ import annotations

from highdicom.seg import Segmentation
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    ReferencedSegment,
    SourceImageForMeasurement,
    SourceSeriesForSegmentation,
    TrackingIdentifier,
    VolumetricROIMeasurementsAndQualitativeEvaluations,
)
from pydicom.sr.codedict import codes

from ct.derived import MANUFACTURER
from detect.dicom_out.common import TRACKING_ID, Case
from detect.scores import rounded_down

CT_HEAD = CodedConcept("24725-4", "LN", "CT Head")
MILLILITER = CodedConcept("ml", "UCUM", "milliliter")
PRESENCE = {True: codes.DCM.Present, False: codes.DCM.Absent, None: codes.DCM.PresenceUndetermined}


def build(case: Case, segmentation: Segmentation | None) -> Comprehensive3DSR:
    """The report; it refers to the segmentation and, with each key slice's score, to that slice."""
    # The library repeats what every image's header says, 0.03 s of CPU time each: that of the key slices is enough
    library = [case.reference(k)[0] for k in case.key_slices] if len(case.images) > 1 else None
    report = MeasurementReport(
        ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, observer(case))), CT_HEAD,
        [_group(case, segmentation)], referenced_images=library)
    evidence = [*case.images, *([] if segmentation is None else [segmentation])]
    return case.finish(Comprehensive3DSR(
        evidence, report, is_complete=True, is_final=False, is_verified=False,
        **case.header_of("sr", "report")))


def observer(case: Case) -> DeviceObserverIdentifyingAttributes:
    """TID 1004. It has no field for a version: that stands in the name, as in the algorithm's identification."""
    identity = case.identity
    return DeviceObserverIdentifyingAttributes(
        identity.maker.device_uid, f"{MANUFACTURER} {identity.version}", MANUFACTURER, identity.name,
        identity.weights_hash)


def _group(case: Case, segmentation: Segmentation | None):
    identity, result = case.identity, case.result
    parameters = [f"weights_sha256={identity.weights_hash}"]
    parameters += [] if result.threshold is None else [f"threshold={result.threshold:.6g}"]
    parameters += [f"settings={identity.settings}"] if identity.settings else []
    shared = dict(
        tracking_identifier=TrackingIdentifier(case.tracking_uid, TRACKING_ID),
        finding_type=codes.SCT.Lesion, finding_category=codes.SCT.MorphologicallyAbnormalStructure,
        algorithm_id=AlgorithmIdentification(identity.name, identity.version, parameters,
                                             codes.DCM.ArtificialIntelligence, MANUFACTURER),
        finding_sites=[FindingSite(codes.SCT.Brain)], measurements=_measurements(case),
        qualitative_evaluations=[QualitativeEvaluation(
            codes.DCM.PresenceOfProperty, PRESENCE[None if result.flagged is None else bool(result.flagged)])])
    if segmentation is None:
        return MeasurementsAndQualitativeEvaluations(**shared)
    series = SourceSeriesForSegmentation(case.images[0].SeriesInstanceUID)
    return VolumetricROIMeasurementsAndQualitativeEvaluations(referenced_segment=ReferencedSegment(
        segmentation.SOPClassUID, segmentation.SOPInstanceUID, 1, source_series=series), **shared)


def _measurements(case: Case) -> list[Measurement]:
    result = case.result
    measured = [Measurement(codes.SCT.Score, _rounded(result.score, 6), case.identity.unit)]
    if result.percentile is not None:
        measured.append(Measurement(codes.DCM.PercentileRankingOfMeasurement, rounded_down(result.percentile),
                                    codes.UCUM.Percent))
    if result.anomalous_ml is not None:
        measured.append(Measurement(codes.SCT.Volume, _rounded(result.anomalous_ml, 3), MILLILITER))
    for k in case.key_slices:
        image, frames = case.reference(k)
        source = SourceImageForMeasurement(image.SOPClassUID, image.SOPInstanceUID, frames)
        measured.append(Measurement(codes.SCT.Score, _rounded(result.slice_scores[k], 6), case.identity.unit,
                                    referenced_images=[source]))
    return measured


def _rounded(value: float, digits: int) -> float:
    """To so many significant digits: of scores as many as the tables hold, of others what may mean something."""
    return float(f"{value:.{digits}g}")
