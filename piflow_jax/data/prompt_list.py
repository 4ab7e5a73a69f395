"""Lists of prompts as people have them: text files, JSON lines, parquet, Hugging Face's datasets."""

import json
import pathlib
from typing import Any, NamedTuple

_LONGEST = 20_000  # letters of a prompt


class Prompt(NamedTuple):
  """One of a list."""

  text: str
  image: Any = None  # a file's path or bytes; None: there is none
  size: tuple | None = None  # (height, width) that the list says of it


def read(place, column="prompt"):
  """The Prompts that a file or a dataset lists, each once, in their order.

  Args:
    place: what --prompts of piflow_jax.data.prompts takes.
    column: of a .jsonl, .parquet or dataset.
  Raises:
    ValueError: "prompts: ...": it cannot be read, or a line is no prompt.
  """
  kind, _, rest = place.partition(":")
  path = pathlib.Path(place).expanduser()
  if kind == "datasets" and rest:
    rows = _of_datasets(rest)
  elif not path.is_file():
    raise ValueError(f"prompts: {place!r} is not there; give a .txt, .jsonl or .parquet file, or datasets:NAME:SPLIT")
  elif path.suffix == ".parquet":
    rows = _of_parquet(path)
  elif path.suffix in (".jsonl", ".txt"):
    rows = _of_lines(path)
  else:
    raise ValueError(f"prompts: {place!r} ends in none of .txt, .jsonl, .parquet")
  found = {}
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
      raise ValueError(f"prompts: {place}: row {number} has no text {column!r}: {str(row)[:80]}")
    if len(row[column]) > _LONGEST:
      raise ValueError(f"prompts: {place}: row {number} has {len(row[column])} letters; {_LONGEST} are the most")
    image = row.get("image")
    image = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    image = str(path.parent / image) if isinstance(image, str) else image
    sides = row.get("height"), row.get("width")
    size = sides if all(isinstance(n, int) and n > 0 for n in sides) else None
    found.setdefault((row[column], image), Prompt(row[column], image, size))
  if not found:
    raise ValueError(f"prompts: {place} lists none")
  return list(found.values())


def _of_lines(path):
  try:
    lines = path.read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise ValueError(f"prompts: {path} cannot be read as UTF-8 ({e})") from e
  if path.suffix == ".txt":
    return [{"prompt": line.strip()} for line in lines if line.strip()]
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      rows.append(json.loads(line))
    except (ValueError, RecursionError) as e:
      raise ValueError(f"prompts: {path}: line {number} is no JSON ({e})") from e
  return rows


def _of_parquet(path):
  try:
    from pyarrow import parquet
  except ImportError as e:
    raise ValueError("prompts: .parquet files need pyarrow: pip install -e '.[text]'") from e
  try:
    return parquet.read_table(path).to_pylist()
  except (OSError, ValueError) as e:
    raise ValueError(f"prompts: {path} cannot be read ({' '.join(str(e).split())[:200]})") from e


def _of_datasets(rest):
  name, _, split = rest.partition(":")
  try:
    import datasets
  except ImportError as e:
    raise ValueError("prompts: datasets:NAME needs Hugging Face's datasets: pip install datasets") from e
  return datasets.load_dataset(name, split=split or "train")
