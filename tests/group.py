"""A run of several processes as launch/local.sh starts it: to start, to look into, to end."""

import os
import pathlib
import re
import signal
import subprocess

from tests import tiny


def start(workdir, processes, devices, *arguments, out=subprocess.PIPE, **env):
  """The launcher of a tiny teacher's run, leader of a process group of its own."""
  # On a busy machine one process may compile optimised code longer than Gloo waits, 30 s, for the other to come.
  env = tiny.environment(**env)
  command = tiny.command("teacher", workdir, *arguments)
  command = ["launch/local.sh", str(processes), str(devices), *command]
  return subprocess.Popen(command, cwd=tiny.ROOT, env=env, text=True, stdout=out, stderr=subprocess.STDOUT,
                          start_new_session=True)


def finish(process, timeout=600):
  """(status, output) of a group that ends by itself; what is left of it after the timeout is killed."""
  try:
    out = process.communicate(timeout=timeout)[0]
  finally:
    if process.poll() is None:
      os.killpg(process.pid, signal.SIGKILL)
  # Gloo prints greetings.
  return process.returncode, "\n".join(line for line in out.splitlines() if "[Gloo]" not in line)


def workers(process):
  """Process ids of the training programs, by number."""
  found = {}
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      words = path.read_bytes().decode().split("\0")
      which = [re.search(r"--distributed=.*,(\d+),\d+", word) for word in words]
      if any(which) and os.getpgid(int(path.parent.name)) == process.pid and "bash" not in words[0]:
        found[int(next(filter(None, which))[1])] = int(path.parent.name)
    except (OSError, UnicodeDecodeError):
      continue  # gone since
  return found
