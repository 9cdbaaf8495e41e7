#!/usr/bin/env bash
# Test what train_covid.sh has trained: bash test_covid.sh [DATA [more flags of healthygan.test]]
#
# DATA (default datasets/covid) holds test/healthy and test/diseased; for another folder of images there are scores,
# but no metrics. Generator and threshold are those that the training chose without labels. $MODEL and $RESULTS name
# another model and another folder for scores, maps and metrics than runs/covid and results/covid beside this script.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3
data=${1:-datasets/covid}
model=${MODEL:-$here/runs/covid}
results=${RESULTS:-$here/results/covid}

status=0
"$python" "$here/test.py" --data "$data" --model "$model" --out "$results" "${@:2}" || status=$?
[ $status -eq 0 ] || [ $status -eq 3 ] || exit $status      # 3: some images could not be read
rm -rf "$results/metrics"                                    # of other data, perhaps without labels this time
[ -f "$results/labels.csv" ] || exit $status
[ "$results/scores.csv" -nt "$results/labels.csv" ] && exit $status      # labels that were there before, of whatever data

flags=()
[ $status -eq 0 ] || flags+=(--missing exclude)
threshold=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["threshold"])' "$results/run.json")
[ "$threshold" = None ] || flags+=(--threshold "$threshold")
"$python" "$here/../evaluate.py" "$results/scores.csv" "$results/labels.csv" --out "$results/metrics" "${flags[@]}"
echo "Where the classes are of different collections, as the usual chest X-rays with COVID-19 are, a high AUC may detect" \
    "the source and not the disease: compare python -m healthygan.trivial --data DATA"
exit $status
