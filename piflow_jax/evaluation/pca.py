"""Features of any data, labelled or not: the leading principal components of training records."""

import functools

import numpy as np

from piflow_jax import config as config_lib
from piflow_jax.evaluation import extract as extract_lib


def config(**fields):
  """Principal components of training records, pictures shrunk first."""
  return config_lib.noun(make, dict(
      components=64,  # at most; there are no more than records or values
      records=2048,  # training records to find them from
      size=16,  # pixels along a side, to which pictures are shrunk first
  ), fields)


def make(data, *, components, records, size):
  """Features of `data`'s training records; see `config`."""
  for name, value in dict(components=components, records=records, size=size).items():
    config_lib.whole(name, value, least=2 if name == "records" else 1)
  x_0, _ = extract_lib.first_records(data, records)
  if len(x_0) < 2:
    raise ValueError(f"records: {len(x_0)} in the training data, which have no spread; at least 2 are needed")
  mean, directions = fit(_rows(x_0, size), components)
  project = functools.partial(_project, mean=mean, directions=directions, size=size)
  return extract_lib.Features(project, None, f"{len(directions)} principal components")


def fit(rows, components):
  """(mean [D], directions [k, D], orthonormal, of the most variance first) of rows [n, D], k <= components."""
  mean = rows.mean(0)
  centred = rows - mean
  # The smaller of the two Gram matrices has all directions that the rows span.
  if len(rows) >= rows.shape[1]:
    values, vectors = np.linalg.eigh(centred.T @ centred)
    directions = vectors.T
  else:
    values, vectors = np.linalg.eigh(centred @ centred.T)
    directions = vectors.T @ centred
  kept = values > len(values) * np.finfo(np.float64).eps * max(values.max(), np.finfo(np.float64).tiny)
  directions = directions[kept][::-1][:components]
  if not len(directions):
    raise ValueError("records: the training data are all the same; they have no principal components")
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  # A direction's sign is free: the one whose largest entry is positive is the same on every machine.
  largest = np.abs(directions).argmax(1)
  return mean, directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]


def _rows(x_0, size):
  pictures = extract_lib.shrunk(extract_lib.as_picture(np.asarray(x_0, np.float64)), size)
  return pictures.reshape(len(pictures), -1)


def _project(x_0, *, mean, directions, size):
  return (_rows(x_0, size) - mean) @ directions.T
