from mutants.mutant import Mutant

MUTANTS = (
    Mutant("a killed recipe stands still between its sets", "recipes/healthygan.sh",
           '"$work/better.lmdb" --overwrite', '"$work/better.lmdb"', "tests/test_recipes.py -k healthygan"),
    Mutant("a picture that cannot be read ends the recipe, each time", "recipes/healthygan.sh",
           '--out "$work/test" || status=$?', '--out "$work/test"', "tests/test_recipes.py -k in_part"),
    Mutant("what failed in part is told as done", "recipes/head-128.sh",
           '--out "$work/phe-sich" || status=$?\nexit $status', '--out "$work/phe-sich"',
           "tests/test_recipes.py -k in_part"),
    Mutant("scans with a bleed calibrate as healthy", "recipes/ct_ich_tables.py",
           'if row["label"] != "0":', "if False:", "tests/test_recipes.py -k tables_of_ct_ich"),
    Mutant("a bleed labelled 1.0 trains as healthy", "recipes/ct_ich_tables.py",
           'if row["label"] not in ("0", "1"):', "if False:", "tests/test_recipes.py -k tables_of_ct_ich"),
)
