#!/bin/sh
# A generator that draws heads from random codes, and the sheets and figures of its samples.
#
# usage: sh recipes/heads-128.sh DATA [WORK]
#
# DATA is a database of healthy slices of 128 pixels, such as slices.lmdb of recipes/head-128.sh. WORK (default
# runs/heads-128) gets gan/, heads/ and samples/. Paths are relative to the repository. Started again, it goes on where
# it stopped. On one CPU core 65 minutes. Another interpreter: PYTHON=python3 sh recipes/... What it gave is in
# docs/RESULTS.md, 'A generator that draws heads from random codes'.

set -eu
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 1 ] || usage
case $1 in -*) usage ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
data=$1
work=${2:-runs/heads-128}

# A short GAN: its weights are no more than a start
"$python" train.py --data "$data" --out "$work/gan" --preset ct128 --kimg 5
"$python" train_encoder.py --data "$data" --gan "$work/gan" --out "$work/heads" --preset heads128
"$python" benchmarks/samples.py --run "$work/heads" --data "$data" --out "$work/samples"
