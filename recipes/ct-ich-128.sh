#!/bin/sh
# models/ct-ich-128 and its tables: three folds on the healthy scans of CT-ICH and the slices of PHE-SICH-CT-IDS far
# from any bleed, beginning with the networks of recipes/phantom-128.sh.
#
# usage: sh recipes/ct-ich-128.sh CT_ICH PHE_SICH [WORK]
#
# CT_ICH and PHE_SICH are folders as docs/DATA.md describes them ('Folders of the two benchmarks'). WORK (default
# runs/ct-ich-128) gets everything: the tables of slices and splits, fold0.lmdb to fold2.lmdb, fold0/ to fold2/, model/,
# cross-validation/table.md, ct-ich/table.md and phe-sich/table.md. PHANTOMS (default runs/phantom-128) is the WORK of
# phantom-128.sh. Paths are relative to the repository. Started again, it goes on where it stopped. On two CPU cores
# some 65 minutes of training, and the benchmarks. Another interpreter: PYTHON=python3 sh recipes/...
# Read the tables of the test scans once, at the end: choices are made by cross-validation and benchmarks/inversion.py.

set -eu
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 2 ] || usage
case $1 in -*) usage ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
ct_ich=$1
phe_sich=$2
work=${3:-runs/ct-ich-128}
phantoms=${PHANTOMS:-runs/phantom-128}
[ -d "$phantoms/gan" ] && [ -d "$phantoms/encoder" ] || {
    echo "$phantoms: expected gan/ and encoder/; run recipes/phantom-128.sh first, or set PHANTOMS to its folder" >&2
    exit 2
}

"$python" recipes/ct_ich_tables.py "$ct_ich" "$phe_sich" "$work"
for fold in 0 1 2; do
    [ -e "$work/fold$fold.lmdb" ] ||
        "$python" prepare.py "$ct_ich/train" "$phe_sich/scans" --slices "$work/keep.csv" \
            --split "$work/fold$fold.csv" --out "$work/fold$fold.lmdb" --size 128
    "$python" train_encoder.py --data "$work/fold$fold.lmdb" --gan "$phantoms/gan" --init "$phantoms/encoder" \
        --out "$work/fold$fold" --preset noise128 --seed "$fold"
done

# Fold 1 is the bundle's; the others only calibrate
[ -e "$work/model/model.json" ] ||
    "$python" latent_stats.py --data "$work/fold1.lmdb" --encoder "$work/fold1" \
        --fold "$work/fold0.lmdb" "$work/fold0" --fold "$work/fold2.lmdb" "$work/fold2" \
        --out "$work/model" --name ct-ich-128 --preset noise128 --set filter=band

"$python" benchmarks/cross_validation.py --fold "$work/fold0.lmdb" "$work/fold0" \
    --fold "$work/fold1.lmdb" "$work/fold1" --fold "$work/fold2.lmdb" "$work/fold2" --out "$work/cross-validation"
"$python" benchmarks/inversion.py --data "$work/fold1.lmdb" --model "$work/model" --out "$work/inversion"
"$python" benchmarks/ct_ich.py --data "$ct_ich" --database "$work/fold1.lmdb" --model "$work/model" \
    --out "$work/ct-ich"
"$python" benchmarks/phe_sich.py --data "$phe_sich" --database "$work/fold1.lmdb" --model "$work/model" \
    --out "$work/phe-sich"
