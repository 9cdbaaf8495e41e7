from mutants.mutant import Mutant

MUTANTS = (
    Mutant("whoever makes phantoms has one thread ever after", "demos/phantom.py",
           'os.environ.pop("OMP_NUM_THREADS")', "return", "tests/test_phantom.py -k one_thread"),
    Mutant("the number of threads that was set is lost", "demos/phantom.py",
           "if before is not None:", "if False:", "tests/test_phantom.py -k one_thread"),
    Mutant("figures of an earlier projection", "demos/benchmark.py",
           "compare.key_of(key, own, *map(sha256, maps))", "compare.key_of(key, own)",
           "tests/test_phantom_benchmark.py -k going_on"),
    Mutant("a phantom that failed is no failure", "demos/benchmark.py",
           "return 3 if failed else 0", "return 0", "tests/test_phantom_benchmark.py -k going_on"),
    Mutant("figures of another truth", "demos/benchmark.py",
           'maps.append(folder', '[].append(folder', "tests/test_phantom_benchmark.py -k going_on"),
)
