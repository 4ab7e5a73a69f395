"""Objectives made of segments, which begin at noised data or where the student ended the segment before.

Both take segment_fn(params, teacher_params, x_src, tau_src, segment, cond, keys, step) -> (loss, x_dst): the loss of
one segment, differentiable in params, and the detached point at its end; tau_src and segment [B] are raw times.
"""

import functools

import jax
import jax.numpy as jnp

from piflow_jax import flow


def on_data(segment_fn, clock):
  """Draw a raw time and noise the data to the source of the segment that it falls in (method.md, 2 and 6).

  Args:
    segment_fn: see above.
    clock: `flow.Clock`; its segments are the ones that are trained.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); batch is {"x_0": [B, ...], "cond":
    tree of [B, ...]}.
  """
  def loss_fn(params, teacher_params, batch, keys, step):
    x_0 = batch["x_0"]
    key_tau, key_noise, key_segment = split(keys, 3)
    tau = flow.uniform_tau(draw_uniform(key_tau))
    tau_src, segment = clock.segment_source(tau)
    x_src = flow.noise_data(x_0, draw_noise(key_noise, x_0.shape), clock.warp(tau_src))
    return segment_fn(params, teacher_params, x_src, tau_src, segment, batch["cond"], key_segment, step)[0]

  def objective(params, teacher_params, batch, keys, step):
    loss, grads = jax.value_and_grad(loss_fn)(params, teacher_params, batch, keys, step)
    return grads, {"loss": loss}

  return objective


def data_free(segment_fn, clock):
  """Walk all segments from noise, each from the point where the last one ended; no data are read (method.md, 6.4).

  Each segment has its own backward pass, so that no gradient crosses from one into another. The loss is the mean of the
  segments' losses, weighted by length.

  Args:
    segment_fn, clock: as in `on_data`.
  Returns:
    objective as of `on_data`, which reads only the shape of the batch's x_0.
  """
  times = clock.step_times()
  tau_src, lengths = jnp.array(times[:-1]), jnp.array([a - b for a, b in zip(times, times[1:])])

  def objective(params, teacher_params, batch, keys, step):
    key_noise, key_walk = split(keys, 2)
    noise = draw_noise(key_noise, batch["x_0"].shape)
    value_and_grad = jax.value_and_grad(segment_fn, has_aux=True)

    def walk(carry, inputs):
      x, grads, loss = carry
      i, tau, length = inputs
      taus, segments = jnp.full(len(keys), tau), jnp.full(len(keys), length)
      segment_keys = jax.vmap(jax.random.fold_in, (0, None))(key_walk, i)
      (segment_loss, x), segment_grads = value_and_grad(
          params, teacher_params, x, taus, segments, batch["cond"], segment_keys, step)
      grads = jax.tree.map(lambda total, g: total + (length * g).astype(total.dtype), grads, segment_grads)
      return (x, grads, loss + length * segment_loss), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (_, grads, loss), _ = jax.lax.scan(
        walk, (noise, zeros, jnp.zeros(())), (jnp.arange(clock.nfe), tau_src, lengths))
    return grads, {"loss": loss}

  return objective


def drop(cond, null, dropped):
  """The condition, null where a sample's is dropped: one network learns both passes of guidance (method.md, 10).

  Args:
    cond: tree of [B, ...].
    null: cond -> the null condition, a tree like it.
    dropped: [B] bool, or [layers, B]: one for each layer that is given a condition of its own; see `dit.DiT`.
  Returns:
    Tree of [B, ...], or [layers, B, ...].
  """
  def choose(nothing, mine):
    return jnp.where(dropped.reshape(dropped.shape + (1,) * (mine.ndim - 1)), nothing, mine)

  return jax.tree.map(choose, null(cond), cond)


def split(keys, num):
  """Each sample's key [B] split into `num`: [num, B] keys."""
  return jax.vmap(functools.partial(jax.random.split, num=num), out_axes=1)(keys)


def draw_noise(keys, shape):
  """Standard normal [B, ...], each sample from its own key [B]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def draw_uniform(keys, *shape):
  """Uniform [B, *shape], each sample from its own key [B]."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
