"""The launchers against stand-ins: a gcloud that records its calls, fails on command and runs what it is told to run on
workers, each with a home folder of its own; srun, scontrol and scancel likewise. Nothing leaves this machine."""

import ast
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
URL = "https://example.com/group/piflow.git"
TOOLS = "awk bash basename cat chmod cksum cut date dirname env flock git grep mkdir mktemp rm sed sleep sort tr uname".split()

# No imports that take time, json among them: it starts hundreds of times. ssh runs in a session of its own: a Ctrl-C here
# is none there. One that comes too early waits until it can take ssh's other side along: that would hold our output open.
GCLOUD = f"""#!{sys.executable} -IS
import os, re, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
cloud = os.environ["CLOUD"]
args = sys.argv[1:]
quoted = ['"' + a.replace("\\\\", "\\\\\\\\").replace('"', '\\\\"') + '"' for a in args]
with open(cloud + "/calls", "a") as f:
  print("[" + ", ".join(quoted) + "]", file=f)
with open(cloud + "/state") as f:
  state = eval(f.read())
kind, verb = args[2], args[3]
taken = os.path.exists(cloud + "/taken")

def end(status, text=""):
  # Slices are reached side by side: nobody may read half a state.
  with open(f"{{cloud}}/state.{{os.getpid()}}", "w") as f:
    print(state, file=f)
  os.replace(f.name, cloud + "/state")
  if text:
    print(f"ERROR: (gcloud.compute.tpus.{{kind}}.{{verb}}) {{text}}", file=sys.stderr)
  sys.exit(status)

failure = (state["fail"].get(verb) or [None]).pop(0)
if failure:
  end(1, failure)
if verb == "create":
  count = [int(a.split("=")[1]) for a in args if a.startswith("--node-count=")] or [1]
  state["there"], state["waiting"], state["slices"] = True, list(state["waits"]), count[0]
  end(0)
nodes = ["pod"] if state["slices"] == 1 else [f"pod-{{i}}" for i in range(state["slices"])]
if not state["there"] or args[4] not in (nodes if kind == "tpu-vm" else ["pod"]):
  end(1, "NOT_FOUND: Resource was not found")
if verb == "delete":
  import fcntl, glob, shutil
  for lock in glob.glob(cloud + "/home/*/piflow_run/lock"):
    fcntl.flock(open(lock), fcntl.LOCK_EX)  # nothing runs on what is deleted
  shutil.rmtree(cloud + "/home", ignore_errors=True)
  if taken:
    os.remove(cloud + "/taken")
  state["there"] = False
  end(0)
if verb == "describe":
  if taken:
    if state["deleted_by_another"]:
      state["there"] = False
    print("SUSPENDED" if kind == "queued-resources" else "PREEMPTED")
  elif state["waiting"]:
    print(state["waiting"].pop(0))
  else:
    print("ACTIVE" if kind == "queued-resources" else "READY")
  end(0)
assert verb == "ssh"
options = dict(a[2:].split("=", 1) for a in args if a.startswith("--") and "=" in a)
if taken or os.path.exists(f"{{cloud}}/unreachable-{{args[4]}}"):
  end(1, "the TPU is in an unusable state")
if "tail" in options["command"] and state["drops"]:
  state["drops"] -= 1
  end(255, "connection closed")
status = 0
for worker in range(state["workers"]) if options["worker"] == "all" else [int(options["worker"])]:
  home = f"{{cloud}}/home/w-{{nodes.index(args[4]) * state['workers'] + worker}}"
  os.makedirs(home, exist_ok=True)
  env = os.environ | {{"HOME": home, "PATH": f"{{cloud}}/bin:" + os.environ["PATH"]}}
  os.chdir(home)
  child = os.posix_spawnp("bash", ["bash", "-c", options["command"]], env, setsid=True, setsigmask=[])
  try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or status
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
  except KeyboardInterrupt:
    os.killpg(child, signal.SIGKILL)
    sys.exit(130)
if os.path.exists(cloud + "/taken"):
  end(255, "connection closed")
end(status)
"""

