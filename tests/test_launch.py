"""The launchers against stand-ins: a gcloud that records its calls, fails on command and runs what it is told to run on
workers, each with a home folder of its own; srun, scontrol and scancel likewise. Nothing leaves this machine."""

import ast
import os
import pathlib
import py_compile
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
TOOLS = "awk bash basename cat chmod cksum cut date dirname env flock git grep mkdir mktemp rm sed sleep sort tr uname"
PATIENCE = 300  # seconds until a test that hangs fails; nothing is measured by it

UV = """#!/usr/bin/env bash
echo "$*" >>"$CLOUD/uv"
if [[ $1 == venv ]]; then mkdir -p .venv/bin; cp "$CLOUD/program" .venv/bin/python; fi
if [[ $1 == pip && -e $CLOUD/broken ]]; then echo "no such package" >&2; exit 1; fi
"""

# The launcher gives `tail` a second to show the end of a log. This waits until tail has read it, at most a second.
SLEEP = f"""#!/usr/bin/env bash
size=$(stat -c %s "$HOME/piflow_run/log.$(<"$HOME/piflow_run/id")")
for ((i = 0; i < 20; i++)); do
  {shutil.which("sleep")} 0.05
  read -r tail _ <"/proc/$PPID/task/$PPID/children"
  read -r _ read_so_far <"/proc/$tail/fdinfo/3"  # pos: NUMBER
  if [[ $read_so_far == "$size" ]]; then exit; fi
done 2>/dev/null
"""


def _script(path, text):
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
  """A folder with a checkout of the launcher, its remote, and the stand-ins."""
  folder = tmp_path_factory.mktemp("launch") / "template"
  for name in ("checkout/launch", "bin", "alive", "path", "no_hooks"):
    (folder / name).mkdir(parents=True)
  shutil.copy(LAUNCH / "tpu_pod.sh", folder / "checkout" / "launch")
  (folder / "checkout" / "requirements.lock").write_text("")
  # Compiled once: compiling would be a third of a call.
  source = pathlib.Path(__file__).with_name("fake_gcloud.py")
  compiled = py_compile.compile(str(source), str(folder / "fake_gcloud.pyc"))
  for path, what in ((folder / "path" / "gcloud", "gcloud"), (folder / "program", "program")):
    _script(path, f'#!/bin/sh\nexec {sys.executable} -IS {compiled} {what} "$@"\n')
  _script(folder / "bin" / "uv", UV)
  _script(folder / "bin" / "hostname", '#!/bin/sh\necho "${HOME##*/}"\n')
  _script(folder / "bin" / "sleep", SLEEP)
  env = _environment(folder)
  subprocess.run(["git", "init", "-q", "--bare", folder / "remote.git"], check=True, env=env)
  for command in ("init -q -b main", "add .", "commit -q -m one", f"remote add origin {URL}", "push -q -u origin main"):
    subprocess.run(["git", *command.split()], cwd=folder / "checkout", env=env, check=True)
  return folder


