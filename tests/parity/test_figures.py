"""FID, Inception score, precision and recall of the same arrays: here, and by torch-fidelity."""

import numpy as np
import pytest
import torch

from piflow_jax.evaluation import inception_score
from piflow_jax.evaluation import manifold
from piflow_jax.evaluation import statistics
from tests.parity import inception_oracle


@pytest.mark.parametrize("n, m, width", [(400, 300, 24), (300, 500, 64)])
def test_frechet_distance(n, m, width):
  metric_fid = inception_oracle.imported("torch_fidelity.metric_fid")

  rng = np.random.default_rng(n)
  a = rng.standard_normal((n, width)) @ rng.standard_normal((width, width)) + 1
  b = rng.standard_normal((m, width)) @ rng.standard_normal((width, width))
  theirs = metric_fid.fid_statistics_to_metric(
      *(metric_fid.fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)), verbose=False)
  ours = statistics.frechet_distance(statistics.of(a), statistics.of(b))
  np.testing.assert_allclose(ours, theirs["frechet_inception_distance"], rtol=1e-9)  # both in float64


@pytest.mark.parametrize("splits, permuted", [(10, True), (1, False), (7, True)])
def test_inception_score(splits, permuted):
  metric_isc = inception_oracle.imported("torch_fidelity.metric_isc")

  logits = np.random.default_rng(0).standard_normal((203, 40)).astype(np.float32) * 3
  theirs = metric_isc.isc_features_to_metric(torch.from_numpy(logits), splits, permuted)
  mean, deviation = inception_score.inception_score(logits, splits=splits, permuted=permuted)
  np.testing.assert_allclose(mean, theirs["inception_score_mean"], rtol=1e-12)
  np.testing.assert_allclose(deviation, theirs["inception_score_std"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n, m, width", [(300, 200, 8), (150, 400, 32)])
def test_precision_and_recall(n, m, width):
  metric_prc = inception_oracle.imported("torch_fidelity.metric_prc")

  rng = np.random.default_rng(m)
  samples, real = (rng.standard_normal((k, width)).astype(np.float32) for k in (n, m))
  samples[:, 0] += 1
  theirs = metric_prc.prc_features_to_metric(
      torch.from_numpy(samples), torch.from_numpy(real), prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False,
      verbose=False)
  ours = manifold.precision_recall(real, samples, 3, rows=64)
  np.testing.assert_allclose(ours, (theirs["precision"], theirs["recall"]), rtol=1e-6)
  assert 0 < ours[0] < 1