# What stands for COMMAND's python: ends as the scenario says for this attempt and worker.
PROGRAM = f"""#!{sys.executable} -IS
import os, signal, sys, time
cloud, home = os.environ["CLOUD"], os.environ["HOME"]
signal.signal(signal.SIGTERM, lambda *_: end(75))
me = f"{{cloud}}/alive/{{os.getpid()}}"
open(me, "w").close()

def end(status):
  os.remove(me)
  os._exit(status)

worker = int(home[-1])
with open(".git/HEAD") as f:
  commit = f.read().strip()
with open(f"{{cloud}}/programs-{{worker}}", "a+") as f:
  print(dict(args=sys.argv[1:], commit=commit), file=f, flush=True)
  f.seek(0)
  attempt = len(f.readlines()) - 1
print("hello from", os.path.basename(home), flush=True)
with open(cloud + "/ends") as f:
  ends = eval(f.read())
mine = ends[min(attempt, len(ends) - 1)]
mine = mine[worker] if isinstance(mine, list) else mine
if mine == "taken" and worker == 0:
  while len(os.listdir(cloud + "/alive")) < 2:
    time.sleep(0.01)
  open(cloud + "/taken", "w").close()
if mine == "lost":
  os.kill(os.getppid(), signal.SIGKILL)
while mine in ("taken", "hang") and not os.path.exists(cloud + "/taken") and not os.path.exists(cloud + "/go"):
  time.sleep(0.01)
end(mine if isinstance(mine, int) else 0)
"""

UV = """#!/usr/bin/env bash
echo "$*" >>"$CLOUD/uv"
if [[ $1 == venv ]]; then mkdir -p .venv/bin; cp "$CLOUD/program" .venv/bin/python; fi
if [[ $1 == pip && -e $CLOUD/broken ]]; then echo "no such package" >&2; exit 1; fi
"""


def _script(path, text):
  path.write_text(text)
  path.chmod(0o755)


class Cloud:
  """A checkout with the launcher, its remote, and the stand-in for everything else."""

  def __init__(self, folder, **scenario):
    self.folder = folder
    self.checkout = folder / "checkout"
    (self.checkout / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "tpu_pod.sh", self.checkout / "launch")
    (self.checkout / "requirements.lock").write_text("")
    for name in ("bin", "alive", "path"):
      (folder / name).mkdir()
    _script(folder / "path" / "gcloud", GCLOUD)
    _script(folder / "program", PROGRAM)
    _script(folder / "bin" / "uv", UV)
    _script(folder / "bin" / "hostname", '#!/bin/sh\nbasename "$HOME"\n')
    _script(folder / "bin" / "sleep", f"#!/bin/sh\nexec {shutil.which('sleep')} 0.1\n")
    self.env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | {
        "PATH": f"{folder / 'path'}:{os.environ['PATH']}", "CLOUD": str(folder), "LAUNCH_POLL": "0",
        "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_COUNT": "3",
        "GIT_CONFIG_KEY_0": f"url.{folder / 'remote.git'}.insteadOf", "GIT_CONFIG_VALUE_0": URL,
        "GIT_CONFIG_KEY_1": "user.name", "GIT_CONFIG_VALUE_1": "a", "GIT_CONFIG_KEY_2": "user.email", "GIT_CONFIG_VALUE_2": "a@b",
    }
    subprocess.run(["git", "init", "-q", "--bare", folder / "remote.git"], check=True, env=self.env)
    for command in ("init -q -b main", "add .", "commit -q -m one", f"remote add origin {URL}", "push -q -u origin main"):
      self.git(*command.split())
    self.ends = scenario.pop("ends", [0])
    (folder / "ends").write_text(repr(self.ends))
    state = dict(there=False, waiting=[], waits=[], fail={}, workers=2, slices=1, drops=0, deleted_by_another=False)
    (folder / "state").write_text(repr(state | scenario))

  def git(self, *args):
    return subprocess.run(["git", *args], cwd=self.checkout, env=self.env, check=True, capture_output=True, text=True).stdout.strip()

  def line(self, action, *options, name="pod", command=("python", "-m", "piflow_jax.main", "--workdir=gs://b/x")):
    place = [f"--name={name}", "--zone=us-east5-b", "--project=my-project", "--type=v6e-16", "--runtime=v2-alpha-tpuv6e"]
    return [self.checkout / "launch" / "tpu_pod.sh", action, *place, *options, *(["--", *command] if command else [])]

  def start(self, *args, **kwargs):
    return subprocess.Popen(self.line(*args, **kwargs), env=self.env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            start_new_session=True)

  def call(self, *args, **kwargs):
    process = self.start(*args, **kwargs)
    try:
      out, err = process.communicate(timeout=60)
    finally:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err

  def calls(self, *verbs):
    path = self.folder / "calls"
    calls = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [c for c in calls if not verbs or c[3] in verbs]

  def programs(self, worker=0):
    path = self.folder / f"programs-{worker}"
    return [ast.literal_eval(line) for line in path.read_text().splitlines()] if path.exists() else []

  def until(self, condition):
    end = time.time() + 30
    while not condition():
      assert time.time() < end
      time.sleep(0.02)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
  """One for everything that is refused before any call."""
  yield (cloud := Cloud(tmp_path_factory.mktemp("launch") / "cloud"))
  assert not cloud.calls() and not list(cloud.folder.rglob("HERE"))


