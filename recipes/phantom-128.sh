#!/bin/sh
# models/phantom-128 and the phantom benchmark, from nothing: 530 synthetic healthy heads, GAN, encoder, bundle, table.
#
# usage: sh recipes/phantom-128.sh [WORK]
#
# WORK (default runs/phantom-128) gets everything: phantoms/, phantoms.lmdb, gan/, encoder/, noise/, model/ and
# benchmark/table.md. Paths are relative to the repository. Started again, it goes on where it stopped. On two CPU
# cores some 70 minutes, and an hour or two for the benchmark. Another interpreter: PYTHON=python3 sh recipes/...
# The first three of the shipped model's six encoder epochs had other rates (see its model.json): these commands give a
# model of this kind, not these weights.

set -eu
case ${1-} in -*) sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2 ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
work=${1:-runs/phantom-128}
mkdir -p "$work"

"$python" demos/phantom.py --healthy 530 --seed 1 --out "$work/phantoms"
[ -e "$work/phantoms.lmdb" ] ||
    "$python" prepare.py "$work/phantoms/scans" --out "$work/phantoms.lmdb" --size 128 --val-fraction 0.0566

"$python" train.py --data "$work/phantoms.lmdb" --out "$work/gan" --preset noise128 --channel-multiplier 1 --batch 8 \
    --kimg 20

# The code first, then the noise maps as well
"$python" train_encoder.py --data "$work/phantoms.lmdb" --gan "$work/gan" --out "$work/encoder" --preset noise128 \
    --no-noise --epochs 6 --perceptual-epochs 6 --rotate 0
"$python" train_encoder.py --data "$work/phantoms.lmdb" --gan "$work/gan" --init "$work/encoder" \
    --out "$work/noise" --preset noise128 --epochs 1 --perceptual-epochs 1 --decay 0 --rotate 0

[ -e "$work/model/model.json" ] ||
    "$python" latent_stats.py --data "$work/phantoms.lmdb" --encoder "$work/noise" --out "$work/model" \
        --name phantom-128 --preset noise128 --passes 1 \
        --set filter=band hypodense=1 surprise_above=1.5 surprise_mask=3.5

"$python" demos/benchmark.py --model "$work/model" --data "$work/phantoms.lmdb" \
    --training-labels "$work/phantoms/labels.csv" --out "$work/benchmark"
