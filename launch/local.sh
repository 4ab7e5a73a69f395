#!/usr/bin/env bash
# Run a program of the package as several processes of one machine, on simulated devices: the code path of a pod.
#
#   launch/local.sh PROCESSES DEVICES_EACH COMMAND...
#   launch/local.sh 2 4 python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/two
#
# Every process's output is shown with its number. Ends with the first status that is not 0, when all have ended.
set -uo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 3 && $1 =~ ^[1-9][0-9]*$ && $2 =~ ^[1-9][0-9]*$ ]] || usage
processes=$1 devices=$2
shift 2

# A port that is free now; the coordinator takes it a moment later.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < processes; i++)); do
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices "$@" "--distributed=127.0.0.1:$port,$i,$processes" \
    > >(sed -u "s/^/[$i] /") 2> >(sed -u "s/^/[$i] /" >&2) &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  # A signal to this script ends the wait, not the process.
  until wait "$pid"; code=$?; ! kill -0 "$pid" 2>/dev/null; do :; done
  ((status)) || status=$code
done
exit "$status"
