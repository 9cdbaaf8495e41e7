#!/usr/bin/env bash
# Train on chest X-rays: bash train_covid.sh [DATA [more flags of healthygan.train]]
#
# DATA (default datasets/covid) holds train/healthy and train/mixed. The run goes to runs/covid beside this script
# and the same command goes on with an unfinished one. On a CPU add --preset cpu128.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$here/../.venv/bin/python
[ -x "$python" ] || python=python3
data=${1:-datasets/covid}
exec "$python" "$here/train.py" --data "$data" --out "$here/runs/covid" "${@:2}"
