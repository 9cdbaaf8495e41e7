#!/bin/sh
# A GPU for a short while, in pieces that each end within ten minutes:
#
#   sh benchmarks/gpu_session.sh check                       the kernels build and agree with their references
#   sh benchmarks/gpu_session.sh table [ops512,median512]    the GPU's rows of the speed table, or some of them; OURS=1:
#                                                            without the reference, which may take most of the time
#   DATA=healthy.lmdb sh benchmarks/gpu_session.sh train     trains for nine minutes; again goes on where it stopped
#
# PYTHON: the interpreter; OUT: where figures go (default benchmarks/gpu-results); LIMIT_S: of table; RUN, PRESET,
# PIECE_S: of train; XDG_CACHE_HOME: where compiled kernels are kept. They may come from a machine without a GPU, with
# the same nvcc:
#   XDG_CACHE_HOME=kernels python -c "from op import build; build.load_cuda('median', (9, 0))"     for an H100
set -eu
PYTHON=${PYTHON:-.venv/bin/python}
OUT=${OUT:-benchmarks/gpu-results}
PATH=$PATH:/usr/local/cuda/bin                     # where nvcc is, if it is not on the path

case "${1:-}" in
check)
    mkdir -p "$OUT"
    workers=
    "$PYTHON" -c "import xdist" 2>/dev/null && workers="-n 8"
    "$PYTHON" -m op.doctor >"$OUT/doctor.txt" 2>&1 &                   # builds the kernels while pytest starts
    doctor=$! status=0
    # shellcheck disable=SC2086
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p no:cacheprovider --tb=short -rfE $workers tests/test_op.py \
        tests/test_op_cuda.py tests/test_fused.py tests/test_median.py tests/test_gpu.py || status=$?
    wait "$doctor" || status=$?
    cat "$OUT/doctor.txt"
    exit "$status"
    ;;
table)
    mkdir -p "$OUT"
    "$PYTHON" -m benchmarks.gpu ${2:+--only "$2"} --limit-s "${LIMIT_S:-540}" ${OURS:+--ours} \
        --out "$OUT/gpu-${2:-all}.json"
    ;;
train)
    status=0
    timeout --signal=INT "${PIECE_S:-540}" "$PYTHON" train.py --data "${DATA:?name the database: DATA=healthy.lmdb}" \
        --out "${RUN:-runs/gpu}" --preset "${PRESET:-ct256}" --snapshot-kimg 10 --tick-kimg 1 || status=$?
    test "$status" -eq 124 && echo "time is up; the same command goes on from the last snapshot" && exit 0
    exit "$status"
    ;;
*)
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
