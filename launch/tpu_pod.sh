#!/usr/bin/env bash
# Run one command on every worker of a Cloud TPU pod slice, or of several, through preemptions.
#
#   launch/tpu_pod.sh run --name=NAME --zone=ZONE --project=PROJECT --type=v5litepod-16 --runtime=v2-alpha-tpuv5-lite
#       [--slices=1] [--spot|--reserved] [--queued|--tpu-vm] [--commit=HEAD] [--repository=URL] [--allow-dirty]
#       [--max-restarts=5] [--dry-run] -- python -m piflow_jax.main --config=... --workdir=gs://BUCKET/RUN
#   launch/tpu_pod.sh logs|stop|down ... the same line; name, zone, project, --slices and --tpu-vm are what counts
#
# run   takes the queued resource (--tpu-vm: the TPU VM) of that name or makes it, installs the commit on all workers,
#       runs COMMAND --distributed=auto there and shows worker 0. Ctrl-C detaches; the same line again attaches. A run
#       that ends with status 75 or by a signal, or whose machine was preempted, is started again: at most
#       --max-restarts times in a row with less than LAUNCH_PROGRESS (900) seconds of running. Ends with 0, with
#       COMMAND's status, or with 75: can be run again.
# logs  shows worker 0.   stop  has COMMAND save and end; the machine stays.   down  deletes the machine: nothing else
#       does.
#
# Needs gcloud, logged in, and for several workers: ssh-add ~/.ssh/google_compute_engine. Looks every LAUNCH_POLL (30)
# seconds.
set -uo pipefail
LC_ALL=C  # or ranges like a-z match letters that are not ASCII

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$2" >&2; exit "$1"; }
usage() { sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; }
((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) ||
  fail 2 "bash $BASH_VERSION is too old; bash 4.4 or newer is needed"
line=("$0" "$@")

case ${1-} in
  run | logs | stop | down) action=$1 && shift ;;
  -h | --help) usage; exit ;;
  *) usage >&2; exit 2 ;;
esac
declare -A option=([commit]=HEAD [max-restarts]=5 [slices]=1)
command=() kind=queued-resources capacity='' dry_run=0 allow_dirty=0
while (($#)); do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --slices=* | --runtime=* | --commit=* | --repository=* | \
      --max-restarts=*)
      key=${1%%=*} option[${key#--}]=${1#*=} ;;
    --spot | --reserved)
      [[ -z $capacity || $capacity == "$1" ]] || fail 2 "--spot, --reserved: both given; give one"
      capacity=$1 ;;
    --queued) kind=queued-resources ;;
    --tpu-vm) kind=tpu-vm ;;
    --dry-run) dry_run=1 ;;
    --allow-dirty) allow_dirty=1 ;;
    -h | --help) usage; exit ;;
    --) shift && command=("$@") && break ;;
    *) fail 2 "$(printf %q "$1"): not understood; options are written --name=value, the command stands behind --" ;;
  esac
  shift
done

check() {  # OPTION PATTERN WHAT-IT-SHOULD-BE
  local value=${option[$1]-}
  [[ -n $value ]] || fail 2 "--$1: missing; give $3"
  [[ $value =~ ^($2)$ ]] || fail 2 "--$1: $(printf %q "$value") is not $3"
}
check name '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "a name of a-z, 0-9 and - that starts with a letter"
check zone '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-east5-b"
check project '([a-z0-9.-]+:)?[a-z][-a-z0-9]*[a-z0-9]' "a project id of a-z, 0-9 and -"
check slices '[1-9][0-9]{0,2}' "a number of slices"
slices=${option[slices]}
((slices == 1)) || [[ $kind == queued-resources ]] ||
  fail 2 "--slices, --tpu-vm: a TPU VM is one slice; leave out --tpu-vm"
poll=${LAUNCH_POLL:-30} progress=${LAUNCH_PROGRESS:-900}
[[ "$poll $progress" =~ ^(0|[1-9][0-9]{0,5})\ (0|[1-9][0-9]{0,5})$ ]] ||
  fail 2 "LAUNCH_POLL, LAUNCH_PROGRESS: not whole seconds; give numbers such as 30 and 900"
name=${option[name]} where=("--zone=${option[zone]}" "--project=${option[project]}" --quiet)
nodes=("$name")
if ((slices > 1)); then  # so Google Cloud calls them
  for ((i = 0; i < slices; i++)); do nodes[i]=$name-$i; done
fi

