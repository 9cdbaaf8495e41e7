from mutants.mutant import Mutant

MUTANTS = (
    Mutant("p of slices as if independent", "benchmarks/ct_ich.py",
           "ours[0], other[0], ours[1], ours[2])", "ours[0], other[0], ours[1])",
           "tests/test_benchmark_ct_ich.py -k counts_patients"),
    Mutant("a head judged by another scan of its patient", "benchmarks/cross_validation.py",
           "[c.patient or c.scan_id for", "[c.scan_id for", "tests/test_cross_validation.py -k another_scan"),
    Mutant("two heads of a patient are two patients to a change's interval", "benchmarks/cross_validation.py",
           "np.unique(patients, return_inverse=True)", "np.unique(range(len(patients)), return_inverse=True)",
           "tests/test_cross_validation.py -k by_one_head"),
    Mutant("a model's reader reads what it has learnt from", "benchmarks/cross_validation.py",
           "    if learnt_by_reader(held_out, bundle", '    if "readers" in bundle.meta["provenance"] and (bundle',
           "tests/test_cross_validation.py -k one_fold"),
    Mutant("a reader reads another scan of a patient who has taught it", "benchmarks/cross_validation.py",
           "taught_by = {patient[scan] for scan in", "taught_by = {scan for scan in",
           "tests/test_cross_validation.py -k has_taught"),
    Mutant("a slab's slices counted each", "benchmarks/baselines.py",
           "scan_score(self.kept_scores, how, self.thickness_mm)",
           "scan_score(torch.from_numpy(self.slice_scores[self.shown]), how)",
           "tests/test_baselines.py -k thin_slices"),
    Mutant("distances to masks that were corrected since", "benchmarks/phe_sich.py",
           "mask_hashes(masks, source.scan_id)),", "{}),", "tests/test_benchmark_phe_sich.py -k going_on"),
)
