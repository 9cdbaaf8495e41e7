#!/bin/sh
# models/head-128 and its tables: loose slices of many people and the slices of PHE-SICH-CT-IDS far from any bleed train,
# all healthy scans of CT-ICH are held out and calibrate. A reader learns from all that trains, then three from two thirds
# of the held-out scans each, too: each calibrates by the third that it has not seen, and the first is kept.
#
# usage: sh recipes/head-128.sh CT_ICH PHE_SICH LOOSE [WORK]
#
# CT_ICH, PHE_SICH and LOOSE are folders as docs/DATA.md describes them ('Folders of the benchmarks on real scans', 'Loose
# slices'). WORK (default runs/head-128) gets everything: the tables of slices and splits, slices.lmdb (HU 0..70, as loose
# slices have them), scans.lmdb (HU -20..100, as new scans are seen), gan/, encoder/, surroundings/, reader/, reader-1/ to
# reader-3/, model/, inversion/table.md, cross-validation/table.md, ct-ich/table.md and phe-sich/table.md. Paths are relative to the
# repository. Started again, it goes on where it stopped. Another interpreter: PYTHON=python3 sh recipes/...
#
#     RANKS=1                    processes that train together and share a batch (default: 2, one for each CPU core;
#                                1 with SIZE=256)
#     SIZE=256                   models/head-256, on a GPU in ten minutes of training (work in runs/head-256)
#
# models/head-128 is what this gave on two CPU cores with AVX512: 86 minutes of encoder and generator, 63 of the networks
# for the surroundings, 21 of readers. Other seeds, machines or numbers of processes give other weights of the same kind.
# models/head-256 was trained in another way, which its model.json tells.
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
case $size in 128) batch=16 ranks=${RANKS:-2} ;; *) batch=64 ranks=${RANKS:-1} ;; esac
case $ranks in 1 | 2 | 4) ;; *) echo "RANKS=$ranks: expected 1, 2 or 4: fewer than 4 images each are another training" >&2
    exit 2 ;; esac

# learn train_encoder.py ...: in $ranks processes, which share a batch
learn() {
    "$python" -m torch.distributed.run --standalone --nproc-per-node="$ranks" "$@" --batch $((batch / ranks))
}

"$python" recipes/ct_ich_tables.py "$ct_ich" "$phe_sich" "$work"
[ -e "$work/slices.lmdb" ] ||
    "$python" prepare.py "$ct_ich/train" "$phe_sich/scans" "$loose" --slices "$work/keep.csv" --split "$work/all.csv" \
        --out "$work/slices.lmdb" --size "$size" --hu-clip 0 70 --bone-apart
[ -e "$work/scans.lmdb" ] ||
    "$python" prepare.py "$ct_ich/train" "$phe_sich/scans" --slices "$work/keep.csv" --split "$work/all.csv" \
        --out "$work/scans.lmdb" --size "$size" --hu-clip -20 100 --bone-apart

# No more than a start: encoder and generator learn together
"$python" train.py --data "$work/slices.lmdb" --out "$work/gan" --preset "ct$size" --kimg 1
learn train_encoder.py --data "$work/slices.lmdb" --gan "$work/gan" --out "$work/encoder" --preset "ct$size"
learn train_encoder.py --data "$work/slices.lmdb" --gan "$work/gan" --out "$work/surroundings" --preset "half$size"
learn train_reader.py --data "$work/slices.lmdb" --encoder "$work/encoder" --surroundings "$work/surroundings" \
    --out "$work/reader" --preset "ct$size"
set --                                                       # from here on: --reader RUN of each fold
for fold in 1 2 3; do
    learn train_reader.py --data "$work/slices.lmdb" --encoder "$work/encoder" --surroundings "$work/surroundings" \
        --init "$work/reader" --fold $fold:3 --out "$work/reader-$fold" --preset "ct$size" --epochs 0.6
    set -- "$@" --reader "$work/reader-$fold"
done
use="non-commercial research, as the licences of CT-ICH, PHE-SICH-CT-IDS and the loose slices allow no more"
[ -e "$work/model/model.json" ] ||
    "$python" latent_stats.py --data "$work/slices.lmdb" --encoder "$work/encoder" --held-out "$work/scans.lmdb" "$@" \
        --surroundings "$work/surroundings" --out "$work/model" --name "head-$size" --preset "ct$size" \
        --set hypodense=0.65 --provenance "$use; made by recipes/head-128.sh"

"$python" benchmarks/inversion.py --data "$work/scans.lmdb" --model "$work/model" --out "$work/inversion"
"$python" benchmarks/cross_validation.py --model "$work/scans.lmdb" "$work/model" "$@" --out "$work/cross-validation"
status=0
"$python" benchmarks/ct_ich.py --data "$ct_ich" --database "$work/scans.lmdb" --model "$work/model" \
    --out "$work/ct-ich" || status=$?
[ $status -eq 0 ] || [ $status -eq 3 ] || exit $status       # 3: some scans failed, the table is of the others
"$python" benchmarks/phe_sich.py --data "$phe_sich" --database "$work/scans.lmdb" --model "$work/model" \
    --out "$work/phe-sich" || status=$?
exit $status
