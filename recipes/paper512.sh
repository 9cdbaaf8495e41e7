#!/bin/sh
# The paper's model at 512x512 from healthy scans of your own: GAN, encoder, bundle, by torchrun on any number of GPUs
# and nodes. Not yet run at this size.
#
# usage: sh recipes/paper512.sh SCANS [WORK]
#
# SCANS is a folder of healthy scans. WORK (default runs/paper512) gets everything: healthy.lmdb (or holds it already),
# gan/, encoder/, model/ and inversion/table.md. Paths are relative to the repository. Started again, it goes on where
# it stopped, also after scans that could not be prepared (they are named, and prepare.py ends with 3).
#
#     GPUS=8                     on each node (default: one per GPU that is there, else 1)
#     NODES=4 HEAD=node1         start the same command on every node, with a WORK that all of them see; HEAD is the
#                                name of the first node, which alone prepares and calibrates
#     NODE=0 ... NODES-1         the number of this node (default: $SLURM_NODEID, else 0)
#     PATIENTS=patients.csv      scan_id, patient: where a patient has more than one scan
#
# Under SLURM slurm/train.sbatch does the same for one training command, and requeues it before the time limit.

set -eu
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; exit 2; }
[ $# -ge 1 ] || usage
case $1 in -*) usage ;; esac
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
scans=$1
work=${2:-runs/paper512}
nodes=${NODES:-1}
node=${NODE:-${SLURM_NODEID:-0}}
gpus=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}
mkdir -p "$work"

# A store of its own for every start of the workers: several nodes count their restarts separately (distributed.py)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Runs may share a node: the port and the name of a rendezvous are those of the folder
own=$(printf %s "$work" | cksum | cut -d " " -f 1)

# launch train.py ...: on every GPU of every node
launch() {
    "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts=3 \
        --rdzv-id="paper512-$own-${1%.py}" --rdzv-backend=c10d \
        --rdzv-endpoint="${HEAD:-127.0.0.1}:${PORT:-$((20000 + own % 12000))}" "$@"
}

if [ "$node" = 0 ] && [ ! -e "$work/healthy.lmdb" ]; then
    "$python" prepare.py "$scans" --out "$work/healthy.lmdb" --size 512 ${PATIENTS:+--patients "$PATIENTS"}
fi
[ -e "$work/healthy.lmdb" ] || echo "waiting for node 0 to write $work/healthy.lmdb" >&2
while [ ! -e "$work/healthy.lmdb" ]; do sleep 10; done

launch train.py --data "$work/healthy.lmdb" --out "$work/gan" --preset paper512
launch train_encoder.py --data "$work/healthy.lmdb" --gan "$work/gan" --out "$work/encoder" --preset paper512

[ "$node" = 0 ] || exit 0
[ -e "$work/model/model.json" ] ||
    "$python" latent_stats.py --data "$work/healthy.lmdb" --encoder "$work/encoder" --out "$work/model" \
        --name paper512 --preset paper512
"$python" benchmarks/inversion.py --data "$work/healthy.lmdb" --model "$work/model" --out "$work/inversion"