@pytest.fixture
def cloud(tmp_path):
  made = []

  def make(**scenario):
    made.append(Cloud(tmp_path / f"cloud{len(made)}", **scenario))
    return made[-1]

  yield make
  for each in made:
    for pid in (each.folder / "alive").iterdir():
      try:
        os.kill(int(pid.name), signal.SIGKILL)
      except ProcessLookupError:
        pass


def _one_line(err, *words):
  lines = [line for line in err.splitlines() if line.startswith("error:")]
  assert len(lines) == 1, err
  for word in words:
    assert word in lines[0], lines[0]


KINDS = [([], "queued-resources"), (["--slices=2"], "queued-resources"), (["--tpu-vm"], "tpu-vm")]


def _workers(options):
  return range(4 if "--slices=2" in options else 2)


@pytest.mark.parametrize("options, kind", KINDS)
def test_a_fresh_machine_is_made_awaited_and_runs_on_all_workers(options, kind, cloud):
  c = cloud(waits=["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING"])
  status, out, err = c.call("run", *options)
  assert status == 0, err
  (create,) = c.calls("create")
  assert create[2] == kind and {"pod", "--accelerator-type=v6e-16", "--zone=us-east5-b", "--project=my-project"} <= set(create)
  assert ("--runtime-version=v2-alpha-tpuv6e" in create) == (kind == "queued-resources")
  assert ("--node-id=pod" in create) == (not options)
  assert ("--node-count=2" in create and "--node-prefix=pod" in create) == (options == ["--slices=2"])
  assert ("--version=v2-alpha-tpuv6e" in create) == (kind == "tpu-vm")
  assert "WAITING_FOR_RESOURCES" in err and "PROVISIONING" in err and err.count("WAITING_FOR_RESOURCES") == 1
  for worker in _workers(options):
    (program,) = c.programs(worker)
    assert program == dict(args=["-m", "piflow_jax.main", "--workdir=gs://b/x", "--distributed=auto"], commit=c.git("rev-parse", "HEAD"))
    assert f"worker w-{worker}: 0" in err
  assert "hello from w-0" in out and out.count("hello from") == 1
  assert not c.calls("delete")
  assert "pip install -q --python .venv/bin/python -c requirements.lock -e .[tpu]" in (c.folder / "uv").read_text()


