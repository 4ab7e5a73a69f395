"""One program at a time in a workdir: a lock that says who holds it and does not outlive its holder.

On a disk the kernel keeps it (flock) and frees it when the process ends, however it ends. Object stores, and disks
without flock, hold a small object that its holder renews; when that has not changed for a minute its holder is dead.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import socket
import threading
import time
import uuid

import jax
from orbax.checkpoint import multihost
import tensorstore

from piflow_jax import errors

_NAME = "lock"
_PATIENCE = 1.0  # seconds in which a process that was just killed may still be ending
_BEAT = 10.0  # seconds between renewals
_STALE = 60.0  # seconds without one after which a holder is dead
_ACCESS = {  # TensorStore's settings
    "gcs_request_retries": {"max_retries": 4, "initial_delay": "0.5s"},  # seven seconds in all
    "file_io_locking": {"mode": "lockfile"}}
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_MISSING_OR_OTHER = b""  # TensorStore's generation of a conditional write that was not made

_held = set()  # file descriptors
_meetings = itertools.count()


@contextlib.contextmanager
def hold(workdir):
  """Keep every other program out of a workdir during the block. Of several processes the first holds it for all.

  Args:
    workdir: local or gs://; made if it is not there.
  Raises:
    errors.UserError: another program is at work in it, or it cannot be written.
  """
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(_object(str(workdir), workdir) if "://" in str(workdir) else _file(workdir))
    if jax.process_count() > 1:
      # By JAX's coordinator, not by a collective: the first process may wait longer than a collective would.
      multihost.get_barrier_sync_fn()(key=f"workdir_lock_{next(_meetings)}", timeout_ms=round((_STALE + 300) * 1000))
    yield


def _in_use(workdir, holder):
  since = holder.get("since", "")
  if since.startswith(today := time.strftime("%Y-%m-%d ")):
    since = since.removeprefix(today)
  return errors.UserError(f"--workdir: {str(workdir)!r} is in use by process {holder.get('process', '?')} on "
                          f"{holder.get('host', '?')} since {since or '?'}; wait for it, or stop it")


def _cannot_write(workdir, error):
  return errors.UserError(f"--workdir: cannot write to {str(workdir)!r} ({errors.reason(error)}); choose a folder that "
                          "you may write")


def _me():
  return {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M"),
          "machine": _machine(), "started": _started(os.getpid()), "key": uuid.uuid4().hex}


def _holder(text):
  try:
    return dict(json.loads(text))
  except (ValueError, TypeError):
    return {}  # torn, or just being written


@contextlib.contextmanager
def _file(workdir):
  """The lock of a local folder."""
  path = pathlib.Path(os.path.abspath(workdir)) / _NAME
  made = not path.parent.exists()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = _flock(path, workdir)
  except OSError as e:
    if e.errno not in _NO_FLOCK:
      raise _cannot_write(workdir, e) from e
    opened = None
  if opened is None:
    with _object(path.parent.as_uri(), workdir):
      yield
    return
  try:
    yield
  finally:
    path.unlink(missing_ok=True)  # before the lock is free: whoever got it on this file looks whether it is still there
    _held.discard(opened)
    os.close(opened)
    if made:
      with contextlib.suppress(OSError):
        path.parent.rmdir()  # if nothing came into it


def _flock(path, workdir):
  """A locked file descriptor of path, which says who holds it. Raises OSError, errors.UserError."""
  end = time.monotonic() + _PATIENCE
  while True:
    opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
      fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
      if path.exists() and os.path.samestat(os.fstat(opened), os.stat(path)):
        os.ftruncate(opened, 0)
        os.write(opened, json.dumps(_me()).encode())
        _held.add(opened)
        return opened
    except BlockingIOError:
      if time.monotonic() > end:
        holder = _holder(os.pread(opened, 4096, 0))
        os.close(opened)
        raise _in_use(workdir, holder) from None
      time.sleep(0.05)
    except OSError:
      os.close(opened)
      raise
    os.close(opened)


def _forget():
  # A forked child, a loader's worker say, shares the lock: it would hold it on after its parent was killed.
  for opened in _held:
    os.close(opened)
  _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextlib.contextmanager
def _object(url, workdir):
  """The lock of a folder in an object store, or of another that TensorStore can write to."""
  try:
    store = tensorstore.KvStore.open(f"{url.rstrip('/')}/", context=tensorstore.Context(_ACCESS)).result()
    me = _me()
    generation = _take(store, me, workdir)
  except (OSError, ValueError, NotImplementedError) as e:  # TensorStore's
    raise _cannot_write(workdir, e) from e
  beating = _Beating(store, me, generation, workdir)
  beating.start()
  try:
    yield
  finally:
    beating.end()


def _take(store, me, workdir):
  """Write who holds it where nobody alive does; returns the generation written. Raises errors.UserError."""
  watched, since = None, None
  while True:
    found = store.read(_NAME).result()
    holder, generation = _holder(found.value), found.stamp.generation
    silent = watched is not None and time.monotonic() - since > _STALE
    if watched not in (None, generation) and found.state != "missing":
      raise _in_use(workdir, holder)  # it has been renewed, or another got it
    if found.state == "missing" or silent or _dead(holder):
      written = store.write(_NAME, json.dumps(me | {"beat": 0}).encode(), if_equal=generation).result().generation
      if written != _MISSING_OR_OTHER:
        return written
    elif watched is None:
      watched, since = generation, time.monotonic()
      print(f"{workdir}: process {holder.get('process', '?')} on {holder.get('host', '?')} held it last; going on if "
            f"it gives no sign of life for {_STALE:.0f} s", flush=True)
    time.sleep(min(1.0, _BEAT / 4))


class _Beating(threading.Thread):
  """Renews the object until the end."""

  def __init__(self, store, me, generation, workdir):
    super().__init__(name="workdir_lock", daemon=True)
    self._store, self._me, self._generation, self._workdir = store, me, generation, workdir
    self._ended = threading.Event()

  def run(self):
    for beat in itertools.count(1):
      if self._ended.wait(_BEAT):
        return
      try:
        self._write(json.dumps(self._me | {"beat": beat}).encode())
      except (OSError, ValueError):
        pass  # the store cannot be reached: saves will tell, if it stays so

  def end(self):
    self._ended.set()
    self.join()
    with contextlib.suppress(OSError, ValueError):
      self._store.write(_NAME, None, if_equal=self._generation).result()

  def _write(self, value):
    written = self._store.write(_NAME, value, if_equal=self._generation).result().generation
    if written == _MISSING_OR_OTHER:
      found = self._store.read(_NAME).result()
      holder = _holder(found.value)
      # A write whose answer was lost is repeated, and then finds its own.
      if found.state != "missing" and holder.get("key") != self._me["key"]:
        return errors.leave(
            2, f"--workdir: {str(self._workdir)!r} was taken over by process {holder.get('process', '?')} on "
            f"{holder.get('host', '?')}, because this one gave no sign of life for {_STALE:.0f} s")
      written = found.stamp.generation
    self._generation = written


def _machine():
  """What process ids count within: this boot of this machine, and the container. "" where Linux does not say."""
  try:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
  except OSError:
    return ""


def _started(process):
  """When a process began, in the kernel's ticks, which no later process of the same id shares; None: it has ended."""
  try:
    state, *fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])
  except (OSError, ValueError, IndexError):
    return None


def _dead(holder):
  """Whether a holder was on this machine and has ended. On another one: nobody knows."""
  here = bool(holder.get("machine")) and holder["machine"] == _machine()
  return here and holder.get("started") != _started(holder.get("process"))
