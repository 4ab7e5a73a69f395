"""A short list of prompts encoded before a run, in a process beside it, with which PyTorch and its memory are gone."""

import fcntl
import os
import pathlib
import subprocess
import sys

from etils import epath

from piflow_jax.data import prompt_list
from piflow_jax.data import shards

LONGEST = 10_000  # prompts: more are a work of hours, of which every host of a pod would do all


def encode(prompts, path, *, encoder, tokens):
  """Make the cache `path` of a list, unless it is there; what was begun is gone on with.

  Args:
    prompts: what --prompts of piflow_jax.data.prompts takes; "": nothing is made.
    path: folder of the cache.
    encoder: KIND:PLACE.
    tokens: longest text; 0: as long as that program takes.
  Raises:
    ValueError: "on_the_fly: ...": the list cannot be read or is too long, or the program failed; it says why itself.
  """
  if not prompts or (epath.Path(path) / shards.MANIFEST).exists():
    return
  pathlib.Path(path).mkdir(parents=True, exist_ok=True)
  with open(pathlib.Path(path) / ".on_the_fly", "w", encoding="utf-8") as alone:
    fcntl.flock(alone, fcntl.LOCK_EX)  # of several processes of a host one does the work, and the others wait for it
    if not (epath.Path(path) / shards.MANIFEST).exists():
      _encode(prompts, path, encoder, tokens)


def _encode(prompts, path, encoder, tokens):
  try:
    count = len(prompt_list.read(prompts))
  except ValueError as e:
    raise ValueError(f"on_the_fly: {str(e).partition(': ')[2]}") from e
  if count > LONGEST:
    raise ValueError(f"on_the_fly: {prompts} lists {count:,} prompts; of more than {LONGEST:,} make a cache first, by "
                     "python -m piflow_jax.data.prompts, and give it as data.path")
  if not encoder:
    raise ValueError("on_the_fly: data.encoder is empty; give KIND:PLACE of the encoder of these prompts")
  command = [sys.executable, "-m", "piflow_jax.data.prompts", f"--prompts={prompts}", f"--encoder={encoder}",
             f"--out={path}", "--shards=1", *([f"--tokens={tokens}"] if tokens else [])]
  # The accelerator is the run's own, and a second process could not have it.
  status = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False).returncode
  if status:
    raise ValueError(f"on_the_fly: {prompts} was not encoded (status {status}; the lines above say why); the same "
                     "command goes on from there")