check_run() {
  local word root
  check type 'v[0-9]+[a-z]*-[0-9]+' "an accelerator type such as v5litepod-16 or v6e-256"
  check runtime '[a-z][-a-z0-9.]*' "a runtime version such as v2-alpha-tpuv6e"
  check commit '[A-Za-z0-9_][A-Za-z0-9_./-]*' "a commit, branch or tag"
  check max-restarts '0|[1-9][0-9]{0,5}' "a whole number"
  ((${#command[@]})) || fail 2 "COMMAND: missing; write it behind --"
  for word in "${command[@]}"; do
    [[ $word =~ ^[][A-Za-z0-9_./:=,@%+\(\)\ -]+$ ]] ||
      fail 2 "COMMAND: the word $(printf %q "$word") could mean something to a shell; words may have letters, digits, \
spaces and _ . / : = , @ % + ( ) [ ] -"
    case $word in
      --distributed*) fail 2 "COMMAND: leave out ${word%%=*}; --distributed=auto is added" ;;
      --workdir=gs://* | --workdir=/*) ;;
      --workdir*)
        fail 2 "COMMAND: $word: not for all workers to see, and lost with them; write --workdir=gs://BUCKET/RUN" ;;
    esac
  done
  [[ ${command[0]} != -* ]] || fail 2 "COMMAND: ${command[0]} is no program; write python -m ..."
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  commit=$(git -C "$root" rev-parse --verify --quiet "${option[commit]}^{commit}") ||
    fail 2 "--commit: ${option[commit]} is not in $root; give a commit, branch or tag of it"
  ((allow_dirty)) || [[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] ||
    fail 2 "--commit: changes in $root are not committed, so they would not run; commit them or say --allow-dirty"
  if [[ -z ${option[repository]-} ]]; then
    option[repository]=$(git -C "$root" config --get remote.origin.url) ||
      fail 2 "--repository: missing, and there is no origin; give a URL"
    [[ -n $(git -C "$root" branch --remotes --contains "$commit" 2>/dev/null) ]] ||
      fail 2 "--commit: ${commit:0:12} is on no remote branch, so the workers cannot fetch it; git push it first"
  fi
  # Not shown: it may hold a token.
  [[ ${option[repository]} =~ ^(https://|ssh://git@|git@)[A-Za-z0-9.-]+(:[A-Za-z0-9_.-]+)?(/[A-Za-z0-9_.-]+)*$ ]] ||
    fail 2 "--repository: neither https://HOST/PATH nor git@HOST:PATH, plain and without user or token; give such a URL"
}

# What the workers run. COMMAND runs as long as the lock is held: a file with a process number could outlive its
# process.
# shellcheck disable=SC2016
report_text='mkdir -p ~/piflow_run && cd ~/piflow_run && if ! flock -ns lock true; then s=running; '\
'else s=$(cat status 2>/dev/null || echo lost); '\
'if [ -e stop ]; then case $s in 75|12[89]|1[3-9]?|2??) s=stopped ;; esac; fi; fi; '\
'echo "piflow-worker $(hostname) $(cat id 2>/dev/null || echo none) $s"'
# shellcheck disable=SC2016
tail_text='cd ~/piflow_run && { tail -n 200 -f "log.$(cat id)" & } && flock -s lock true && sleep 1 && kill $!'
# shellcheck disable=SC2016
stop_text='cd ~/piflow_run && touch stop && if ! flock -ns lock true; then kill "$(cat program)"; fi'
# The machine's own Python is older than 3.11 on many runtimes: uv brings one.
install_text() {
  printf '%s' "export PATH=~/.local/bin:\$PATH; git init -q ~/piflow_jax && cd ~/piflow_jax && " \
    "git fetch -q ${option[repository]} '+refs/heads/*:refs/remotes/origin/*' && " \
    "git checkout -q -f --detach $commit && " \
    "{ command -v uv >/dev/null || python3 -m pip install -q --user uv; } && " \
    "{ [ -x .venv/bin/python ] || uv venv -q --python 3.12 .venv; } && " \
    "uv pip install -q --python .venv/bin/python -c requirements.lock -e '.[tpu]'"
}
start_text() {  # A worker that gets this twice starts COMMAND once.
  printf '%s' "mkdir -p ~/piflow_run && cd ~/piflow_run && exec 9>lock && " \
    "if [ \"\$(cat id 2>/dev/null)\" = $id ]; then :; " \
    "elif ! flock -n 9; then echo another command runs here >&2; exit 1; " \
    "else rm -f status stop program; echo $id >id; " \
    "(trap '' HUP; cd ~/piflow_jax; export PATH=~/piflow_jax/.venv/bin:\$PATH; " \
    "(echo \$BASHPID >~/piflow_run/program; exec$(printf ' %q' "${command[@]}") --distributed=auto) 9>&-; " \
    "echo \$? >~/piflow_run/status) >log.$id 2>&1 </dev/null & fi"
}

exec 3>&1
errors=$(mktemp) && trap 'rm -f "$errors"' EXIT
reason() { tr -s '\n' ' ' <"$errors"; }
nap() { ((dry_run)) || sleep "$1"; }
cloud() {
  local word text=
  ((dry_run)) || { gcloud compute tpus "$@" </dev/null 3>&-; return; }
  for word in gcloud compute tpus "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then text+="$word "; else text+="${word@Q} "; fi
  done
  printf '%s\n' "${text% }" >&3
}
# Keepalives, or a machine that vanishes leaves ssh waiting for good.
reach() { cloud tpu-vm ssh "$1" "${where[@]}" --ssh-flag=-oServerAliveInterval=30 --worker="$2" --command="$3"; }
on() {  # WORKER TEXT: worker 0 is that of the first slice, all are those of all slices; fails when one slice does.
  local node job jobs=() failed=0
  if [[ $1 == 0 ]] || ((slices == 1)); then reach "${nodes[0]}" "$@"; return; fi
  for node in "${nodes[@]}"; do
    if ((dry_run)); then reach "$node" "$@"; else reach "$node" "$@" & jobs+=($!); fi
  done
  for job in "${jobs[@]}"; do wait "$job" || failed=1; done
  return "$failed"
}
delete() {
  local force=()
  [[ $kind == tpu-vm ]] || force=(--force)
  cloud "$kind" delete "$name" "${where[@]}" "${force[@]}" 2>"$errors" || fail 1 "$name could not be deleted: $(reason)"
}

seen=0 misses=0 may_create=1 restarts=0 attempt=0 began='' pretend=NOT_FOUND
describe() {  # KIND NAME FIELD; sets state
  if state=$(cloud "$1" describe "$2" "${where[@]}" --format="value($3)" 2>"$errors"); then
    misses=0
  elif grep -q NOT_FOUND "$errors"; then
    state=NOT_FOUND
  elif ((seen && ++misses < 5)); then
    state=UNKNOWN
  else
    fail 1 "cannot look at $2: $(reason)"
  fi
  ((!dry_run)) || state=$pretend
}
# Sets state to READY, NOT_FOUND, UNKNOWN or what Google Cloud calls it: that of the first slice that is not READY.
look() {
  local node
  if [[ $kind == queued-resources ]]; then
    describe queued-resources "$name" state.state
    [[ $state == ACTIVE ]] || return 0
    pretend=READY
  fi
  for node in "${nodes[@]}"; do
    describe tpu-vm "$node" state
    [[ $state == READY ]] || break
  done
  # A queued resource whose node is gone is on its way to SUSPENDED.
  [[ $kind == tpu-vm || $state != NOT_FOUND ]] || state=SUSPENDING
}
again() {  # WHY
  [[ -z $began ]] || ((SECONDS - began < progress)) || restarts=0
  began=''
  ((++restarts <= option[max-restarts])) ||
    fail 75 "$1, and --max-restarts=${option[max-restarts]} in a row are spent; the same line goes on. $name is left \
as it is"
  say "$1: restart $restarts of at most ${option[max-restarts]} in a row"
  nap $((poll << (restarts < 5 ? restarts - 1 : 4)))
}
create() {
  local flags=("--accelerator-type=${option[type]}")
  if [[ $kind == tpu-vm ]]; then
    flags+=("--version=${option[runtime]}")
  elif ((slices > 1)); then
    flags+=("--runtime-version=${option[runtime]}" "--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--runtime-version=${option[runtime]}" "--node-id=$name")
  fi
  say "making $name ($slices x ${option[type]}${capacity:+, ${capacity#--}})"
  if cloud "$kind" create "$name" "${where[@]}" "${flags[@]}" ${capacity:+"$capacity"} 2>"$errors"; then
    may_create=0
    if [[ $kind == tpu-vm ]]; then pretend=READY; else pretend=ACTIVE; fi
  else
    ((seen)) || fail 1 "$name could not be made: $(reason)"
    again "$name could not be made again: $(reason)"
  fi
}
get_ready() {
  local shown='' looks=0
  while look; do
    case $state in
      READY) seen=1 may_create=0; return ;;
      NOT_FOUND)
        ((may_create)) || fail 1 "$name was deleted, so it is not made again; the same line makes it"
        create; continue ;;
      SUSPENDED | PREEMPTED | TERMINATED)
        say "$name is $state: nothing is left on it, it is made anew"
        delete; may_create=1 seen=1; continue ;;
      FAILED | STOPPED | HIDDEN)
        fail 1 "$name is $state; gcloud compute tpus $kind describe $name ${where[*]:0:2} tells why; the same line \
with down deletes it" ;;
    esac
    if [[ $state != "$shown" ]] || ((++looks % 20 == 0)); then say "$name is $state after $SECONDS s"; fi
    shown=$state
    nap "$poll"
  done
}
lost() {  # WHAT FAILED: because the machine has been taken?
  look
  [[ $state != READY ]] || fail 1 "$1 failed on $name, which is up; the lines above tell why"
  again "$name is $state"
  return 1
}
step() { on all "$2" || { nap "$poll"; on all "$2"; } || lost "$1"; }
ask() {  # Sets report, a line a worker. Fails when one cannot be reached.
  report=$(on all "$report_text" 2>"$errors") || { cat "$errors" >&2; return 1; }
  ((dry_run)) || report=$(grep '^piflow-worker ' <<<"$report")
}
follow() {  # Until COMMAND has ended on every worker; fails when the machine is gone.
  local shown=0
  while :; do
    ((shown)) || { on 0 "$tail_text" && shown=1; }
    look
    case $state in
      READY)
        if ask && ! grep -q ' running$' <<<"$report"; then
          # COMMAND's last words matter most.
          ((shown)) || on 0 "$tail_text"
          return 0
        fi ;;
      UNKNOWN) ;;
      *) again "$name is $state"; return 1 ;;
    esac
    nap "$poll"
  done
}
judge() {  # Sets worst to 0, 75, stopped or the status that no restart mends, and culprit.
  local host status
  worst=0 culprit=''
  while read -r _ host _ status; do
    say "worker $host: $status"
    case $status in
      0) ;;
      75 | lost | 12[89] | 1[3-9][0-9] | 2[0-9][0-9]) ((worst)) || worst=75 ;;  # from 128 on: ended by a signal
      *) [[ $worst != 0 && $worst != 75 ]] || worst=$status culprit=$host ;;
    esac
  done <<<"$report"
}
detach() {
  say "detached; COMMAND runs on, and $name costs until it is deleted. To attach: ${line[*]@Q}"
  say "The same line with stop instead of run stops COMMAND, with down it deletes $name"
  exit "$1"
}