def _environment(folder):
  settings = {f"url.{folder / 'remote.git'}.insteadOf": URL, "user.name": "a", "user.email": "a@b",
              "maintenance.auto": "false"}
  git = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_TEMPLATE_DIR": str(folder / "no_hooks"),
         "GIT_CONFIG_COUNT": str(len(settings))}
  for i, (key, value) in enumerate(settings.items()):
    git |= {f"GIT_CONFIG_KEY_{i}": key, f"GIT_CONFIG_VALUE_{i}": value}
  mine = {"PATH": f"{folder / 'path'}:{os.environ['PATH']}", "CLOUD": str(folder), "LAUNCH_POLL": "0"}
  return {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | git | mine


class Cloud:
  """A checkout with the launcher, its remote, and the stand-in for everything else."""

  def __init__(self, template, folder, **scenario):
    shutil.copytree(template, folder)
    self.folder = folder
    self.checkout = folder / "checkout"
    self.env = _environment(folder)
    self.started = []
    (folder / "ends").write_text(repr(scenario.pop("ends", [0])))
    state = dict(there=False, waiting=[], waits=[], fail={}, workers=2, slices=1, drops=0, deleted_by_another=False)
    (folder / "state").write_text(repr(state | scenario))

  def git(self, *args):
    done = subprocess.run(["git", *args], cwd=self.checkout, env=self.env, check=True, capture_output=True, text=True)
    return done.stdout.strip()

  def line(self, action, *options, name="pod", command=("python", "-m", "piflow_jax.main", "--workdir=gs://b/x")):
    place = [f"--name={name}", "--zone=us-east5-b", "--project=my-project", "--type=v6e-16"]
    options = [*place, "--runtime=v2-alpha-tpuv6e", *options]
    return [self.checkout / "launch" / "tpu_pod.sh", action, *options, *(["--", *command] if command else [])]

  def start(self, *args, **kwargs):
    self.started.append(subprocess.Popen(self.line(*args, **kwargs), env=self.env, text=True, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE, start_new_session=True))
    return self.started[-1]

  def call(self, *args, **kwargs):
    return _finish(self.start(*args, **kwargs))

  def calls(self, *verbs):
    calls = self._seen("calls")
    return [c for c in calls if not verbs or c[3] in verbs]

  def programs(self, worker=0):
    return self._seen(f"programs-{worker}")

  def _seen(self, name):
    path = self.folder / name
    return [ast.literal_eval(line) for line in path.read_text().splitlines()] if path.exists() else []

  def until(self, condition):
    """Waits until the launcher that was started last has come so far; it has to be running then."""
    end = time.monotonic() + PATIENCE
    while not condition():
      assert self.started[-1].poll() is None, self.started[-1].stderr.read()
      assert time.monotonic() < end
      time.sleep(0.02)

  def kill(self):
    for process in self.started:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    for pid in (self.folder / "alive").iterdir():
      try:
        os.kill(int(pid.name), signal.SIGKILL)
      except ProcessLookupError:
        pass


def _finish(process):
  """(status, output, errors) of a process that ends by itself."""
  try:
    out, err = process.communicate(timeout=PATIENCE)
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  return process.returncode, out, err


@pytest.fixture(scope="module")
def untouched(template, tmp_path_factory):
  """One for everything that is refused before any call."""
  yield (cloud := Cloud(template, tmp_path_factory.mktemp("launch") / "cloud"))
  assert not cloud.calls() and not list(cloud.folder.rglob("HERE"))


@pytest.fixture
def cloud(template, tmp_path):
  made = []

  def make(**scenario):
    made.append(Cloud(template, tmp_path / f"cloud{len(made)}", **scenario))
    return made[-1]

  yield make
  for each in made:
    each.kill()


@pytest.fixture
def interruptible():
  """A shell that starts the tests by `&` has SIGINT ignored, and what the tests start would inherit that."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def _one_line(err, *words):
  lines = [line for line in err.splitlines() if line.startswith("error:")]
  assert len(lines) == 1, err
  for word in words:
    assert word in lines[0], lines[0]


KINDS = [([], "queued-resources"), (["--slices=2"], "queued-resources"), (["--tpu-vm"], "tpu-vm")]


def _workers(options):
  return range(4 if "--slices=2" in options else 2)


@pytest.mark.parametrize("options, kind", KINDS)
def test_a_fresh_machine_is_made_awaited_and_runs_on_all_workers_and_then_is_taken(options, kind, cloud):
  c = cloud(waits=["CREATING", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING"])
  status, out, err = c.call("run", *options)
  assert status == 0, err
  (create,) = c.calls("create")
  assert create[2] == kind
  assert {"pod", "--accelerator-type=v6e-16", "--zone=us-east5-b", "--project=my-project"} <= set(create)
  assert not {"--spot", "--reserved"} & set(create)
  assert ("--runtime-version=v2-alpha-tpuv6e" in create) == (kind == "queued-resources")
  assert ("--node-id=pod" in create) == (not options)
  assert ("--node-count=2" in create and "--node-prefix=pod" in create) == (options == ["--slices=2"])
  assert ("--version=v2-alpha-tpuv6e" in create) == (kind == "tpu-vm")
  assert "WAITING_FOR_RESOURCES" in err and "PROVISIONING" in err and err.count("WAITING_FOR_RESOURCES") == 1
  commit = c.git("rev-parse", "HEAD")
  for worker in _workers(options):
    (program,) = c.programs(worker)
    assert program["args"] == ["-m", "piflow_jax.main", "--workdir=gs://b/x", "--distributed=auto"]
    assert program["commit"] == commit
    assert f"worker w-{worker}: 0" in err
  assert "hello from w-0" in out and out.count("hello from") == 1
  assert not c.calls("delete")
  assert "pip install -q --python .venv/bin/python -c requirements.lock -e .[tpu]" in (c.folder / "uv").read_text()

  seen = len(c.calls())
  assert c.call("run", *options)[0] == 0
  assert len(c.calls("create")) == 1 and not c.calls("delete")
  assert all(len(c.programs(worker)) == 2 for worker in _workers(options))
  assert {call[2] for call in c.calls()[seen:] if call[3] == "describe"} == {kind, "tpu-vm"}

  status, out, _ = c.call("logs", *options, command=None)
  assert status == 0 and out == "hello from w-0\n"


@pytest.mark.parametrize("options, kind", KINDS)
def test_preempted_in_mid_run_it_comes_back(options, kind, cloud):
  c = cloud(ends=["taken", 0])
  status, _, err = c.call("run", "--spot", *options)
  assert status == 0, err
  assert [call[3] for call in c.calls("create", "delete")] == ["create", "delete", "create"]
  first, second = c.calls("create")
  assert first == second and "--spot" in second and "--reserved" not in second
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
  c.until(lambda: sum(call[4] == "pod-1" and "piflow-worker" in call[-1] for call in c.calls()[seen:]) >= 3)
  (c.folder / "unreachable-pod-1").unlink()
  status, _, err = _finish(process)
  assert status == 0 and all(f"worker w-{worker}: 0" in err for worker in range(4)), err


def test_preempted_while_installing(cloud):
  c = cloud()
  once = '[[ -e $CLOUD/once ]] || { touch "$CLOUD/once" "$CLOUD/taken"; exit 1; }'
  _script(c.folder / "bin" / "uv", UV.replace("echo", f"{once}\necho", 1))
  status, _, err = c.call("run")
  assert status == 0, err
  assert [call[3] for call in c.calls("create", "delete")] == ["create", "delete", "create"]
  assert len(c.programs()) == 1
  assert "restart 1" in err and "restart 2" not in err


def test_what_saved_or_lost_its_machine_is_started_again_where_it_was(cloud):
  # JAX aborts (134) where it learns of a lost process by itself; a machine that rebooted has no status.
  c = cloud(ends=[[75, 134], ["lost", 0], [75, 0], 0])
  status, _, err = c.call("run")
  assert status == 0 and "worker w-0: lost" in err, err
  assert len(c.programs(0)) == len(c.programs(1)) == 4
  assert all(program == c.programs(0)[0] for program in c.programs(0) + c.programs(1))
  assert len(c.calls("create")) == 1 and not c.calls("delete")


def test_what_no_restart_mends_is_told(cloud):
  cases = [([2, 2], 2, "w-0"), ([127, 127], 127, "w-0"), ([3, 3], 3, "w-0"), ([75, 2], 2, "w-1"), ([3, 75], 3, "w-0"),
           ([0, 1], 1, "w-1"), ([137, 2], 2, "w-1")]
  c = cloud(ends=[ends for ends, _, _ in cases] + [0])
  for i, (ends, expected, culprit) in enumerate(cases):
    status, _, err = c.call("run")
    assert status == expected, ends
    _one_line(err, f"status {expected}", culprit, "piflow_run/log")
    assert len(c.programs()) == i + 1, ends
  assert not c.calls("delete")


def test_restarts_in_a_row_are_bounded(cloud):
  c = cloud(ends=[75], workers=1)
  status, _, err = c.call("run", "--max-restarts=2")
  assert status == 75 and len(c.programs()) == 3
  _one_line(err, "--max-restarts=2")
  c = cloud(ends=["taken"], workers=1)
  status, _, err = c.call("run", "--max-restarts=1")
  assert status == 75 and len(c.programs()) == 2 and len(c.calls("delete")) == 1


def test_progress_begins_the_count_anew(cloud):
  c = cloud(ends=[75, 75, 0], workers=1)
  c.env["LAUNCH_PROGRESS"] = "0"
  status, _, err = c.call("run", "--max-restarts=1")
  assert status == 0 and len(c.programs()) == 3, err


def test_gcloud_cannot_make_it(cloud):
  c = cloud(fail={"create": ["RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPerProject' has been exceeded."]})
  status, _, err = c.call("run")
  assert status == 1
  _one_line(err, "pod", "TPUV6EPerProject")
  assert not c.calls("ssh", "delete") and len(c.calls("create")) == 1


def test_gcloud_cannot_make_it_again_at_once(cloud):
  c = cloud(ends=["taken", 0], fail={"create": [None, "no more capacity in the zone"]}, workers=1)
  status, _, err = c.call("run", "--tpu-vm")
  assert status == 0, err
  assert len(c.calls("create")) == 3 and "no more capacity" in err


def test_gcloud_may_not_look(cloud):
  c = cloud(fail={"describe": ["PERMISSION_DENIED: no access to my-project"]})
  status, _, err = c.call("run")
  assert status == 1 and len(c.calls()) == 1
  _one_line(err, "PERMISSION_DENIED")


def test_gcloud_stumbles_in_mid_run(cloud):
  c = cloud(fail={"describe": [None, None, None, "try again", "try again"]}, drops=1, workers=1)
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
  process = c.start("run")
  c.until(lambda: sum("tail" in call[-1] for call in c.calls("ssh")) >= 3)
  (c.folder / "go").touch()
  status, out, err = _finish(process)
  assert status == 0 and "hello from w-0" in out, err
  assert len(c.programs()) == 1

  c = cloud(drops=1)  # and once more at the end of a run that is over by then
  status, out, _ = c.call("run")
  assert status == 0 and "hello from w-0" in out


def test_detach_attach_stop(cloud, interruptible):
  c = cloud(ends=["hang"])
  process = c.start("run")
  c.until(lambda: c.programs(0) and c.programs(1) and any("tail" in call[-1] for call in c.calls("ssh")))
  os.killpg(process.pid, signal.SIGINT)
  status, _, err = _finish(process)
  assert status == 130 and "attach" in err and "stop" in err and "down" in err
  assert len(list((c.folder / "alive").iterdir())) == 2 and not c.calls("delete")

  status, _, err = c.call("run", command=["python", "-m", "another"])
  assert status == 2
  _one_line(err, "another command")

  seen = len(c.calls())
  process = c.start("run")
  c.until(lambda: any("tail" in call[-1] for call in c.calls()[seen:]))
  assert c.call("stop")[0] == 0
  status, out, err = _finish(process)
  assert status == 75 and "attached" in err and "hello from w-0" in out
  _one_line(err, "stopped")
  assert len(c.programs(0)) == len(c.programs(1)) == 1, "neither attaching nor stopping starts anything"
  assert not any("uv" in call[-1] for call in c.calls()[seen:]), "nothing is installed under a program that runs"

  (c.folder / "go").touch()
  assert c.call("run")[0] == 0 and len(c.programs()) == 2


@pytest.mark.parametrize("options, kind", KINDS)
def test_down_deletes(options, kind, cloud):
  c = cloud(there=True)
  assert c.call("down", *options)[0] == 0
  (call,) = c.calls()
  assert call[2:5] == [kind, "delete", "pod"] and "--zone=us-east5-b" in call
  assert ("--force" in call) == (kind == "queued-resources")
  status, _, err = c.call("down", *options)
  assert status == 1
  _one_line(err, "NOT_FOUND")


def _few_tools(folder):
  folder.mkdir()
  for tool in TOOLS.split():
    (folder / tool).symlink_to(shutil.which(tool))
  return str(folder)


@pytest.mark.parametrize("options, kind", KINDS)
def test_dry_run_prints_the_very_commands_and_runs_none(options, kind, cloud, tmp_path):
  command = ["python", "-m", "piflow_jax.main", "--workdir=gs://b/x", "--config.shape=(8, 8, 1)"]
  c = cloud(workers=1)
  real_path = c.env["PATH"]
  c.env["PATH"] = _few_tools(tmp_path / "tools")  # not even a gcloud
  status, out, err = c.call("run", "--dry-run", "--reserved", *options, command=command)
  assert status == 0 and not c.calls(), err
  assert "delete" in err and "delete" not in out, "what it would delete is not among the lines to copy"
  assert c.call("run", *options)[0] == 2 and not c.calls()

  c.env["PATH"] = real_path
  assert c.call("run", "--reserved", *options, command=command)[0] == 0
  (create,) = c.calls("create")
  assert "--reserved" in create and "--spot" not in create
  dry = [_without_ids(shlex.split(line)[1:]) for line in out.splitlines()]
  real = [_without_ids(call) for call in c.calls()]
  if "--slices=2" in options:  # slices are reached side by side
    dry, real = sorted(dry), sorted(real)
  assert _once(dry) == _once(real)
  assert c.programs()[0]["args"][-2] == "--config.shape=(8, 8, 1)"


def _without_ids(words):
  return [re.sub(r"\b\d+\.\d+\.\d+\.1\b", "ID", word) for word in words]


def _once(calls):
  return [call for i, call in enumerate(calls) if call not in calls[:i]]


@pytest.mark.parametrize("action", ["down", "stop", "logs"])
def test_dry_run_of_the_rest(action, cloud):
  c = cloud(there=True)
  status, out, _ = c.call(action, "--dry-run")
  assert status == 0 and out.startswith("gcloud compute tpus ") and out.count("\n") == 1 and not c.calls()


BAD = ["a b", "a;b", "a;touch HERE", "a$b", "$(touch HERE)", "`touch HERE`", "a|b", "a&b", "a>HERE", "a\nb", "a'b",
       'a"b', "a\\b", "ä", "-a", "~a", "a*", "", "a\tb"]
BAD_WORDS = ["--workdir=gs://b/x;rm -rf ~", "a;b", "a$b", "$(touch HERE)", "`touch HERE`", "a&&b", "a|b", "a>HERE",
             "a<b", "a\nb", "a'b", 'a"b', "a\\b", "é", "*", "~", "{a,b}", "a!b", "a#b", "", "a\x01b",
             "--distributed=auto", "--workdir=runs/x", "--workdir"]


def _is_refused(called, name):
  status, out, err = called
  lines = err.splitlines()
  return status == 2 and not out and len(lines) == 1 and lines[0].startswith("error:") and name in lines[0]


def test_unsafe_values_are_refused_before_any_call(untouched):
  options = ["name", "zone", "project", "type", "runtime", "commit", "repository", "max-restarts", "slices"]
  accepted, tried = [], 0
  for option in options:
    for value in BAD:
      if (option, value) == ("repository", ""):
        continue  # means origin
      tried += 1
      if not _is_refused(untouched.call("run", f"--{option}={value}"), f"--{option}"):
        accepted.append((option, value))
  assert tried == 170 and not accepted, str(accepted)
  assert not untouched.calls()


def test_unsafe_words_are_refused_before_any_call(untouched):
  commands = [command for word in BAD_WORDS for command in (["python", word], [word])]
  accepted = [command for command in commands if not _is_refused(untouched.call("run", command=command), "COMMAND")]
  assert len(commands) == 48 and not accepted, str(accepted)
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
@pytest.mark.parametrize("script, usage", [
    ("tpu_pod.sh", "launch/tpu_pod.sh run --name=NAME"), ("slurm.sh", "sbatch --nodes=2"),
])
def test_they_tell_how_to_use_them(script, usage):
  none = subprocess.run([LAUNCH / script], capture_output=True, text=True)
  assert none.returncode == 2 and usage in none.stderr and not none.stdout
  asked = subprocess.run([LAUNCH / script, "--help"], capture_output=True, text=True)
  assert asked.returncode == 0 and asked.stdout == none.stderr and not asked.stderr
  assert not re.search("set -u|#|SBATCH", asked.stdout), "no more than the words at its head"


def test_help_may_stand_behind_an_action(untouched):
  status, out, err = untouched.call("run", "--help", command=None)
  assert status == 0 and "launch/tpu_pod.sh run --name=NAME" in out and not err
  assert not untouched.calls()


def test_only_what_is_committed_and_pushed_runs(cloud):
  c = cloud(workers=1)
  old = c.git("rev-parse", "HEAD")
  (c.checkout / "requirements.lock").write_text("changed")
  _one_line(c.call("run")[2], "--allow-dirty")
  assert _commit(c, "--allow-dirty") == old

  c.git("commit", "-q", "-a", "-m", "two")
  _one_line(c.call("run")[2], "git push")
  c.git("push", "-q")
  assert _commit(c) == _commit(c, "--commit=main") == c.git("rev-parse", "HEAD") != old
  assert not c.calls()
  assert c.call("run", f"--commit={old}")[0] == 0 and c.programs()[-1]["commit"] == old


def _commit(c, *options):
  """The commit that a run would have workers check out."""
  status, out, err = c.call("run", "--dry-run", *options)
  assert status == 0, err
  return re.search("git checkout -q -f --detach ([0-9a-f]{40}) ", out)[1]


def test_a_token_in_the_repository_is_not_shown(cloud):
  c = cloud()
  c.git("remote", "set-url", "origin", "https://user:tok3n@example.com/group/piflow.git")
  status, out, err = c.call("run")
  assert status == 2 and "tok3n" not in out + err
  _one_line(err, "--repository", "token")
  status, out, err = c.call("run", "--dry-run", f"--repository={URL}")
  assert status == 0 and f"git fetch -q {URL} " in out and "tok3n" not in out + err
  assert not c.calls()


def _slurm(tmp_path, srun, *command, **env):
  folder = tmp_path / "path"
  folder.mkdir()
  record = f'echo "$(basename "$0") $*" >>{tmp_path}/calls'
  _script(folder / "srun", f"#!/usr/bin/env bash\n{record}\n{srun}\n")
  _script(folder / "scontrol", f"#!/usr/bin/env bash\n{record}\n")
  # As SLURM's: to the steps, not to the script.
  _script(folder / "scancel", f'#!/usr/bin/env bash\n{record}\nkill -TERM "$(cat {tmp_path}/step)"\n')
  env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"} | env
  return subprocess.Popen([LAUNCH / "slurm.sh", *command], env=env, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, start_new_session=True)


def _calls(tmp_path):
  path = tmp_path / "calls"
  return path.read_text().splitlines() if path.exists() else []


COMMAND = ["python", "-m", "piflow_jax.main", "--config.shape=(8, 8)"]
SRUN = f"srun --kill-on-bad-exit=0 --wait=0 {' '.join(COMMAND)} --distributed=auto"


@pytest.mark.parametrize("status", [0, 2, 3, 75, 137])
def test_slurm_requeues_what_was_saved_or_killed(status, tmp_path):
  assert _finish(_slurm(tmp_path, f"exit {status}", *COMMAND))[0] == status
  assert _calls(tmp_path) == [SRUN] + (["scontrol requeue 17"] if status in (75, 137) else [])


def test_slurm_forwards_sigterm_and_waits_for_the_saving(tmp_path):
  step = tmp_path / "step"
  process = _slurm(tmp_path, f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 75' TERM\n"
                             f"echo $$ >{step}.new; mv {step}.new {step}\nwhile :; do sleep 0.02; done", *COMMAND)
  try:
    end = time.monotonic() + PATIENCE
    while not step.exists():
      assert process.poll() is None and time.monotonic() < end
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    status = _finish(process)[0]
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  assert status == 75 and (tmp_path / "saved").exists()
  assert _calls(tmp_path) == [SRUN, "scancel --signal=TERM 17", "scontrol requeue 17"]


def test_slurm_requeues_are_bounded(tmp_path):
  status, _, err = _finish(_slurm(tmp_path, "exit 75", *COMMAND, LAUNCH_REQUEUES="3", SLURM_RESTART_COUNT="3"))
  _one_line(err, "LAUNCH_REQUEUES")
  assert status == 75 and _calls(tmp_path) == [SRUN]


@pytest.mark.parametrize("env, words", [
    ({"SLURM_JOB_ID": ""}, ["SLURM_JOB_ID", "sbatch"]), ({"LAUNCH_REQUEUES": "a[$(x)]"}, ["LAUNCH_REQUEUES"]),
])
def test_slurm_names_what_is_wrong(env, words, tmp_path):
  status, _, err = _finish(_slurm(tmp_path, "exit 0", *COMMAND, **env))
  _one_line(err, *words)
  assert status == 2 and not _calls(tmp_path)


def test_sbatch_reads_the_options_of_slurm_sh():
  # It reads them up to the first command.
  head = (LAUNCH / "slurm.sh").read_text().split("\nset -")[0].splitlines()
  assert "#SBATCH --requeue" in head and "#SBATCH --signal=B:TERM@120" in head


def test_shellcheck_is_clean():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  shellcheck = shellcheck if shellcheck.exists() else shutil.which("shellcheck")
  assert shellcheck, "shellcheck comes with requirements.lock"
  done = subprocess.run([shellcheck, *sorted(LAUNCH.glob("*.sh"))], capture_output=True, text=True)
  assert done.returncode == 0 and not done.stdout, done.stdout
