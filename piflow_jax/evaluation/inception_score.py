"""The Inception score of samples, as evaluators that are in use compute it."""

import numpy as np

_PERMUTATION = 2020  # torch-fidelity's seed


def inception_score(logits, *, block=None, splits=10, permuted=False):
  """exp(E KL(p(y|x) || p(y))) of samples (Salimans et al., arXiv 1606.03498, section 4): mean and deviation over parts.

  Args:
    logits: [n, classes], of Inception without the bias.
    block: samples a part, in their order, as ADM's evaluator has it (5000; a last part may be shorter).
    splits: where `block` is None: so many parts, as torch-fidelity and improved MeanFlow have it.
    permuted: whether the samples are shuffled first by NumPy's RandomState(2020), as these two do.
  Returns:
    (mean, standard deviation) over the parts.
  Raises:
    ValueError: fewer samples than parts, or values that are not finite.
  """
  logits = np.asarray(logits, np.float64)
  if logits.ndim != 2 or not np.isfinite(logits).all():
    raise ValueError(f"logits: must be [n, classes] and finite, got {logits.shape}")
  n = len(logits)
  edges = [*range(0, n, block), n] if block else [i * n // splits for i in range(splits + 1)]
  if n < max(len(edges) - 1, 1):
    raise ValueError(f"logits: {n} samples are too few for {splits} parts")
  if permuted:
    logits = logits[np.random.RandomState(_PERMUTATION).permutation(n)]
  logits = logits - logits.max(1, keepdims=True)
  log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
  scores = [_score(log_p[a:b]) for a, b in zip(edges[:-1], edges[1:])]
  return float(np.mean(scores)), float(np.std(scores))


def _score(log_p):
  p = np.exp(log_p)
  mean = p.mean(0)
  # A class that no sample can be, to rounding, adds nothing: p log p -> 0.
  log_mean = np.log(np.where(mean > 0, mean, 1))
  return np.exp(np.mean(np.sum(p * (log_p - log_mean), 1)))
