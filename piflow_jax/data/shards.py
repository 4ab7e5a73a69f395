"""Caches in ArrayRecord shards that several processes write side by side, and go on with after a kill.

Beside a shard that is whole lies NAME.json, what is known of it; settings.json says what the folder was begun for.
"""

import contextlib
import hashlib
import json
import tempfile
import uuid
import zlib

from array_record.python import array_record_module
from etils import epath

from piflow_jax import errors

_SETTINGS = "settings.json"
_OPTIONS = "group_size:1,uncompressed"  # records are read at random: one alone, as it is
_CHUNK = 1 << 24


def claim(folder, settings, names, flag="--out"):
  """Begin a cache in a folder, or go on with it.

  Args:
    folder: epath.Path.
    settings: what decides the bytes, a tree for JSON.
    names: of all items; their digest is among the settings.
    flag: that named the folder, for the message.
  Raises:
    errors.UserError: the folder holds a cache of something else.
  """
  folder.mkdir(parents=True, exist_ok=True)
  digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
  ours = json.loads(json.dumps(settings | {"items": len(names), "names": digest}))
  path = folder / _SETTINGS
  if not path.exists():
    write_json(path, ours)
    return
  try:
    theirs = json.loads(path.read_text())
  except ValueError as e:
    raise errors.UserError(f"{flag}: {path} cannot be read ({e}); choose another folder") from e
  if theirs != ours:
    differ = [k for k in ours if not isinstance(theirs, dict) or theirs.get(k) != ours[k]]
    raise errors.UserError(f"{flag}: {folder} was begun with another {', '.join(differ) or 'setting'}; choose another "
                           "folder, or say what was said then")


def sidecar(folder, name):
  """Where what is known of a shard lies."""
  return folder / f"{name}.json"


def write(folder, name, records, known):
  """Write a shard, then what is known of it.

  Args:
    folder: epath.Path, local or gs://.
    name: of the shard.
    records: iterable of bytes.
    known: () -> tree for JSON that lies beside {"shard": ...}, asked for once all records are written.
  """
  place, remote = folder / name, "://" in str(folder)
  with contextlib.ExitStack() as stack:
    local = epath.Path(stack.enter_context(tempfile.TemporaryDirectory())) if remote else folder
    for stale in local.glob(f".{name}.*.partial"):  # of a process that was killed
      stale.unlink(missing_ok=True)
    partial = local / f".{name}.{uuid.uuid4().hex}.partial"
    count = write_records(partial, records)
    found = {"name": name, "records": count, "bytes": partial.stat().length, "crc32": crc32(partial)}
    if remote:
      partial.copy(place, overwrite=True)
    else:
      partial.replace(place)
  write_json(sidecar(folder, name), {"shard": found} | known())


def write_records(path, records):
  """Write records, bytes, to a local file; returns how many."""
  writer, count = array_record_module.ArrayRecordWriter(str(path), _OPTIONS), 0
  try:
    for record in records:
      writer.write(record)
      count += 1
  finally:
    writer.close()
  return count


def crc32(path):
  """CRC-32 of a file's bytes."""
  found = 0
  with epath.Path(path).open("rb") as file:
    while part := file.read(_CHUNK):
      found = zlib.crc32(part, found)
  return found


def write_json(path, tree):
  """Write a tree as JSON, whole or not at all; several processes may write the same at once."""
  partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
  partial.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n")
  partial.replace(path)


def check_files(folder, shards):
  """Raises ValueError "path: ...": shards, as a manifest lists them, are missing or of another size."""
  for shard in shards:
    place = epath.Path(folder) / shard["name"]
    if not place.exists():
      raise ValueError(f"path: {folder} lacks the shard {shard['name']}; copy it again")
    if (there := place.stat().length) != (size := shard["bytes"]):
      raise ValueError(f"path: {place} has {there} bytes, its manifest says {size}: is it torn? Copy it again")


def check_sums(folder, shards):
  """Raises ValueError "path: ...": a shard is not what was written."""
  for shard in shards:
    place = epath.Path(folder) / shard["name"]
    if crc32(place) != shard["crc32"]:
      raise ValueError(f"path: {place} is not what was written: its CRC-32 differs. Copy it again")
