"""Figures that are published of files that anybody can fetch: whoever measures them has the right evaluator."""

from typing import NamedTuple

import numpy as np

from piflow_jax.evaluation import fid
from piflow_jax.evaluation import protocol as protocol_lib
from piflow_jax.evaluation import references
from piflow_jax.evaluation import samples_file
from piflow_jax.evaluation import statistics

_REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
# (samples, {figure: (expected, tolerance)}) against _REFERENCE, from guided-diffusion's evaluations/README.md and its
# issue 142. Tolerances: what the best known port to PyTorch differs by (issue 159: FID 3.9433 for 3.9426, precision
# .8259 for .8265, recall .5282 for .5309), and half a unit of the Inception score, whose port is not published.
_PUBLISHED = (
    (_REFERENCE, {"inception_score": (338.01, 0.5)}),
    ("admnet_guided_upsampled_imagenet256.npz", {
        "fid": (3.9426, 0.005), "sfid": (6.1404, 0.01), "inception_score": (215.84, 0.5), "precision": (0.8265, 0.003),
        "recall": (0.5309, 0.005)}),
)


class Row(NamedTuple):
  """A figure of a gate."""

  gate: str
  figure: str
  expected: float
  tolerance: float
  found: float | None  # None: the files are not there

  @property
  def passed(self):
    """None where it was not measured."""
    return None if self.found is None else abs(self.found - self.expected) <= self.tolerance


def run(folder, extract, published=_PUBLISHED, reference_name=_REFERENCE, width=references.WIDTH):
  """A Row for each figure; those of files that are not in the folder are not measured.

  Args:
    folder: epath.Path.
    extract: of `inception_features.extractor`.
    published: (name of a file of samples, {figure: (expected, tolerance)}), ...
    reference_name: name of the reference's file.
    width: of its features.
  """
  rows, place = [_closed_form()], folder / reference_name
  reference = references.load(place, pool=width) if place.exists() else None
  protocol = protocol_lib.PROTOCOLS["adm"]
  real = None if reference is None else references.rows_of(reference, extract, protocol.neighbours)
  for name, expected in published:
    found = {}
    if reference is not None and (folder / name).exists():
      sums = fid.take(samples_file.batches(folder / name, 512), extract, rows=True)
      found = fid.figures(sums, reference, protocol, real).values
    rows += [Row(f"{name} against {reference_name}"[:56], figure, value, tolerance, found.get(figure))
             for figure, (value, tolerance) in expected.items()]
  return rows


def _closed_form():
  """Gaussians whose covariances commute: |mu|^2 + sum (sd_a - sd_b)^2."""
  a, b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 1.0, 0.5])
  found = statistics.frechet_distance(statistics.from_moments(np.array([1.0, -2.0, 0.0]), np.diag(a**2), 100),
                                      statistics.from_moments(np.zeros(3), np.diag(b**2), 100))
  return Row("two Gaussians in closed form", "fid", 5 + float(np.sum((a - b) ** 2)), 1e-9, found)
