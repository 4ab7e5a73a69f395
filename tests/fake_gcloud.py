"""Stand-ins for gcloud, and for the Python of a worker, that tests/test_launch.py starts hundreds of times.

    fake_gcloud.py gcloud compute tpus KIND VERB NAME ...   keeps the state of the cloud in $CLOUD; ssh runs its command
    fake_gcloud.py program ARGUMENTS...                     is COMMAND on a worker: ends as the scenario says

Files of $CLOUD: state, ends (literals, the scenario), calls, programs-WORKER (a literal a line, what was seen),
home/w-WORKER, alive/PID; a test makes go (programs that hang end), unreachable-NODE, broken.
"""

# The modules signal and json load enum and re, which is as much work as Python's own start.
import _signal as signal
import os
import sys
import time

CLOUD = os.environ["CLOUD"]
SIGINT = [signal.SIGINT]


def _read(name):
  with open(f"{CLOUD}/{name}") as f:
    return eval(f.read(), {})


def _write(name, value):
  # The launcher reaches slices side by side: the rename keeps one call from reading half of what another writes.
  with open(f"{CLOUD}/{name}.{os.getpid()}", "w") as f:
    print(value, file=f)
  os.replace(f.name, f"{CLOUD}/{name}")


def _there(name):
  return os.path.exists(f"{CLOUD}/{name}")


def gcloud(args):
  """(status, error message) of one call."""
  kind, verb, name = args[2:5]
  with open(f"{CLOUD}/calls", "a") as f:
    print(list(args), file=f)
  state = _read("state")
  nodes = ["pod"] if state["slices"] == 1 else [f"pod-{i}" for i in range(state["slices"])]
  try:
    failure = (state["fail"].get(verb) or [None]).pop(0)
    if failure:
      return 1, failure
    if verb == "create":
      _create(state, args)
      return 0, ""
    if not state["there"] or name not in (nodes if kind == "tpu-vm" else ["pod"]):
      return 1, "NOT_FOUND: Resource was not found"
    if verb == "delete":
      _delete(state)
      return 0, ""
    if verb == "describe":
      print(_describe(state, kind))
      return 0, ""
    assert verb == "ssh", args
    options = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
    if _there("taken") or _there(f"unreachable-{name}"):
      return 1, "the TPU is in an unusable state"
    if "tail" in options["command"] and state["drops"]:
      state["drops"] -= 1
      return 255, "connection closed"
  finally:
    _write("state", state)
  workers = range(state["workers"]) if options["worker"] == "all" else [int(options["worker"])]
  return _ssh(options["command"], [nodes.index(name) * state["workers"] + worker for worker in workers])


def _create(state, args):
  slices = [int(a.split("=")[1]) for a in args if a.startswith("--node-count=")]
  state.update(there=True, waiting=list(state["waits"]), slices=slices[0] if slices else 1)


def _delete(state):
  import fcntl
  import glob
  import shutil

  for lock in glob.glob(f"{CLOUD}/home/*/piflow_run/lock"):
    with open(lock) as f:
      fcntl.flock(f, fcntl.LOCK_EX)  # held by what runs: nothing runs on a deleted machine
  shutil.rmtree(f"{CLOUD}/home", ignore_errors=True)
  if _there("taken"):
    os.remove(f"{CLOUD}/taken")
  state["there"] = False


def _describe(state, kind):
  if _there("taken"):
    if state["deleted_by_another"]:
      state["there"] = False
    return "SUSPENDED" if kind == "queued-resources" else "PREEMPTED"
  if state["waiting"]:
    return state["waiting"].pop(0)
  return "ACTIVE" if kind == "queued-resources" else "READY"


def _ssh(command, workers):
  """Run a command in the home folder of each worker."""
  status = 0
  for worker in workers:
    home = f"{CLOUD}/home/w-{worker}"
    os.makedirs(home, exist_ok=True)
    env = os.environ | {"HOME": home, "PATH": f"{CLOUD}/bin:{os.environ['PATH']}"}
    os.chdir(home)
    # In a session of its own: the Ctrl-C that a user types here does not reach the other side of ssh.
    child = os.posix_spawnp("bash", ["bash", "-c", command], env, setsid=True, setsigmask=[])
    try:
      signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGINT)
      status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or status
      signal.pthread_sigmask(signal.SIG_BLOCK, SIGINT)
    except KeyboardInterrupt:
      os.killpg(child, signal.SIGKILL)
      return 130, ""
  return (255, "connection closed") if _there("taken") else (status, "")


def program(args):
  """Status of COMMAND for this attempt and worker: a number, or `hang`, `lost`, `taken`."""
  home = os.environ["HOME"]
  worker = int(home.rsplit("-", 1)[1])
  alive = f"{CLOUD}/alive/{os.getpid()}"

  def terminate(*_):
    os.remove(alive)
    os._exit(75)

  open(alive, "w").close()
  signal.signal(signal.SIGTERM, terminate)
  with open(".git/HEAD") as f:
    commit = f.read().strip()
  with open(f"{CLOUD}/programs-{worker}", "a+") as f:
    print(dict(args=list(args), commit=commit), file=f, flush=True)
    f.seek(0)
    attempt = len(f.readlines()) - 1
  print("hello from", os.path.basename(home), flush=True)
  ends = _read("ends")
  end = ends[min(attempt, len(ends) - 1)]
  end = end[worker] if isinstance(end, list) else end
  if end == "taken" and worker == 0:
    while len(os.listdir(f"{CLOUD}/alive")) < min(2, _read("state")["workers"]):
      time.sleep(0.01)
    open(f"{CLOUD}/taken", "w").close()
  if end == "lost":
    os.kill(os.getppid(), signal.SIGKILL)
  while end in ("taken", "hang") and not _there("taken") and not _there("go"):
    time.sleep(0.01)
  os.remove(alive)
  return end if isinstance(end, int) else 0


def main(what, *args):
  if what == "program":
    return program(args)
  # A Ctrl-C that comes while Python starts waits until it can end ssh's other side too, which would hold our output.
  signal.pthread_sigmask(signal.SIG_BLOCK, SIGINT)
  status, error = gcloud(args)
  if error:
    print(f"ERROR: (gcloud.compute.tpus.{'.'.join(args[2:4])}) {error}", file=sys.stderr)
  return status


if __name__ == "__main__":
  code = main(*sys.argv[1:])
  sys.stdout.flush()
  os._exit(code)  # Python's own tidying would take a tenth of a call