@pytest.mark.parametrize("options, kind", KINDS)
def test_what_is_ready_is_taken(options, kind, cloud):
  c = cloud(there=True, slices=len(_workers(options)) // 2)
  assert c.call("run", *options)[0] == 0
  assert not c.calls("create", "delete") and all(len(c.programs(worker)) == 1 for worker in _workers(options))
  assert {call[2] for call in c.calls("describe")} == {kind, "tpu-vm"}


@pytest.mark.parametrize("kind", [[], ["--tpu-vm"]])
@pytest.mark.parametrize("capacity", ["--spot", "--reserved"])
def test_capacity(capacity, kind, cloud):
  c = cloud()
  assert c.call("run", capacity, *kind)[0] == 0
  (create,) = c.calls("create")
  assert [a for a in create if a in ("--spot", "--reserved")] == [capacity]


@pytest.mark.parametrize("options, kind", KINDS)
def test_preempted_in_mid_run_it_comes_back(options, kind, cloud):
  c = cloud(ends=["taken", 0])
  status, _, err = c.call("run", "--spot", *options)
  assert status == 0, err
  assert [call[3] for call in c.calls("create", "delete")] == ["create", "delete", "create"]
  first, second = c.calls("create")
  assert first == second and "--spot" in second
  for worker in _workers(options):
    first, second = c.programs(worker)
    assert first == second and "--workdir=gs://b/x" in second["args"]
  # A machine made anew has nothing on it: the second program can only have run if it was installed there too.
  assert (c.folder / "uv").read_text().count("venv -q") == 2 * len(_workers(options))
  assert "restart 1 of at most 5" in err


def test_a_slice_that_cannot_be_asked_has_not_ended(cloud):
  c = cloud(ends=["hang"])
  process = c.start("run", "--slices=2")
  c.until(lambda: all(c.programs(worker) for worker in range(4)))
  (c.folder / "unreachable-pod-1").touch()
  (c.folder / "go").touch()
  seen = len(c.calls())
  c.until(lambda: sum(call[4] == "pod-1" and "piflow-worker" in call[-1] for call in c.calls("ssh")[seen:]) >= 3 or process.poll() is not None)
  assert process.poll() is None
  (c.folder / "unreachable-pod-1").unlink()
  _, err = process.communicate(timeout=30)
  assert process.returncode == 0 and all(f"worker w-{worker}: 0" in err for worker in range(4)), err


def test_preempted_while_installing(cloud):
  c = cloud()
  _script(c.folder / "bin" / "uv", UV.replace("echo", '[[ -e $CLOUD/once ]] || { touch "$CLOUD/once" "$CLOUD/taken"; exit 1; }\necho', 1))
  status, _, err = c.call("run")
  assert status == 0, err
  assert [call[3] for call in c.calls("create", "delete")] == ["create", "delete", "create"] and len(c.programs()) == 1
  assert "restart 1" in err and "restart 2" not in err


def test_status_75_is_started_again_where_it_was(cloud):
  c = cloud(ends=[[75, 134], [75, 0], 0])  # JAX aborts (134) where it learns of a lost process by itself
  status, _, err = c.call("run")
  assert status == 0, err
  assert len(c.programs(0)) == len(c.programs(1)) == 3
  assert c.programs(0)[0] == c.programs(0)[2]
  assert len(c.calls("create")) == 1 and not c.calls("delete")


def test_a_machine_that_rebooted_is_started_again(cloud):
  c = cloud(ends=["lost", 0])
  status, _, err = c.call("run")
  assert status == 0 and "worker w-0: lost" in err and len(c.programs()) == 2, err
  assert not c.calls("delete")


@pytest.mark.parametrize("ends, expected, culprit", [
    ([2, 2], 2, "w-0"), ([127, 127], 127, "w-0"), ([3, 3], 3, "w-0"), ([75, 2], 2, "w-1"), ([3, 75], 3, "w-0"), ([0, 1], 1, "w-1"), ([137, 2], 2, "w-1"),
])
def test_what_no_restart_mends_is_told(ends, expected, culprit, cloud):
  c = cloud(ends=[ends, 0])
  status, _, err = c.call("run")
  assert status == expected
  _one_line(err, f"status {expected}", culprit, "piflow_run/log")
  assert len(c.programs()) == 1 and not c.calls("delete")


def test_restarts_in_a_row_are_bounded(cloud):
  c = cloud(ends=[75])
  status, _, err = c.call("run", "--max-restarts=2")
  assert status == 75 and len(c.programs()) == 3
  _one_line(err, "--max-restarts=2")
  c = cloud(ends=["taken"])
  status, _, err = c.call("run", "--max-restarts=1")
  assert status == 75 and len(c.programs()) == 2 and len(c.calls("delete")) == 1


def test_progress_begins_the_count_anew(cloud):
  c = cloud(ends=[75, 75, 75, 0])
  c.env["LAUNCH_PROGRESS"] = "0"
  status, _, err = c.call("run", "--max-restarts=1")
  assert status == 0, err


def test_gcloud_cannot_make_it(cloud):
  c = cloud(fail={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' has been exceeded."]})
  status, _, err = c.call("run")
  assert status == 1
  _one_line(err, "pod", "TPUV6EPerProject")
  assert not c.calls("ssh", "delete") and len(c.calls("create")) == 1


def test_gcloud_cannot_make_it_again_at_once(cloud):
  c = cloud(ends=["taken", 0], fail={"create": [None, "no more capacity in the zone"]})
  status, _, err = c.call("run", "--tpu-vm")
  assert status == 0, err
  assert len(c.calls("create")) == 3 and "no more capacity" in err


def test_gcloud_may_not_look(cloud):
  c = cloud(fail={"describe": ["PERMISSION_DENIED: no access to my-project"]})
  status, _, err = c.call("run")
  assert status == 1 and len(c.calls()) == 1
  _one_line(err, "PERMISSION_DENIED")


def test_gcloud_stumbles_in_mid_run(cloud):
  c = cloud(fail={"describe": [None, None, None, "try again", "try again"]}, drops=1)
  status, _, err = c.call("run")
  assert status == 0, err
  assert len(c.programs()) == 1


def test_a_request_that_failed_is_told(cloud):
  c = cloud(waits=["FAILED"])
  status, _, err = c.call("run")
  assert status == 1 and not c.calls("delete")
  _one_line(err, "FAILED", "down")


def test_a_commit_that_does_not_install_is_told(cloud):
  c = cloud()
  (c.folder / "broken").touch()
  status, _, err = c.call("run")
  assert status == 1 and not c.programs() and not c.calls("delete")
  _one_line(err, "installation", "pod")
  assert "no such package" in err


def test_what_another_deleted_is_not_made_again(cloud):
  c = cloud(ends=["taken"], deleted_by_another=True)
  # Looked at once, it is SUSPENDED; looked at again, it is gone.
  status, _, err = c.call("run")
  assert status == 1 and len(c.calls("create")) == 1
  _one_line(err, "pod", "deleted")


def test_a_dropped_ssh_leaves_the_run_alone(cloud):
  c = cloud(drops=2, ends=["hang"])
  tails = lambda: sum("tail" in call[-1] for call in c.calls("ssh"))
  process = c.start("run")
  c.until(lambda: tails() >= 3)
  (c.folder / "go").touch()
  out, err = process.communicate(timeout=30)
  assert process.returncode == 0 and "hello from w-0" in out, err
  assert len(c.programs()) == 1

  c = cloud(drops=1)  # and once more at the end of a run that is over by then
  status, out, _ = c.call("run")
  assert status == 0 and "hello from w-0" in out


def test_detach_attach_stop(cloud):
  # A shell that starts the tests by `&` has it ignored, and what they start would inherit that.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  c = cloud(ends=["hang"])
  process = c.start("run")
  c.until(lambda: c.programs(0) and c.programs(1) and any("tail" in call[-1] for call in c.calls("ssh")))
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 130 and "attach" in err and "stop" in err and "down" in err
  assert len(list((c.folder / "alive").iterdir())) == 2 and not c.calls("delete")

  status, _, err = c.call("run", command=["python", "-m", "another"])
  assert status == 2
  _one_line(err, "another command")

  seen = len(c.calls())
  process = c.start("run")
  c.until(lambda: any("tail" in call[-1] for call in c.calls()[seen:]))
  assert c.call("stop")[0] == 0
  out, err = process.communicate(timeout=30)
  assert process.returncode == 75 and "attached" in err and "hello from w-0" in out
  _one_line(err, "stopped")
  assert len(c.programs(0)) == len(c.programs(1)) == 1, "neither attaching nor stopping starts anything"
  assert not any("uv" in call[-1] for call in c.calls()[seen:]), "nothing is installed under a program that runs"

  (c.folder / "go").touch()
  assert c.call("run")[0] == 0 and len(c.programs()) == 2


def test_logs(cloud):
  c = cloud(there=True)
  assert c.call("run")[0] == 0
  status, out, _ = c.call("logs", command=None)
  assert status == 0 and out == "hello from w-0\n"


@pytest.mark.parametrize("options, kind", KINDS)
def test_down_deletes(options, kind, cloud):
  c = cloud(there=True)
  assert c.call("down", *options)[0] == 0
  (call,) = c.calls()
  assert call[2:5] == [kind, "delete", "pod"] and "--zone=us-east5-b" in call and ("--force" in call) == (kind == "queued-resources")
  status, _, err = c.call("down", *options)
  assert status == 1
  _one_line(err, "NOT_FOUND")


def _few_tools(folder):
  folder.mkdir()
  for tool in TOOLS:
    (folder / tool).symlink_to(shutil.which(tool))
  return str(folder)


@pytest.mark.parametrize("options, kind", KINDS)
def test_dry_run_prints_the_very_commands_and_runs_none(options, kind, cloud, tmp_path):
  command = ["python", "-m", "piflow_jax.main", "--workdir=gs://b/x", "--config.shape=(8, 8, 1)"]
  c = cloud()
  real_path = c.env["PATH"]
  c.env["PATH"] = _few_tools(tmp_path / "tools")  # not even a gcloud
  status, out, err = c.call("run", "--dry-run", "--spot", *options, command=command)
  assert status == 0 and not c.calls(), err
  assert "delete" in err and "delete" not in out, "what it would delete is not among the lines to copy"
  assert c.call("run", *options)[0] == 2 and not c.calls()

  c.env["PATH"] = real_path
  assert c.call("run", "--spot", *options, command=command)[0] == 0
  plain = lambda words: [re.sub(r"\b\d+\.\d+\.\d+\.1\b", "ID", w) for w in words]
  dry = [plain(shlex.split(line)[1:]) for line in out.splitlines()]
  real = [plain(call) for call in c.calls()]
  once = lambda calls: [call for i, call in enumerate(calls) if call not in calls[:i]]
  if "--slices=2" in options:  # slices are reached side by side
    dry, real = sorted(dry), sorted(real)
  assert once(dry) == once(real)
  assert c.programs()[0]["args"][-2] == "--config.shape=(8, 8, 1)"


@pytest.mark.parametrize("action", ["down", "stop", "logs"])
def test_dry_run_of_the_rest(action, cloud):
  c = cloud(there=True)
  status, out, _ = c.call(action, "--dry-run")
  assert status == 0 and out.startswith("gcloud compute tpus ") and out.count("\n") == 1 and not c.calls()


BAD = ["a b", "a;b", "a;touch HERE", "a$b", "$(touch HERE)", "`touch HERE`", "a|b", "a&b", "a>HERE", "a\nb", "a'b", 'a"b', "a\\b", "ä", "-a",
       "~a", "a*", "", "a\tb"]


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("option", ["name", "zone", "project", "type", "runtime", "commit", "repository", "max-restarts", "slices"])
def test_unsafe_values_are_refused_before_any_call(option, value, untouched):
  if (option, value) == ("repository", ""):
    return  # means origin
  status, out, err = untouched.call("run", f"--{option}={value}")
  assert status == 2 and not out and len(err.splitlines()) == 1, err
  _one_line(err, f"--{option}")
  assert not untouched.calls()


@pytest.mark.parametrize("word", [
    "--workdir=gs://b/x;rm -rf ~", "a;b", "a$b", "$(touch HERE)", "`touch HERE`", "a&&b", "a|b", "a>HERE", "a<b", "a\nb", "a'b", 'a"b', "a\\b", "é",
    "*", "~", "{a,b}", "a!b", "a#b", "", "a\x01b",
    "--distributed=auto", "--workdir=runs/x", "--workdir",
])
def test_unsafe_words_are_refused_before_any_call(word, untouched):
  for command in (["python", word], [word]):
    status, out, err = untouched.call("run", command=command)
    assert status == 2 and not out and len(err.splitlines()) == 1, err
    _one_line(err, "COMMAND")
  assert not untouched.calls()


@pytest.mark.parametrize("options, words", [
    (["--spot", "--reserved"], ["--spot", "--reserved"]),
    (["--zonne=a"], ["--zonne=a"]),
    (["stray"], ["stray"]),
    (["--zone=mars"], ["--zone", "mars", "us-east5-b"]),
    (["--slices=2", "--tpu-vm"], ["--slices", "--tpu-vm"]),
    (["--slices=0"], ["--slices"]),
    (["--type=big"], ["--type", "v6e-256"]),
    (["--max-restarts=08"], ["--max-restarts"]),
    (["--commit=nowhere"], ["--commit", "nowhere"]),
])
def test_bad_options_are_named(options, words, untouched):
  status, _, err = untouched.call("run", *options)
  assert status == 2 and len(err.splitlines()) == 1
  _one_line(err, *words)
  assert not untouched.calls()


def test_what_is_missing_is_named(cloud):
  c = cloud()
  for option in ("name", "zone", "project", "type", "runtime"):
    line = [a for a in c.line("run") if not str(a).startswith(f"--{option}=")]
    done = subprocess.run(line, env=c.env, capture_output=True, text=True)
    assert done.returncode == 2
    _one_line(done.stderr, f"--{option}", "missing")
  _one_line(c.call("run", command=None)[2], "COMMAND", "missing")
  c.env["LAUNCH_POLL"] = "soon"
  _one_line(c.call("run")[2], "LAUNCH_POLL")
  assert not c.calls()
  done = subprocess.run([c.checkout / "launch" / "tpu_pod.sh"], capture_output=True, text=True)
  assert done.returncode == 2 and "launch/tpu_pod.sh run --name=NAME" in done.stderr and "set -u" not in done.stderr


def test_only_what_is_committed_and_pushed_runs(cloud):
  c = cloud()
  (c.checkout / "requirements.lock").write_text("changed")
  _one_line(c.call("run")[2], "--allow-dirty")
  assert not c.calls()
  assert c.call("run", "--allow-dirty")[0] == 0

  c.git("commit", "-q", "-a", "-m", "two")
  seen = len(c.calls())
  _one_line(c.call("run")[2], "git push")
  assert len(c.calls()) == seen
  c.git("push", "-q")
  assert c.call("run")[0] == 0 and c.programs()[-1]["commit"] == c.git("rev-parse", "HEAD")
  assert c.call("run", "--commit=main")[0] == 0
  old = c.git("rev-parse", "HEAD~1")
  assert c.call("run", f"--commit={old}")[0] == 0 and c.programs()[-1]["commit"] == old


def test_a_token_in_the_repository_is_not_shown(cloud):
  c = cloud()
  c.git("remote", "set-url", "origin", "https://user:tok3n@example.com/group/piflow.git")
  status, out, err = c.call("run")
  assert status == 2 and "tok3n" not in out + err and not c.calls()
  _one_line(err, "--repository", "token")
  assert c.call("run", f"--repository={URL}")[0] == 0


def _slurm(tmp_path, srun, *command, **env):
  folder = tmp_path / "path"
  folder.mkdir()
  record = f'echo "$(basename "$0") $*" >>{tmp_path}/calls'
  _script(folder / "srun", f"#!/usr/bin/env bash\n{record}\n{srun}\n")
  _script(folder / "scontrol", f"#!/usr/bin/env bash\n{record}\n")
  # As SLURM's: to the steps, not to the script.
  _script(folder / "scancel", f'#!/usr/bin/env bash\n{record}\nkill -TERM "$(cat {tmp_path}/step)"\n')
  env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"} | env
  return subprocess.Popen([LAUNCH / "slurm.sh", *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          start_new_session=True)


def _calls(tmp_path):
  path = tmp_path / "calls"
  return path.read_text().splitlines() if path.exists() else []


COMMAND = ["python", "-m", "piflow_jax.main", "--config.shape=(8, 8)"]
SRUN = f"srun --kill-on-bad-exit=0 --wait=0 {' '.join(COMMAND)} --distributed=auto"


@pytest.mark.parametrize("status", [0, 2, 3, 75, 137])
def test_slurm_requeues_what_was_saved_or_killed(status, tmp_path):
  process = _slurm(tmp_path, f"exit {status}", *COMMAND)
  process.communicate(timeout=30)
  assert process.returncode == status
  assert _calls(tmp_path) == [SRUN] + (["scontrol requeue 17"] if status in (75, 137) else [])


def test_slurm_forwards_sigterm_and_waits_for_the_saving(tmp_path):
  process = _slurm(tmp_path, f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 75' TERM\necho $$ >{tmp_path}/step\nwhile :; do sleep 0.02; done", *COMMAND)
  end = time.time() + 30
  while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text().strip():
    assert time.time() < end
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  try:
    process.communicate(timeout=30)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  assert process.returncode == 75 and (tmp_path / "saved").exists()
  assert _calls(tmp_path) == [SRUN, "scancel --signal=TERM 17", "scontrol requeue 17"]


def test_slurm_requeues_are_bounded(tmp_path):
  process = _slurm(tmp_path, "exit 75", *COMMAND, LAUNCH_REQUEUES="3", SLURM_RESTART_COUNT="3")
  _one_line(process.communicate(timeout=30)[1], "LAUNCH_REQUEUES")
  assert process.returncode == 75 and _calls(tmp_path) == [SRUN]


@pytest.mark.parametrize("env, words", [({"SLURM_JOB_ID": ""}, ["SLURM_JOB_ID", "sbatch"]), ({"LAUNCH_REQUEUES": "a[$(x)]"}, ["LAUNCH_REQUEUES"])])
def test_slurm_names_what_is_wrong(env, words, tmp_path):
  process = _slurm(tmp_path, "exit 0", *COMMAND, **env)
  _one_line(process.communicate(timeout=30)[1], *words)
  assert process.returncode == 2 and not _calls(tmp_path)


def test_slurm_tells_how_to_use_it(tmp_path):
  process = _slurm(tmp_path, "exit 0")
  assert "sbatch --nodes=2" in process.communicate(timeout=30)[1] and process.returncode == 2
  # sbatch reads these up to the first command.
  head = (LAUNCH / "slurm.sh").read_text().split("\nset -")[0].splitlines()
  assert "#SBATCH --requeue" in head and "#SBATCH --signal=B:TERM@120" in head


def test_shellcheck_is_clean():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  shellcheck = shellcheck if shellcheck.exists() else shutil.which("shellcheck")
  assert shellcheck, "shellcheck comes with requirements.lock"
  done = subprocess.run([shellcheck, *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stdout, done.stdout
