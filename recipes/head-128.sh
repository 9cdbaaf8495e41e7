#!/bin/sh
# models/head-128 and its tables: loose slices of many people and the slices of PHE-SICH-CT-IDS far from any bleed train,
# all healthy scans of CT-ICH are held out and calibrate. A reader learns from all that trains, then three from two thirds
# of the held-out scans each, too: each calibrates by the third that it has not seen, and the first is kept.
#
# usage: sh recipes/head-128.sh CT_ICH PHE_SICH LOOSE [WORK]
#
# CT_ICH, PHE_SICH and LOOSE are folders as docs/DATA.md describes them ('Folders of the two benchmarks', 'Loose
# slices'). WORK (default runs/head-128) gets everything: the tables of slices and splits, slices.lmdb (HU 0..70, as loose
# slices have them), scans.lmdb (HU -20..100, as new scans are seen), gan/, encoder/, reader/, reader-1/ to reader-3/,
# model/, inversion/table.md, cross-validation/table.md, ct-ich/table.md and phe-sich/table.md. Paths are relative to the
# repository. Started again, it goes on where it stopped. On one CPU core some three and a half hours of training, two or
# three more for the readers, and the benchmarks. Another interpreter: PYTHON=python3 sh recipes/...
# models/head-256, on a GPU in ten minutes of training: SIZE=256 sh recipes/head-128.sh ... (work in runs/head-256).
# The shipped models were trained in other ways, which their model.json tells: head-128 in five runs, after a GAN of 50,000
# images; head-256 without a GAN. As it stands the recipe was run at 128 up to its readers ('As the recipe has it' in
# docs/RESULTS.md), at 256 not.
# Read the tables of the test scans once, at the end: choices are made by cross-validation and benchmarks/inversion.py.

set -eu
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 3 ] || usage
case $1 in -*) usage ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
ct_ich=$1
phe_sich=$2
loose=$3
size=${SIZE:-128}
work=${4:-runs/head-$size}

"$python" recipes/ct_ich_tables.py "$ct_ich" "$phe_sich" "$work"
[ -e "$work/slices.lmdb" ] ||
    "$python" prepare.py "$ct_ich/train" "$phe_sich/scans" "$loose" --slices "$work/keep.csv" --split "$work/all.csv" \
        --out "$work/slices.lmdb" --size "$size" --hu-clip 0 70 --bone-apart
[ -e "$work/scans.lmdb" ] ||
    "$python" prepare.py "$ct_ich/train" "$phe_sich/scans" --slices "$work/keep.csv" --split "$work/all.csv" \
        --out "$work/scans.lmdb" --size "$size" --hu-clip -20 100 --bone-apart

# No more than a start: encoder and generator learn together
"$python" train.py --data "$work/slices.lmdb" --out "$work/gan" --preset "ct$size" --kimg 1
"$python" train_encoder.py --data "$work/slices.lmdb" --gan "$work/gan" --out "$work/encoder" --preset "ct$size"
"$python" train_reader.py --data "$work/slices.lmdb" --encoder "$work/encoder" --out "$work/reader" \
    --preset "ct$size" --epochs 10
set --                                                       # from here on: --reader RUN of each fold
for fold in 1 2 3; do
    "$python" train_reader.py --data "$work/slices.lmdb" --encoder "$work/encoder" --init "$work/reader" \
        --fold $fold:3 --out "$work/reader-$fold" --preset "ct$size" --epochs 0.6
    set -- "$@" --reader "$work/reader-$fold"
done
[ -e "$work/model/model.json" ] ||
    "$python" latent_stats.py --data "$work/slices.lmdb" --encoder "$work/encoder" --held-out "$work/scans.lmdb" "$@" \
        --out "$work/model" --name "head-$size" --preset "ct$size" --set hypodense=0.65

"$python" benchmarks/inversion.py --data "$work/scans.lmdb" --model "$work/model" --out "$work/inversion"
"$python" benchmarks/cross_validation.py --model "$work/scans.lmdb" "$work/model" "$@" --out "$work/cross-validation"
"$python" benchmarks/ct_ich.py --data "$ct_ich" --database "$work/scans.lmdb" --model "$work/model" \
    --out "$work/ct-ich"
"$python" benchmarks/phe_sich.py --data "$phe_sich" --database "$work/scans.lmdb" --model "$work/model" \
    --out "$work/phe-sich"