((dry_run)) || type -P gcloud >/dev/null ||
  fail 2 "gcloud: not installed; see https://cloud.google.com/sdk/docs/install"
case $action in
  logs) on 0 "$tail_text"; exit ;;
  stop) on all "$stop_text"; exit ;;
  down) delete; exit ;;
esac

check_run
digest=$(printf '%s\0' "$commit" "${command[@]}" | cksum | cut -d ' ' -f 1)
trap 'detach 130' INT
trap 'detach 143' TERM
while :; do
  get_ready
  ask || { nap "$poll"; ask; } || lost "asking the workers" || continue
  if grep -q ' running$' <<<"$report"; then
    id=$(awk '$4 == "running" {print $3; exit}' <<<"$report")
    [[ $id == "$digest".* ]] ||
      fail 2 "COMMAND: another command or commit runs on $name; stop that first: the same line with stop"
    say "COMMAND runs on $name: attached"
  else
    id=$digest.$(date +%s).$$.$((++attempt))
    say "installing ${commit:0:12} on $name"
    step "the installation" "$(install_text)" || continue
  fi
  step "the start" "$(start_text)" || continue
  began=$SECONDS
  follow || continue
  ((!dry_run)) || { say "after a preemption: $(delete 3>&1), and the same from create on"; exit 0; }
  judge
  case $worst in
    0) say "done; $name is left as it is, down deletes it"; exit 0 ;;
    75) again "COMMAND wants to be started again (75)" ;;
    stopped) fail 75 "COMMAND was stopped and has saved; the same line goes on" ;;
    *) fail "$worst" "COMMAND ended with status $worst on $culprit and is not started again; its output: \
~/piflow_run/log.$id on each worker" ;;
  esac
done
