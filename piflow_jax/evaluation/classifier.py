"""Features of labelled data of any shape: the last layer of a small convolutional classifier, trained here in seconds.

It tells samples of one data set apart by what tells its classes apart. Distances by it are comparable between models of
the same data and config, not between data sets, nor with FID.
"""

import functools

import flax.linen as nn
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import optax

from piflow_jax import config as config_lib
from piflow_jax.data import spec as spec_lib
from piflow_jax.evaluation import extract as extract_lib

_BLOCK = 256  # pictures at once through the trained network: one shape, compiled once


def config(**fields):
  """A small classifier of the training records; their labels must be all that conditions."""
  return config_lib.noun(make, dict(
      records=20_000,  # training records to learn from, at most
      size=32,  # pixels along a side, to which pictures are shrunk first
      width=16,  # channels of the first layer; features are four times as many
      steps=400,  # of Adam
      batch_size=128,  # records in a step
      learning_rate=2e-3,  # at the start, of a cosine
      noise=0.2,  # standard deviation of what is added in training: samples to be judged are a bit off, too
      seed=0,  # of weights, batches and noise
  ), fields)


class Network(nn.Module):
  """Three convolutions, each halving the sides, and a hidden layer; -> (logits [B, classes], features [B, D])."""

  classes: int
  width: int

  @nn.compact
  def __call__(self, x):
    init = nn.initializers.he_normal()
    for i in range(3):
      x = nn.relu(nn.Conv(self.width * 2**i, (3, 3), strides=2, kernel_init=init)(x))
    features = nn.relu(nn.Dense(4 * self.width, kernel_init=init)(x.reshape(len(x), -1)))
    return nn.Dense(self.classes)(features), features


def make(data, *, records, size, width, steps, batch_size, learning_rate, noise, seed):
  """Features of a classifier trained on `data`'s training records; see `config`."""
  counts = dict(records=records, size=size, width=width, steps=steps, batch_size=batch_size)
  for name, value in counts.items():
    config_lib.whole(name, value, most=2**20)
  config_lib.number("learning_rate", learning_rate, above=0)
  config_lib.number("noise", noise, least=0)
  config_lib.whole("seed", seed, least=0)
  classes = spec_lib.num_classes(data.spec)
  if not classes:
    raise ValueError("make: a classifier needs data whose only condition is a label; take evaluation.pca.config()")
  x_0, labels = extract_lib.first_records(data, records)
  pictures = extract_lib.shrunk(extract_lib.as_picture(np.asarray(x_0, np.float32)), size)
  scale = pictures.mean((0, 1, 2)), pictures.std((0, 1, 2)) + 1e-6
  network = Network(classes, width)
  params = train(network, _scaled(pictures, scale), labels, steps=steps, batch_size=batch_size,
                 learning_rate=learning_rate, noise=noise, seed=seed)
  if jax.process_count() > 1:  # one and the same on all, whatever their machines round
    params = multihost_utils.broadcast_one_to_all(params)
  run = functools.partial(_by_blocks, jax.jit(functools.partial(network.apply, {"params": params})), size, scale)

  def extract(x_0):
    return run(x_0)[1].astype(np.float64)

  def predict(x_0):
    return run(x_0)[0].argmax(1).astype(np.int32)

  return extract_lib.Features(extract, predict, f"a classifier of {classes} classes")


def train(network, pictures, labels, *, steps, batch_size, learning_rate, noise, seed):
  """Parameters after Adam's steps on batches of pictures [n, H, W, C], shifted a little and with noise added."""
  key = jax.random.key(seed)
  params = network.init(jax.random.fold_in(key, 0), pictures[:1])["params"]
  optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
  reach = [side // 8 for side in pictures.shape[1:3]]

  def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network.apply({"params": params}, x)[0], y).mean()

  @jax.jit
  def step(params, state, x, y, key):
    noise_key, *shift_keys = jax.random.split(key, 3)
    shifts = [jax.random.randint(k, (), -r, r + 1) for k, r in zip(shift_keys, reach)]
    x = jnp.roll(x, shifts, (1, 2)) + noise * jax.random.normal(noise_key, x.shape)
    updates, state = optimizer.update(jax.grad(loss)(params, x, y), state)
    return optax.apply_updates(params, updates), state

  state, draw = optimizer.init(params), np.random.default_rng(seed)
  for i in range(steps):
    rows = draw.integers(len(pictures), size=batch_size)
    params, state = step(params, state, pictures[rows], labels[rows], jax.random.fold_in(key, i + 1))
  return params


def _scaled(pictures, scale):
  mean, std = scale
  return (pictures - mean) / std


def _by_blocks(run, size, scale, x_0):
  """(logits, features) of x_0 by the trained network, a fixed number of rows at a time."""
  pictures = extract_lib.shrunk(extract_lib.as_picture(np.asarray(x_0, np.float32)), size)
  found = []
  for start in range(0, len(pictures), _BLOCK):
    block = _scaled(pictures[start:start + _BLOCK], scale)
    filled = np.resize(block, (_BLOCK, *block.shape[1:]))
    found.append([np.asarray(part)[:len(block)] for part in run(filled)])
  return [np.concatenate(parts) for parts in zip(*found)]
