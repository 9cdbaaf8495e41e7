"""One-line defects that the tests must catch, by the folder that they are in; mutations.py puts them in.

Those of ct/ are in ct.py, and so on; those of modules at the top level in top_level.py.
"""

from mutants import (
    benchmarks,
    bundling,
    common,
    ct,
    demos,
    detect,
    evaluation,
    gan,
    healthygan,
    op,
    pacs,
    recipes,
    top_level,
)
from mutants.mutant import Mutant

ROOMS = (benchmarks, bundling, common, ct, demos, detect, evaluation, gan, healthygan, op, pacs, recipes, top_level)
MUTANTS: tuple[Mutant, ...] = tuple(mutant for room in ROOMS for mutant in room.MUTANTS)
