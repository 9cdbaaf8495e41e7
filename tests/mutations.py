"""One-line defects that the tests must catch.

    make mutants                                     all of them, some 10 minutes of one CPU core
    python tests/mutations.py train.py percentile    those whose file or defect holds one of these words

A copy of the tree gets one mutant at a time, and the tests named for it must fail there; without it they must pass.
A mutant whose text is not found exactly once is an error: whoever changes such a line writes its mutant anew.
Exit codes: 0 all caught; 1 a mutant survived, does not fit, or keeps its tests from running at all.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("matplotlib.figure", "nibabel", "pydicom", "safetensors.torch", "scipy.ndimage", "skimage.morphology",
             "sklearn.metrics", "torch")   # take longer to import than most of these tests to run
TIMEOUT_S = 1800                           # of one run of tests
VERDICTS = {0: "SURVIVED", 1: "caught"}    # by pytest's exit code; others mean that the tests did not run


@dataclass(frozen=True)
class Mutant:
    """In `file` the text `old`, found once, becomes `new`; `tests`, arguments of pytest, must notice."""

    defect: str
    file: str
    old: str
    new: str
    tests: str


BLEED = "tests/test_known_bleed.py"
MUTANTS = (
    # ---- projector.py and the Python API: what is found in a scan, and how it is written
    Mutant("flagged when below the threshold", "detect/projection.py",
           "else score > threshold", "else score < threshold", BLEED + " -k beyond_all"),
    Mutant("volume 100 times too large", "detect/projection.py", "pixel_spacing_mm) / 1000)", "pixel_spacing_mm) / 10)",
           BLEED + " -k volume"),
    Mutant("mask mirrored", "detect/projection.py",
           "findings.mask.numpy())", "findings.mask.numpy()[..., ::-1].copy())",
           BLEED + " -k mask_lies"),
    Mutant("map with the wrong sign", "detect/projection.py",
           "anomaly=pre.maps", "anomaly=-pre.maps", BLEED + " -k too_dense"),
    Mutant("percentile of minus the score", "detect/calibration.py",
           "torch.tensor([score])", "torch.tensor([-score])", BLEED + " -k beyond_all"),
    Mutant("below_vertex_mm all 0", "detect/projection.py",
           "values_to_scan(pre.standardised", "values_to_scan(0 * pre.standardised", BLEED + " -k know_their_place"),
    Mutant("no warning for a bad reconstruction", "detect/projection.py",
           "if share > TOO_MUCH", "if share > 2", "tests/test_end_to_end.py -k at_fault"),
    Mutant("residual with the wrong sign", "detect/projection.py",
           "residual_hu=pre.maps", "residual_hu=-pre.maps", BLEED + " -k too_dense"),
    Mutant("maps swapped left to right in the world", "ct/geometry.py",
           "np.diag([-1.0, -1.0, 1.0])", "np.diag([1.0, -1.0, 1.0])", BLEED + " -k mask_lies"),
    Mutant("only what is hyperdense is predicted", "detect/surprise.py",
           "combined.abs() > self.mask", "combined > self.mask", "tests/test_anomaly.py -k either_side"),
    Mutant("worklist begins with the lowest score", "detect/folder.py",
           '-row["score"]', 'row["score"]', "tests/test_end_to_end.py -k ranked"),
    Mutant("exit code 0 although scans failed", "projector.py", "in results) else 3", "in results) else 0",
           "tests/test_patient_data.py -k output"),
    Mutant("a broken header's value in the reason", "ct/dicom.py",
           "cannot be read as DICOM ({type(error).__name__})", "cannot be read as DICOM ({error})",
           "tests/test_patient_data.py"),
    Mutant("percentile for other settings than the calibration's", "detect/projection.py",
           "plain(self.settings.comparable()) !=", "plain(self.settings.comparable()) is",
           "tests/test_projector.py -k made_alike"),
    Mutant("results of another calibration go on", "detect/projection.py",
           '"calibration": calibrated if self.calibration else None}', '"calibration": None}',
           "tests/test_projector.py -k another_calibration"),
    Mutant("how a lossy source was compressed is lost", "ct/derived.py",
           '"LossyImageCompression", "LossyImageCompressionRatio",', '"LossyImageCompression",',
           "tests/test_dicom_out.py -k ratio_and_method"),
    Mutant("no threshold, and no word of it", "detect/projection.py",
           "notes = [] if threshold is not None else", "notes = [] if True else",
           "tests/test_projector.py -k note_says_why"),
    Mutant("a threshold that is no number", "projector.py",
           "args.threshold is not None and not math.isfinite(args.threshold)", "False",
           "tests/test_projector.py -k no_number"),
    Mutant("a rate that is refused is named as the lowest", "detect/scores.py",
           "math.ceil(rate / step - 1e-9) * step", "round(rate / step) * step",
           "tests/test_projector.py -k lowest_rate"),
    Mutant("weights of a perceptual distance count for nothing", "detect/search.py",
           'if self.perceptual != "lpips":', "if True:", "tests/test_projector.py -k by_content"),
    Mutant("a reader's own scans, prepared again, calibrate it", "bundling.py",
           'known["counts"].get("val") == dataset.manifest["counts"].get("val"))', "False)",
           "tests/test_latent_stats.py -k known_by_digest"),
    Mutant("a model that is calibrated anew forgets its reader's scans", "bundling.py",
           'if "readers" in provenance and any(', "if any(() and ", "tests/test_train_reader.py -k leave_it_out"),
    Mutant("how close the normal comes is taken after the noise", "detect/search.py",
           "drawn_hu=by_code)", "drawn_hu=decode(run.image).cpu())", "tests/test_projection.py -k before_texture"),
    Mutant("percentile for another version's scores", "detect/projection.py",
           'meta["versions"][what] != now[what]', 'meta["versions"][what] is None',
           "tests/test_projector.py -k made_alike"),
    Mutant("percentile for scans prepared otherwise", "detect/projection.py",
           "plain(self.preprocessing.to_json()) !=", "plain(self.preprocessing.to_json()) is",
           "tests/test_projector.py -k made_alike"),
    Mutant("query and reconstruction swapped", "detect/residual.py",
           "(query_hu - recon_hu) * brain", "(recon_hu - query_hu) * brain", "tests/test_anomaly.py -k residual"),
    Mutant("votes of the slice below lost", "detect/votes.py",
           "supporters[1:] += exceeds[:-1]", "supporters[1:] += 0 * exceeds[:-1]", "tests/test_anomaly.py -k votes"),
    Mutant("a move towards the normal costs, one away is free", "detect/perceptual.py",
           "p.abs() > p_encoder.abs()", "p.abs() < p_encoder.abs()", "tests/test_losses.py -k prior"),
    Mutant("a peak needs no neighbours", "detect/surprise.py",
           "pool_along_axis(near, positions_mm).amax", "near.amax", "tests/test_anomaly.py -k peak"),
    Mutant("a percentile among scans of another slice spacing", "detect/projection.py",
           "self.spacing_mm[0] / OTHER_SPACING", "self.spacing_mm[0] / 100",
           "tests/test_end_to_end.py -k files_changed"),
    Mutant("what only draws the mask takes the percentile", "detect/settings.py",
           '("method", "reconstruction", "measure", "scoring")',
           '("method", "reconstruction", "measure", "scoring", "mask")', "tests/test_projector.py -k mask_does_not"),
    Mutant("highest slices by number, not by thickness", "detect/scores.py",
           "before = thickness.cumsum(0) - thickness", "before = 0 * thickness", "tests/test_anomaly.py -k weigh"),
    Mutant("along the axis only neighbours count", "detect/surprise.py",
           "mm[:, None] - POOL_MM / 2, mm[:, None] + POOL_MM / 2", "mm[:, None] - 2.5, mm[:, None] + 2.5",
           "tests/test_anomaly.py -k millimetres"),
    # ---- train.py
    Mutant("R1 doubled", "gan/training.py",
           "self.config.r1_gamma / 2", "self.config.r1_gamma", "tests/test_train.py -k weighs"),
    Mutant("path length without its lazy factor", "gan/training.py",
           "path_weight * self.config.path_every", "path_weight", "tests/test_train.py -k weighs"),
    Mutant("mean path length never moves", "gan/training.py",
           "mean, self.config.path_decay", "mean, 0.0", "tests/test_train.py -k weighs"),
    Mutant("path length of the whole batch", "gan/training.py",
           "len(w_plus) // self.config.path_shrink", "len(w_plus)", "tests/test_train.py -k part_of_the_batch"),
    Mutant("averaged generator keeps what it should drop", "gan/training.py", "1 - keep", "keep",
           "tests/test_train.py -k averaged"),
    Mutant("fake images shown without augmentation", "gan/training.py",
           "self.d(self._augment(real)), self.d(self._augment(fake))", "self.d(self._augment(real)), self.d(fake)",
           "tests/test_train.py -k alike"),
    Mutant("styles mixed where they should not be", "gan/training.py",
           "< self.config.mixing", "> self.config.mixing", "tests/test_train.py -k styles"),
    Mutant("a resumed discriminator forgets Adam's averages", "gan/training.py",
           'load_optimiser(self.d_opt, state["d_opt"])', "pass", "tests/test_train.py -k bit_identical"),
    Mutant("all held-out slices measured, however many", "gan/loop.py",
           "min(len(held_out), MOST_HELD_OUT)", "len(held_out)", "tests/test_quality.py -k evenly_spaced"),
    Mutant("no snapshot is the best", "gan/loop.py",
           "distance=swd", "distance=None", "tests/test_train.py -k best_snapshot"),
    Mutant("a style of no numbers passes", "gan/settings.py",
           '"style_dim", "channel_base"', '"channel_base"', "tests/test_config.py -k meant"),
    Mutant("a snapshot that is not there is said to be kept", "gan/runlog.py",
           'is kept in {out}." if snapshot_steps(out) else', 'is kept in {out}." if True else',
           "tests/test_interruptions.py -k before_its_first"),
    Mutant("a run of an older version goes on with other settings", "gan/runlog.py",
           '- set(meta["config"])):', '- set(snapshot.meta["config"])):', "tests/test_healthygan.py -k older_version"),
    Mutant("generator scared of fooling the discriminator", "gan/losses.py",
           "F.softplus(-fake_logits).mean()", "F.softplus(fake_logits).mean()", "tests/test_losses.py -k adversarial"),
    # ---- gan/encoding.py and gan/inpainting.py
    Mutant("no in-domain term", "gan/encoding.py",
           " + self.config.domain * domain", "", "tests/test_train_encoder.py -k sum_of"),
    Mutant("encoder input not corrupted", "gan/encoding.py",
           "self.reconstruct(corrupted, alone)", "self.reconstruct(real, alone)",
           "tests/test_train_encoder.py -k erased_images"),
    Mutant("target corrupted", "gan/encoding.py",
           "features(self._reduced(real))", "features(self._reduced(corrupted))",
           "tests/test_train_encoder.py -k whole"),
    Mutant("adversarial term at full weight", "gan/encoding.py",
           "self.config.adversarial * adversarial", "adversarial", "tests/test_train_encoder.py -k sum_of"),
    Mutant("encoder training's R1 without its interval", "gan/encoding.py",
           "self.config.r1_gamma / 2 * self.config.r1_every", "self.config.r1_gamma / 2",
           "tests/test_train_encoder.py -k weighs"),
    Mutant("coarse noise in bone, too", "gan/augment.py",
           "(hu < SOFT_TISSUE_HU[1])", "(hu > SOFT_TISSUE_HU[0])", "tests/test_train_encoder.py -k coarse"),
    Mutant("what is hidden is seen", "model.py",
           "[images * ~hidden, ", "[images, ", "tests/test_inpainting.py -k cannot_be_seen"),
    Mutant("the mean of nothing counts", "gan/quality.py",
           "if where.any() else []", "if True else []", "tests/test_inpainting.py -k hidden_nowhere"),
    Mutant("a drawing that is not finite passes where nothing is hidden", "gan/quality.py",
           "if not error.isfinite().all():", "if False:", "tests/test_inpainting.py -k hidden_nowhere"),
    Mutant("a run without an adversary does not say so", "gan/encoder_loop.py",
           "config.perceptual_epochs >= config.epochs:", "False:",
           "tests/test_train_encoder.py -k without_an_adversary"),
    Mutant("an encoder's training takes a reader's run", "train_encoder.py",
           'load_run(args.gan, "--gan", "gan", "train.py")', 'load_run(args.gan, "--gan", "reader", "train.py")',
           "tests/test_train_encoder.py -k exits_2"),
    Mutant("hidden pixels weigh no more", "gan/inpainting.py",
           "self.config.hidden * hidden + ", "", "tests/test_inpainting.py -k weigh_as_said"),
    Mutant("what is anomalous is drawn as it is", "detect/inpainting.py",
           "self.draw(self.seen(hu), hidden, bone)", "self.draw(self.seen(hu), ~hidden, bone)",
           "tests/test_inpainting.py -k bleed_is_drawn_anew"),
    Mutant("what is drawn anew is judged as it is drawn", "detect/inpainting.py",
           "torch.where(anomalous, expected_hu, torch.where(hidden, query_hu, normal_hu))", "normal_hu",
           "tests/test_inpainting.py -k judged_by_its_surroundings"),
    Mutant("the rim of what is dark is as wide as that of what is bright", "detect/inpainting.py",
           "found & (smooth > 0)", "found", "tests/test_inpainting.py -k what_is_bright"),
    Mutant("what is not dark is hidden with what is", "detect/inpainting.py",
           "if self.settings.spared:", "if False:", "tests/test_inpainting.py -k spared"),
    Mutant("a hypodense place is drawn anew no further than it is found", "detect/inpainting.py",
           "-self.settings.grow_hu)", "-gate)", "tests/test_inpainting.py -k goes_on"),
    Mutant("what is drawn anew since it goes on is judged", "detect/inpainting.py",
           "torch.where(hidden, query_hu, normal_hu)).cpu()", "normal_hu).cpu()",
           "tests/test_inpainting.py -k goes_on"),
    Mutant("hidden by chance alone, whatever --gated says", "gan/inpainting.py",
           "self.config.gated * len(hidden)", "0", "tests/test_inpainting.py -k found_anomalous_is_hidden"),
    Mutant("a folder of which nothing is used passes", "gan/database.py",
           "if mine and not used:", "if False:", "tests/test_prepare.py -k nothing_would_be_used"),
    Mutant("bone is mixed with what lies beside it", "ct/standardise.py",
           "above * ~bone, frame", "above, frame", "tests/test_standardise.py -k not_mixed"),
    Mutant("a lesion's edge comes back as detail", "detect/inpainting.py",
           ".clamp(-GRAIN_HU, GRAIN_HU)", "", "tests/test_inpainting.py -k grain"),
    Mutant("the mask goes on over what has less than half of its contrast", "detect/residual.py",
           "HALF * float(", "0.2 * float(", "tests/test_anomaly.py -k goes_on"),
    Mutant("the mask goes on without end", "detect/residual.py",
           "(away > max(least_hu, half)) & dilated(own, reach)", "(away > max(least_hu, half))",
           "tests/test_anomaly.py -k at_most"),
    Mutant("the mask keeps what hardly differs", "detect/residual.py",
           "own & (away.abs() >= half)", "own & (away.abs() >= 0)", "tests/test_anomaly.py -k goes_on"),
    Mutant("the mask goes on to both sides", "detect/residual.py",
           "residual_hu[place] * residual_hu[place][own].sum().sign()", "residual_hu[place].abs()",
           "tests/test_anomaly.py -k goes_on"),
    Mutant("specks are drawn anew", "detect/inpainting.py",
           "SPECK * unit**2", "0", "tests/test_inpainting.py -k specks"),
    Mutant("what is hypodense counts at the hyperdense fine scale", "detect/normative.py",
           "band.clamp(min=0) if hyperdense else band", "band", "tests/test_normative.py -k hyperdense"),
    Mutant("beyond a picture's right edge lies its next row", "op/csrc/winograd.c",
           "k >= 0 && k < columns;", "k >= 0;", "tests/test_winograd.py -k same_as_pytorch"),
    Mutant("a strided convolution by tiles", "op/conv.py",
           "weight.tiles is not None and stride == padding == 1", "weight.tiles is not None",
           "tests/test_winograd.py -k when_it_is_used"),
    Mutant("the search's target is drawn by other kernels", "detect/search.py",
           "normal = torch.cat([self._image(chunk).detach() for chunk in self.chunks])", "normal = self.image.clone()",
           "tests/test_projection.py -k drawn_stays"),
    Mutant("the caller's threads are changed", "projector.py",
           "        torch.set_num_threads(threads)   ", "        pass   ",
           "tests/test_processes.py -k left_alone"),
    Mutant("weights that are trained are kept as they were", "op/layers.py",
           "if torch.is_grad_enabled() or parameter.requires_grad or", "if torch.is_grad_enabled() or",
           "tests/test_model.py -k made_anew"),
    Mutant("weights that have changed are kept as they were", "op/layers.py",
           "key = parameter.data_ptr(), parameter._version, how", "key = parameter.data_ptr(), how",
           "tests/test_model.py -k made_anew"),
    Mutant("weights made in inference mode are asked for their version", "op/layers.py",
           "if parameter.is_inference():", "if False:", "tests/test_model.py -k inference_mode"),
    Mutant("a filter made in inference mode breaks later gradients", "op/banded.py",
           "@torch.inference_mode(False)                             # kept", "# kept",
           "tests/test_banded.py -k inference_mode"),
    Mutant("ranks of NaN are taken for numbers", "op/median.py",
           "return median.masked_fill(dilated(plane.isnan(), margin), torch.nan) ", "return median ",
           "tests/test_median.py -k doubles_with_nan"),
    Mutant("without a home folder nothing is computed", "op/build.py",
           "except RuntimeError as error:  ", "except KeyError as error:  ", "tests/test_median.py -k home_folder"),
    Mutant("the doctor passes over a convolution that does not build", "op/doctor.py",
           'build.load_c("winograd", *winograd.FLAGS)', "pass", "tests/test_op_cuda.py -k does_not_build"),
    Mutant("the doctor takes op/fused.py at its word", "op/doctor.py",
           "errors[name] = _error(found, reference(*map(_doubled, inputs)))", "errors[name] = 0.0",
           "tests/test_op_cuda.py -k does_not_build"),
    Mutant("blocks of memory are mapped all the same", "op/memory.py",
           "KEEP = {MMAP_MAX: 0, ", "KEEP = {", "tests/test_memory.py -k used_again"),
    Mutant("a folded weight with its places mirrored", "op/modulated_conv.py",
           ".flip(1, 3)", "", "tests/test_op.py -k folded"),
    Mutant("a folded layer's places mixed up", "op/csrc/fused.c",
           "+ 2 * (r % 2) + c % 2", "+ 2 * (c % 2) + r % 2", "tests/test_fused.py -k folded"),
    Mutant("the next layer's style is forgotten", "op/csrc/fused.c",
           "scaled ? x * wide(then[c]) : x", "x", "tests/test_fused.py -k styled_layer"),
    Mutant("the scans of a process that was killed are left undone", "projector.py",
           "if turns.died:", "if False:", "tests/test_processes.py -k costs_no_scan"),
    Mutant("processes outlive the first", "detect/processes.py",
           "ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGTERM)", "pass",
           "tests/test_processes.py -k takes_the_others"),
    Mutant("all processes write a table at one place", "common/files.py",
           "{uuid.uuid4().hex}.writing\")", "writing\")", "tests/test_files.py -k at_once"),
    Mutant("what a living run writes is removed", "common/files.py",
           "path.stat().st_mtime > age_s", "path.stat().st_mtime > 0", "tests/test_files.py -k killed_process"),
    Mutant("a folder that is not replaced is lost", "common/files.py",
           "if old.exists() and not path.exists():", "if False:",
           "tests/test_files.py -k breaks_off"),
    Mutant("a part that never began is not missed", "detect/folder.py",
           "set(range(last[\"of\"]))", "set()", "tests/test_queue.py -k same_inputs"),
    Mutant("merge keeps to itself what is missing", "projector.py",
           "return 3 if missed else exit_code", "return exit_code", "tests/test_queue.py -k never_began"),
    Mutant("SIGTERM ends a process on the spot", "common/stopping.py",
           "signal.signal(number, end)", "pass", "tests/test_stopping.py -k raises"),
    Mutant("a second SIGTERM breaks off the cleaning up", "common/stopping.py",
           "signal.signal(other, signal.SIG_IGN)", "pass", "tests/test_stopping.py -k raises"),
    Mutant("a process of several ends on the spot", "detect/processes.py",
           "with orderly_end(), contextlib.suppress(", "with contextlib.suppress(",
           "tests/test_processes.py -k are_stopped_clean_up"),
    Mutant("projector.py ends on the spot", "projector.py",
           "@orderly_end()", "", "tests/test_stopping.py -k leaves_no_patient"),
    Mutant("what a zip was unpacked to stays after SIGTERM", "ct/archive.py",
           "with orderly_end(), _folder() as folder:", "with _folder() as folder:",
           "tests/test_archive.py -k sigterm"),
    Mutant("what a living run has unpacked is removed", "ct/archive.py",
           "        fcntl.flock(handle, fcntl.LOCK_EX)\n", "        pass\n", "tests/test_archive.py -k killed_run"),
    Mutant("what killed runs have unpacked stays", "ct/read.py",
           "    archive.remove_abandoned()\n", "", "tests/test_archive.py -k killed_run"),
    Mutant("a part writes beside what a whole run has made", "detect/folder.py",
           "return (found or places)[0]", "return places[0]", "tests/test_queue.py -k after_a_whole_run"),
    Mutant("a scan's place is chosen before the claim on it", "detect/folder.py",
           "        def place() -> Path:", "        @__import__('functools').cache\n        def place() -> Path:",
           "tests/test_queue.py -k meanwhile"),
    Mutant("a scan with two results has two rows", "detect/folder.py",
           "if first is not result:", "if False:", "tests/test_queue.py -k are_named"),
    Mutant("a second result is passed over", "detect/folder.py",
           "if len(found) > 1:", "if False:", "tests/test_queue.py -k are_named"),
    Mutant("a scan in a folder called scans has an id that cannot be", "ct/read.py",
           "if odd or name in RESERVED", "if odd", "tests/test_read.py -k no_id"),
    Mutant("another scan's results are replaced", "detect/folder.py",
           "if earlier and is_another(source, earlier):", "if False:", "tests/test_queue.py -k another_scan_of"),
    Mutant("another scan's results are taken for its own", "detect/folder.py",
           'and found["key"] == key and not is_another(source, found)', 'and found["key"] == key',
           "tests/test_queue.py -k another_scan_of"),
    Mutant("files that were moved are another scan", "detect/folder.py",
           'known["content"] != (_content(source) or "unknown")', "True", "tests/test_queue.py -k another_scan_of"),
    Mutant("results take the place of the scans", "detect/folder.py",
           "                    _refuse_others(place())\n", "", "tests/test_queue.py -k take_the_place"),
    Mutant("a mask takes the place of the scan", "ct/mask.py",
           "if scans := sorted(written &", "if scans := sorted(set() &", "tests/test_mask.py -k never_takes"),
    Mutant("large scans are two at a time", "detect/pipeline.py",
           "if is_large(job):", "if False:", "tests/test_pipeline.py -k large"),
    Mutant("two processes may each hold a large scan", "detect/pipeline.py",
           "with large():", "if True:", "tests/test_pipeline.py -k large"),
    Mutant("air is to be drawn exactly", "gan/coding.py",
           "(real <= self.low) & (fake < self.low)", "(real < self.low) & (fake < self.low)",
           "tests/test_coding.py -k beyond_a_cut"),
    Mutant("information costs less while the code holds too much", "gan/coding.py",
           "nats / self.config.code_nats - 1)", "1 - nats / self.config.code_nats)",
           "tests/test_coding.py -k information_costs"),
    Mutant("the prior forgets a code's own variance", "gan/prior.py",
           "cholesky(covariance + blur)", "cholesky(covariance + 1e-5 * torch.eye(len(blur)))",
           "tests/test_coding.py -k two_clouds"),
    Mutant("the coarse maps are noise, too", "model.py",
           "enumerate(self.fine_noise, FIRST_FINE)", "enumerate(self.fine_noise, 1)",
           "tests/test_coding.py -k only_the_finest"),
    Mutant("rates fall from the start", "gan/encoding.py",
           "(1 - done) / self.config.decay", "1 - done", "tests/test_train_encoder.py -k rates_fall"),
    # ---- bundling.py
    Mutant("calibrated on the training scans", "bundling.py",
           'SliceDataset(one.path, "val"', 'SliceDataset(one.path, "train"',
           "tests/test_latent_stats.py -k end_to_end"),
    Mutant("the plain pass is the augmented one", "detect/codes.py",
           "if number else images", "if not number else images", "tests/test_latent_stats.py -k stay_together"),
    Mutant("thresholds at the complement of the rate", "detect/calibration.py",
           "dtype=torch.float64), fpr)", "dtype=torch.float64), 1 - fpr)", "tests/test_latent_stats.py -k thresholds"),
    Mutant("two pixels left out next to bone at 256", "detect/normative.py", "RIM_AT_512 = 2", "RIM_AT_512 = 4",
           "tests/test_normative.py -k rim"),
    Mutant("every batch corrupted alike", "dataset.py", "(self.seed, found[0][0])", "(self.seed, 0)",
           "tests/test_dataset.py -k hangs_on_its_place"),
    Mutant("an encoder's training knows no hours", "gan/encoder_loop.py",
           "if config.hours else 0.0", "if False else 0.0", "tests/test_train_encoder.py -k hours"),
    Mutant("resampling's second derivative is nought", "gan/augment.py",
           "return _Resampled.apply(gradient, *ctx.saved_tensors), None, None",
           "return 0 * _Resampled.apply(gradient, *ctx.saved_tensors), None, None",
           "tests/test_augment.py -k twice"),
    Mutant("healthy scans measured by their own statistics", "detect/normative.py",
           "if patient != patients[left_out]]", "if True]", "tests/test_normative.py -k own_statistics"),
    Mutant("healthy scans measured by the same head's others", "detect/calibration.py",
           "measure.fit(seen, patients)", "measure.fit(seen)", "tests/test_latent_stats.py -k patients_other"),
    Mutant("a fold teaches with a patient's other scan", "gan/encoder_loop.py",
           "held_out.scan_ids, held_out.patients)", "held_out.scan_ids, held_out.scan_ids)",
           "tests/test_train_reader.py -k shares_a_patient"),
    Mutant("latent statistics of the farthest position", "detect/latent.py",
           "self.positions_mm).abs().argmin(dim=1)", "self.positions_mm).abs().argmax(dim=1)",
           "tests/test_latent.py -k nearest"),
    # ---- loose slices
    Mutant("statistics by position of loose slices", "detect/codes.py",
           "np.flatnonzero(~np.isnan(dataset.below_vertex_mm))", "np.arange(len(dataset))",
           "tests/test_loose.py -k leave_loose_slices_out"),
    Mutant("loose slices held out", "gan/database.py",
           'splits |= {s.scan_id: "train"', 'splits |= {s.scan_id: "val"', "tests/test_loose.py -k without_a_position"),
    Mutant("every loose slice as large as the next", "ct/loose.py",
           "max(HEAD_MM, widest / LARGEST)", "widest / LARGEST", "tests/test_loose.py -k high_levels"),

    # ---- prepare.py and the reading of scans
    Mutant("the neck kept, the brain left out", "ct/frame.py",
           "below <= settings.max_below_vertex_mm", "below >= settings.max_below_vertex_mm",
           "tests/test_prepare.py -k below_the_vertex"),
    Mutant("split by scan, not by patient", "gan/database.py",
           '_by_scan(patients_csv, "patient", "--patients", scan_ids)', "{s: s for s in scan_ids}",
           "tests/test_prepare.py -k given_split"),
    Mutant("listed slices ignored", "gan/database.py",
           "kept & listed_slabs(", "kept | listed_slabs(", "tests/test_prepare.py -k given_split"),
    Mutant("thick slices among thin ones cut short", "ct/slab.py",
           "1.5 * nearest_mm / 2", "1.5 * np.median(nearest_mm) / 2", "tests/test_slab.py -k finer"),
    Mutant("thick slices among thin ones averaged", "ct/slab.py",
           "nearest >= thin_mm, []", "nearest >= 99, []", "tests/test_slab.py -k thick_slices"),
    Mutant("slices in no slab said to be seen", "ct/slab.py",
           "& self.covered.reshape(-1, 1, 1)", "", "tests/test_slab.py -k not_said"),
    Mutant("prepare.py ignores --slab-mm", "prepare.py",
           "slab_mm=args.slab_mm", "slab_mm=5.0", "tests/test_prepare.py -k flags_reach"),
    Mutant("a deflated data set unpacked, however large", "ct/dicom_pixels.py",
           "            self._check_inflated()", "            pass", "tests/test_hostile_sizes.py -k gigabyte"),
    Mutant("any file may unpack to anything", "ct/limits.py",
           "if unpacked > max(SMALL, MAX_RATIO * packed):", "if False:", "tests/test_hostile_sizes.py -k gigabyte"),
    Mutant("pictures decoded in the program's process", "ct/picture_pixels.py",
           'decode_apart("picture", path, BYTES * height * width)', "decode(str(path))",
           "tests/test_hostile_sizes.py -k crashes and picture"),
    Mutant("HU without their intercept", "ct/dicom.py",
           "values * slope + intercept", "values * slope", "tests/test_dicom.py"),
    Mutant("slices from top to bottom", "ct/dicom.py", "np.argsort(position", "np.argsort(-position",
           "tests/test_dicom.py"),
    Mutant("millimetres above the vertex, not below", "ct/standardise.py",
           "below_vertex = vertex_mm(brain, scan.position_mm) -", "below_vertex = vertex_mm(brain, scan.position_mm) +",
           "tests/test_standardise.py -k grows_downwards"),
    Mutant("padding with more bits than the pixels have", "ct/dicom.py",
           "if fits.all() else None", "if True else None", "tests/test_dicom.py -k bits"),
    Mutant("members of a zip found by their names as written", "ct/archive.py",
           "_place(m) in only", "m.filename in only", "tests/test_archive.py -k otherwise"),
    Mutant("ids by uid of the files' sizes", "ct/read.py",
           'hashlib.file_digest(file, "sha256").digest()', "str(path.stat().st_size).encode()",
           "tests/test_read.py -k all_that_is_in"),
    Mutant("folders as given compared with resolved files", "gan/database.py",
           "whole = Path(folder).resolve()", "whole = Path(folder)", "tests/test_prepare.py -k nothing_would_be_used"),
    Mutant("windows decoded at half their width", "ct/window.py",
           "((high - low) / 2)", "((high - low) / 4)", "tests/test_window.py"),
    Mutant("the volume of a head as if its slices lay evenly", "ct/whole_head.py",
           "areas @ _thickness_mm(scan)", "areas.sum() * scan.slice_spacing_mm",
           "tests/test_whole_head.py -k own_thickness"),
    Mutant("the head measured by the shoulders", "ct/whole_head.py",
           "head = outline[inside >= ENDED * largest].max()", "head = outline.max()",
           "tests/test_whole_head.py -k shoulders"),
    Mutant("a brain at padding is not cut off", "ct/whole_head.py",
           "outside = labels == labels[0, 0]", "outside = np.pad(air & False, 1, constant_values=True)",
           "tests/test_whole_head.py -k cuts_off"),
    Mutant("a brain that touches the edge is cut off", "ct/whole_head.py",
           "AT_EDGE_MM, CUT_OFF_MM = 1.5, 40.0", "AT_EDGE_MM, CUT_OFF_MM = 1.5, 1.0",
           "tests/test_whole_head.py -k cuts_off"),
    Mutant("the profile of a head as if its slices lay evenly", "ct/whole_head.py",
           "np.searchsorted((heights[1:] + heights[:-1]) / 2, step_mm * np.arange(count))",
           "np.arange(0, len(heights), max(1, round(step_mm / scan.slice_spacing_mm)))",
           "tests/test_whole_head.py"),
    Mutant("a slice far off makes a profile without end", "ct/whole_head.py",
           "np.minimum(np.diff(scan.position_mm), SLICE_MM[1])", "np.minimum(np.diff(scan.position_mm), 900.0)",
           "tests/test_whole_head.py -k even_steps"),
    # ---- evaluate.py
    Mutant("AUC of the healthy over the ill", "evaluation/metrics.py",
           "return float(placements(", "return 1 - float(placements(",
           "tests/test_evaluate.py -k counts_pairs"),
    Mutant("false alarms counted as misses", "evaluation/metrics.py",
           '"fn": int((~called & positive)', '"fn": int((called & ~positive)', "tests/test_evaluate.py -k confusion"),
    Mutant("failed scans counted as ranked best", "evaluation/cohort.py",
           "{1: min(finite.values()) - 1, 0: max(finite.values()) + 1}",
           "{0: min(finite.values()) - 1, 1: max(finite.values()) + 1}",
           "tests/test_evaluate.py -k missing"),
    Mutant("patients taken for independent slices", "evaluate.py",
           "patient=scan_labels[k[:1]].patient", "patient=str(k)", "tests/test_evaluate.py -k command_end_to_end"),
    Mutant("slices of both classes in a scan taken for independent", "evaluation/metrics.py",
           " + (s11 + s11.T) / (m * n)", "", "tests/test_evaluate.py -k both_classes"),
    Mutant("paired test of slices as if independent", "evaluation/metrics.py",
           "_delong_covariance([scores_a, scores_b], labels, clusters)",
           "_delong_covariance([scores_a, scores_b], labels, np.arange(len(labels)))",
           "tests/test_evaluate.py -k paired_test_of_copies"),
    Mutant("p of slices as if independent", "benchmarks/ct_ich.py",
           "ours[0], other[0], ours[1], ours[2])", "ours[0], other[0], ours[1])",
           "tests/test_benchmark_ct_ich.py -k counts_patients"),
    Mutant("a head judged by another scan of its patient", "benchmarks/cross_validation.py",
           "[c.patient or c.scan_id for", "[c.scan_id for", "tests/test_cross_validation.py -k another_scan"),
    Mutant("a slab's slices counted each", "benchmarks/baselines.py",
           "scan_score(self.kept_scores, how, self.thickness_mm)",
           "scan_score(torch.from_numpy(self.slice_scores[self.shown]), how)",
           "tests/test_baselines.py -k thin_slices"),
    Mutant("figures of an earlier projection", "demos/benchmark.py",
           "compare.key_of(key, own, *map(sha256, maps))", "compare.key_of(key, own)",
           "tests/test_phantom_benchmark.py -k going_on"),
    Mutant("what is hypodense ranked as least abnormal", "evaluation/metrics.py",
           "np.abs(anomaly[truth == value])", "anomaly[truth == value]", "tests/test_evaluate.py -k either_side"),
    Mutant("pixels ranked by their nearness to normal", "evaluation/metrics.py",
           "np.unique(np.abs(", "np.unique(-np.abs(", "tests/test_evaluate.py -k masks"),
    Mutant("maps of a run in parts not found", "evaluate.py",
           "find_result_folder(args.maps, scan_id)", "args.maps / scan_id", "tests/test_evaluate.py -k in_parts"),
    Mutant("pictures of a stack that was put upright compared upside down", "evaluation/cohort.py",
           "nearest[::-1] if upended else nearest", "nearest", "tests/test_evaluate.py -k put_upright"),
    Mutant("a stack that was put upright not known by its note", "evaluate.py",
           "UPSIDE_DOWN in result", "UPSIDE_DOWN not in result", "tests/test_evaluate.py -k put_upright"),
    Mutant("slices of scans that are not to be trusted counted", "evaluate.py",
           "if scan_scores.get(k[:1]) in UNSCORED", "if False", "tests/test_evaluate.py -k to_be_trusted"),
    Mutant("unreliable scans counted as failed", "evaluation/cohort.py",
           "scores[key] = status if status in UNSCORED", 'scores[key] = "failed" if status in UNSCORED',
           "tests/test_evaluate.py -k to_be_trusted"),
    Mutant("no pictures of scans that are not to be trusted", "detect/report.py",
           "for entry in (e for e in entries if e.done)", "for entry in (e for e in entries if e.ok)",
           "tests/test_report.py -k not_to_be_trusted"),
    Mutant("the page's other unreliable scans counted as failed", "detect/report.py",
           'others[row["status"]] += 1', 'others["failed"] += 1', "tests/test_report.py -k beyond_the_page"),
    Mutant("a category against all scans but the healthy", "evaluation/figures.py",
           "| (units.labels == 0)", "| (units.labels == 1)", "tests/test_evaluate.py -k command_end_to_end"),
    Mutant("worklist reads the lowest score first", "evaluation/triage.py",
           "(scores[i], -i)", "(-scores[i], -i)", "tests/test_evaluate.py -k worklist"),
    # ---- checkpoint.py, bundles and snapshots
    Mutant("goes on from the oldest snapshot", "gan/snapshots.py",
           "in reversed(steps)", "in steps", "tests/test_checkpoint.py"),
    Mutant("the worst snapshot is kept", "gan/snapshots.py",
           "key=measured.get)[:1]", "key=measured.get)[-1:]", "tests/test_checkpoint.py -k best_are_kept"),
    Mutant("weights not checked against their hash", "common/weights.py",
           "(found := sha256(path)) != expected", '(found := sha256(path)) == ""', "tests/test_checkpoint.py"),
    Mutant("lists in lists in lists end in a traceback", "common/weights.py",
           "except (ValueError, RecursionError) as error:", "except ValueError as error:",
           "tests/test_checkpoint.py -k no_file_of_a_bundle"),
    Mutant("a shape too large ends in a traceback", "common/weights.py",
           "except TypeError as error:", "except KeyError as error:",
           "tests/test_checkpoint.py -k no_file_of_a_bundle"),
    Mutant("a bundle is gone before the next is written", "detect/bundle.py",
           "earlier, files = _files_of_bundle(folder), {}",
           'earlier, files = _files_of_bundle(folder), {}; (folder / "model.json").unlink(missing_ok=True)',
           "tests/test_checkpoint.py -k another_is_written"),
    Mutant("values beyond half precision become infinite", "common/weights.py",
           "stored if stored.isfinite().all() else tensor", "stored", "tests/test_checkpoint.py -k half_precision"),
    Mutant("checkpoint.py ends with 0 for a damaged bundle", "checkpoint.py",
           "return 2", "return 0", "tests/test_checkpoint.py -k command"),
    Mutant("checkpoint.py halves what --fp32 should keep", "checkpoint.py",
           "torch.float32 if args.fp32", "torch.float16 if args.fp32", "tests/test_checkpoint.py -k command"),
    # ---- healthygan
    Mutant("critic lowers what it should raise", "healthygan/train.py",
           "* penalty - distance", "* penalty + distance", "tests/test_healthygan.py -k critics_gradient"),
    Mutant("generator's terms all weigh 1", "healthygan/train.py",
           "weights[name] * term for", "term for",
           "tests/test_healthygan.py -k generators_gradient"),
    Mutant("healthygan's rate falls from the start", "healthygan/train.py",
           "round(self.decay * self.iterations)", "self.iterations", "tests/test_healthygan.py -k learning_rate"),
    Mutant("a rate of false positives above 1", "healthygan/train.py",
           '"mask_rampup", "fpr"):', '"mask_rampup"):', "tests/test_healthygan.py -k cannot_be_meant"),
    Mutant("beyond the windows healthygan changes what it does not", "healthygan/reconstruct.py",
           "healthy - small.clamp(*WINDOWS_HU[-1])", "healthy - small", "tests/test_healthygan.py -k changes_nothing"),
    Mutant("a name ends at its last dot", "healthygan/data.py",
           "if path.suffix.lower() in SUFFIXES else path).as_posix()", ").as_posix()",
           "tests/test_healthygan_data.py -k held_out_whole"),
    Mutant("healthy scans flagged", "healthygan/test.py",
           "int(score > threshold)", "int(score < threshold)", "tests/test_healthygan.py -k mean_difference"),
    Mutant("differences cancel", "healthygan/scoring.py",
           "(x - y).abs() / 2", "(x - y) / 2", "tests/test_healthygan.py -k by_hand"),
    Mutant("the generator that tells healthy from mixed worst is kept", "healthygan/scoring.py",
           "np.repeat([1, 0]", "np.repeat([0, 1]", "tests/test_healthygan.py -k by_hand"),
    # ---- The reader
    Mutant("a reader sees the grain", "detect/reader.py",
           "torch.where(soft, grainless(query_hu, soft), query_hu)", "query_hu",
           "tests/test_reader.py"),
    Mutant("a reader's second side is not turned", "detect/reader.py", "-found[:, 1]", "found[:, 1]",
           "tests/test_reader.py -k turned"),
    Mutant("a reader speaks of bone", "detect/reader.py",
           "-found[:, 1]], dim=1) * soft[:, None]", "-found[:, 1]], dim=1) * brain[:, None]",
           "tests/test_reader.py -k soft_brain"),
    Mutant("a reader doubts a whole slice", "detect/reader.py",
           "found = found - middle(found, soft)[..., None, None]", "found = found + 0",
           "tests/test_reader.py -k turned"),
    Mutant("a reader calibrated by another version is taken", "detect/reader.py",
           'config.get("version") != VERSION', 'False', "tests/test_reader.py -k does_not_fit"),
    Mutant("a reader has all the weight", "detect/surprise.py",
           "surprise[:, kinds:], s.read)", "surprise[:, kinds:], 1.0)", "tests/test_reader.py -k weighs"),
    Mutant("a reader deeper than its slices", "gan/encoder_loop.py",
           "if dataset.size % 2**config.depth:", "if False:", "tests/test_train_reader.py -k halved"),
    Mutant("what a scanner adds is to be found", "gan/reading.py",
           '"change_hu": (query - hu) * soft}', '"change_hu": (scanner(query, soft, bone, rng) - hu) * soft}',
           "tests/test_train_reader.py -k scanner"),
    Mutant("what hardly changed is to be found", "gan/reading.py",
           "CHANGED_HU, SAME_HU = 4.0, 1.5", "CHANGED_HU, SAME_HU = 2.0, 1.5",
           "tests/test_train_reader.py -k clearly"),
    Mutant("the average is left behind", "gan/reading.py",
           "mine.lerp_(other, 1 - kept)", "mine.lerp_(other, 0.0)", "tests/test_train_reader.py -k average"),
    Mutant("shapes smooth the slice where they are not", "gan/corrupt.py",
           "drawn + changed * (smoothed(", "drawn + (smoothed(",
           "tests/test_train_reader.py -k scanner"),
    Mutant("a reader reads beside the slice itself", "detect/inversion.py",
           "self.read(query_hu, normal_hu, brain", "self.read(query_hu, query_hu, brain",
           "tests/test_train_reader.py -k against_noise"),
    Mutant("a reader is taught beside the slice itself", "detect/inversion.py",
           "return decode(self.invert(encode(hu)))", "return hu", "tests/test_train_reader.py -k against_noise"),
    Mutant("a reader of another encoder is taken", "bundling.py",
           'encoder["images_seen"], encoder["data_digest"]):', 'encoder["images_seen"], None):',
           "tests/test_train_reader.py -k gets_into"),
    Mutant("a fold's reader learns from its own fold", "gan/encoder_loop.py",
           "for part in (here, set(held_out.scan_ids) - set(here)))", "for part in (here, set(held_out.scan_ids)))",
           "tests/test_train_reader.py -k half_of_what"),
    Mutant("a reader calibrates by what it has learnt from", "bundling.py",
           "if one not in seen]", "if True]", "tests/test_train_reader.py -k calibrates_by"),
    Mutant("what a run began with counts for one run", "gan/runlog.py",
           "yield from lineage(meta[flag])", "yield meta[flag]", "tests/test_train_reader.py -k any_number_of_runs"),
    Mutant("healthygan goes on with other images", "healthygan/train.py",
           ', "digest": data.digest()}', "}", "tests/test_healthygan.py -k kept_aside"),
    Mutant("nobody is told what first weights have seen", "gan/runlog.py",
           "not_held_out(held_out, snapshot.meta):", "[]:", "tests/test_train_reader.py -k first_weights"),
    Mutant("weights that only their writer may read", "common/weights.py",
           "Path(path).write_bytes(save(dict(state), metadata))",
           "Path(path).write_bytes(save(dict(state), metadata)); Path(path).chmod(0o600)",
           "tests/test_checkpoint.py -k group"),
    # ---- pacs/
    Mutant("a user who may not store is waited for", "pacs/orthanc.py",
           "self.status in (401, 403)", "self.status == 401", "tests/test_pacs.py -k may_not_do_it"),
    Mutant("a redirect is followed", "pacs/orthanc.py",
           "build_opener(no_proxy, _NoRedirects)", "build_opener(no_proxy)", "tests/test_pacs.py -k redirect"),
    Mutant("JSON of another server's is taken", "pacs/orthanc.py",
           "    if not right:", "    if False:", "tests/test_pacs.py -k not_orthancs"),
    Mutant("another server's id becomes a file name", "pacs/node.py",
           "if ID.fullmatch(text):", "if True:", "tests/test_pacs.py -k becomes_no_file"),
    Mutant("a series that Orthanc does not announce is lost", "pacs/node.py",
           "return self._announce_settled(settled)", "return False", "tests/test_pacs.py -k arriving_series"),
    Mutant("each image of a series is asked after", "pacs/node.py",
           'instances -= set(series["Instances"])', "pass", "tests/test_pacs.py -k arriving_series"),
    Mutant("arriving series are forgotten at a restart", "pacs/state.py",
           'set(known["arriving"])', "set()", "tests/test_pacs.py -k arriving_series"),
    Mutant("a change log is read again whenever its newest entry goes", "pacs/node.py",
           " and newest.date > self.state.date:", ":", "tests/test_pacs.py -k newest_entries"),
    Mutant("a first start from now reads all", "pacs/node.py",
           "self.state.advance(newest.sequence if from_now else 0)", "self.state.advance(0)",
           "tests/test_pacs.py -k newest_entries"),
    Mutant("a study sent again stays done", "pacs/node.py",
           "bool(self.orthanc.find(row[\"objects\"][-1], row[\"study\"]))", "True",
           "tests/test_pacs.py -k when_it_was_deleted"),
    Mutant("results of another study with their UIDs are deleted", "pacs/orthanc.py",
           '{"ID": str})["ID"] == study_id', '{"ID": str})["ID"]', "tests/test_pacs.py -k of_this_study"),
    Mutant("the pages show all that was ever done", "pacs/server.py",
           'row.get("finished", oldest) < oldest', "False", "tests/test_pacs.py -k last_days"),
    Mutant("one series that Orthanc does not serve is waited for", "pacs/node.py",
           "result = self._put_back(series_id, row, str(error))", "raise", "tests/test_pacs.py -k does_not_serve"),
    Mutant("a storage that serves no series fails them all", "pacs/node.py",
           "tries >= TRIES and any(", "tries >= TRIES or any(", "tests/test_pacs.py -k serves_none"),
    Mutant("Orthanc being away is a try of the series in work", "pacs/node.py",
           "self.orthanc.system()                     # raises", "pass  # raises",
           "tests/test_pacs.py -k away_as_a_whole"),
    Mutant("a series put back keeps its place", "pacs/node.py",
           'max(self.state.rows[other]["sequence"]', 'min(self.state.rows[other]["sequence"]',
           "tests/test_pacs.py -k does_not_serve"),
    Mutant("a series that is tried again keeps room", "pacs/node.py",
           'sum("tries" not in', 'sum("" not in', "tests/test_pacs.py -k does_not_serve"),
    Mutant("a refused series keeps the results of its part", "pacs/node.py",
           'if row["state"] not in (REFUSED, FAILED) or', 'if row["state"] not in (FAILED,) or',
           "tests/test_pacs.py -k results_of_a_part"),
    Mutant("results in the archive are forgotten before they are gone", "pacs/node.py",
           'result |= {"finished"', 'result |= {"objects": result.get("objects", []), "finished"',
           "tests/test_pacs.py -k results_of_a_part"),
    Mutant("results that cannot be deleted are not told of", "pacs/node.py",
           'row | {"notes": [STILL_THERE]}', 'row', "tests/test_pacs.py -k cannot_be_deleted"),
    Mutant("a full disk fails the series in work", "pacs/node.py",
           "with full_disk_named(self.state.work):\n                result",
           "if True:\n                result", "tests/test_pacs.py -k full_disk"),
    Mutant("the page is silent of a full disk", "pacs/node.py",
           "self._take_down(True, bool(self._no_room))", "self._take_down(True, False)",
           "tests/test_pacs.py -k full_disk"),
    Mutant("a full disk ends the node", "pacs/node.py",
           "except (OrthancAway, FullDiskError) as error:", "except OrthancAway as error:",
           "tests/test_pacs.py -k cannot_be_written_down"),
)


def misfits(root: Path) -> list[str]:
    """What keeps a mutant from being put in."""
    found = []
    for mutant in MUTANTS:
        path = root / mutant.file
        count = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if count != 1:
            found.append(f"{mutant.file}: expected once, found {count} times: {mutant.old!r} ({mutant.defect})")
    return found


def copy_tree(to: Path) -> None:
    """The files that git knows or would add, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run_tests(tree: Path, file: str, selected: str) -> tuple[int, str]:
    """pytest's exit code for the tests of a file, '' or an expression of -k, and what it said.

    In a fork of this process, which has the libraries and nothing of the program. No bytecode is kept: it would
    outlive a mutant of the same length. What tests keep in pytest's cache stays from run to run.
    """
    log = tree / ".said"
    child = os.fork()
    if not child:
        code = 3
        try:
            said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            signal.alarm(TIMEOUT_S)
            os.chdir(tree)
            sys.dont_write_bytecode = True
            sys.path[:] = [entry for entry in sys.path if entry != str(ROOT / "tests")]
            arguments = ["-x", "-q", "--tb=line", file, *(["-k", selected] if selected else [])]
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def by_file(mutants: list[Mutant]) -> dict[str, str]:
    """The test files of the mutants, and what to select of each so that all of their tests run."""
    selections = defaultdict(set)
    for mutant in mutants:
        file, _, selected = mutant.tests.partition(" -k ")
        selections[file].add(selected)
    return {file: "" if "" in chosen else " or ".join(sorted(chosen)) for file, chosen in selections.items()}


def main(words: list[str]) -> int:
    if wrong := misfits(ROOT):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file}: {m.defect}" for word in words)]
    for name in LIBRARIES:
        importlib.import_module(name)
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        copy_tree(tree)
        for file, selected in by_file(chosen).items():
            code, said = run_tests(tree, file, selected)
            if code:
                print(f"{file}: must pass without a mutant, but ended with {code}\n{said}", file=sys.stderr)
                return 1
            print(f"{file}: passes without a mutant", flush=True)
        for number, mutant in enumerate(chosen, 1):
            started = time.perf_counter()
            path = tree / mutant.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            file, _, selected = mutant.tests.partition(" -k ")
            code, said = run_tests(tree, file, selected)
            path.write_text(text, encoding="utf-8")
            verdict = VERDICTS.get(code, f"NOT TESTED (pytest ended with {code})")
            print(f"{number}/{len(chosen)} {verdict}: {mutant.file}: {mutant.defect} "
                  f"({time.perf_counter() - started:.0f} s)", flush=True)
            if code != 1:
                survivors += 1
                print(said[-2000:], flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
