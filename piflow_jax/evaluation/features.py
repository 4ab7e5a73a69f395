"""Features for any data: a small classifier where there are labels to learn, else principal components."""

from piflow_jax import config as config_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import classifier
from piflow_jax.evaluation import pca


def auto_config(**fields):
  """evaluation.classifier.config() for data whose only condition is a label, else evaluation.pca.config()."""
  return config_lib.noun(auto, dict(
      records=4000,  # training records to learn from, at most
  ), fields)


def auto(data, *, records):
  """Features of `data`'s training records; see `auto_config`."""
  labelled = spec_lib.num_classes(data.spec) > 1
  chosen = classifier.config(records=records) if labelled else pca.config(records=records)
  return chosen.make(data, **config_lib.fields_of(chosen))
