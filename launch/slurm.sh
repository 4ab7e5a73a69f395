#!/usr/bin/env bash
# Run one command on the GPUs of a SLURM cluster, through preemptions and time limits.
#
#   sbatch --nodes=2 --time=24:00:00 launch/slurm.sh python -m piflow_jax.main --config=... --workdir=/SHARED/RUN
#
# One process a GPU (JAX gives each the GPU of its number on the node, so let every process see all of the node's):
# change --ntasks-per-node and --gpus-per-node together. Two minutes before the time limit, or when preempted, the run
# saves and the job is queued again, at most LAUNCH_REQUEUES (100) times. --workdir has to lie where all nodes see it.
#SBATCH --job-name=piflow
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -uo pipefail

fail() { printf 'error: %s\n' "$1" >&2; exit "${2-2}"; }
usage() { sed -n '2,/^#SBATCH/{s/^#$//p;s/^# //p}' "$0"; }
case ${1-} in
  '') usage >&2; exit 2 ;;
  -h | --help) usage; exit ;;
esac
job=${SLURM_JOB_ID-} limit=${LAUNCH_REQUEUES:-100}
[[ $job =~ ^[0-9]+$ ]] || fail "SLURM_JOB_ID: not set, so this is no job; start this with sbatch"
[[ $limit =~ ^(0|[1-9][0-9]{0,5})$ ]] || fail "LAUNCH_REQUEUES: $(printf %q "$limit") is not a whole number"

# A site may have srun end all tasks when the first has ended or failed: that would cut off the others' saving.
srun --kill-on-bad-exit=0 --wait=0 "$@" --distributed=auto &
step=$!
# To the programs themselves: what srun makes of a SIGTERM of its own differs by version.
trap 'scancel --signal=TERM "$job"' TERM
# A signal to this script ends the wait, not the step.
until wait "$step"; status=$?; ! kill -0 "$step" 2>/dev/null; do :; done

if ((status == 75 || status >= 128)); then  # saved, or ended by a signal
  ((${SLURM_RESTART_COUNT:-0} < limit)) ||
    fail "job $job was queued again $limit times (LAUNCH_REQUEUES); sbatch the same line to go on" 75
  echo "== ended with status $status; job $job is queued again" >&2
  scontrol requeue "$job"
fi
exit "$status"
