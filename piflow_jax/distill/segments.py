"""Objectives made of segments: where a segment's first point comes from, data or the student's own last one.

Both take segment_fn(params, teacher_params, x_src, tau_src, segment, cond, keys, step) -> (loss, x_dst): the loss of one
segment, differentiable in params, and the detached point at its end; tau_src and segment [B] are raw times, keys [B].
"""

import functools

import jax
import jax.numpy as jnp

from piflow_jax import flow


def on_data(segment_fn, *, nfe, shift=1.0, final_scale=1.0):
  """Draw a time, noise the data to the source of the segment that it falls in (pi-Flow, arXiv 2510.14974, section 3.2).

  Args:
    segment_fn: see above.
    nfe, final_scale: how raw time splits into segments; see `flow.segment_source`.
    shift: of `flow.warp`.
  Returns:
    objective(params, teacher_params, batch, keys [B], step) -> (grads, metrics); batch is {x_0 [B, ...], cond}.
  """
  def loss_fn(params, teacher_params, batch, keys, step):
    x_0 = batch["x_0"]
    key_tau, key_noise, key_segment = jax.vmap(functools.partial(jax.random.split, num=3), out_axes=1)(keys)
    tau = flow.uniform_tau(draw_uniform(key_tau))
    tau_src, segment = flow.segment_source(tau, nfe=nfe, final_scale=final_scale)
    x_src = flow.noise_data(x_0, draw_noise(key_noise, x_0.shape), flow.warp(tau_src, shift))
    return segment_fn(params, teacher_params, x_src, tau_src, segment, batch["cond"], key_segment, step)[0]

  def objective(params, teacher_params, batch, keys, step):
    loss, grads = jax.value_and_grad(loss_fn)(params, teacher_params, batch, keys, step)
    return grads, {"loss": loss}

  return objective


def data_free(segment_fn, *, nfe, final_scale=1.0):
  """Walk all segments from noise, each from where the last one ended; no data is looked at (spec section 5).

  Every segment has a backward pass of its own, and nothing is differentiated from one into another. The loss is the mean
  of the segments' by their lengths.

  Args:
    segment_fn, nfe, final_scale: as in `on_data`.
  Returns:
    objective as of `on_data`; of the batch's x_0 only the shape matters.
  """
  times = flow.step_times(nfe=nfe, final_scale=final_scale)
  tau_src, lengths = jnp.array(times[:-1]), jnp.array([a - b for a, b in zip(times, times[1:])])

  def objective(params, teacher_params, batch, keys, step):
    key_noise, key_walk = jax.vmap(jax.random.split, out_axes=1)(keys)
    noise = draw_noise(key_noise, batch["x_0"].shape)

    def walk(carry, inputs):
      x, grads, loss = carry
      i, tau, length = inputs
      of_each = lambda value: jnp.full(len(keys), value)
      (segment_loss, x), segment_grads = jax.value_and_grad(segment_fn, has_aux=True)(
          params, teacher_params, x, of_each(tau), of_each(length), batch["cond"],
          jax.vmap(jax.random.fold_in, (0, None))(key_walk, i), step)
      grads = jax.tree.map(lambda total, g: total + (length * g).astype(total.dtype), grads, segment_grads)
      return (x, grads, loss + length * segment_loss), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    (_, grads, loss), _ = jax.lax.scan(
        walk, (noise, zeros, jnp.zeros(())), (jnp.arange(nfe), tau_src, lengths))
    return grads, {"loss": loss}

  return objective


def draw_noise(keys, shape):
  """Standard normal [B, ...], each sample from its own key [B]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)


def draw_uniform(keys, *shape):
  """Uniform [B, *shape], each sample from its own key [B]."""
  return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
