#!/bin/sh
# The two runs of HealthyGAN in healthygan/README.md: chest X-rays (models/healthygan-cxr-128) and head CT.
#
# usage: sh recipes/healthygan.sh cxr DATA [WORK]
#        sh recipes/healthygan.sh ct BLEEDS LOOSE SLICES SCANS CT_ICH [WORK]
#
# DATA holds train/healthy, train/mixed, test/healthy and test/diseased. BLEEDS and LOOSE are databases of 128 pixels by
# prepare.py --hu-clip 0 70 --bone-apart: the slices of PHE-SICH-CT-IDS with a bleed, and loose slices (900 were drawn).
# SLICES and SCANS are slices.lmdb and scans.lmdb of recipes/head-128.sh: the scans that both hold out calibrate, and none
# of them may be in BLEEDS or LOOSE. CT_ICH is the folder of that benchmark. WORK (default runs/healthygan-cxr,
# runs/healthygan-ct) gets sets, run and figures. Paths are relative to the repository.
# Started again, it goes on where it stopped. Minutes on a GPU. Another interpreter: PYTHON=python3 sh recipes/...
# The runs were interrupted twice and went on, by this schedule. Read the test's figures once, at the end.
#
#     SIZE=64                    head CT at half the pixels: two hours of one CPU core (Zen 4, bfloat16)

set -eu
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
size=${SIZE:-128}
case $size in
128) layers=6 shift=4 steps=5683 ;;
64) layers=5 shift=2 steps=4200 ;;
*) echo "SIZE=$size: expected 128 or 64" >&2; exit 2 ;;
esac

train() {
    "$python" -m healthygan.train "$@" --out "$work/run" --size "$size" --width 48 --blocks 6 --critic-width 64 \
        --critic-max 512 --critic-layers "$layers" --batch 16 --lr 2e-4 --identity 200 --reconstruction 1 --mask 40 \
        --indecision 0 --copy-first 500 --ema-iterations 1000 --choose 1500 --choose-after 0.9 --tick 50
}

case ${1:-} in
cxr)
    [ $# -ge 2 ] || usage
    data=$2
    work=${3:-runs/healthygan-cxr}
    train --data "$data" --seed 3 --shift 8 --translate-first 2204 --iterations 5906 --decay 0.23535
    status=0
    "$python" -m healthygan.test --data "$data" --model "$work/run" --out "$work/test" || status=$?
    [ $status -eq 0 ] || [ $status -eq 3 ] || exit $status    # 3: some pictures could not be read, all others were
    "$python" -m benchmarks.xray_map --data "$data" --model "$work/run" --out "$work/xray-map"
    "$python" -m healthygan.trivial --data "$data"
    exit $status
    ;;
ct)
    [ $# -ge 6 ] || usage
    bleeds=$2
    loose=$3
    slices=$4
    scans=$5
    ct_ich=$6
    work=${7:-runs/healthygan-ct}
    mkdir -p "$work"
    [ -e "$work/worse.lmdb" ] ||                          # of the two it is put in place last, over a better.lmdb
        "$python" -m healthygan.sets halves --data "$bleeds" --mixed "$work/worse.lmdb" \
            --healthy "$work/better.lmdb" --overwrite     # that a killed run has left
    train --mixed "$work/worse.lmdb" "$work/worse.lmdb" "$loose" --healthy "$work/better.lmdb" "$work/better.lmdb" \
        "$loose" --seed 1 --shift "$shift" --translate-first 2125 --iterations "$steps" --decay 0.26131
    [ -e "$work/model/model.json" ] ||
        "$python" latent_stats.py --data "$slices" --encoder "$work/run" --held-out "$scans" --out "$work/model" \
            --name "healthygan-ct-$size" --preset ct128 --set method=healthygan
    "$python" benchmarks/inversion.py --data "$scans" --model "$work/model" --scans 10 --out "$work/inversion"
    "$python" benchmarks/cross_validation.py --model "$scans" "$work/model" --out "$work/cross-validation"
    "$python" benchmarks/ct_ich.py --data "$ct_ich" --database "$scans" --model models/head-128 \
        --baselines hu flat pca --beside "$work/model" --out "$work/ct-ich"
    ;;
*) usage ;;
esac
