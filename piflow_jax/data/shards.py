"""Caches in ArrayRecord shards that several processes write side by side, and go on with after a kill.

Beside a shard that is whole lies NAME.json, what is known of it; settings.json says what the folder was begun for.
"""

import contextlib
import hashlib
import json
import tempfile
import uuid
import zlib

from array_record.python import array_record_data_source
from array_record.python import array_record_module
from etils import epath
import numpy as np
import tqdm

from piflow_jax import errors

MANIFEST = "manifest.json"
_SETTINGS = "settings.json"
_EVERY = 500  # without a cache of their own, each 500th record is held out
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


def sidecars(folder, kind, count):
  """Where what is known of each of `count` shards lies."""
  return [_sidecar(folder, _name(kind, k, count)) for k in range(count)]


def known(folder, kind, count):
  """What is known of each of `count` shards, trees; None where some are not there yet."""
  paths = sidecars(folder, kind, count)
  return [json.loads(path.read_text()) for path in paths] if all(path.exists() for path in paths) else None


def fill(folder, kind, items, count, records, *, unit, process=0, processes=1, before=None):
  """Write those of a process's shards that are not there yet, showing how far it is.

  Args:
    folder: epath.Path, which is claimed.
    kind: what shards are called after.
    items: so many are shared out among `count` shards, in their order.
    count: of shards; the k-th is process k % processes's.
    records: (numbers of a shard's items, whether it is the last shard, bar to update) -> (iterable of bytes, known of
      `write`).
    unit: of an item, for people.
    process, processes: see above.
    before: called with the number of items that are left, if there are any, before the first of them.
  """
  edges = [k * items // count for k in range(count + 1)]
  mine = [k for k in range(count) if k % processes == process]
  left = [k for k in mine if not _sidecar(folder, _name(kind, k, count)).exists()]
  total, todo = (sum(edges[k + 1] - edges[k] for k in some) for some in (mine, left))
  if todo and before is not None:
    before(todo)
  with tqdm.tqdm(total=total, initial=total - todo, unit=unit, desc=str(folder)) as bar:
    for k in left:
      write(folder, _name(kind, k, count), *records(range(edges[k], edges[k + 1]), k == count - 1, bar))


def _name(kind, k, count):
  return f"{kind}s-{k:05}-of-{count:05}.array_record"


def _sidecar(folder, name):
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
  write_json(_sidecar(folder, name), {"shard": found} | known())


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


def write_manifest(folder, form, manifest):
  """Write a manifest, a NamedTuple with `shards`, whole or not at all; `form` is the number of its form."""
  write_json(epath.Path(folder) / MANIFEST, {"format": form} | manifest._asdict())


def read_manifest(folder, form, make, check, maker):
  """The manifest of a cache, made of its fields by `make` and looked at by `check`, which raises ValueError.

  Args:
    folder: of the cache.
    form: number of the form that it must have.
    make, check: see above.
    maker: module of the program that makes such caches, for messages.
  Raises:
    ValueError: "path: ...": there is none, it is another's, or shards are missing or of another size.
  """
  path = epath.Path(folder) / MANIFEST
  if not path.exists():
    raise ValueError(f"path: {str(folder)!r} holds no {MANIFEST}; give a folder that python -m {maker} made, to its "
                     "end")
  try:
    tree = json.loads(path.read_text())
    if tree.pop("format") != form:
      raise ValueError("another version's")
    found = make(**{k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()})
    check(found)
    sizes = {shard["name"]: shard["bytes"] for shard in found.shards}
  except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as e:
    raise ValueError(f"path: {path} is no manifest of this program ({type(e).__name__}: {e}); make the cache "
                     "again") from e
  _check_files(epath.Path(folder), sizes)
  return found


def open_records(folder, manifest):
  """Random access to the bytes of all records of a local cache."""
  return array_record_data_source.ArrayRecordDataSource(
      [str(epath.Path(folder) / shard["name"]) for shard in manifest.shards if shard["records"]])


def split_numbers(count, split):
  """Numbers of the records of "train" or of "held_out", where the cache of so many records has to serve both."""
  numbers = np.arange(count)
  out = numbers % _EVERY == min(_EVERY, count) - 1
  return numbers[out if split == "held_out" else ~out]


def check_local(**paths):
  """Raises ValueError: the value of a field is no local path."""
  for name, value in paths.items():
    if not isinstance(value, str) or "://" in value:
      raise ValueError(f"{name}: {value!r}; give a folder on a local disk: records are read at random, which a bucket "
                       "is too far away for. Copy it first")


def _check_files(folder, sizes):
  for name, size in sizes.items():
    place = folder / name
    if not place.exists():
      raise ValueError(f"path: {folder} lacks the shard {name}; copy it again")
    if (there := place.stat().length) != size:
      raise ValueError(f"path: {place} has {there} bytes, its manifest says {size}: is it torn? Copy it again")


def check_sums(folder, shards):
  """Raises ValueError "path: ...": a shard is not what was written."""
  for shard in shards:
    place = epath.Path(folder) / shard["name"]
    if crc32(place) != shard["crc32"]:
      raise ValueError(f"path: {place} is not what was written: its CRC-32 differs. Copy it again")
