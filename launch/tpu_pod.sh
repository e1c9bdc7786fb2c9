#!/usr/bin/env bash
# Training on a Cloud TPU pod over ssh: the same command on every host, each with its own number.
#
#   WORKDIR=gs://bucket/v3 launch/tpu_pod.sh NAME ZONE --config=configs/deepseek_v3_671b.py \
#     --config.mesh.data=32 --config.mesh.node=8 --config.mesh.local=8 --config.mesh.zero=3 ...
#
# This checkout is copied to every host and installed there with the extra [tpu]. Started again, the run
# goes on from its last checkpoint. Of a tpu7x with PLATFORM=tpu7x (environment.sh). Ctrl-C here asks all hosts to save and stop.
set -euo pipefail

name=${1:?name of the TPU} zone=${2:?its zone}
shift 2
workdir=${WORKDIR:?a folder that all hosts see}
port=${PORT:-8476}
root=$(cd "$(dirname "$0")/.." && pwd)

# In the order of the workers: it is the one in which libtpu numbers processes.
mapfile -t hosts < <(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
  --format='value[delimiter="\n"](networkEndpoints[].ipAddress)')
[ "${#hosts[@]}" -gt 0 ] || { echo "tpu_pod.sh: $name in $zone has no hosts" >&2; exit 2; }

# on WORKER COMMAND: as the user that gcloud makes there.
on() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"; }

gcloud compute tpus tpu-vm scp --recurse "$root" "$name:dsv3" --zone="$zone" --worker=all
on all "cd dsv3 && python3 -m venv .venv && .venv/bin/pip install --quiet '.[tpu]'"

arguments=$(printf '%q ' --workdir="$workdir" "$@")
# shellcheck disable=SC2329  # by the trap
stop() { on all 'pkill -TERM -f dsv3_jax.train' || true; }
trap stop INT TERM
pids=()
for worker in "${!hosts[@]}"; do
  on "$worker" "cd dsv3 && . .venv/bin/activate && export PLATFORM=${PLATFORM:-tpu} WORKDIR=/tmp && . launch/environment.sh &&
    JAX_COORDINATOR_ADDRESS=${hosts[0]}:$port JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$worker \
    exec python -m dsv3_jax.train $arguments" &
  pids+=($!)
done
# The first one that fails ends this; the others end by themselves once they miss it.
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
