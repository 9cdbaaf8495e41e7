#!/usr/bin/env bash
# Score chest X-rays with the shipped generator: bash test_covid_pretrained.sh FOLDER [more flags of healthygan.test]
#
# FOLDER holds images, or test/healthy and test/diseased; then there are metrics, too. All goes to
# results/covid-pretrained beside this script, or to $RESULTS.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ $# -ge 1 ] || { echo "usage: bash test_covid_pretrained.sh FOLDER: name a folder of chest X-rays" >&2; exit 2; }
MODEL=$here/../models/healthygan-cxr-128 RESULTS=${RESULTS:-$here/results/covid-pretrained} \
    exec bash "$here/test_covid.sh" "$@"
