#!/usr/bin/env bash
# Run a program of the package as several processes of one machine, on simulated devices: the code path of a pod.
#
#   launch/local.sh PROCESSES DEVICES_EACH COMMAND...
#   launch/local.sh 2 4 python -m piflow_jax.main --config=configs/digits.py:teacher --workdir=runs/two
#
# Every process's output is shown with its number. When one has died, those that have not ended GRACE seconds later
# (75 if not set) are killed.
# Exit status: 0 all done; 75 some were stopped or killed, the same command goes on; else what one of them ended with.
set -uo pipefail

usage() { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[[ $# -ge 3 ]] || usage
# whole NAME VALUE: refuses a wrong number before anything runs; bash would stumble over it when processes are there.
whole() {
  [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] && return
  echo "launch/local.sh: $1: '$2' is not a whole number from 1 to 9999" >&2
  exit 2
}
processes=$1 devices=$2 grace=${GRACE:-75}
whole PROCESSES "$processes"
whole DEVICES_EACH "$devices"
whole GRACE "$grace"
shift 2

# A port that is free now; the coordinator takes it a moment later.
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])') || exit 1
# Lines with the process's number; a progress bar's too, which end in \r, and what a killed one left unfinished.
relay='
import os, sys
number, held = sys.argv[1].encode(), b""
while data := os.read(0, 65536):
  *lines, held = (held + data).replace(b"\r", b"\n").split(b"\n")
  os.write(1, b"".join(b"[%s] %s\n" % (number, line) for line in lines if line))
if held:
  os.write(1, b"[%s] %s\n" % (number, held))'

pids=() codes=() writers=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < processes; i++)); do
  # Whoever signals all of the group means the programs: one that cannot write any more could not save either.
  exec 3> >(trap "" INT TERM; exec python3 -S -c "$relay" "$i") && writers+=($!)
  exec 4> >(trap "" INT TERM; exec python3 -S -c "$relay" "$i" >&2) && writers+=($!)
  JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=$devices "$@" "--distributed=127.0.0.1:$port,$i,$processes" >&3 2>&4 3>&- 4>&- &
  pids+=($!)
  exec 3>&- 4>&-
done
status=0 died=
while ((${#codes[@]} < processes)); do
  for i in "${!pids[@]}"; do
    if [[ -n ${codes[i]-} ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
    wait "${pids[i]}" 2>/dev/null
    code=$? codes[i]=$code
    ((code)) || continue
    died=${died:-$SECONDS}
    echo "[$i] ended with status $code" >&2
    # An error that a restart does not mend is the one to tell.
    ((code < 128 && code != 75)) && ((status == 0 || status == 75)) && status=$code
    ((status)) || status=75
  done
  if [[ -n $died ]] && ((SECONDS - died > grace && ${#codes[@]} < processes)); then
    echo "launch/local.sh: a process died $grace seconds ago and others still wait for it: killed" >&2
    for i in "${!pids[@]}"; do [[ -n ${codes[i]-} ]] || kill -KILL "${pids[i]}" 2>/dev/null; done
    died=$SECONDS
  fi
  ((${#codes[@]} == processes)) || sleep 0.2
done
wait "${writers[@]}" 2>/dev/null  # or the last words would come after the end
((status != 75)) || echo "launch/local.sh: start it again: the same command goes on from the last checkpoint" >&2
exit "$status"
